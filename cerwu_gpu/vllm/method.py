"""The quantization method "cerwu" of vLLM, and linear layers whose weights stay compressed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.utils import set_weight_attrs
from vllm.utils.torch_utils import direct_register_custom_op

from cerwu_gpu.container.reader import StoredWeight
from cerwu_gpu.errors import ConfigError, FormatError
from cerwu_gpu.spec import QUANT_METHOD

LOAD_FORMATS = ("auto", "hf", "safetensors")
"""Load formats of vLLM under which compressed directories are read."""


class CerwuConfig(QuantizationConfig):
    """The `quantization_config` of a compressed directory's config.json.

    Attributes:
        compressed: keep the weights of linear layers compressed in memory; the loader asks for it.
    """

    def __init__(self, *, compressed: bool = False) -> None:
        super().__init__()
        self.compressed = compressed

    def get_name(self) -> Any:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CerwuConfig":
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method of a linear layer; embeddings, heads and experts are always dense.

        Raises:
            ConfigError: another loader of vLLM is building the model.
        """
        load_format = get_current_vllm_config().load_config.load_format
        if load_format not in (*LOAD_FORMATS, "dummy"):
            known = ", ".join(LOAD_FORMATS)
            raise ConfigError(f"load format {load_format} reads no compressed model: use {known}.")
        if not isinstance(layer, LinearBase):
            return None
        return CompressedLinearMethod(prefix) if self.compressed else UnquantizedLinearMethod()


class StoredTensor(Tensor):
    """A compressed weight in the place of its tensor: it is decoded by the first operation on it.

    Attributes:
        stored: the compressed weight.
        shard_id: part of a fused layer that vLLM wants it for.
    """

    stored: StoredWeight
    shard_id: Any

    @staticmethod
    def __new__(cls, stored: StoredWeight) -> "StoredTensor":
        entry = stored.entry
        dtype = getattr(torch, entry.dtype)
        return Tensor._make_wrapper_subclass(cls, entry.shape, dtype=dtype)

    def __init__(self, stored: StoredWeight) -> None:
        self.stored = stored
        self.shard_id = None

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        dense = partial(tree_map_only, cls, lambda weight: weight.stored.decode())
        return func(*dense(args), **dense(kwargs or {}))


class CompressedLinearMethod(LinearMethodBase):
    """Linear layer that decodes its weight for each forward pass.

    vLLM's own rules place the decoded weights in the layer's part of a fused or sharded weight.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._sources: list[tuple[Tensor, Any]] = []
        self._place: Callable[..., None]
        self._shape: tuple[int, int]
        self._dtype: torch.dtype
        self._parts: int

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        self._place = extra_weight_attrs["weight_loader"]
        self._shape = sum(output_partition_sizes), input_size_per_partition
        self._dtype = params_dtype
        weight = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
        set_weight_attrs(weight, {"weight_loader": self._keep})
        layer.register_parameter("weight", weight)
        # The operator below finds the layer by its name.
        layers = get_current_vllm_config().compilation_config.static_forward_context
        if self._prefix in layers:
            raise ConfigError(f"two layers have the name {self._prefix!r}: drop resident.")
        layers[self._prefix] = layer
        self._parts = len(output_partition_sizes)

    def _keep(self, weight: nn.Parameter, loaded: Tensor, shard_id: Any = None) -> None:
        """Take what vLLM loads into the weight, or a part of it."""
        part = getattr(loaded, "shard_id", None) if shard_id is None else shard_id
        if not isinstance(loaded, StoredTensor):  # a view of the file
            loaded = loaded.to(weight.device, self._dtype, copy=True)
        self._sources.append((loaded, part))

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check that the weight is there, in all of its parts.

        Raises:
            FormatError: it is not.
        """
        parts: set[Any] = set()
        for _, part in self._sources:
            parts.update(part if isinstance(part, tuple) else (part,))
        if None not in parts and len(parts) < self._parts:
            raise FormatError(f"{self._prefix}: its weight is not in the directory; get it again.")

    def decode(self, device: torch.device) -> Tensor:
        """Return the layer's weight [rows, columns] as this process has it."""
        weight = nn.Parameter(
            torch.empty(self._shape, dtype=self._dtype, device=device), requires_grad=False
        )
        set_weight_attrs(weight, {"output_dim": 0, "input_dim": 1})
        for source, part in self._sources:
            dense = source.stored.decode() if isinstance(source, StoredTensor) else source
            self._place(weight, dense, *(() if part is None else (part,)))
        return weight.data

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        product: Tensor = torch.ops.vllm.cerwu_linear(x, bias, self._shape[0], self._prefix)
        return product


def _linear(x: Tensor, bias: Tensor | None, rows: int, name: str) -> Tensor:
    """Multiply by the weight of the layer of this name, decoded for the occasion."""
    layer = get_forward_context().no_compile_layers[name]
    return nn.functional.linear(x, layer.quant_method.decode(x.device), bias)


def _empty_product(x: Tensor, bias: Tensor | None, rows: int, name: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


if not hasattr(torch.ops.vllm, "cerwu_linear"):
    direct_register_custom_op("cerwu_linear", _linear, fake_impl=_empty_product)
