"""The kinds of transformers models, one line each: how they are loaded and which adapter they have.

A new kind is an adapter, a line in KINDS, and tests.
"""

from dataclasses import dataclass
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from cerwu_gpu.errors import ModelError
from cerwu_gpu.hf.causal_lm import CausalLM
from cerwu_gpu.hf.classifier import ImageClassifier


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    Attributes:
        name: with its article.
        mapping: transformers' mapping from configurations to classes.
        auto: the Auto class that loads it.
        adapter: its adapter; one that takes text is a CausalLM.
    """

    name: str
    mapping: Any
    auto: Any
    adapter: type[CausalLM] | type[ImageClassifier]

    @property
    def takes_text(self) -> bool:
        """Whether it is calibrated by text, not by batches of inputs."""
        return issubclass(self.adapter, CausalLM)

    def class_of(self, config: PretrainedConfig) -> Any:
        """Return the class for a configuration; None where this kind has none."""
        classes = self.mapping.get(type(config), None)
        return classes[0] if isinstance(classes, tuple) else classes


KINDS = (
    Kind("a causal language model", MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, CausalLM),
    Kind(
        "an image classifier",
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        AutoModelForImageClassification,
        ImageClassifier,
    ),
)


def kind_of(model: PreTrainedModel) -> Kind | None:
    """Return the kind whose class the model has; None where it is of none."""
    return next((kind for kind in KINDS if type(model) is kind.class_of(model.config)), None)


def kind_of_config(config: PretrainedConfig, architectures: object) -> Kind | None:
    """Return the kind that a configuration stands for, by the named architectures where several
    kinds know it; None where none does, or they leave it open."""
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
    found: type[PreTrainedModel] = kind.class_of(config)
    return found
