"""Full disks, few files, closed pipes and signals: one sentence and exit code 2 or 130.

`scripts/limits.py` and `scripts/kill_and_resume.py` do the same at many levels and moments.
"""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import cerwu_gpu
from cerwu_gpu import ConfigError, FormatError, ModelError, OutputError
from cerwu_gpu.calibration.cache import HessianCache, cached_sensitivities
from cerwu_gpu.container.reader import open_directory
from cerwu_gpu.container.work import work_path
from cerwu_gpu.container.writer import check_storable
from cerwu_gpu.errors import shortage
from cerwu_gpu.files import resolved, written
from cerwu_gpu.hf.models import load_model
from tests.configs import compress_flat, configured
from tests.hf.toys import toy
from tests.test_cli_wrong_input import FEW, Command, assert_refused, contents

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"


def apart(*words: str | Path, stdout: Any = subprocess.PIPE, files: int | None = None) -> Any:
    """`cerwu-gpu` in a process of its own, with a number of files that it may open."""

    def limit() -> None:
        if files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    return subprocess.run(
        [sys.executable, "-m", "cerwu_gpu", *map(str, words)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=limit,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", [("--help",), ("info", GOLDEN / "scalar")], ids=["help", "info"])
def test_a_result_that_cannot_be_printed(words: tuple[str | Path, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = apart(*words, stdout=full)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("cerwu-gpu: ")
    assert "No space left" in done.stderr


def test_a_pipe_that_nobody_reads() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        done = apart("info", GOLDEN / "scalar", stdout=pipe)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "Broken pipe" in done.stderr


def test_six_files_are_enough_to_look_at_a_directory() -> None:
    done = apart("verify", GOLDEN / "sharded", files=9)
    assert (done.returncode, done.stderr) == (0, "")


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file may become larger, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 3000])
def test_decompress_on_a_full_disk(size: int, command: Command, tmp_path: Path) -> None:
    with small_files(size):
        outcome = command("decompress", GOLDEN / "scalar", "-o", tmp_path / "out")
    assert_refused(outcome, "cannot write", "free some space")
    assert contents(tmp_path) == {}


def test_compress_on_a_full_disk(
    command: Command, toy_directory: Path, toy_text: Path, tmp_path: Path
) -> None:
    options = ("-o", tmp_path / "out", "--calibration", toy_text, *FEW)
    with small_files(3000):
        outcome = command("compress", toy_directory, *options)
    assert_refused(outcome, "free some space")
    assert {path.name for path in tmp_path.iterdir()} <= {".out.work"}


def test_a_disk_that_is_full_is_recognised_in_every_library() -> None:
    for error in (
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
        Exception("File too large (os error 27)"),
        OSError(errno.EDQUOT, "quota"),
    ):
        with pytest.raises(OutputError, match="free some space"), written(Path("out")):
            raise error
    with pytest.raises(KeyError), written(Path("out")):
        raise KeyError("a defect")


SHORTAGES = {
    "memory": (
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("std::bad_alloc"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("can't start new thread"),
    ),
    "files that may be open (ulimit -n)": (
        OSError(errno.EMFILE, "Too many open files"),
        SafetensorError("Too many open files (os error 24)"),
    ),
}


@pytest.mark.parametrize("what", SHORTAGES)
def test_what_is_short_is_named(
    what: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in SHORTAGES[what]:
        assert shortage(error) == what
        chained = ValueError("anything")
        chained.__cause__ = error
        assert shortage(chained) == what

        def fail(*_: object, error: Exception = chained) -> None:
            raise error

        monkeypatch.setattr("cerwu_gpu.container.reader.inventory", fail)
        assert_refused(command("info", GOLDEN / "scalar"), f"not enough {what}")
    assert shortage(ValueError("allocated")) is None


def test_a_defect_stays_one(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("cerwu_gpu.container.reader.inventory", fail)
    with pytest.raises(ZeroDivisionError):
        cerwu_gpu.cli.main(["info", str(GOLDEN / "scalar")])


def test_sigterm_is_an_interrupt(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def terminated(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("cerwu_gpu.container.reader.inventory", terminated)
    outcome = command("info", GOLDEN / "scalar")
    assert outcome == (130, "", "cerwu-gpu: interrupted.\n")
    assert signal.getsignal(signal.SIGTERM) == before


def test_links_in_a_circle(command: Command, toy_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for words in (
        ("decompress", GOLDEN / "scalar", "-o", tmp_path / "a"),
        ("compress", toy_directory, "-o", tmp_path / "a" / "out"),
        ("compress", toy_directory, "-o", tmp_path / "out", "--report", tmp_path / "a"),
        ("sweep", toy_directory, "-o", tmp_path / "a"),
    ):
        assert_refused(command(*words), "lead in a circle")
    assert resolved("~") == Path.home().resolve()
    (tmp_path / "c").symlink_to("missing")
    assert resolved(tmp_path / "c") == (tmp_path / "missing").resolve()


@pytest.mark.parametrize("content", ["[]", "3", "{", "[" * 10**5, "\udce4"])
def test_a_damaged_fingerprint(
    content: str, command: Command, toy_directory: Path, toy_text: Path, tmp_path: Path
) -> None:
    work = work_path(tmp_path / "out")
    shutil.copytree(toy_directory, tmp_path / "model")
    work.mkdir()
    from cerwu_gpu.container.work import MARKER, MARKER_FILE

    (work / MARKER_FILE).write_text(MARKER, encoding="utf-8")
    (work / "fingerprint.json").write_bytes(content.encode(errors="surrogateescape"))
    options = ("-o", tmp_path / "out", "--calibration", toy_text, *FEW)
    outcome = command("compress", tmp_path / "model", *options)
    assert_refused(outcome, "fingerprint.json is damaged", "delete")


LONG = "x" * 300


def test_names_longer_than_any_file_has(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "sharded", tmp_path / "sharded"))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text(encoding="utf-8"))
    content["weight_map"]["model.norm.weight"] = LONG
    index.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(FormatError, match="which is not in the directory"):
        open_directory(folder)
    with pytest.raises(FormatError, match="is no directory"):
        open_directory(tmp_path / LONG)
    with pytest.raises(FormatError, match="is no directory"):
        cerwu_gpu.load_compressed(tmp_path / LONG)
    for model in (LONG, f"{LONG}.gguf"):
        with pytest.raises(ModelError):
            load_model(tmp_path / model)


@pytest.mark.parametrize("name", ["chat_template.jinja", "generation_config.json"])
def test_a_directory_in_the_place_of_a_file_is_refused_before_the_work(
    name: str,
    command: Command,
    toy_directory: Path,
    toy_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Path(shutil.copytree(toy_directory, tmp_path / "model"))
    (model / name).unlink(missing_ok=True)
    (model / name).mkdir()
    monkeypatch.setattr("cerwu_gpu.hf.models._load_directory", None)
    options = ("-o", tmp_path / "out", "--calibration", toy_text, *FEW)
    assert_refused(command("compress", model, *options), f"{name}, which is a directory")


def never() -> Any:
    raise AssertionError("nothing must be calibrated")


def test_a_cache_that_takes_no_file_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    places = [tmp_path / "file"]
    if os.getuid() != 0:  # root may write everywhere
        (tmp_path / "locked").mkdir(mode=0o555)
        places.append(tmp_path / "locked")
    for place in places:
        cache = HessianCache(place, "key")
        with pytest.raises(OutputError, match="choose another directory"):
            cached_sensitivities(cache, never)
        with pytest.raises(OutputError, match="choose another directory"):
            cache.blocks(torch.nn.Linear(1, 1), [], 1, never, torch.device("cpu"), progress=False)


def test_names_and_dtypes_that_the_format_cannot_hold() -> None:
    for compressed, plain, part in (
        (["a\x1b"], {}, "cannot be stored"),
        (["a"], {"a.words": torch.float32}, "has another use"),
        ([], {"__metadata__": torch.float32}, "has another use"),
        ([], {"a": torch.complex128}, "complex128, which cannot be stored"),
    ):
        with pytest.raises(ModelError, match=part):
            check_storable(compressed, plain)
    check_storable(["a", "b"], {"c.words": torch.float8_e4m3fn, "d": torch.uint16})


def test_they_are_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    model.register_buffer("odd", torch.zeros(2, dtype=torch.complex128))
    monkeypatch.setattr("cerwu_gpu.compression.run.Run.attempt", never)
    with pytest.raises(ModelError, match="odd is complex128"):
        compress_flat(
            model,
            tmp_path / "out",
            batches=[torch.randn(64, 16)],
            config=configured(sensitivity="none"),
            progress=False,
        )
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("field", "value"), [("vocab_size", 50), ("hidden_size", 16), ("num_hidden_layers", 9)]
)
def test_weights_of_another_size_are_one_sentence(
    field: str, value: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = toy("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}), encoding="utf-8")
    capfd.readouterr()
    with pytest.raises(ModelError, match=r"do not belong together|lacks \d+ of the") as refused:
        load_model(tmp_path)
    assert len(str(refused.value)) < 400
    assert "MISM" not in "".join(capfd.readouterr())


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    name = r"lacks model\.safetensors\.index\.json"
    folder = Path(shutil.copytree(GOLDEN / "sharded", tmp_path / "sharded"))
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(FormatError, match=name):
        open_directory(folder)
    toy("llama").save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    (tmp_path / "dense" / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=name):
        load_model(tmp_path / "dense")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system has no /proc")
def test_a_file_is_mapped_once_however_many_tensors_it_has() -> None:
    """A file of 13 MB could not be read with 256 MB of address space left."""
    directory = open_directory(GOLDEN / "plain-ends")
    names = list(directory.compressed())
    held = [directory.stored(name) for name in names], dict(directory.plain())
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    assert len(names) > 2 and len(held[1]) > 2
    assert sum("golden/plain-ends/model.safetensors" in line for line in maps) == 1


def test_generation_settings_that_transformers_would_not_save_are_copied(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "scalar", tmp_path / "scalar"))
    text = json.dumps({"do_sample": False, "temperature": 0.5})
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    cerwu_gpu.decompress(folder, tmp_path / "plain")
    written_text = (tmp_path / "plain" / "generation_config.json").read_text(encoding="utf-8")
    assert written_text == text


def test_an_error_of_settings_is_still_a_value_error() -> None:
    with pytest.raises(ValueError, match="x"):
        raise ConfigError("x")
