"""Image classifiers of transformers, and plain modules: what calibrates them are batches of inputs.

The way is that of `cerwu_gpu.vision`; here are the model class, its files and its configuration.
"""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoModelForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.errors import ConfigError, ModelError
from cerwu_gpu.hf.attempt import LICENCE_PATTERNS, write_companions
from cerwu_gpu.hf.models import LoadedModel
from cerwu_gpu.hf.reason import reason
from cerwu_gpu.progress import Clock
from cerwu_gpu.report import Report
from cerwu_gpu.vision.compression import compress_module
from cerwu_gpu.vision.loading import in_own_shapes
from cerwu_gpu.vision.running import Batch
from cerwu_gpu.vision.sensitivity import Loss

COPIED_FILES = ("preprocessor_config.json", "processor_config.json", *LICENCE_PATTERNS)
"""Files of an image classifier that go into the compressed directory as they came."""


def compress_on_batches(
    model: str | Path | nn.Module,
    output: Path,
    batches: Iterable[Batch],
    config: CompressionConfig,
    *,
    loss: Loss | None,
    device: torch.device,
    overwrite: bool,
    verify: bool,
    progress: bool,
    trust_remote_code: bool,
) -> Report:
    """`compress` for a plain module, or for an image classifier (also by name or directory).

    Raises:
        ModelError: a model of another kind, or one that its configuration does not build.
        CerwuError: otherwise as `compress`.
    """
    clock = Clock()
    if isinstance(model, nn.Module):
        module, files = model, None
    else:
        with clock.stage("load"):
            module, files = _load(model, trust_remote_code)
    if isinstance(module, PreTrainedModel):
        _check_classifier(module)

    def companions(folder: Path) -> None:
        if isinstance(module, PreTrainedModel):
            write_companions(LoadedModel(module, None, None), folder)
        for file in sorted({f for p in COPIED_FILES for f in files.glob(p)} if files else ()):
            shutil.copyfile(file, folder / file.name)

    return compress_module(
        module,
        output,
        batches,
        config,
        loss=loss,
        device=device,
        overwrite=overwrite,
        verify=verify,
        progress=progress,
        companions=companions,
        clock=clock,
    )


def check_batches(
    model: object, batches: Iterable[Batch] | None, language: Mapping[str, object]
) -> None:
    """Refuse batches beside what only language models take, and modules without batches.

    Args:
        language: name -> value of such arguments.

    Raises:
        ConfigError: both are given.
        ModelError: a plain module or an image classifier comes without batches.
    """
    if batches is not None:
        for name, value in language.items():
            if value is not None:
                raise ConfigError(f"{name} is for language models: drop it, or drop batches.")
        return
    classifier = isinstance(model, PreTrainedModel) and is_classifier(model)
    if classifier or (isinstance(model, nn.Module) and not isinstance(model, PreTrainedModel)):
        raise ModelError(
            f"{type(model).__name__} is no language model: give batches of its inputs to calibrate."
        )


def is_classifier(model: PreTrainedModel) -> bool:
    """Whether transformers lists the model's class among its image classifiers."""
    return type(model) is _class_of(model.config, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING)


def model_class(config: PretrainedConfig, architectures: object) -> type[PreTrainedModel]:
    """The class that a compressed directory's configuration stands for.

    Raises:
        ModelError: it is neither a causal language model nor an image classifier.
    """
    kinds = [
        kind
        for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING)
        if (kind := _class_of(config, mapping)) is not None
    ]
    named = architectures if isinstance(architectures, list) else []
    for kind in kinds:
        if kind.__name__ in named or len(kinds) == 1:
            found: type[PreTrainedModel] = kind
            return found
    raise ModelError(
        f"{type(config).__name__} is neither of a causal language model nor of an image classifier."
    )


def in_shapes_of(
    kind: type[PreTrainedModel], config: PretrainedConfig, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """`state` with matrices in the shapes of the model's convolutions."""
    if kind is not _class_of(config, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING):
        return state
    with torch.device("meta"):
        return in_own_shapes(kind(config), state)


def _class_of(config: PretrainedConfig, mapping: Any) -> Any:
    """The class for this configuration, or None."""
    found = mapping.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found


def _load(source: str | Path, trust_remote_code: bool) -> tuple[PreTrainedModel, Path | None]:
    try:
        model = AutoModelForImageClassification.from_pretrained(
            source, dtype="auto", trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise ModelError(
            f"{source} cannot be loaded as an image classifier: {reason(error)}"
        ) from error
    folder = Path(source).expanduser()
    return model, folder if folder.is_dir() else None


def _check_classifier(model: PreTrainedModel) -> None:
    """Refuse what `load_compressed` could not build again.

    Raises:
        ModelError: the model is no image classifier, or its layers were changed.
    """
    kind = type(model).__name__
    if not is_classifier(model):
        raise ModelError(f"{kind} is no image classifier: batches are for those and plain modules.")
    with torch.device("meta"):
        fresh = type(model)(model.config).state_dict()
    own = model.state_dict()
    odd = own.keys() ^ fresh.keys() or {n for n in own if own[n].shape != fresh[n].shape}
    if odd:
        raise ModelError(
            f"{min(odd)} of {kind} is not as its configuration says (folded or changed layers): "
            "its directory could not be loaded."
        )
