"""Row scales of a directory that is being written: read, sized, and replaced."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cerwu_gpu.coding import side
from cerwu_gpu.compression.distill import RowCodes
from cerwu_gpu.container.header import Part
from cerwu_gpu.container.reader import decode_stored, stored_weight
from cerwu_gpu.container.writer import DirectoryWriter
from cerwu_gpu.report import LayerReport

_ROWS = "row_scale_code"


class WrittenRowCodes(RowCodes):
    """Row scales of the weights that a writer holds, and of the model in memory.

    The words of a weight stay as they are: its side data is packed anew, and the weight decoded.
    """

    def __init__(self, writer: DirectoryWriter, module: nn.Module) -> None:
        """Read the codes of all compressed weights of `module`, which `writer` holds."""
        self._writer = writer
        self._module = module
        self._classes: dict[str, tuple[NDArray[Any], ...]] = {}
        codes: dict[str, Tensor] = {}
        for name, (entry, blob) in writer.sides.items():
            arrays = [
                side.unpack(content, part.rows, part.columns)
                for part, content in _parts(entry.parts, blob)
            ]
            codes[name] = torch.from_numpy(np.concatenate([array[_ROWS] for array in arrays]))
            self._classes[name] = tuple(array["row_class"] for array in arrays)
        self.codes = codes
        self._stored: Mapping[str, Tensor] = codes
        self.weights = sum(entry.weights for entry, _ in writer.sides.values())

    def size(self, codes: Mapping[str, Tensor]) -> int:
        total = 0
        for name, classes in self._classes.items():
            for one, row_class in zip(self._split(name, codes[name]), classes, strict=True):
                total += side.packed_size(_ROWS, one, row_class)
        return total

    @torch.no_grad()
    def store(self, codes: Mapping[str, Tensor]) -> None:
        for name, (entry, blob) in self._writer.sides.items():
            if torch.equal(codes[name], self._stored[name]):
                continue
            parts, contents = [], []
            for (part, content), one in zip(
                _parts(entry.parts, blob), self._split(name, codes[name]), strict=True
            ):
                arrays = side.unpack(content, part.rows, part.columns) | {_ROWS: one}
                contents.append(side.pack(arrays, part.rows, part.columns))
                parts.append(replace(part, side=len(contents[-1])))
            joined = torch.frombuffer(bytearray(b"".join(contents)), dtype=torch.uint8)
            self._writer.replace_side(name, tuple(parts), joined)
            entry, joined = self._writer.sides[name]
            stored = stored_weight(name, entry, self._writer.words(name), joined)
            ((_, weight),) = decode_stored([stored])
            parameter = self._module.get_parameter(name)
            parameter.copy_(weight.reshape(parameter.shape))
        self._stored = dict(codes)

    def reports(self, layers: list[LayerReport]) -> list[LayerReport]:
        """Return the reports of matrices with the bytes that they take now."""
        entries = {name: entry for name, (entry, _) in self._writer.sides.items()}
        changed = []
        for layer in layers:
            size = entries[layer.name].parts[layer.part].side
            rows, columns = layer.shape
            bits = 8 * (layer.words_bytes + size) / (rows * columns)
            changed.append(replace(layer, side_bytes=size, bits_per_weight=bits))
        return changed

    def _split(self, name: str, codes: Tensor) -> list[NDArray[Any]]:
        """Return the codes of a weight's matrices."""
        parts = torch.split(codes.cpu(), [len(x) for x in self._classes[name]])
        return [part.numpy() for part in parts]


def _parts(parts: tuple[Part, ...], blob: Tensor) -> Iterator[tuple[Part, bytes]]:
    """Yield each part of a weight with its side data."""
    content, first = blob.numpy().tobytes(), 0
    for part in parts:
        yield part, content[first : first + part.side]
        first += part.side
