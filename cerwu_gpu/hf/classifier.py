"""Image classifiers of transformers: modules with a configuration and an image processor."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from cerwu_gpu.errors import ModelError
from cerwu_gpu.hf.companions import (
    LICENCE_PATTERNS,
    copy_files,
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

    def __init__(self, module: PreTrainedModel, *args: Any, **options: Any) -> None:
        """Choose the weights; arguments are those of ModuleAdapter.

        Raises:
            ModelError: the model's layers were changed, so that its directory could not be loaded.
        """
        _check_unchanged(module)
        super().__init__(module, *args, **options)

    def write_files(self, folder: Path) -> None:
        write_config(self.module, folder)
        save_text_files(self.module, None, folder)
        if self.files is not None:
            copy_files(self.files, folder, COPIED_FILES)


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
