"""Hidden states in front of every block, kept in a file between a forward and a backward pass."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import torch
from torch import Tensor

from cerwu_gpu.files import tensor_bytes, written


class Stack(Protocol):
    """Tensors, last in, first out."""

    def append(self, tensor: Tensor, /) -> None: ...

    def pop(self) -> Tensor: ...


class FileStack:
    """Tensors in a file (Stack); a popped one has the device and the values that it had."""

    def __init__(self, file: BinaryIO, folder: Path) -> None:
        self._file = file
        self._folder = folder
        self._entries: list[tuple[int, torch.Size, torch.dtype, torch.device]] = []
        self._end = 0

    def append(self, tensor: Tensor, /) -> None:
        """Write a tensor.

        Raises:
            OutputError: the disk refuses it.
        """
        self._entries.append((self._end, tensor.shape, tensor.dtype, tensor.device))
        with written(self._folder):
            self._file.seek(self._end)
            self._file.write(tensor_bytes(tensor))
        self._end = self._file.tell()

    def pop(self) -> Tensor:
        """Return the last tensor."""
        self._end, shape, dtype, device = self._entries.pop()
        content = torch.empty(shape.numel() * dtype.itemsize, dtype=torch.uint8)
        self._file.seek(self._end)
        self._file.readinto(content.numpy())  # type: ignore[attr-defined]
        return content.view(dtype).reshape(shape).to(device)


@contextmanager
def stack(folder: Path | None) -> Iterator[Stack]:
    """Yield an empty stack: in an unnamed file in `folder`, or in memory where that is None.

    Raises:
        OutputError: the disk refuses the file.
    """
    if folder is None:
        yield []
        return
    with ExitStack() as opened:
        with written(folder):
            file = opened.enter_context(tempfile.TemporaryFile(dir=folder))
        yield FileStack(cast(BinaryIO, file), folder)
