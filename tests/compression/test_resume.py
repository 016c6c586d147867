"""A run that dies is continued where it stopped, and ends with the bytes of one that did not."""

import errno
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import cerwu_gpu
from cerwu_gpu.calibration import cache as hessian_cache
from cerwu_gpu.calibration.cache import HessianCache
from cerwu_gpu.container import writer
from cerwu_gpu.container.journal import Journal
from cerwu_gpu.container.output import REPLACED
from cerwu_gpu.container.work import work_directory, work_path
from cerwu_gpu.errors import CalibrationError, OutputError
from cerwu_gpu.hf import causal_lm
from tests.configs import compress_flat, configured
from tests.hf.toys import toy

ROOT = Path(__file__).resolve().parents[2]
FEW: dict[str, Any] = {"samples": 4, "sequence_length": 32, "batch_size": 2, "lmbda": 3e-4}


@pytest.fixture
def text(toy_text: Path) -> str:
    return toy_text.read_text(encoding="utf-8")


@pytest.fixture
def compress(toy_tokenizer: Any, text: str) -> Callable[..., Any]:
    """Compress a fresh toy; every call is a run of its own, as after a new start."""

    def run(output: Path, family: str = "llama", **settings: Any) -> Any:
        names = ("verify", "overwrite", "restart", "hessian_cache", "text", "model")
        options = {name: settings.pop(name) for name in names if name in settings}
        model = options.pop("model", None) or toy(family)
        return compress_flat(
            model,
            output,
            config=configured(**{**FEW, **settings}),
            tokenizer=toy_tokenizer,
            progress=False,
            **{"text": text, "verify": False, **options},
        )

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Any, toy_text: Path) -> Path:
    """What `compress` gives where nothing happens."""
    output = tmp_path_factory.mktemp("whole") / "out"
    compress_flat(
        toy("llama"),
        output,
        config=configured(**FEW),
        tokenizer=toy_tokenizer,
        text=toy_text.read_text(encoding="utf-8"),
        progress=False,
    )
    return output


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def directories(folder: Path) -> list[str]:
    """What is there besides the reports."""
    return sorted(path.name for path in folder.iterdir() if ".report." not in path.name)


class Failing:
    """Patches a function so that its call number `number` (from 1) raises `error` instead."""

    def __init__(self, owner: Any, name: str, number: int, error: BaseException) -> None:
        self._patch = pytest.MonkeyPatch()
        original, calls = getattr(owner, name), itertools.count(1)

        def call(*arguments: Any, **keywords: Any) -> Any:
            if next(calls) == number:
                raise error
            return original(*arguments, **keywords)

        self._patch.setattr(owner, name, call)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
WAYS: dict[str, dict[str, Any]] = {
    "default": {"verify": True},
    "trellis": {"quantizer": "trellis4", "keep_head": True, "include": ("*.layers.[02].*",)},
    "drift": {"correct_drift": True, "sensitivity": "layer"},
    "experts-sequential": {"family": "mixtral", "sequential": True, "keep_head": True},
    "bits": {"family": "phi", "bits": 5.0, "sensitivity": "relative"},
}
"""Settings in which finished blocks matter for the next ones in different ways."""


@pytest.mark.parametrize(
    "way",
    [pytest.param(way, marks=pytest.mark.slow if "bits" in WAYS[way] else ()) for way in WAYS],
)
def test_an_interrupted_run_ends_with_the_bytes_of_an_undisturbed_one(
    way: str, compress: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = compress(tmp_path / "whole", **WAYS[way])
    output = tmp_path / "out"
    with (
        Failing(Journal, "write", 2, KeyboardInterrupt()),
        pytest.raises(KeyboardInterrupt, match="start it again to continue"),
    ):
        compress(output, **WAYS[way])
    assert not output.exists()
    assert len(list(work_path(output).glob("lmbda-*/block-*"))) == 1
    caplog.clear()
    resumed = compress(output, **WAYS[way])
    assert [record.getMessage() for record in caplog.records if "continued" in record.msg] == [
        f"{work_path(output)} is continued; finished blocks: 1."
    ]
    assert files(output) == files(tmp_path / "whole")
    assert directories(tmp_path) == ["out", "whole"]
    assert resumed.layers == report.layers
    assert resumed.lmbda == report.lmbda


def test_finished_blocks_and_sensitivities_are_not_computed_again(
    compress: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Failing(Journal, "write", 4, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        compress(tmp_path / "out")  # three blocks are finished, the head is not
    quantized = []
    original = cerwu_gpu.compression.pipeline.quantize_stacks
    monkeypatch.setattr(
        cerwu_gpu.compression.pipeline,
        "quantize_stacks",
        lambda *arguments: quantized.append(arguments) or original(*arguments),
    )
    monkeypatch.setattr(causal_lm, "blockwise_sensitivities", None)
    compress(tmp_path / "out")
    assert len(quantized) == 1


@pytest.mark.slow
def test_hessians_of_a_search_that_was_interrupted_are_kept(
    compress: Callable[..., Any], tmp_path: Path
) -> None:
    """The sampling for a target walks through all blocks before anything is quantized."""
    compress(tmp_path / "whole", bits=5.0, sensitivity="relative")
    with Failing(HessianCache, "write", 3, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        compress(tmp_path / "out", bits=5.0, sensitivity="relative")
    found = list(work_path(tmp_path / "out").glob("hessians/*/block-*.safetensors"))
    assert len(found) == 2
    with Failing(HessianCache, "write", 3, AssertionError()):  # two are left: block 2 and the head
        compress(tmp_path / "out", bits=5.0, sensitivity="relative")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def changed(model: Any) -> Any:
    with torch.no_grad():
        next(iter(model.parameters()))[0, 0] += 1
    return model


DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "lmbda": ({"lmbda": 2e-4}, r"lmbda 0\.0003 instead of 0\.0002"),
    "include": ({"include": ("*.mlp.*",)}, "include .* instead of .*mlp"),
    "text": (
        {"text": "Another text, as long as it needs to be. " * 90},
        "another calibration text",
    ),
    "model": ({"model": changed(toy("llama"))}, "another model"),
    "target": ({"bits": 4.0}, r"bits None instead of 4\.0"),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_another_run_is_refused_by_what_differs(
    difference: str, compress: Callable[..., Any], tmp_path: Path
) -> None:
    settings, sentence = DIFFERENCES[difference]
    with Failing(Journal, "write", 2, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        compress(tmp_path / "out")
    with pytest.raises(OutputError, match=f"{sentence}.*--restart"):
        compress(tmp_path / "out", **settings)
    kept = list(work_path(tmp_path / "out").glob("lmbda-*/block-*"))
    assert len(kept) == 1  # the refusal costs the other run nothing
    if difference == "lmbda":
        compress(tmp_path / "out", restart=True, **settings)
        compress(tmp_path / "fresh", **settings)
        assert files(tmp_path / "out") == files(tmp_path / "fresh")


def test_another_version_is_refused(
    compress: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Failing(Journal, "write", 2, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        compress(tmp_path / "out")
    monkeypatch.setattr(cerwu_gpu, "__version__", "99.0")
    with pytest.raises(OutputError, match=r"cerwu_gpu 0\.\S* instead of 99\.0"):
        compress(tmp_path / "out")


PLACES: dict[str, tuple[Any, str, int]] = {
    "fingerprint": (os, "replace", 1),
    "sensitivities": (hessian_cache, "save_file", 1),
    "block": (writer, "write_shard", 3),
    "reports": (Path, "write_text", 2),
    "tensors": (writer, "write_shard", 5),
    "config.json": (Path, "write_text", 5),
    "tokenizer": (PreTrainedTokenizerFast, "save_pretrained", 1),
    "into place": (os, "replace", 7),
}
"""Which call of what meets it: three blocks and the head are journaled, then all is written."""


@pytest.mark.parametrize("place", PLACES)
def test_a_full_disk_is_one_sentence_and_costs_nothing(
    place: str, compress: Callable[..., Any], whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    (output / "LICENSE").write_text("what was there")
    before = files(output)
    # From Rust it comes as a plain Exception.
    error = Exception(f"{FULL} (os error 28)") if place == "tokenizer" else FULL
    with Failing(*PLACES[place], error), pytest.raises(OutputError, match="free some space") as end:
        compress(output, overwrite=True)
    assert "No space left on device" in str(end.value)
    assert files(output) == before
    assert not list(tmp_path.rglob("*.partial"))
    compress(output, overwrite=True)
    assert files(output) == files(whole)
    assert directories(tmp_path) == ["out"]


def test_a_full_disk_at_the_end_is_met_with_all_blocks_kept(
    compress: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Failing(writer, "write_shard", 5, FULL), pytest.raises(OutputError):
        compress(tmp_path / "out")
    monkeypatch.setattr(cerwu_gpu.compression.pipeline, "quantize_stacks", None)
    compress(tmp_path / "out")


def test_an_error_that_would_come_again_leaves_nothing(
    compress: Callable[..., Any], tmp_path: Path
) -> None:
    error = CalibrationError("not finite")
    with Failing(Journal, "write", 3, error), pytest.raises(CalibrationError):
        compress(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_was_amid_is_tidied_up(
    compress: Callable[..., Any], whole: Path, tmp_path: Path
) -> None:
    """A block half written, a directory half written, and an output taken out of its place."""
    output, kept = tmp_path / "out", work_path(tmp_path / "out")
    with Failing(Journal, "write", 2, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        compress(output)
    (folder,) = kept.glob("lmbda-*")
    shutil.copytree(folder / "block-00000", folder / ".block-00001.x.partial")
    (kept / ".out.y.partial").mkdir()
    aside = tmp_path / f".out.0123abcd{REPLACED}"
    shutil.copytree(whole, aside)
    (aside / "LICENSE").write_text("what was there")
    with pytest.raises(OutputError, match="not empty"):
        compress(output)
    assert files(output) == {**files(whole), "LICENSE": b"what was there"}
    compress(output, overwrite=True)
    assert files(output) == files(whole)
    assert directories(tmp_path) == ["out"]


@pytest.mark.parametrize("name", ["model.safetensors", "reports.json"])
def test_a_damaged_block_is_refused(
    name: str, compress: Callable[..., Any], tmp_path: Path
) -> None:
    with Failing(Journal, "write", 2, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        compress(tmp_path / "out")
    (path,) = work_path(tmp_path / "out").glob(f"lmbda-*/block-*/{name}")
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x55
    path.write_bytes(content)
    with pytest.raises(OutputError, match=r"block-00000 is damaged.*--restart"):
        compress(tmp_path / "out")
    compress(tmp_path / "out", restart=True)


def test_the_second_of_two_processes_is_refused(
    compress: Callable[..., Any], tmp_path: Path
) -> None:
    with work_directory(tmp_path / "out"):
        with pytest.raises(OutputError, match="another process"):
            compress(tmp_path / "out")
        compress(tmp_path / "other")
    compress(tmp_path / "out")


def test_the_command_line_says_how_to_go_on(
    command: Callable[..., Any], toy_directory: Path, toy_text: Path, tmp_path: Path
) -> None:
    few = ("--calibration", toy_text, "--samples", "4", "--sequence-length", "32", "--quiet")
    arguments = ("compress", toy_directory, "-o", tmp_path / "out", *few)
    with Failing(Journal, "write", 2, KeyboardInterrupt()):
        code, out, err = command(*arguments)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1].startswith("cerwu-gpu: interrupted: ")
    assert "start it again" in err
    code, _, err = command(*arguments, "--samples", "5")
    assert code == 2
    assert "samples 4 instead of 5" in err.splitlines()[-1]
    code, _, err = command(*arguments, "--restart")
    assert code == 0
    assert "continued" not in err


@pytest.mark.parametrize("place", [".", "deeper/out", ".."], ids=["equal", "inside", "around"])
def test_an_output_in_the_model_is_refused(
    place: str, command: Callable[..., Any], toy_directory: Path, toy_text: Path
) -> None:
    before = sorted(toy_directory.rglob("*"))
    arguments = ("-o", toy_directory / place, "--overwrite", "--calibration", toy_text)
    code, _, err = command("compress", toy_directory, *arguments)
    assert code == 2
    assert "choose another output" in err
    assert sorted(toy_directory.rglob("*")) == before


def test_a_place_that_cannot_be_written_is_refused_at_once(
    command: Callable[..., Any], toy_directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = command("compress", toy_directory, "-o", tmp_path / "file" / "out")
    assert code == 2
    assert "cannot write" in err
    readonly = OSError(errno.EROFS, os.strerror(errno.EROFS))
    with Failing(Path, "mkdir", 1, readonly):
        code, _, err = command("compress", toy_directory, "-o", tmp_path / "out")
    assert code == 2
    assert "Read-only file system" in err


@pytest.fixture
def stories(data: Path) -> Path:
    """A trained model of 260,032 parameters."""
    return data / "stories260k"


def test_threads_do_not_change_the_bytes(stories: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    config = configured(
        samples=4,
        sequence_length=128,
        calibration=str(stories / "stories.txt"),
        include=("*.layers.[01].*",),
        keep_head=True,
        correct_drift=True,
        lmbda=1e-5,
    )
    try:
        for name, count in (("one", 1), ("two", 2), ("again", 1)):
            torch.set_num_threads(count)
            compress_flat(stories, tmp_path / name, config=config, verify=False, progress=False)
            assert files(tmp_path / name) == files(tmp_path / "one")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_kill_9_at_random_moments(stories: Path) -> None:
    """Real processes; CERWU_GPU_KILLS says how many."""
    kills = os.environ.get("CERWU_GPU_KILLS", "3")
    result = subprocess.run(
        [
            *(sys.executable, ROOT / "scripts" / "kill_and_resume.py", stories),
            *("--kills", kills, "--calibration", stories / "stories.txt"),
            *("--samples", "8", "--sequence-length", "64", "--quantizer", "trellis4"),
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{kills} kills, 0 differing results" in result.stdout


@pytest.mark.parametrize("content", ["[]", "3", "{", '"text"', "[" * 100_000], ids=len)
def test_a_damaged_fingerprint_is_one_sentence(
    content: str, compress: Callable[..., Any], tmp_path: Path
) -> None:
    with work_directory(tmp_path / "out"):
        pass
    with Failing(Journal, "write", 2, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        compress(tmp_path / "out")
    (work_path(tmp_path / "out") / "fingerprint.json").write_text(content, encoding="utf-8")
    with pytest.raises(OutputError, match=r"fingerprint\.json is damaged .*: delete"):
        compress(tmp_path / "out")
