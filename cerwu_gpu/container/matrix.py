"""One matrix between its tensors and its bytes: words of the streams, and the side blob."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cerwu_gpu.coded import CodedMatrix, Reconstruction, check
from cerwu_gpu.coding import side, streams
from cerwu_gpu.coding.tables import table_from_codes
from cerwu_gpu.container.header import Part
from cerwu_gpu.errors import FormatError
from cerwu_gpu.quantize.symbols import QuantizedMatrix
from cerwu_gpu.reference.counts import alphabet_indices


@dataclass(frozen=True)
class EncodedMatrix:
    """One matrix in its file: its manifest part, uint32 words and the side blob."""

    part: Part
    words: NDArray[np.uint32]
    side: bytes


@dataclass(frozen=True)
class StoredMatrix:
    """One matrix as read and checked, on the device where it will be decoded."""

    coded: CodedMatrix
    rule: Reconstruction

    def to(self, device: torch.device | str) -> "StoredMatrix":
        """Return the matrix with its tensors on `device`."""
        return StoredMatrix(self.coded.to(device), self.rule.to(device))


def encode_matrix(matrix: QuantizedMatrix, relative_loss: float) -> EncodedMatrix:
    """Code one quantized matrix; constriction writes the streams."""
    rows, columns = matrix.symbols.shape
    symbols = matrix.symbols.cpu()
    indices, escaped = alphabet_indices(
        symbols, lowest=matrix.lowest, size=matrix.size, escapes=matrix.escapes
    )
    escapes = symbols[escaped].numpy()
    codes = matrix.codes.cpu().numpy()
    part = Part(
        rows=rows,
        columns=columns,
        quantizer=_quantizer(matrix),
        lowest=matrix.lowest,
        size=matrix.size,
        escapes=matrix.escapes,
        tables=len(codes) // (2 if matrix.states else 1),
        words=0,
        side=0,
        escaped=len(escapes),
        relative_loss=_rounded(relative_loss),
    )
    row_class, column_class = (x.cpu().numpy() for x in (matrix.row_class, matrix.column_class))
    words, lengths = streams.encode(
        indices.numpy(),
        table_from_codes(codes),
        row_class,
        column_class,
        None if matrix.second is None else matrix.second.cpu().numpy(),
    )
    arrays = {
        "table_codes": _halved(codes, part),
        "row_class": row_class.astype(np.uint8),
        "column_class": column_class.astype(np.uint8),
        "step_code": matrix.column_step.expand(columns).cpu().numpy(),
        "row_scale_code": matrix.row_scale.expand(rows).cpu().numpy(),
        "lengths": lengths,
    }
    if len(escapes):
        arrays["escapes"] = escapes
    if matrix.grid is not None:
        arrays["grid"] = matrix.grid.cpu().numpy()
    blob = side.pack(arrays, rows, columns)
    return EncodedMatrix(replace(part, words=len(words), side=len(blob)), words, blob)


def unpack_matrix(
    name: str, part: Part, words: Tensor, blob: bytes, device: torch.device | str
) -> StoredMatrix:
    """Check the data read of a matrix, and make it ready for the decoder on `device`.

    Raises:
        FormatError: the side blob is malformed or contradicts the manifest.
        CorruptionError: words and side data contradict each other.
    """
    try:
        arrays = side.unpack(blob, part.rows, part.columns, escapes=part.escaped)
        _check_names(part, arrays)
        tables = table_from_codes(_whole(arrays["table_codes"], part))
    except FormatError as error:
        raise FormatError(f"{name}: {error}") from None

    def tensor(array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array))

    coded = CodedMatrix(
        name=name,
        shape=(part.rows, part.columns),
        words=words.view(torch.int32),  # uint32 has few operations on GPUs
        lengths=tensor(arrays["lengths"].astype(np.int64)),
        tables=tensor(tables),
        row_class=tensor(arrays["row_class"].astype(np.int64)),
        column_class=tensor(arrays["column_class"].astype(np.int64)),
        states=part.states,
        parity=tensor(parity_of(part)),
    )
    rule = Reconstruction(
        lowest=part.lowest,
        size=part.size,
        escapes=tensor(arrays.get("escapes", np.empty(0, np.int32))),
        column_step=tensor(arrays["step_code"]),
        row_scale=tensor(arrays["row_scale_code"]),
        grid=tensor(arrays["grid"]) if part.quantizer == "grid" else None,
    )
    check(coded, rule)
    return StoredMatrix(coded, rule).to(device)


def _check_names(part: Part, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Refuse side data with other arrays, or other numbers of escapes, than the manifest has."""
    expected = {"table_codes", "row_class", "column_class", "step_code", "row_scale_code"}
    expected |= {"lengths"} | ({"escapes"} if part.escaped else set())
    expected |= {"grid"} if part.quantizer == "grid" else set()
    for name in sorted(set(arrays) ^ expected):
        raise FormatError(f"side data and manifest disagree on {name}.")
    if part.escaped and len(arrays["escapes"]) != part.escaped:
        raise FormatError("side data and manifest disagree on escapes.")


def parity_of(part: Part) -> NDArray[np.uint8]:
    """Return the parity [K] of every symbol; escape symbols carry theirs by position."""
    integers = (np.arange(part.size) + part.lowest) & 1
    return np.concatenate([integers, np.arange(part.escapes)]).astype(np.uint8)


def _quantizer(matrix: QuantizedMatrix) -> str:
    if matrix.grid is not None:
        return "grid"
    return f"trellis{matrix.states}" if matrix.states else "scalar"


def _rounded(loss: float) -> float | None:
    """Return the loss in four digits; None for an infinite one (a matrix without effect)."""
    return float(f"{loss:.4g}") if np.isfinite(loss) else None


def _halved(codes: NDArray[np.uint8], part: Part) -> NDArray[np.uint8]:
    """Return [T, Q, stored] of [T * Q, K]: where q and -q share a code only q >= 0 is stored."""
    if part.mirrored:
        codes = codes[:, part.size // 2 :]
    return np.ascontiguousarray(codes.reshape(part.tables, part.quantizers, -1))


def _whole(stored: NDArray[np.uint8], part: Part) -> NDArray[np.uint8]:
    """Undo `_halved`: [T * Q, K]."""
    half = part.size // 2 if part.mirrored else 0
    if stored.shape != (part.tables, part.quantizers, part.alphabet - half):
        raise FormatError("side data and manifest disagree on table_codes.")
    flat = stored.reshape(part.tables * part.quantizers, -1)
    return np.concatenate([flat[:, half:0:-1], flat], axis=1)
