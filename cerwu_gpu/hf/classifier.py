"""Models of transformers that run whole, and image classifiers, which take batches of images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from cerwu_gpu.calibration.running import mapped, materialized
from cerwu_gpu.config import Batches, CompressionConfig
from cerwu_gpu.hf.companions import described, not_carried, write_companions
from cerwu_gpu.hf.models import LoadedModel
from cerwu_gpu.models.module import ModuleAdapter


class WholeModel(ModuleAdapter):
    """A model of transformers with batches of its inputs, and the files of its directory.

    Attributes:
        loaded: the model and its files.
    """

    module: PreTrainedModel
    takes_text = False

    def __init__(self, loaded: LoadedModel, config: CompressionConfig, **options: Any) -> None:
        """Take the arguments of ModuleAdapter; floating inputs are cast to the model's dtype."""
        module = loaded.model
        self.loaded = loaded
        self.carried = loaded.names.carried
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
        self.note(write_companions(self.loaded, folder))

    def select(self, config: CompressionConfig) -> None:
        super().select(config)
        left, events = not_carried(self.loaded, strict=config.strict)
        self.left = {**self.left, **left}
        self.events = (*self.loaded.events, *self.events, *events)


class ImageClassifier(WholeModel):
    """An image classifier with batches of images."""
