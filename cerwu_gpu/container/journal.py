"""Finished blocks on disk, so that a run that dies can be continued after them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cerwu_gpu.container.header import Part
from cerwu_gpu.container.reader import open_directory
from cerwu_gpu.container.writer import DirectoryWriter
from cerwu_gpu.errors import CorruptionError, FormatError, OutputError
from cerwu_gpu.files import checksum, read_json, written
from cerwu_gpu.report import LayerReport
from cerwu_gpu.spec import SINGLE_FILE

REPORTS_FILE = "reports.json"


@dataclass(frozen=True)
class CodedWeight:
    """One compressed parameter as the file holds it, and what is reported of its matrices.

    Attributes:
        shape, dtype, transposed: of the parameter in the model.
        parts: its matrices in order.
        words, side: uint32 and uint8, of all parts.
        reports: one for each part.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool
    parts: tuple[Part, ...]
    words: Tensor
    side: Tensor
    reports: tuple[LayerReport, ...]

    def add_to(self, writer: DirectoryWriter) -> None:
        """Store it."""
        writer.add_compressed(
            self.name,
            shape=self.shape,
            dtype=self.dtype,
            transposed=self.transposed,
            parts=self.parts,
            words=self.words,
            side=self.side,
        )


class Journal:
    """The blocks of one pass: `folder`/block-00000 and so on, a compressed directory each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def holds(self, index: int) -> bool:
        """Return whether block number `index` is finished."""
        return self._path(index).is_dir()

    def write(self, index: int, weights: Sequence[CodedWeight]) -> None:
        """Keep a finished block; it is safe on the disk afterwards, or not there at all.

        Raises:
            OutputError: the disk refuses it.
        """
        reports = [asdict(report) for weight in weights for report in weight.reports]
        with DirectoryWriter(self._path(index), generator="cerwu_gpu journal") as writer:
            for weight in weights:
                weight.add_to(writer)
            writer.complete()
            path = writer.folder / REPORTS_FILE
            with written(path):
                path.write_text(json.dumps(reports), encoding="utf-8")
            writer.publish()

    def read(self, index: int) -> list[CodedWeight]:
        """Return the weights that `write` kept; words and side data stay on the disk until used.

        Raises:
            OutputError: the block is damaged.
        """
        path = self._path(index)
        try:
            entries = open_directory(path).compressed()
            tensors = load_file(path / SINGLE_FILE)
            for name, entry in entries.items():
                found = [checksum(tensors[f"{name}.{what}"]) for what in ("words", "side")]
                if found != [entry.words_sha256, entry.side_sha256]:
                    raise CorruptionError(f"{name}: its bytes have changed")
            content = read_json(path / REPORTS_FILE)
            reports = [_report(fields) for fields in content]
        except (FormatError, SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
            raise _damaged(path, error) from None
        return [
            CodedWeight(
                name=name,
                shape=entries[name].shape,
                dtype=getattr(torch, entries[name].dtype),
                transposed=entries[name].transposed,
                parts=entries[name].parts,
                words=tensors[f"{name}.words"],
                side=tensors[f"{name}.side"],
                reports=tuple(report for report in reports if report.name == name),
            )
            for name in dict.fromkeys(report.name for report in reports)
        ]

    def weights(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Yield name and decoded parameter of everything in block number `index`.

        Raises:
            OutputError: the block is damaged.
        """
        path = self._path(index)
        try:
            yield from open_directory(path).weights()
        except FormatError as error:
            raise _damaged(path, error) from None

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}"


def _report(fields: dict[str, Any]) -> LayerReport:
    rows, columns = fields.pop("shape")
    return LayerReport(**fields | {"shape": (rows, columns), "events": tuple(fields["events"])})


def _damaged(path: Path, error: Exception) -> OutputError:
    return OutputError(
        f"{path} is damaged ({error}): pass --restart (restart=True) to begin from the start."
    )
