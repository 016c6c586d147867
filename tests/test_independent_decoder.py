"""The decoder that was written from docs/format.md alone reads what cerwu_gpu wrote."""

import ast
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cerwu_gpu.coding import side
from cerwu_gpu.container.reader import open_directory, verify
from cerwu_gpu.errors import CerwuError
from tests.fuzz.mutations import Opened, mend

HERE = Path(__file__).parent
DECODER = HERE / "independent_decoder.py"
GOLDEN = HERE / "golden"
EXPECTED = json.loads((GOLDEN / "weights.json").read_text())
KINDS = sorted(path.name for path in GOLDEN.iterdir() if (path / "config.json").exists())

sys.path.insert(0, str(HERE))
import independent_decoder  # noqa: E402


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_file(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def copy_with_manifest(
    kind: str, directory: Path, change: Callable[[dict[str, Any]], None], damage: int | None = None
) -> None:
    """A golden directory with another manifest; `damage` flips a byte and renews the checksums."""
    shutil.copytree(GOLDEN / kind, directory)
    header, data = read_header(directory / "model.safetensors")
    if damage is not None:
        data = data[:damage] + bytes([data[damage] ^ 1 << damage % 8]) + data[damage + 1 :]
    manifest = json.loads(header["__metadata__"]["cerwu"])
    if damage is not None:
        sums = {}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                sums[name] = hashlib.sha256(data[begin:end]).hexdigest()
        for name, entry in manifest["compressed"].items():
            for suffix in ("words", "side"):
                entry[f"{suffix}_sha256"] = sums[f"{name}.{suffix}"]
        manifest["plain_sha256"] = {name: sums[name] for name in manifest["plain_sha256"]}
    change(manifest)
    header["__metadata__"]["cerwu"] = json.dumps(manifest)
    mend(header)
    write_file(directory / "model.safetensors", header, data)


def test_all_golden_directories_are_expected() -> None:
    assert sorted(EXPECTED) == KINDS
    assert KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_golden(kind: str) -> None:
    """Names, dtypes, shapes and bits of all weights."""
    weights = independent_decoder.decode(GOLDEN / kind)
    found = {
        name: {
            "dtype": weight.dtype,
            "shape": list(weight.array.shape),
            "sha256": weight.sha256(),
        }
        for name, weight in weights.items()
    }
    assert found == EXPECTED[kind]


def test_example_of_the_document(tmp_path: Path) -> None:
    """Section "Example" of docs/format.md, byte by byte."""
    words = bytes.fromhex("835ba58d 7c020000")
    side = bytes.fromhex(
        "01 01 02 01 03 08 08 08 08 f8 00  02 01 00 01 00 01 00  03 00 00 01"
        "04 01 ff 07 10 00 00 00 01 02  05 00 00 01 00  08 00 01 04 01  09 00 01 0a 01"
    )
    part = {"rows": 3, "columns": 4, "quantizer": "scalar", "lowest": -1, "size": 3, "escapes": 1}
    part |= {"tables": 2, "words": 2, "side": 47, "escaped": 1, "relative_loss": 0.01}
    entry = {"shape": [3, 4], "dtype": "bfloat16", "transposed": False, "parts": [part]}
    entry["words_sha256"] = hashlib.sha256(words).hexdigest()
    entry["side_sha256"] = hashlib.sha256(side).hexdigest()
    manifest = {"version": 1, "generator": "x", "compressed": {"x": entry}, "plain_sha256": {}}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "cerwu": json.dumps(manifest)}}
    header["x.words"] = {"dtype": "U32", "shape": [2], "data_offsets": [0, 8]}
    header["x.side"] = {"dtype": "U8", "shape": [47], "data_offsets": [8, 55]}
    mend(header)
    write_file(tmp_path / "model.safetensors", header, words + side)
    weights = independent_decoder.decode(tmp_path)
    assert list(weights) == ["x"]
    assert weights["x"].dtype == "bfloat16"
    rows = [[0, 0x3E80, 0, 0xBE8C], [0x3E80, 0xBE80, 0x3FA7, 0], [0, 0, 0xBE86, 0]]
    assert weights["x"].array.tolist() == rows


def test_command_line() -> None:
    command = [sys.executable, str(DECODER), str(GOLDEN / "scalar")]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines == [
        f"{name} {entry['shape']} {entry['dtype']} {entry['sha256']}"
        for name, entry in sorted(EXPECTED["scalar"].items())
    ]


def test_imports_only_numpy_and_the_standard_library() -> None:
    modules = set()
    for node in ast.walk(ast.parse(DECODER.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules.add(str(node.module).split(".")[0])
    assert "numpy" in modules
    assert modules - {"numpy"} <= sys.stdlib_module_names
    assert "importlib" not in modules and "__import__" not in DECODER.read_text()


@pytest.mark.parametrize("kind", ["scalar", "trellis8"])
def test_flipped_byte_in_a_tensor(kind: str, tmp_path: Path) -> None:
    """The checksum finds it, and the error names the tensor."""
    shutil.copytree(GOLDEN / kind, tmp_path / "x")
    file = tmp_path / "x" / "model.safetensors"
    header, data = read_header(file)
    start = len(file.read_bytes()) - len(data)
    content = bytearray(file.read_bytes())
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        position = start + (begin + end) // 2
        content[position] ^= 1
        file.write_bytes(content)
        content[position] ^= 1
        with pytest.raises(ValueError) as error:
            independent_decoder.decode(tmp_path / "x")
        assert str(error.value).startswith(f"{name}:")


@pytest.mark.parametrize("kind", ["corners", "escapes-trellis", "grid"])
def test_flipped_bytes_behind_the_checksums(kind: str, tmp_path: Path) -> None:
    """With checksums that fit, every byte leads to weights or to ValueError, and never far."""
    header, data = read_header(GOLDEN / kind / "model.safetensors")
    compressed = set(json.loads(header["__metadata__"]["cerwu"])["compressed"])
    positions = np.random.default_rng(0).choice(len(data), min(60, len(data)), replace=False)
    refused = 0
    for position in positions.tolist():
        directory = tmp_path / str(position)
        copy_with_manifest(kind, directory, lambda manifest: None, position)
        name = next(
            name
            for name, entry in header.items()
            if name != "__metadata__"
            and entry["data_offsets"][0] <= position < entry["data_offsets"][1]
        ).removesuffix(".words")
        started = time.monotonic()
        try:
            independent_decoder.decode(directory)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(name.removesuffix(".side"))
            assert name.removesuffix(".side") in compressed
        assert time.monotonic() - started < 30
    assert refused


def first_part(manifest: dict[str, Any]) -> dict[str, Any]:
    part: dict[str, Any] = next(iter(manifest["compressed"].values()))["parts"][0]
    return part


@pytest.mark.parametrize(
    "field, value",
    [
        ("rows", 0),
        ("rows", True),
        ("columns", 2**31),
        ("quantizer", "trellis16"),
        ("lowest", 1.0),
        ("size", 65537),
        ("escapes", 2),
        ("tables", 10**6),
        ("words", 2**30),
        ("side", 1),
        ("escaped", -1),
    ],
)
def test_manifest_that_does_not_fit(field: str, value: Any, tmp_path: Path) -> None:
    copy_with_manifest(
        "scalar", tmp_path / "x", lambda manifest: first_part(manifest).update({field: value})
    )
    header, _ = read_header(GOLDEN / "scalar" / "model.safetensors")
    name = next(iter(json.loads(header["__metadata__"]["cerwu"])["compressed"]))
    with pytest.raises(ValueError, match=f"^{name}"):
        independent_decoder.decode(tmp_path / "x")


def test_missing_field(tmp_path: Path) -> None:
    copy_with_manifest("scalar", tmp_path / "x", lambda manifest: first_part(manifest).pop("rows"))
    with pytest.raises(ValueError, match="rows"):
        independent_decoder.decode(tmp_path / "x")


def test_unknown_field_is_ignored(tmp_path: Path) -> None:
    copy_with_manifest(
        "scalar", tmp_path / "x", lambda manifest: first_part(manifest).update(news=1)
    )
    assert set(independent_decoder.decode(tmp_path / "x")) == set(EXPECTED["scalar"])


def test_newer_version_is_refused_first(tmp_path: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest.clear()
        manifest["version"] = 3

    copy_with_manifest("scalar", tmp_path / "x", change)
    with pytest.raises(ValueError, match="newer program"):
        independent_decoder.decode(tmp_path / "x")


def test_a_quantizer_that_the_version_lacks_is_refused(tmp_path: Path) -> None:
    copy_with_manifest("trellis16", tmp_path / "x", lambda manifest: manifest.update(version=1))
    with pytest.raises(ValueError, match="version 1 lacks"):
        independent_decoder.decode(tmp_path / "x")


def test_missing_shard(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "sharded", tmp_path / "x")
    next((tmp_path / "x").glob("model-00002-*")).unlink()
    with pytest.raises(ValueError, match=r"^model-00002-.*missing"):
        independent_decoder.decode(tmp_path / "x")


def test_shard_outside_the_directory(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "sharded", tmp_path / "x")
    path = tmp_path / "x" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = {name: f"../{file}" for name, file in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="not a file name"):
        independent_decoder.decode(tmp_path / "x")


NAME = "model.layers.0.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"


def both_accept(directory: Path) -> bool:
    """Whether cerwu_gpu and the decoder of the document read a directory; they must agree."""
    outcomes = []
    for read, refusal in ((verify, CerwuError), (independent_decoder.decode, ValueError)):
        try:
            read(directory)
            outcomes.append(True)
        except refusal:
            outcomes.append(False)
    assert outcomes[0] == outcomes[1]
    return outcomes[0]


def part(**changes: Any) -> Callable[[Opened], None]:
    return lambda opened: opened.manifest["compressed"][NAME]["parts"][0].update(changes)


def entry(**changes: Any) -> Callable[[Opened], None]:
    return lambda opened: opened.manifest["compressed"][NAME].update(changes)


def array(name: str, first: float) -> Callable[[Opened], None]:
    """Another first item of a side array."""

    def edit(opened: Opened) -> None:
        own = opened.manifest["compressed"][NAME]["parts"][0]
        arrays = side.unpack(opened.data[f"{NAME}.side"], own["rows"], own["columns"])
        arrays[name] = np.array([first, *arrays[name][1:]], dtype=arrays[name].dtype)
        opened.resize(NAME, "side", side.pack(arrays, own["rows"], own["columns"]))

    return edit


def constant(
    rows: int, columns: int, row_class: bytes = b"\2\0\0\1", integer: int = 0
) -> Callable[[Opened], None]:
    """A matrix of one integer in one stream of no words; `row_class`: bytes of the side data."""

    def edit(opened: Opened) -> None:
        arrays = b"\1\0\1\1\1" + row_class + b"\3\0\0\1" + b"\4\0\0\1\0" + b"\5\0\0\1\0"
        opened.resize(NAME, "words", b"")
        opened.resize(NAME, "side", arrays + b"\x08\0\1\0\1")
        entry(shape=[rows, columns], transposed=False)(opened)
        part(rows=rows, columns=columns, lowest=integer, size=1)(opened)
        part(escapes=0, tables=1, escaped=0)(opened)

    return edit


ACCEPTED: dict[str, tuple[str, Callable[[Opened], None]]] = {
    "unchanged": ("scalar", lambda opened: None),
    "lowest-allowed": ("scalar", constant(4, 4, integer=1 - 2**31)),
    "loss-integer": ("scalar", part(relative_loss=1)),
    "loss-null": ("scalar", part(relative_loss=None)),
    "three-axes": ("scalar", entry(shape=[1, 12, 8])),
    "escape-in-the-alphabet": ("escapes", array("escapes", 0)),
    "escape-smallest": ("escapes", array("escapes", 1 - 2**31)),
    "zero-groups": ("scalar", constant(4, 4, b"\2\0\x80\x80\0\x81\0")),
    "zero-groups-5": ("scalar", constant(4, 4, b"\2\0\0\x81\x80\x80\x80\0")),
    "deflated-nothing": ("scalar", constant(4, 4, b"\2\x10\0\1\2\3\0")),
}
REFUSED: dict[str, tuple[str, Callable[[Opened], None]]] = {
    "lowest": ("scalar", constant(4, 4, integer=-(2**31))),
    "loss-text": ("scalar", part(relative_loss="0")),
    "loss-boolean": ("scalar", part(relative_loss=True)),
    "loss-huge": ("scalar", part(relative_loss=10**400)),
    "loss-infinite": ("scalar", part(relative_loss=float("inf"))),
    "generator": ("scalar", lambda opened: opened.manifest.update(generator=1)),
    "four-axes": ("scalar", entry(shape=[1, 1, 12, 8])),
    "nested-shape": ("scalar", entry(shape=[[12], 8])),
    "many-weights": ("scalar", constant(2**15, 2**15)),
    "many-slots": ("scalar", part(tables=20, lowest=0, size=65535)),
    "grid-descends": ("grid", array("grid", 1e30)),
    "grid-infinite": ("grid", array("grid", -np.inf)),
    "grid-nan": ("grid", array("grid", np.nan)),
    "escape-below": ("escapes", array("escapes", -(2**31))),
    "escape-trellis": ("escapes-trellis", array("escapes", -(2**30))),
    "zero-groups-6": ("scalar", constant(4, 4, b"\2\0\0\x81\x80\x80\x80\x80\0")),
    "product-of-2**64": (
        "scalar",
        constant(4, 4, b"\2\4\0\x80\x80\x80\x80\x20" + b"\0" * 12 + b"\x80" * 4),
    ),
}


@pytest.mark.parametrize("name", [*ACCEPTED, *REFUSED])
def test_both_readers_agree(name: str, tmp_path: Path) -> None:
    kind, edit = {**ACCEPTED, **REFUSED}[name]
    directory = Path(shutil.copytree(GOLDEN / kind, tmp_path / "x"))
    file = directory / "model.safetensors"
    opened = Opened.of(file.read_bytes())
    edit(opened)
    file.write_bytes(opened.joined())
    assert both_accept(directory) == (name in ACCEPTED)


def infinite(header: dict[str, Any]) -> None:
    """A loss beyond float64."""
    text = header["__metadata__"]["cerwu"]
    header["__metadata__"]["cerwu"] = re.sub(
        '"relative_loss":[^,}]*', '"relative_loss":1e999', text
    )
    mend(header)


def overlap(header: dict[str, Any]) -> None:
    """Words that lie where others do, and leave a gap of their size."""
    found = (x["data_offsets"] for name, x in header.items() if name.endswith(".words"))
    begin, end = next(offsets for offsets in found if offsets[0] > 0)
    spoiled = next(x for x in header.values() if x.get("data_offsets") == [begin, end])
    spoiled["data_offsets"] = [begin - 4, end - 4]


@pytest.mark.parametrize(("rows", "accepted"), [(32, True), (33, False)])
def test_both_readers_agree_on_the_longest_stream(
    rows: int, accepted: bool, tmp_path: Path
) -> None:
    """Before they decode it."""
    directory = Path(shutil.copytree(GOLDEN / "scalar", tmp_path / "x"))
    file = directory / "model.safetensors"
    opened = Opened.of(file.read_bytes())
    constant(rows, 4096)(opened)
    file.write_bytes(opened.joined())
    matrix = independent_decoder.File(file).matrices[NAME][0]
    if accepted:
        open_directory(directory).stored(NAME)
        matrix.read(opened.data[f"{NAME}.side"], np.empty(0, np.uint32))
        return
    with pytest.raises(CerwuError, match="streams are too few"):
        open_directory(directory).stored(NAME)
    with pytest.raises(ValueError, match="few streams"):
        matrix.read(opened.data[f"{NAME}.side"], np.empty(0, np.uint32))


HEADERS: dict[str, tuple[bool, Callable[[dict[str, Any]], None]]] = {
    "unchanged": (True, lambda header: None),
    "no-checksum": (False, lambda header: header["__metadata__"].pop("cerwu_sha256")),
    "checksum": (False, lambda header: header["__metadata__"].update(cerwu_sha256="0" * 64)),
    "dtype": (False, lambda header: header["model.norm.weight"].update(dtype="I32")),
    "format": (True, lambda header: header["__metadata__"].pop("format")),
    "loss": (False, infinite),
    "overlap": (False, lambda header: overlap(header)),
    "backwards": (False, lambda header: header["model.norm.weight"]["data_offsets"].reverse()),
}


@pytest.mark.parametrize("name", HEADERS)
def test_both_readers_agree_on_headers(name: str, tmp_path: Path) -> None:
    accepted, edit = HEADERS[name]
    directory = Path(shutil.copytree(GOLDEN / "scalar", tmp_path / "x"))
    header, data = read_header(directory / "model.safetensors")
    edit(header)
    write_file(directory / "model.safetensors", header, data)
    assert both_accept(directory) == accepted


INDICES: dict[str, tuple[bool, Callable[[dict[str, Any]], None]]] = {
    "unchanged": (True, lambda index: None),
    "total-size": (True, lambda index: index.update(metadata={"total_size": 1})),
    "no-metadata": (True, lambda index: index.pop("metadata")),
    "list": (False, lambda index: index.update(weight_map=list(index["weight_map"].items()))),
    "empty": (False, lambda index: index.update(weight_map={})),
    "missing": (False, lambda index: index["weight_map"].popitem()),
    "another": (
        False,
        lambda index: index["weight_map"].update(x="model-00001-of-00003.safetensors"),
    ),
}


@pytest.mark.parametrize("name", INDICES)
def test_both_readers_agree_on_the_index(name: str, tmp_path: Path) -> None:
    accepted, edit = INDICES[name]
    directory = Path(shutil.copytree(GOLDEN / "sharded", tmp_path / "x"))
    index = json.loads((directory / INDEX).read_text())
    edit(index)
    (directory / INDEX).write_text(json.dumps(index))
    (directory / "config.json").unlink()  # a decoder needs none
    assert both_accept(directory) == accepted


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    """A plain tensor with the name of a compressed parameter's words in another file."""
    directory = Path(shutil.copytree(GOLDEN / "sharded", tmp_path / "x"))
    index = json.loads((directory / INDEX).read_text())
    places = index["weight_map"]
    words = next(name for name in places if name.endswith(".words"))
    other = next(file for file in places.values() if file != places[words])
    opened = Opened.of((directory / other).read_bytes())
    opened.header[words] = {"dtype": "U8", "shape": [1]}
    opened.data[words] = b"x"
    opened.manifest["plain_sha256"][words] = ""
    (directory / other).write_bytes(opened.joined())
    for file in (places[words], other):
        places[words] = file
        (directory / INDEX).write_text(json.dumps(index))
        assert not both_accept(directory)


def test_checksum_of_the_header() -> None:
    """The example of the document."""
    header = {"b": {"dtype": "F16", "shape": []}, "a": {"dtype": "F32", "shape": [2, 3]}}
    beginning = independent_decoder.header_sha256("{}", header)[:16]
    assert f"begin with {beginning}" in (HERE.parent / "docs" / "format.md").read_text()
