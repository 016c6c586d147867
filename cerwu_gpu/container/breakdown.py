"""Bytes of a compressed directory by their purpose."""

from collections import Counter
from pathlib import Path

import numpy as np

from cerwu_gpu.coding import side
from cerwu_gpu.container.files import Shard, open_shards
from cerwu_gpu.errors import FormatError
from cerwu_gpu.report import HEADERS, PLAIN, PURPOSES, WORDS

OF_ARRAY = {array: purpose.name for purpose in PURPOSES for array in purpose.arrays}
"""Array of the side data -> what it is for."""


def breakdown(path: Path) -> dict[str, int]:
    """Return purpose -> bytes, largest first, of everything in the directory `path`.

    Purposes are the names of PURPOSES that occur (HEADERS are those of the safetensors files, with
    their manifests), and each other file's name.

    Raises:
        FormatError: this is no compressed directory, or it is damaged.
    """
    taken: Counter[str] = Counter()
    shards = open_shards(path)
    for shard in shards:
        taken.update(_of_shard(shard))
    known = {shard.path for shard in shards}
    for file in path.rglob("*"):
        if file.is_file() and file not in known:
            taken[file.relative_to(path).as_posix()] += file.stat().st_size
    return dict(taken.most_common())


def _of_shard(shard: Shard) -> Counter[str]:
    taken: Counter[str] = Counter()
    for name, entry in shard.manifest.compressed.items():
        taken[WORDS] += sum(4 * part.words for part in entry.parts)
        if shard.tensors[f"{name}.side"][0] != "U8":
            raise FormatError(f"{name}: its side data have the wrong dtype; the file is broken.")
        blob, first = np.asarray(shard.tensor(f"{name}.side")).tobytes(), 0
        for part in entry.parts:
            part_blob = blob[first : first + part.side]
            try:
                sizes = side.sizes(part_blob, part.rows, part.columns)
            except FormatError as error:
                raise FormatError(f"{name}: {error}") from None
            for array, size in sizes.items():
                taken[OF_ARRAY[array]] += size
            first += part.side
    for name in shard.manifest.plain_sha256:
        tensor = shard.tensor(name)
        taken[PLAIN] += tensor.numel() * tensor.element_size()
    taken[HEADERS] += shard.path.stat().st_size - taken.total()
    return taken
