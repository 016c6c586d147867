"""Directories made to do harm: each is refused in one sentence, before anything is allocated."""

import json
import shutil
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cerwu_gpu import backend
from cerwu_gpu.coding import side
from cerwu_gpu.container import reader
from cerwu_gpu.container.header import Manifest, Part
from cerwu_gpu.container.matrix import encode_matrix
from cerwu_gpu.container.reader import open_directory, verify
from cerwu_gpu.container.writer import DirectoryWriter
from cerwu_gpu.errors import CorruptionError, FormatError, VersionError
from cerwu_gpu.quantize.layer import quantize_stack
from cerwu_gpu.spec import TABLE_SLOTS_LIMIT, WEIGHTS_PER_BYTE
from tests.configs import configured
from tests.fuzz.mutations import Opened

GOLDEN = Path(__file__).parents[1] / "golden"
NAME = "model.layers.0.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def copy(tmp_path: Path):
    """A copy of a golden directory."""
    return lambda kind: Path(shutil.copytree(GOLDEN / kind, tmp_path / kind))


def change(directory: Path, edit, spoil=lambda header: None) -> None:
    """Edit the only file of a directory; all checksums are right afterwards."""
    file = directory / "model.safetensors"
    opened = Opened.of(file.read_bytes())
    edit(opened)
    file.write_bytes(opened.joined(spoil))


def entry(opened: Opened) -> dict:
    return opened.manifest["compressed"][NAME]


def part(**changes):
    return lambda opened: entry(opened)["parts"][0].update(changes)


def resized(rows: int, columns: int):
    def edit(opened: Opened) -> None:
        entry(opened)["shape"] = [rows, columns]
        entry(opened)["parts"][0].update(rows=rows, columns=columns)

    return edit


def arrays(**changes):
    """Replace side arrays of the weight NAME by what the functions make of them."""

    def edit(opened: Opened) -> None:
        own = entry(opened)["parts"][0]
        found = side.unpack(opened.data[f"{NAME}.side"], own["rows"], own["columns"])
        for name, function in changes.items():
            found[name] = function(found[name])
        opened.resize(NAME, "side", side.pack(found, own["rows"], own["columns"]))

    return edit


def side_bytes(function):
    return lambda opened: opened.resize(NAME, "side", function(opened.data[f"{NAME}.side"]))


def bomb(opened: Opened) -> None:
    """row_class, 12 bytes of it, expands to 64 MiB."""
    own = entry(opened)["parts"][0]
    found = side.unpack(opened.data[f"{NAME}.side"], own["rows"], own["columns"])
    codes = side.pack({"table_codes": found["table_codes"]}, own["rows"], own["columns"])
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = b"".join(coder.compress(bytes(1 << 20)) for _ in range(64)) + coder.flush()
    size = bytes([len(packed) & 0x7F | 0x80, len(packed) >> 7 & 0x7F | 0x80, len(packed) >> 14])
    opened.resize(NAME, "side", codes + b"\x02\x11\x00\x01" + size + packed)


ATTACKS = {
    "rows-2**31": (resized(2**31, 8), "contradicts itself"),
    "a-terabyte": (resized(2**20, 2**18), "claims 274877906944 weights, too many"),
    "a-long-row": (resized(1, 2**19), "side data|streams are too few"),
    "a-long-column": (resized(2**19, 1), "side data|streams are too few"),
    "tables-of-gigabytes": (part(tables=20, size=2**15 - 1, lowest=-(2**14) + 1), "table_codes"),
    "tables-beyond-the-limit": (part(tables=20, size=2**16), "contradicts itself"),
    "side-rows": (arrays(lengths=lambda x: x[:0]), "wrong number of streams"),
    "length-of-a-stream": (arrays(lengths=lambda x: x + 1), "wrong number of words"),
    "class-past-the-tables": (arrays(row_class=lambda x: x + 100), "wrong classes"),
    "code-too-large": (arrays(table_codes=lambda x: x | 192), "a table code is"),
    "side-cut": (side_bytes(lambda data: data[:-3]), "too early|disagree"),
    "side-continued": (side_bytes(lambda data: data + b"\x0c"), "unknown or out of order"),
    "side-empty": (side_bytes(lambda data: b""), "disagree on"),
    "zlib-bomb": (bomb, "does not end where it must"),
    "no-parts": (lambda opened: entry(opened).update(parts=[]), "no parts"),
    "words-promised": (part(words=2**30), "wrong length"),
    "lowest-beyond-int32": (part(lowest=2**31 - 2), "contradicts itself"),
    "lowest-int32": (part(lowest=-(2**31)), "contradicts itself"),
    "a-loss-as-text": (part(relative_loss="0"), "malformed"),
    "shape-negative": (lambda opened: entry(opened).update(shape=[-12, -8]), "do not fill"),
    "a-part-is-a-list": (lambda opened: entry(opened).update(parts=[[1]]), "malformed"),
    "not-a-number": (part(relative_loss=float("nan")), "not JSON .NaN is no number"),
    "unprintable": (
        lambda o: o.manifest["compressed"].update({"a\x1b[2J": o.manifest["compressed"].pop(NAME)}),
        "cannot be printed",
    ),
    "trellis32-in-version-1": (
        part(quantizer="trellis32", escapes=0, escaped=0),
        "format 1 has no trellis32",
    ),
    "trellis64": (part(quantizer="trellis64"), "contradicts itself"),
    "newer": (lambda opened: opened.manifest.update(version=3), "made by a newer cerwu_gpu"),
    "older": (lambda opened: opened.manifest.update(version=0), "no format version"),
    "version-as-text": (lambda opened: opened.manifest.update(version="1"), "no format version"),
}


@pytest.mark.parametrize(("edit", "message"), ATTACKS.values(), ids=ATTACKS)
def test_an_attack_is_refused(copy, edit, message):
    directory = copy("scalar")
    change(directory, edit)
    with pytest.raises(FormatError, match=message):
        verify(directory)


def test_a_newer_file_is_said_to_be_newer_whatever_else_it_holds(copy):
    directory = copy("scalar")

    def edit(opened: Opened) -> None:
        opened.manifest = {"version": 3, "weights": []}

    change(directory, edit)
    with pytest.raises(VersionError, match="made by a newer cerwu_gpu"):
        open_directory(directory)


HEADERS = {
    "overlap": lambda header: header[f"{NAME}.side"].update(
        data_offsets=header["model.norm.weight"]["data_offsets"]
    ),
    "outside": lambda header: header[f"{NAME}.side"].update(data_offsets=[2**40, 2**40 + 8]),
    "negative": lambda header: header[f"{NAME}.side"].update(data_offsets=[-8, 0]),
    "backwards": lambda header: header[f"{NAME}.side"]["data_offsets"].reverse(),
    "dtype": lambda header: header[f"{NAME}.side"].update(dtype="I8"),
    "axes": lambda header: header[f"{NAME}.side"]["shape"].append(1),
    "a-tensor-more": lambda header: header.update(x={**header["model.norm.weight"]}),
    "no-manifest": lambda header: header["__metadata__"].clear(),
}


@pytest.mark.parametrize("spoil", HEADERS.values(), ids=HEADERS)
def test_a_header_that_lies_is_refused(copy, spoil):
    directory = copy("scalar")
    change(directory, lambda opened: None, spoil)
    with pytest.raises(FormatError):
        verify(directory)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'\\"lowest\\":-1,', b'\\"lowest\\":-2,'),
        (
            b'"model.norm.weight":{"dtype":"F32","shape":[8]',
            b'"model.norm.weight":{"dtype":"I32","shape":[8]',
        ),
        (b'\\"transposed\\":false', b'\\"transposed\\":true '),
    ],
    ids=["manifest", "dtype", "flag"],
)
def test_one_changed_byte_of_the_header_is_noticed(copy, old, new):
    """Even where what it says then would make sense."""
    directory = copy("scalar")
    file = directory / "model.safetensors"
    raw = file.read_bytes()
    assert old in raw
    file.write_bytes(raw.replace(old, new, 1))
    with pytest.raises(FormatError, match=r"has changed|do not fill"):
        verify(directory)


def raw_header(directory: Path, function) -> None:
    """Replace the length and text of the header by what the function makes of the text."""
    file = directory / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    text, claimed = function(raw[8 : 8 + length])
    length_bytes = struct.pack("<Q", len(text) if claimed is None else claimed)
    file.write_bytes(length_bytes + text + raw[8 + length :])


TEXTS = {
    "a-name-twice": (lambda text: (b'{"model.norm.weight":{},' + text[1:], None), "twice|readable"),
    "metadata-twice": (lambda text: (b'{"__metadata__":{},' + text[1:], None), "twice|readable"),
    "deep": (lambda text: (b"[" * 10**6, None), "readable"),
    "longer-than-the-file": (lambda text: (text, 2**40), "readable"),
    "longer-than-memory": (lambda text: (text, 2**64 - 1), "readable"),
    "empty": (lambda text: (b"", None), "readable"),
    "no-utf-8": (lambda text: (text.replace(b"pt", b"\xff\xfe"), None), "readable"),
}


@pytest.mark.parametrize(("function", "message"), TEXTS.values(), ids=TEXTS)
def test_a_header_that_is_no_header_is_refused(copy, function, message):
    directory = copy("scalar")
    raw_header(directory, function)
    with pytest.raises(FormatError, match=message):
        verify(directory)


@pytest.mark.parametrize("digest", ["zz", "A" * 64, "a" * 63, None])
def test_a_checksum_is_64_digits(digest):
    manifest = {"version": 1, "generator": "", "compressed": {}, "plain_sha256": {"x": digest}}
    with pytest.raises(FormatError):
        Manifest.from_json(json.dumps(manifest), "file.safetensors")


MANIFESTS = {
    "deep": "[" * 10**6,
    "a-name-twice": '{"version": 1, "version": 1}',
    "long-number": '{"version": ' + "1" * 5000 + "}",
    "a-list": "[1]",
    "nothing": "",
}


@pytest.mark.parametrize("text", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_is_none_is_refused(text):
    with pytest.raises(FormatError, match=r"^file\.safetensors"):
        Manifest.from_json(text, "file.safetensors")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
FIELDS = ["version", "generator", "compressed", "plain_sha256"]


@settings(max_examples=50, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(FIELDS, json_values)), st.booleans())
def test_any_json_is_a_manifest_or_refused(content, versioned):
    if versioned:
        content["version"] = 1
    with suppress(FormatError):
        Manifest.from_json(json.dumps(content), "file.safetensors")


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_change_of_a_part_is_refused_or_understood(data):
    """Whatever passes the checks has numbers that the decoder can allocate by."""
    opened = Opened.of((GOLDEN / "escapes-trellis" / "model.safetensors").read_bytes())
    chosen = entry(opened)["parts"][0]
    key = data.draw(st.sampled_from(sorted(chosen)))
    chosen[key] = data.draw(json_values | st.integers(-(2**40), 2**40))
    try:
        manifest = Manifest.from_json(json.dumps(opened.manifest), "file.safetensors")
    except FormatError:
        return
    checked = manifest.compressed[NAME].parts[0]
    assert checked.tables * checked.quantizers * checked.alphabet <= 1 << 20
    assert 0 <= checked.escaped <= checked.rows * checked.columns


LIES = {
    "a-path": lambda files: dict.fromkeys(files, "../sharded/model-00001-of-00003.safetensors"),
    "an-absolute-path": lambda files: dict.fromkeys(files, "/etc/passwd"),
    "a-windows-path": lambda files: dict.fromkeys(files, "..\\model.safetensors"),
    "the-parent": lambda files: dict.fromkeys(files, ".."),
    "zero-byte": lambda files: dict.fromkeys(files, "model\0.safetensors"),
    "a-number": lambda files: dict.fromkeys(files, 1),
    "nothing": lambda files: {},
    "a-list": lambda files: list(files),
    "a-list-of-pairs": lambda files: list(files.items()),
    "another-file": lambda files: dict(zip(files, reversed(files.values()), strict=True)),
    "one-file-for-all": lambda files: dict.fromkeys(files, min(files.values())),
    "a-tensor-less": lambda files: dict(list(files.items())[1:]),
    "a-tensor-more": lambda files: {**files, "x": min(files.values())},
    "config": lambda files: {**files, "x": "config.json"},
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES)
def test_an_index_that_lies_is_refused(copy, lie):
    directory = copy("sharded")
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"] = lie(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))
    with pytest.raises(FormatError):
        open_directory(directory)


def test_a_missing_file_is_named(copy):
    directory = copy("sharded")
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FormatError, match="model-00002-of-00003"):
        open_directory(directory)


def test_a_link_is_followed_only_to_a_file(copy):
    """The hub's cache is made of links to files; one to a device or directory is none."""
    directory = copy("scalar")
    file = directory / "model.safetensors"
    moved = file.rename(directory / "blob")
    file.symlink_to(moved)
    verify(directory)
    for target in ("/dev/zero", "."):
        file.unlink()
        file.symlink_to(target)
        with pytest.raises(FormatError, match=r"holds no model\.safetensors"):
            verify(directory)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 9.0], ids=str)
def test_a_grid_is_finite_and_ascending(copy, value):
    directory = copy("grid")

    def spoiled(grid):
        return np.array([grid[0], value, *grid[2:]], dtype=np.float32)

    change(directory, arrays(grid=spoiled))
    with pytest.raises(FormatError, match=rf"^{NAME}: its grid is not finite and ascending"):
        verify(directory)


@pytest.mark.parametrize("value", [2**30, -(2**30), -(2**31)])
def test_under_a_trellis_integers_are_below_2_to_the_30(copy, value):
    directory = copy("escapes-trellis")
    change(directory, arrays(escapes=lambda x: np.array([value, *x[1:]], dtype=np.int32)))
    with pytest.raises(FormatError, match="an escaped integer is too large"):
        verify(directory)


def test_an_escape_of_another_parity_is_noticed(copy):
    directory = copy("escapes-trellis")
    change(directory, arrays(escapes=lambda x: np.array([x[0] ^ 1, *x[1:]], dtype=np.int32)))
    with pytest.raises(CorruptionError, match=rf"^{NAME}: an escape has the wrong parity"):
        verify(directory)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60), st.integers(1, 40), st.integers(1, 40))
def test_any_bytes_are_side_data_or_refused(blob, m, n):
    try:
        found = side.unpack(blob, m, n)
    except FormatError:
        return
    assert all(array.size <= max(TABLE_SLOTS_LIMIT, m * n) for array in found.values())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000), st.sampled_from([0, 6, 25]))
def test_tiny_matrices_have_no_more_tables_than_rows_and_columns(m, n, seed, octaves):
    """However far their rows and columns are apart: their file would be refused."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(m, 1, generator=generator) * octaves
    weight = torch.randn(m, n, generator=generator) * torch.exp2(spread)
    x = torch.randn(n, 20, generator=generator) * torch.exp2(torch.rand(n, 1) * octaves)
    stack = quantize_stack([weight], x @ x.t() / 10, configured(lmbda=1e-3))
    encode_matrix(stack.matrices[0], 0.5).part.check("w")


def empty_matrix(path: Path, rows: int, columns: int, streams: int) -> None:
    """A directory with one matrix of one symbol: no words, and arrays of width 0."""
    counts = {"row_class": (rows, np.uint8), "column_class": (columns, np.uint8)}
    counts |= {"step_code": (columns, np.int16), "row_scale_code": (rows, np.int16)}
    arrays: dict = {name: np.zeros(count, dtype) for name, (count, dtype) in counts.items()}
    arrays |= {
        "table_codes": np.zeros((1, 1, 1), np.uint8),
        "lengths": np.zeros(streams, np.uint32),
    }
    blob = side.pack(arrays, rows, columns)
    only = Part(rows, columns, "scalar", 0, 1, 0, 1, 0, len(blob), 0, None)
    with DirectoryWriter(path, generator="") as writer:
        writer.add_compressed(
            "w",
            shape=(rows, columns),
            dtype=torch.float32,
            transposed=False,
            parts=(only,),
            words=torch.zeros(0, dtype=torch.uint32),
            side=torch.frombuffer(bytearray(blob), dtype=torch.uint8),
        )
        writer.complete()
        writer.publish()


def test_a_small_file_cannot_ask_for_much(tmp_path):
    """The writer makes up for matrices of no bits; without its blanks they are refused."""
    path = tmp_path / "out"
    empty_matrix(path, 1 << 10, 1 << 10, 8)
    assert (path / "model.safetensors").stat().st_size >= (1 << 20) // WEIGHTS_PER_BYTE
    verify(path)
    assert not next(open_directory(path).weights())[1].any()
    raw_header(path, lambda text: (text.rstrip(b" "), None))
    assert (path / "model.safetensors").stat().st_size < 2000
    with pytest.raises(FormatError, match="claims 1048576 weights, too many"):
        verify(path)


def test_a_matrix_has_at_most_511_classes(copy):
    directory = copy("scalar")
    change(directory, lambda o: (resized(1 << 10, 8)(o), part(tables=512)(o)))
    with pytest.raises(FormatError, match="contradicts itself"):
        open_directory(directory)


def test_many_tables_are_laid_out_a_few_at_a_time(tmp_path, monkeypatch):
    """The weights are those that they are together."""
    directory = GOLDEN / "moe"
    expected = dict(open_directory(directory).weights())
    calls = []
    decode = backend.decode_weights
    monkeypatch.setattr(
        backend, "decode_weights", lambda *a: (calls.append(len(a[0])), decode(*a))[1]
    )
    monkeypatch.setattr(reader, "BATCH_TABLES", 2)
    found = dict(open_directory(directory).weights())
    assert len(calls) > 2
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
