"""Compressed directories for transformers' own from_pretrained.

cerwu_gpu.serving.registration imports this module during transformers' own import, so its top level
must import nothing of transformers that needs modeling_utils.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cerwu_gpu.container.reader import (
    BATCH_WEIGHTS,
    CompressedDirectory,
    StoredWeight,
    decode_stored,
    open_directory,
)
from cerwu_gpu.errors import FormatError, ModelError
from cerwu_gpu.spec import FORMAT_VERSION, QUANT_METHOD

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config(QUANT_METHOD)
class CerwuConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed directory's config.json.

    Attributes:
        quant_method: "cerwu".
        format: version of docs/format.md, for information; readers use the manifests'.
        source: what is known of the source's names.
    """

    dequantize = True
    """Marker for transformers that a loaded model is an ordinary dense one."""

    def __init__(self, format: int = FORMAT_VERSION, **source: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.format = format
        self.source = source


@register_quantizer(QUANT_METHOD)
class CerwuQuantizer(HfQuantizer):
    """Quantizer that decodes a compressed directory while transformers loads its model.

    The loaded model trains, casts, moves and saves as any dense one; `save_pretrained` writes dense
    weights and a config.json without our quantization method.
    """

    _weights: "DecodedWeights"

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse to compress while loading.

        Raises:
            ModelError: the directory is not compressed.
        """
        if not self.pre_quantized:
            raise ModelError(
                "from_pretrained loads compressed models but does not compress: "
                "use cerwu_gpu.compress."
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Drop kernels of the Hub and refuse an absurd size, before the model is built.

        Raises:
            FormatError: the configuration asks for too many layers.
        """
        from cerwu_gpu.checkpoint.configuration import check_counts, forget_kernels

        forget_kernels(config)
        check_counts(config.to_dict(), config.name_or_path)
        return config

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Open the directory that transformers found or downloaded, and check all checksums.

        Raises:
            CerwuError: as `load_compressed`.
        """
        if not checkpoint_files:
            raise ModelError("a compressed model is loaded from its files: give no state dict.")
        from cerwu_gpu.serving.description import check_described  # it imports modeling_utils

        folder = Path(checkpoint_files[0]).parent
        given = Path(str(model.config.name_or_path))
        if given.is_dir() and not _below(folder, given):
            raise FormatError(f"{given}: its index leads out of it; get the directory again.")
        directory = open_directory(folder)
        if set(map(Path, checkpoint_files)) != set(directory.files):
            raise FormatError(f"{folder}: its index does not name its files; get it again.")
        check_described(directory, model.is_remote_code())  # transformers asked for trust
        for _name, _tensor in directory.plain():
            pass  # transformers reads these itself, but it compares no checksums
        self._weights = DecodedWeights(directory)
        expected = set(model._keys_to_ignore_on_load_unexpected or ())
        carried = {f"^{re.escape(name)}$" for name in self._source().get("carried", ())}
        model._keys_to_ignore_on_load_unexpected = expected | carried

    def _source(self) -> dict[str, Any]:
        """Return what config.json says of the source's names.

        Raises:
            FormatError: it is malformed.
        """
        from cerwu_gpu.checkpoint.names import checked  # it needs modeling_utils

        assert isinstance(self.quantization_config, CerwuConfig)
        try:
            return checked(self.quantization_config.source)
        except TypeError as error:
            raise FormatError(f"config.json: {error}; get the directory again.") from None

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: "PreTrainedModel"
    ) -> list[Any]:
        """Return our conversion alone: stored names are the model's own already, and a conversion
        of transformers may take one of them for another model's."""
        return list(self.get_weight_conversions())

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Return the conversion of NAME.words and NAME.side into NAME."""
        return [WeightConverter([r"\.words$", r"\.side$"], "", [Decode(self._weights)])]

    def _process_model_after_weight_loading(
        self, model: "PreTrainedModel", **_: Any
    ) -> "PreTrainedModel":
        from cerwu_gpu.checkpoint.names import remember  # it needs modeling_utils

        # save_pretrained inverts the conversions that were used: dense weights need only those
        # of the source.
        remember(model, self._source())
        del self._weights
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class Decode(ConversionOps):
    """Conversion that gives transformers a decoded weight for its words and side data."""

    def __init__(self, weights: "DecodedWeights") -> None:
        self._weights = weights

    def __deepcopy__(self, _: dict[int, object]) -> "Decode":
        return self  # transformers copies the operation for every weight

    def convert(  # type: ignore[override]
        self, input_dict: Mapping[str, list[Tensor]], **context: Any
    ) -> dict[str, Tensor]:
        target, model = context["full_layer_name"], context["model"]
        (words, *_), *_ = input_dict.values()
        weight = self._weights.take(target, model.base_model_prefix, words.device)
        return {target: weight.to(model.get_parameter(target).dtype)}


class DecodedWeights:
    """The compressed weights of a directory, decoded many at a time in the order in which
    transformers asks for them.

    Raises:
        CorruptionError: a checksum is wrong.
    """

    def __init__(self, directory: CompressedDirectory) -> None:
        self._waiting = sorted(directory.compressed(), key=_natural)
        self._ready: dict[str, Tensor] = {}
        # Read at once, since here an error reaches the user as it is; words stay in the file.
        self._stored = {stored.name: stored for stored in directory.all_stored(self._waiting)}

    def take(self, target: str, prefix: str, device: torch.device) -> Tensor:
        """Return the weight that the model calls `target`, on `device`; each can be taken once.

        Args:
            prefix: of the names in a model with a head; a model without one may be loaded from it.

        Raises:
            FormatError: there is no such weight.
        """
        names = (target, f"{prefix}.{target}", target.removeprefix(f"{prefix}."))
        name = next((n for n in names if n in self._ready or n in self._waiting), None)
        if name is None:
            raise FormatError(f"{target}: the directory holds no such compressed weight.")
        if name not in self._ready:
            self._decode_from(self._waiting.index(name), device)
        return self._ready.pop(name).to(device)

    def _decode_from(self, first: int, device: torch.device) -> None:
        """Decode weight number `first` and those that will be asked for next."""
        enough = BATCH_WEIGHTS.get(device.type, BATCH_WEIGHTS["cpu"])
        batch: list[StoredWeight] = []
        while first < len(self._waiting) and sum(x.entry.weights for x in batch) < enough:
            name = self._waiting.pop(first)
            batch.append(self._stored.pop(name).to(device))
        self._ready.update(decode_stored(batch))


def _below(folder: Path, given: Path) -> bool:
    """Return whether the path of `folder`, without links resolved, is `given` or leads below it."""
    return Path(os.path.abspath(folder)).is_relative_to(os.path.abspath(given))


def _natural(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
