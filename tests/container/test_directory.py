"""Directories: written, read back, and refused when they are not what the format says."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cerwu_gpu.container.header import Entry, Manifest, Part
from cerwu_gpu.container.matrix import encode_matrix
from cerwu_gpu.container.reader import inventory, open_directory, verify
from cerwu_gpu.container.writer import DirectoryWriter
from cerwu_gpu.errors import CerwuError, CorruptionError, FormatError, OutputError, VersionError
from cerwu_gpu.quantize.layer import quantize_stack
from tests.configs import configured
from tests.fuzz.mutations import mend

SETTINGS = {
    "scalar": {"lmbda": 1e-2},
    "trellis4": {"lmbda": 1e-2, "quantizer": "trellis4"},
    "trellis8": {"lmbda": 1e-2, "quantizer": "trellis8"},
    "escapes": {"lmbda": 1e-2},
    "levels": {"lmbda": 1e-2, "levels": 15},
    "even-levels": {"lmbda": 1e-2, "levels": 16},
    "grid": {"lmbda": 0.0, "grid": (-1.0, -0.3, 0.0, 0.1, 0.7)},
}


def quantized(kind: str, rows: int = 24, columns: int = 18):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(rows, columns, generator=generator)
    if kind == "escapes":
        weight[3, 4], weight[5, 6] = 900.0, -77.0
    x = torch.randn(columns, 50, generator=generator)
    stack = quantize_stack([weight], x @ x.t() / 25, configured(**SETTINGS[kind]))
    return stack.matrices[0]


def add(writer: DirectoryWriter, name: str, matrices, dtype=torch.float32, transposed=False):
    encoded = [encode_matrix(matrix, 0.5) for matrix in matrices]
    rows, columns = matrices[0].symbols.shape
    shape = (columns, rows) if transposed else (rows, columns)
    writer.add_compressed(
        name,
        shape=shape if len(matrices) == 1 else (len(matrices), *shape),
        dtype=dtype,
        transposed=transposed,
        parts=tuple(each.part for each in encoded),
        words=torch.cat([torch.from_numpy(each.words) for each in encoded]),
        side=torch.frombuffer(bytearray(b"".join(e.side for e in encoded)), dtype=torch.uint8),
    )


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    with DirectoryWriter(path, generator="test") as writer:
        for kind in SETTINGS:
            add(writer, kind, [quantized(kind)])
        add(writer, "experts", [quantized("scalar"), quantized("levels")], torch.bfloat16, True)
        writer.add_plain("norm", torch.arange(5, dtype=torch.bfloat16))
        writer.complete()
        writer.publish()
    return path


def rewrite(path: Path, change) -> None:
    """Change the manifest of a file, with a checksum that fits, and keep its data."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    manifest = json.loads(header["__metadata__"]["cerwu"])
    change(manifest, header)
    header["__metadata__"]["cerwu"] = json.dumps(manifest)
    mend(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize("kind", SETTINGS)
def test_what_is_read_is_what_was_written(written: Path, kind: str):
    weights = dict(open_directory(written).weights())
    assert torch.equal(weights[kind], quantized(kind).weight(torch.float32))


def test_experts_are_transposed_and_rounded_once(written: Path):
    weights = dict(open_directory(written).weights())
    expected = [quantized(kind).weight(torch.bfloat16).t() for kind in ("scalar", "levels")]
    assert torch.equal(weights["experts"], torch.stack(expected))


def test_plain_tensors_and_bytes_add_up(written: Path):
    assert torch.equal(dict(open_directory(written).plain())["norm"], torch.arange(5).bfloat16())
    found = inventory(written)
    assert found.total_bytes == sum(file.stat().st_size for file in written.iterdir())
    assert {entry.name for entry in found.tensors} == {*SETTINGS, "experts", "norm"}
    verify(written)


def test_the_same_content_gives_the_same_bytes(tmp_path: Path):
    files = []
    for name, order in (("a", ("scalar", "grid")), ("b", ("grid", "scalar"))):
        with DirectoryWriter(tmp_path / name, generator="test") as writer:
            for kind in order:
                add(writer, kind, [quantized(kind)])
            writer.complete()
            writer.publish()
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_large_models_are_cut_into_files_with_an_index(tmp_path: Path):
    with DirectoryWriter(tmp_path / "out", generator="test", shard_bytes=600) as writer:
        for kind in SETTINGS:
            add(writer, kind, [quantized(kind)])
        writer.complete()
        writer.publish()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    for kind in SETTINGS:
        words, side = (index["weight_map"][f"{kind}.{suffix}"] for suffix in ("words", "side"))
        assert words == side
    weights = dict(open_directory(tmp_path / "out").weights())
    assert torch.equal(weights["escapes"], quantized("escapes").weight(torch.float32))
    next((tmp_path / "out").glob("model-00001-*")).unlink()
    with pytest.raises(FormatError, match="not in the directory"):
        open_directory(tmp_path / "out")


def test_side_data_can_be_replaced_until_the_end(tmp_path: Path):
    """In memory and in files that are written already: as if it had been so from the beginning."""
    first, last = quantized("scalar"), quantized("scalar")
    last = replace(last, row_scale=torch.arange(24, dtype=torch.int16))
    contents = []
    for name, shard_bytes, replaced in (("a", 1, True), ("b", 1, False), ("c", 1 << 20, True)):
        with DirectoryWriter(tmp_path / name, generator="t", shard_bytes=shard_bytes) as writer:
            for weight in ("x", "y"):
                add(writer, weight, [first if replaced else last])
            assert writer.words("x").dtype == torch.uint32
            if replaced:
                encoded = encode_matrix(last, 0.5)
                blob = torch.frombuffer(bytearray(encoded.side), dtype=torch.uint8)
                for weight in ("x", "y"):
                    assert torch.equal(writer.words(weight), torch.from_numpy(encoded.words))
                    writer.replace_side(weight, (encoded.part,), blob)
            writer.add_plain("z", torch.ones(3))
            writer.complete()
            writer.publish()
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
        for _, weight in open_directory(tmp_path / name).weights():
            assert torch.equal(weight, last.weight(torch.float32))
    assert contents[0] == contents[1]


def test_a_failure_leaves_nothing(tmp_path: Path):
    with pytest.raises(RuntimeError), DirectoryWriter(tmp_path / "out", generator="t") as writer:
        add(writer, "scalar", [quantized("scalar")])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_is_not_empty_is_kept(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not empty"):
        DirectoryWriter(tmp_path / "out", generator="test")
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


CONTRADICTIONS = {
    "rows": lambda part: part.update(rows=25),
    "huge": lambda part: part.update(rows=2**31 - 1, columns=2**31 - 1),
    "negative": lambda part: part.update(columns=-1),
    "words": lambda part: part.update(words=part["words"] + 1),
    "side": lambda part: part.update(side=0),
    "alphabet": lambda part: part.update(size=part["size"] + 2),
    "escapes": lambda part: part.update(escapes=2),
    "quantizer": lambda part: part.update(quantizer="trellis5"),
    "other-quantizer": lambda part: part.update(quantizer="trellis4"),
    "tables": lambda part: part.update(tables=10**9),
    "boolean": lambda part: part.update(tables=True),
    "missing": lambda part: part.pop("lowest"),
}


@pytest.mark.parametrize("change", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_manifest_that_contradicts_its_data_is_refused(written: Path, change):
    def edit(manifest, header):
        change(manifest["compressed"]["scalar"]["parts"][0])

    rewrite(written / "model.safetensors", edit)
    with pytest.raises(FormatError):
        verify(written)


def test_a_grid_starts_at_zero(written: Path):
    def edit(manifest, header):
        manifest["compressed"]["grid"]["parts"][0]["lowest"] = -3

    rewrite(written / "model.safetensors", edit)
    with pytest.raises(FormatError, match="contradicts itself"):
        verify(written)


def test_a_newer_version_is_refused_by_name(written: Path):
    rewrite(written / "model.safetensors", lambda manifest, header: manifest.update(version=99))
    with pytest.raises(VersionError, match=r"made by a newer cerwu_gpu"):
        open_directory(written)


def test_every_changed_byte_is_noticed(written: Path):
    """One byte in each of many places: an error that says so, or the very same weights."""
    file = written / "model.safetensors"
    raw = file.read_bytes()
    before = dict(open_directory(written).weights())
    for place in range(0, len(raw), max(1, len(raw) // 150)):
        broken = bytearray(raw)
        broken[place] ^= 0x41
        file.write_bytes(broken)
        try:
            verify(written)
            after = dict(open_directory(written).weights())
        except CerwuError:
            continue
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_changed_word_is_named(written: Path):
    file = written / "model.safetensors"
    raw = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    begin = header["trellis8.words"]["data_offsets"][0]
    raw[8 + length + begin + 5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CorruptionError, match=r"trellis8\.words"):
        verify(written)
    with pytest.raises(CorruptionError, match="trellis8"):
        dict(open_directory(written).weights(verify=False))


def test_manifests_survive_their_json():
    part = Part(3, 4, "scalar", -1, 3, 1, 2, 5, 6, 0, 0.25)
    entry = Entry((3, 4), "float16", False, (part,), "0" * 64, "f" * 64)
    manifest = Manifest("test", {"w": entry}, {"n": "a" * 64})
    assert Manifest.from_json(manifest.to_json(), "file") == manifest
