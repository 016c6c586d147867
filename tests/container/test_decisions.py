"""Decisions of docs/format.md where JSON and safetensors leave it open: both readers agree."""

import hashlib
import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cerwu_gpu.container.reader import inventory, open_directory
from cerwu_gpu.errors import FormatError
from tests.fuzz.mutations import Opened, mend

sys.path.insert(0, str(Path(__file__).parents[1]))
import independent_decoder

GOLDEN = Path(__file__).parents[1] / "golden"
NAME = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"
Edit = Callable[[Opened], object]
Spoil = Callable[[dict[str, Any]], object]


def copied(tmp_path: Path, edit: Edit, spoil: Spoil = lambda header: None) -> Path:
    """A golden directory after a change; its checksums are right."""
    folder = Path(shutil.copytree(GOLDEN / "scalar", tmp_path / "scalar"))
    file = folder / "model.safetensors"
    opened = Opened.of(file.read_bytes())
    edit(opened)
    file.write_bytes(opened.joined(spoil))
    return folder


def ours(folder: Path) -> dict[str, str]:
    """SHA-256 of every tensor's bytes; the inventory, too, must be had."""
    directory = open_directory(folder)
    assert inventory(folder).total_bytes > 0
    found = dict(directory.plain()) | dict(directory.weights())
    return {name: digest(tensor) for name, tensor in found.items()}


def digest(tensor: torch.Tensor) -> str:
    data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return hashlib.sha256(data).hexdigest()


def theirs(folder: Path) -> dict[str, str]:
    return {name: weight.sha256() for name, weight in independent_decoder.decode(folder).items()}


def part(opened: Opened) -> dict[str, Any]:
    parts: list[dict[str, Any]] = opened.manifest["compressed"][NAME]["parts"]
    return parts[0]


def loss(value: object) -> Edit:
    return lambda opened: part(opened).update(relative_loss=value)


def plain(name: str, dtype: str = "F32", shape: tuple[int, ...] = (8,), size: int = 32) -> Edit:
    """One more tensor, in front of all others."""

    def edit(opened: Opened) -> None:
        opened.header = {name: {"dtype": dtype, "shape": list(shape)}, **opened.header}
        opened.data[name] = bytes(range(size))
        opened.manifest["plain_sha256"][name] = ""

    return edit


def at_both_ends(opened: Opened) -> None:
    for name in ("first", "last"):
        plain(name, shape=(3, 0), size=0)(opened)
    opened.header["last"] = opened.header.pop("last")


ALLOWED: dict[str, Edit] = {
    "16-deep": lambda o: o.manifest.update(x=json.loads("[" * 15 + "]" * 15)),
    "100-digits": lambda o: o.manifest.update(x=10**99),
    "half-a-pair-in-text": lambda o: o.manifest.update(generator="x"),
    "misaligned": plain("a", "U8", (3,), 3),
    "no-bytes-at-both-ends": at_both_ends,
    "a-name-with-dots": plain("../../a/b"),
    "a-name-of-nothing": plain(""),
    "the-largest-loss": loss(2**1024 - 2**970 - 1),
    "a-tiny-loss": loss(-1e-320),
    "more-fields": lambda o: o.manifest.update(x={"": None}),
}


@pytest.mark.parametrize("edit", ALLOWED.values(), ids=ALLOWED)
def test_what_is_allowed_is_read_alike(edit: Edit, tmp_path: Path) -> None:
    folder = copied(tmp_path, edit)
    found = ours(folder)
    assert found == theirs(folder)
    assert found.items() >= ours(GOLDEN / "scalar").items()


HEADERS: dict[str, Spoil] = {
    "without-format": lambda header: header["__metadata__"].pop("format", None),
    "more-keys": lambda header: header["__metadata__"].update(anything="x"),
}


@pytest.mark.parametrize("spoil", HEADERS.values(), ids=HEADERS)
def test_other_metadata_is_ignored(spoil: Spoil, tmp_path: Path) -> None:
    folder = copied(tmp_path, lambda opened: None, spoil)
    assert ours(folder) == theirs(folder) == ours(GOLDEN / "scalar")


def test_blanks_may_follow_the_header(tmp_path: Path) -> None:
    folder = copied(tmp_path, lambda opened: None)
    around(folder, lambda text: text + b" " * 1001)
    assert ours(folder) == theirs(folder) == ours(GOLDEN / "scalar")


def around(folder: Path, change: Callable[[bytes], bytes]) -> None:
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    text = change(raw[8 : 8 + length])
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize("change", [lambda x: x + b"\0", lambda x: x + b"x", lambda x: b"\0" + x])
def test_other_bytes_around_the_header_are_refused(
    change: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    folder = copied(tmp_path, lambda opened: None)
    around(folder, change)
    refused(folder)


def test_a_file_without_tensors(tmp_path: Path) -> None:
    def nothing(opened: Opened) -> None:
        opened.header, opened.data = {}, {}
        opened.manifest |= {"compressed": {}, "plain_sha256": {}}

    folder = copied(tmp_path, nothing)
    assert ours(folder) == theirs(folder) == {}


def refused(folder: Path) -> None:
    with pytest.raises(FormatError):
        ours(folder)
    with pytest.raises(ValueError):
        theirs(folder)


def entry(**changes: object) -> Edit:
    return lambda opened: opened.manifest["compressed"][NAME].update(changes)


def half_a_pair(opened: Opened) -> None:
    opened.manifest["plain_sha256"]["\ud800"] = opened.manifest["plain_sha256"].pop(NORM)


REFUSED: dict[str, Edit] = {
    "quantizer": lambda o: part(o).update(quantizer="trellis5"),
    "dtype": entry(dtype="float64"),
    "escapes-scalar": lambda o: part(o).update(escapes=2),
    "escapes-negative": lambda o: part(o).update(escapes=-1),
    "half-a-pair-in-a-name": half_a_pair,
    "a-loss-that-rounds-up": loss(2**1024 - 2**970),
    "an-infinite-loss": loss(10**400),
    "no-bytes-inside-another": lambda o: (plain("z", shape=(0,), size=0)(o),),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_must_be_refused_is_refused_by_both(case: str, tmp_path: Path) -> None:
    def inside(header: dict[str, Any]) -> None:
        if case == "no-bytes-inside-another":
            begin = header[NORM]["data_offsets"][0] + 4
            header["z"]["data_offsets"] = [begin, begin]

    refused(copied(tmp_path, REFUSED[case], inside))


@pytest.mark.parametrize("text", ["1e999", "1.797693134862315808e308"])
def test_decimals_that_round_to_infinity_are_refused(text: str, tmp_path: Path) -> None:
    folder = copied(tmp_path, loss(0.123456789))
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    manifest = header["__metadata__"]["cerwu"].replace("0.123456789", text)
    assert text in manifest
    header["__metadata__"]["cerwu"] = manifest
    mend(header)
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + raw[8 + length :])
    refused(folder)


@pytest.mark.parametrize("name", ["", ".", "..", "model.safetensors/", "config.json/.."])
def test_an_index_names_files(name: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "sharded", tmp_path / "sharded"))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"][NORM] = name
    index.write_text(json.dumps(content), encoding="utf-8")
    refused(folder)


LENGTHS = bytes([8, 0, 1, 2, 1])
"""The last array of NAME's side data: one stream of one word."""
WIDTHS = {
    "width-4": bytes([8, 4, 1, 2, 1, 0, 0, 0, 0]),
    "divisor-0": bytes([8, 1, 1, 2, 0, 7]),
    "divisor-0-of-width-0": bytes([8, 0, 1, 2, 0]),
    "leading-zero-groups": bytes([8, 0, 129, 0, 130, 128, 0, 129, 0]),
}


@pytest.mark.parametrize("array", WIDTHS.values(), ids=WIDTHS)
def test_any_width_and_divisor_will_do(array: bytes, tmp_path: Path) -> None:
    def edit(opened: Opened) -> None:
        data = opened.data[f"{NAME}.side"]
        assert data.endswith(LENGTHS)
        opened.resize(NAME, "side", data.removesuffix(LENGTHS) + array)

    folder = copied(tmp_path, edit)
    assert ours(folder) == theirs(folder) == ours(GOLDEN / "scalar")


def test_bytes_may_be_stored_in_four(tmp_path: Path) -> None:
    """row_class of NAME: [2, 1, base, 1] and twelve bytes."""

    def edit(opened: Opened) -> None:
        data = opened.data[f"{NAME}.side"]
        first = 5 + data[2] * data[3] * data[4]
        assert data[:2] == b"\1\1" and data[first : first + 2] == b"\2\1"
        wide = b"\2\4" + data[first + 2 : first + 16] + bytes(36)
        opened.resize(NAME, "side", data[:first] + wide + data[first + 16 :])

    folder = copied(tmp_path, edit)
    assert ours(folder) == theirs(folder) == ours(GOLDEN / "scalar")
