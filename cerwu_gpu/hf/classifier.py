"""Image classifiers of transformers: modules with a configuration and an image processor."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cerwu_gpu.calibration.running import mapped, materialized
from cerwu_gpu.config import Batches, CompressionConfig
from cerwu_gpu.errors import ModelError
from cerwu_gpu.hf.companions import (
    LICENCE_PATTERNS,
    copy_files,
    described,
    save_text_files,
    write_config,
)
from cerwu_gpu.models.module import ModuleAdapter

COPIED_FILES = ("preprocessor_config.json", "processor_config.json", *LICENCE_PATTERNS)
"""Files of an image classifier that are copied into the compressed directory."""


class ImageClassifier(ModuleAdapter):
    """An image classifier with batches of its inputs.

    Attributes:
        files: local directory of the source's own files; None for a model in memory.
    """

    module: PreTrainedModel
    files: Path | None = None

    def __init__(self, module: PreTrainedModel, config: CompressionConfig, **options: Any) -> None:
        """Take the arguments of ModuleAdapter; floating inputs are cast to the model's dtype.

        Raises:
            ModelError: the model's layers were changed, so that its directory could not be loaded.
        """
        _check_unchanged(module)
        calibration = config.calibration
        if isinstance(calibration, Batches):

            def cast(tensor: Tensor) -> Tensor:
                return tensor.to(module.dtype) if tensor.is_floating_point() else tensor

            inputs = [mapped(batch, cast) for batch in materialized(calibration.inputs)]
            config = replace(config, calibration=replace(calibration, inputs=inputs))
        super().__init__(module, config, **options)

    def _described(self) -> object:
        return described(self.module)

    def write_files(self, folder: Path) -> None:
        write_config(self.module, folder)
        save_text_files(self.module, None, folder)
        if self.files is not None:
            self.note(copy_files(self.files, folder, COPIED_FILES))


def _check_unchanged(model: PreTrainedModel) -> None:
    """Refuse a model that `load_compressed` could not build from its configuration.

    Raises:
        ModelError: the model's layers were changed.
    """
    with torch.device("meta"):
        fresh = type(model)(model.config).state_dict()
    state = model.state_dict()
    changed = {
        name for name in state.keys() & fresh.keys() if state[name].shape != fresh[name].shape
    }
    changed |= state.keys() ^ fresh.keys()
    if changed:
        raise ModelError(
            f"{min(changed)} of {type(model).__name__} is not as its configuration says (folded or "
            "changed layers): its directory could not be loaded."
        )
