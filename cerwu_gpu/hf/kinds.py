"""Kinds of transformers models: their Auto classes and adapters.

A new kind is an adapter, an entry in KINDS, and tests.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from cerwu_gpu.errors import ModelError
from cerwu_gpu.files import read_json
from cerwu_gpu.hf.card import Loader
from cerwu_gpu.hf.causal_lm import CausalLM
from cerwu_gpu.hf.classifier import ImageClassifier, WholeModel
from cerwu_gpu.hf.encoder import MaskedLM
from cerwu_gpu.hf.models import (
    ENCODER_DECODERS,
    MASKED,
    LoadedModel,
    is_gguf,
    load_model,
    local_directory,
    quantization_of,
)
from cerwu_gpu.hf.streaming import blocks_on_disk
from cerwu_gpu.hf.text_heads import Embedder, TextClassifier
from cerwu_gpu.hf.whole_text import SequenceToSequence


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    Attributes:
        name: with its article.
        mapping: transformers' mapping from configurations to classes.
        names: model type -> names of the classes in `mapping` that are of this kind.
        auto: the Auto class that loads it.
        adapter: its adapter; one that is calibrated block by block is a CausalLM.
        tag: the Hub's name of its task.
        processor: the Auto class of what makes its inputs.
        named: whether only an architecture that is named, not a model type, stands for it.
    """

    name: str
    mapping: Any
    names: Mapping[str, Any]
    auto: Any
    adapter: type[CausalLM] | type[WholeModel]
    tag: str
    processor: str = "AutoTokenizer"
    named: bool = False

    @property
    def takes_text(self) -> bool:
        """Whether it is calibrated by text, if not by batches of inputs."""
        return self.adapter.takes_text

    @property
    def in_blocks(self) -> bool:
        """Whether it is calibrated block by block."""
        return issubclass(self.adapter, CausalLM)

    @property
    def loader(self) -> Loader:
        """Instructions for its card."""
        title = self.name.partition(" ")[2]
        return Loader(title, self.tag, self.auto.__name__, self.processor, self.takes_text)

    def classes_of(self, config: PretrainedConfig) -> tuple[type[PreTrainedModel], ...]:
        """Return the classes for a configuration; none where this kind has none."""
        classes = self.mapping.get(type(config), None)
        if classes is None:
            return ()
        classes = classes if isinstance(classes, tuple) else (classes,)
        return tuple(one for one in classes if one.__name__ in self.all_names)

    @cached_property
    def all_names(self) -> frozenset[str]:
        """Names of its classes."""
        return frozenset(name for model_type in self.names for name in self.class_names(model_type))

    def class_names(self, model_type: str) -> tuple[str, ...]:
        """Return the names of the classes for a model type."""
        names = self.names.get(model_type, ())
        return names if isinstance(names, tuple) else (names,)


TEXT_MODELS = {
    *modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    *modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    *modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES,
}
"""Model types of text; AutoModel's mapping has those of images and sound as well."""


EMBEDDERS = {
    model_type: named
    for model_type, named in modeling_auto.MODEL_MAPPING_NAMES.items()
    if model_type in TEXT_MODELS
}
ENCODERS = {
    model_type: name
    for model_type, name in modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES.items()
    if name != EMBEDDERS.get(model_type)
}
"""Names of the classes of text models without a head: those that AutoModel loads, and encoders of
encoder-decoders, which it takes for the whole."""
IMAGES_AND_TEXT = {
    model_type: name
    for model_type, name in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items()
    if name not in ENCODER_DECODERS
}
"""Names of the classes of vision-language models; some encoder-decoders are among transformers'."""

KINDS = (
    Kind(
        "a causal language model",
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        AutoModelForCausalLM,
        CausalLM,
        "text-generation",
    ),
    Kind(
        "a masked language model",
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING,
        {k: x for k, x in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.items() if x in MASKED},
        AutoModelForMaskedLM,
        MaskedLM,
        "fill-mask",
    ),
    Kind(
        "a vision-language model",
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        IMAGES_AND_TEXT,
        AutoModelForImageTextToText,
        CausalLM,
        "image-text-to-text",
        "AutoProcessor",
        named=True,
    ),
    Kind(
        "an image classifier",
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        AutoModelForImageClassification,
        ImageClassifier,
        "image-classification",
        "AutoImageProcessor",
    ),
    Kind(
        "a text classifier",
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        AutoModelForSequenceClassification,
        TextClassifier,
        "text-classification",
        named=True,
    ),
    Kind(
        "a token classifier",
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        AutoModelForTokenClassification,
        TextClassifier,
        "token-classification",
        named=True,
    ),
    Kind(
        "an encoder-decoder",
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        AutoModelForSeq2SeqLM,
        SequenceToSequence,
        "text2text-generation",
        named=True,
    ),
    Kind(
        "a speech recognizer",
        modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
        modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        AutoModelForSpeechSeq2Seq,
        SequenceToSequence,
        "automatic-speech-recognition",
        "AutoProcessor",
        named=True,
    ),
    Kind(
        "an embedding model",
        modeling_auto.MODEL_MAPPING,
        EMBEDDERS,
        AutoModel,
        Embedder,
        "feature-extraction",
        named=True,
    ),
    Kind(
        "a text encoder",
        modeling_auto.MODEL_FOR_TEXT_ENCODING_MAPPING,
        ENCODERS,
        AutoModelForTextEncoding,
        Embedder,
        "feature-extraction",
        named=True,
    ),
)


def kind_of(model: PreTrainedModel) -> Kind | None:
    """Return the kind whose class the model has, or a subclass of it; None where it is of none."""
    for exact in (True, False):
        for kind in KINDS:
            classes = kind.classes_of(model.config)
            if type(model) in classes or (not exact and classes and isinstance(model, classes)):
                return kind
    return None


def model_class(config: PretrainedConfig, architectures: object) -> type[PreTrainedModel]:
    """Return the class that a compressed directory's configuration stands for, by the named
    architectures where there are several.

    Raises:
        ModelError: it is of no kind, or the architectures leave it open.
    """
    named = architectures if isinstance(architectures, list) else []
    for kind in KINDS:
        for one in kind.classes_of(config):
            if one.__name__ in named:
                return one
    classes = [(kind, one) for kind in KINDS if not kind.named for one in kind.classes_of(config)]
    if len({kind.name for kind, _ in classes}) != 1:
        kinds = " nor of ".join(kind.name for kind in KINDS)
        raise ModelError(f"{type(config).__name__} is neither of {kinds}.")
    return classes[0][1]


def remote_class(content: Mapping[str, Any]) -> str | None:
    """Return the reference to the code of a model that is no class of transformers ("module.Class"
    in `auto_map` of its config.json, `content`); None for a model of transformers."""
    code, architectures = content.get("auto_map"), content.get("architectures")
    if not isinstance(code, dict) or not isinstance(architectures, list):
        return None
    for kind in KINDS:
        reference = code.get(kind.auto.__name__)
        name = reference.rpartition(".")[2] if isinstance(reference, str) else ""
        if name in architectures and not hasattr(transformers, name):
            return str(reference)
    return None


def load_kind(
    source: str | Path, *, trust_remote_code: bool = False, stream: bool = False
) -> tuple[Kind, LoadedModel]:
    """Load a model of the kind of the architecture in its config.json, or else of its model type;
    by default a causal language model.

    Args:
        stream: leave the blocks of a language model on disk (hf/streaming.py), unless its weights
            are quantized.

    Raises:
        ModelError: as `load_model`.
    """
    kind = KINDS[0]
    if not is_gguf(source):
        source = local_directory(source)
        kind = _kind_of_directory(source) or kind
    options: dict[str, Any] = {"auto": kind.auto, "what": kind.name}
    streaming: AbstractContextManager[list[str]] = nullcontext([])
    method = None if is_gguf(source) else quantization_of(Path(source))
    if stream and kind.in_blocks and method is None:
        streaming = blocks_on_disk()
    with streaming as reasons:
        loaded = load_model(source, trust_remote_code=trust_remote_code, **options)
    whole = tuple(f"the model is whole in memory, because {reason}" for reason in reasons)
    return kind, replace(loaded, events=(*loaded.events, *whole))


def _kind_of_directory(folder: Path) -> Kind | None:
    """Return the kind that a directory's config.json stands for, if it is known."""
    try:
        content = read_json(folder / "config.json")
        model_type, architectures = content["model_type"], content.get("architectures") or []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # load_model has the sentence for it
    _check_architectures(folder, architectures)
    kinds = [kind for kind in KINDS if kind.class_names(model_type)]
    for kind in kinds:
        if set(kind.class_names(model_type)) & set(architectures):
            return kind
    kinds = [kind for kind in kinds if not kind.named]
    if len(kinds) > 1 and not content.get("is_decoder", False):
        kinds = kinds[1:]  # an encoder, which can be a decoder as well
    return kinds[0] if kinds else None


def _check_architectures(folder: Path, architectures: object) -> None:
    """Refuse a directory whose config.json names a class of transformers for another task: loaded
    as a model of one of our kinds, it would lose its head or more.

    Raises:
        ModelError: it does.
    """
    known = frozenset[str]().union(*(kind.all_names for kind in KINDS))
    named = (
        [x for x in architectures if isinstance(x, str)] if isinstance(architectures, list) else []
    )
    if named and not known.intersection(named):
        other = next((name for name in named if hasattr(transformers, name)), None)
        if other is not None:
            kinds = ", nor of ".join(kind.name.partition(" ")[2] for kind in KINDS)
            raise ModelError(
                f"{folder}: its config.json names {other}, which is no class of {kinds}: it is not "
                "supported."
            )
