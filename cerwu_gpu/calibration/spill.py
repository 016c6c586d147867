"""Tensors that are kept in memory up to a bound, and in an unnamed file beyond."""

import tempfile
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from cerwu_gpu.files import tensor_bytes, written

MEMORY = 2**28
"""Maximum bytes in memory."""


class TensorStore:
    """A list of tensors on the CPU; the file has no name on the disk, so nothing of it is left
    behind by a run that is killed."""

    def __init__(self, folder: Path | None = None, memory: int = MEMORY) -> None:
        """Start empty.

        Args:
            folder: place of the file; default: that of the system's temporary files.
            memory: maximum bytes in memory.
        """
        self._folder = folder
        self._left = memory
        self._kept: list[Tensor | tuple[int, torch.Size, torch.dtype]] = []
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def append(self, tensor: Tensor) -> None:
        """Keep a copy of a tensor.

        Raises:
            OutputError: the disk refuses it.
        """
        size = tensor.numel() * tensor.element_size()
        if size <= self._left:
            self._left -= size
            self._kept.append(tensor.detach().to("cpu", copy=True))
            return
        place = self._folder or Path(tempfile.gettempdir())
        with written(place):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=place)  # noqa: SIM115
            offset = self._file.seek(0, 2)
            self._file.write(tensor_bytes(tensor))
        self._kept.append((offset, tensor.shape, tensor.dtype))

    def __getitem__(self, index: int) -> Tensor:
        """Return tensor number `index`."""
        kept = self._kept[index]
        if isinstance(kept, Tensor):
            return kept
        assert self._file is not None
        offset, shape, dtype = kept
        self._file.seek(offset)
        content = bytearray(self._file.read(shape.numel() * dtype.itemsize))
        return torch.frombuffer(content, dtype=dtype).view(shape)
