"""A loader for vLLM that decodes compressed directories and leaves all others to vLLM."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from cerwu_gpu.checkpoint.names import carried_names, remember, source_of, under_source_names
from cerwu_gpu.container.reader import CompressedDirectory, open_directory
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.serving.description import check_described, described_model
from cerwu_gpu.serving.loading import Resident
from cerwu_gpu.serving.resident import owned
from cerwu_gpu.spec import QUANT_METHOD
from cerwu_gpu.vllm.method import CerwuConfig, StoredTensor


class CerwuLoader(DefaultModelLoader):
    """vLLM's own loader, but for directories whose quantization method is "cerwu".

    Their weights are decoded a few million at a time and go straight into vLLM's parameters, fused
    and sharded by vLLM's own rules: the dense model is in memory once, and it is an ordinary one.
    With {"resident": "compressed"} among vLLM's extra settings of the loader, linear layers keep
    theirs compressed and decode them in each forward pass.
    """

    enable_weights_track: bool | None

    def __init__(self, load_config: LoadConfig) -> None:
        extra: Any = load_config.model_loader_extra_config
        extra = dict(extra) if isinstance(extra, dict) else extra
        resident = extra.pop("resident", None) if isinstance(extra, dict) else None
        if resident not in (None, *get_args(Resident)):
            raise ConfigError(f"resident is {resident!r}: use dense or compressed.")
        super().__init__(replace(load_config, model_loader_extra_config=extra))
        self._resident: Resident | None = resident
        self._tracking = self.enable_weights_track
        self._device = torch.device("cpu")

    def load_model(
        self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = ""
    ) -> nn.Module:
        """Load a model, as vLLM's own loader does.

        Raises:
            FormatError, ModelError: as `load_compressed`, before the model is built.
            ConfigError: the model cannot be kept compressed as it was asked for.
        """
        self._device = torch.device(self.load_config.device or vllm_config.device_config.device)
        if model_config.quantization != QUANT_METHOD:
            if self._resident is not None:
                raise ConfigError(f"{model_config.model} is not compressed: drop resident.")
            model: nn.Module = super().load_model(vllm_config, model_config, prefix)
            return model
        compressed = self._resident == "compressed"
        if compressed and self._device.type != "cpu" and not model_config.enforce_eager:
            # Decoding checks its streams on the CPU, which a recorded graph cannot do.
            raise ConfigError("resident compressed runs no CUDA graphs: give --enforce-eager, too.")
        check_described(open_directory(self._folder(model_config)), model_config.trust_remote_code)
        if compressed and isinstance(vllm_config.additional_config, dict):
            # vLLM finds compiled models again by its settings, but for those of loaders.
            kept = {"cerwu_resident": self._resident}
            vllm_config.additional_config = vllm_config.additional_config | kept
        before = vllm_config.quant_config
        # Dense layers are those of a model without quantization.
        vllm_config.quant_config = CerwuConfig(compressed=True) if compressed else None
        try:
            model = super().load_model(vllm_config, model_config, prefix)
        finally:
            vllm_config.quant_config = before
        return model

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        if model_config.quantization == QUANT_METHOD and self._tracking is None:
            self.enable_weights_track = True  # nothing may stay at random
        super().load_weights(model, model_config)

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Iterator[tuple[str, Tensor]]:
        if model_config.quantization != QUANT_METHOD:
            yield from super().get_all_weights(model_config, model)
            return
        self.counter_before_loading_weights = perf_counter()
        folder, trusted = self._folder(model_config), model_config.trust_remote_code
        directory, carried = open_directory(folder), carried_names(folder)
        check_described(directory, trusted)
        config, kind = described_model(folder, trusted)
        with torch.device("meta"):
            described: Any = kind(config)
        remember(described, source_of(folder))
        plain = list(directory.plain())
        stored = ((name, tensor) for name, tensor in plain if name not in carried)
        yield from under_source_names(described, chain(stored, self._weights(directory)))
        yield from ((name, tensor) for name, tensor in plain if name in carried)

    def _weights(self, directory: CompressedDirectory) -> Iterator[tuple[str, Tensor]]:
        """Yield the compressed weights, decoded or to be decoded."""
        if self._resident != "compressed":
            yield from directory.weights(device=self._device)
            return
        for name in directory.compressed():
            yield name, StoredTensor(owned(directory.stored(name, device=self._device)))

    def _folder(self, model_config: ModelConfig) -> Path:
        """Return the local directory of a model, from the Hub where it is none."""
        folder = Path(model_config.model)
        if folder.is_dir():
            return folder
        return Path(
            snapshot_download(
                model_config.model,
                revision=model_config.revision,
                cache_dir=self.load_config.download_dir,
            )
        )
