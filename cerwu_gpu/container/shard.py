"""Writing one safetensors file, byte for byte the same for the same content.

The library's own writer keeps the metadata in a hash map, so that its key order, and with it the
file's bytes, can differ between runs; the layout itself is eight bytes of header length, a JSON
header and the data, and is read with the library (cerwu_gpu.container.reader).
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cerwu_gpu.files import dtype_name, tensor_bytes
from cerwu_gpu.spec import HEADER_KEY, METADATA_KEY

SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.bool: "BOOL",
}
"""Dtypes that can be stored -> their names in safetensors."""


TORCH_NAMES = {name: dtype_name(dtype) for dtype, name in SAFETENSORS_NAMES.items()}
"""Name of a dtype in safetensors -> its name in torch."""


def header_digest(manifest: str, tensors: Mapping[str, tuple[str, Sequence[int]]]) -> str:
    """Return the SHA-256 of a file's description of its tensors: its manifest, and below it a line
    "NAME DTYPE EXTENT EXTENT ..." for each tensor, sorted by name.

    Args:
        manifest: the JSON text.
        tensors: dtype (safetensors' name for it) and shape of every tensor.
    """
    lines = [
        " ".join(map(str, (name, *tensors[name][:1], *tensors[name][1])))
        for name in sorted(tensors)
    ]
    return hashlib.sha256("\n".join([manifest, *lines]).encode()).hexdigest()


def write_shard(
    path: Path, tensors: Mapping[str, Tensor], manifest: str, *, least: int = 0
) -> None:
    """Write `tensors` (any order) with their manifest to `path`, and flush to the disk.

    Args:
        least: minimum bytes of the file; blanks in the header make up for what is missing.
    """
    described = {name: (SAFETENSORS_NAMES[x.dtype], tuple(x.shape)) for name, x in tensors.items()}
    metadata = {METADATA_KEY: manifest, HEADER_KEY: header_digest(manifest, described)}
    header: dict[str, object] = {"__metadata__": {**metadata, "format": "pt"}}
    # Wide elements first keeps every tensor aligned to its element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * max(least - 8 - len(text) - offset, 0)
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            file.write(tensor_bytes(tensors[name]))
        file.flush()
        os.fsync(file.fileno())
