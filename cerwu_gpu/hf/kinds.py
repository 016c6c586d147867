"""Kinds of transformers models: their Auto classes and adapters.

A new kind is an adapter, an entry in KINDS, and tests.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from cerwu_gpu.errors import ModelError
from cerwu_gpu.hf.card import Loader
from cerwu_gpu.hf.causal_lm import CausalLM
from cerwu_gpu.hf.classifier import ImageClassifier
from cerwu_gpu.hf.encoder import MaskedLM
from cerwu_gpu.hf.models import LoadedModel, is_gguf, load_model, local_directory


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    Attributes:
        name: with its article.
        mapping: transformers' mapping from configurations to classes.
        names: the same mapping by names, without importing the classes.
        auto: the Auto class that loads it.
        adapter: its adapter; one that takes text is a CausalLM.
        tag: the Hub's name of its task.
    """

    name: str
    mapping: Any
    names: Mapping[str, Any]
    auto: Any
    adapter: type[CausalLM] | type[ImageClassifier]
    tag: str

    @property
    def takes_text(self) -> bool:
        """Whether it is calibrated by text, not by batches of inputs."""
        return issubclass(self.adapter, CausalLM)

    @property
    def loader(self) -> Loader:
        """Instructions for its card."""
        processor = "AutoTokenizer" if self.takes_text else "AutoImageProcessor"
        title = self.name.partition(" ")[2]
        return Loader(title, self.tag, self.auto.__name__, processor, self.takes_text)

    def class_of(self, config: PretrainedConfig) -> Any:
        """Return the class for a configuration; None where this kind has none."""
        classes = self.mapping.get(type(config), None)
        return classes[0] if isinstance(classes, tuple) else classes


KINDS = (
    Kind(
        "a causal language model",
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        AutoModelForCausalLM,
        CausalLM,
        "text-generation",
    ),
    Kind(
        "a masked language model",
        MODEL_FOR_MASKED_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        AutoModelForMaskedLM,
        MaskedLM,
        "fill-mask",
    ),
    Kind(
        "an image classifier",
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        AutoModelForImageClassification,
        ImageClassifier,
        "image-classification",
    ),
)


def kind_of(model: PreTrainedModel) -> Kind | None:
    """Return the kind whose class the model has; None where it is of none."""
    return next((kind for kind in KINDS if type(model) is kind.class_of(model.config)), None)


def kind_of_config(config: PretrainedConfig, architectures: object) -> Kind | None:
    """Return the kind of a configuration, chosen by `architectures` where several kinds have its
    model type; None where none has, or `architectures` names none of them."""
    kinds = [kind for kind in KINDS if kind.class_of(config) is not None]
    named = architectures if isinstance(architectures, list) else []
    by_name = [kind for kind in kinds if kind.class_of(config).__name__ in named]
    if by_name:
        return by_name[0]
    return kinds[0] if len(kinds) == 1 else None


def model_class(config: PretrainedConfig, architectures: object) -> type[PreTrainedModel]:
    """Return the class that a compressed directory's configuration stands for.

    Raises:
        ModelError: it is of no kind, or of several.
    """
    kind = kind_of_config(config, architectures)
    if kind is None:
        kinds = " nor of ".join(kind.name for kind in KINDS)
        raise ModelError(f"{type(config).__name__} is neither of {kinds}.")
    model: type[PreTrainedModel] = kind.class_of(config)
    return model


def load_kind(source: str | Path, *, trust_remote_code: bool = False) -> tuple[Kind, LoadedModel]:
    """Load a model of the kind of the architecture in its config.json; by default a causal language
    model.

    Raises:
        ModelError: as `load_model`.
    """
    kind = KINDS[0]
    if not is_gguf(source):
        source = local_directory(source)
        kind = _named_kind(source) or kind
    loaded = load_model(source, trust_remote_code=trust_remote_code, auto=kind.auto, what=kind.name)
    return kind, loaded


def _named_kind(folder: Path) -> Kind | None:
    """Return the kind of the architecture in a directory's config.json, if it is known."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (architecture,) = content["architectures"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # load_model has the sentence for it
    for kind in KINDS:
        classes = [n for x in kind.names.values() for n in (x if isinstance(x, tuple) else (x,))]
        if architecture in classes:
            return kind
    return None
