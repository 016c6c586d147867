"""Several ranks compress a model to the bytes of one process, and a rank that dies ends the run."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cerwu_gpu.hf.plan import outline, plan
from cerwu_gpu.ranks import SHARDS, Ranks, greedy_owners, shard_of
from cerwu_gpu.sweep.table import read_table
from tests.configs import configured
from tests.conftest import TEXT
from tests.hf.toys import toy

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 60
"""Seconds within which the death of a rank ends the run."""
COUNTS = (0, 1, 2, 4)
"""Numbers of ranks; 0: no torchrun at all."""
FEW = {"samples": 18, "sequence_length": 24, "batch_size": 1, "lmbda": 1e-7}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"drift": "correct"}),
    "mixtral": ("mixtral", {"drift": "correct"}),
    "gpt2, sequential": ("gpt2", {"drift": "sequential", "quantizer": "trellis4"}),
}

WIDER = {
    "llama": {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2},
    "mixtral": {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2},
    "gpt2": {"n_embd": 96, "n_layer": 2},
}
"""Changes of the toys: wide enough that matrices outweigh everything else that ranks send."""


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment() -> dict[str, str]:
    """The environment of a rank with one thread, on this machine alone."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
    }


def forked(runs: Sequence[dict[str, Any]]) -> tuple[list[list[int]], str]:
    """Return the exit codes of the ranks of each run, and what they print on stderr."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.ranks.forked"],
        input=json.dumps([{**run, "port": free_port()} for run in runs]),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr
    codes: list[list[int]] = json.loads(process.stdout.splitlines()[-1])
    return codes, process.stderr


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a directory, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@dataclass(frozen=True)
class Forks:
    """Toys compressed by different numbers of ranks.

    Attributes:
        folder: holds the toys as directories, and the output "CASE-COUNT" of each run.
        codes: exit codes of the ranks of each run, by the name of its output.
        errors: what all of them print on stderr.
    """

    folder: Path
    codes: dict[str, list[int]]
    errors: str


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Forks:
    """The runs of this file: the cases, a setting that is refused, an output that is occupied."""
    folder = tmp_path_factory.mktemp("ranks")
    runs: dict[str, dict[str, Any]] = {}
    for number, (family, settings) in enumerate(CASES.values()):
        toy(family, **WIDER.get(family, {})).save_pretrained(folder / family)
        for count in COUNTS:
            runs[f"{number}-{count}"] = {"count": count, "settings": {**FEW, **settings}}
            runs[f"{number}-{count}"]["model"] = str(folder / family)
    refused: dict[str, Any] = {**FEW, "bits": 3.0}
    del refused["lmbda"]
    toys = {"count": 2, "model": str(folder / "llama")}
    runs |= {"refused": {**toys, "settings": refused}, "occupied": {**toys, "settings": FEW}}
    (folder / "occupied").mkdir()
    (folder / "occupied" / "note.txt").write_text("mine")
    outputs = [{**run, "output": str(folder / name)} for name, run in runs.items()]
    codes, errors = forked(outputs)
    return Forks(folder, dict(zip(runs, codes, strict=True)), errors)


@pytest.mark.parametrize("count", COUNTS[1:])
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_ranks_gives_the_same_bytes(forks: Forks, case: str, count: int) -> None:
    number, folder = list(CASES).index(case), forks.folder
    assert not any(forks.codes[f"{number}-{count}"]), forks.errors
    alone, shared = contents(folder / f"{number}-0"), contents(folder / f"{number}-{count}")
    assert "model.safetensors" in alone
    assert shared == alone


def traffic(folder: Path, run: str) -> list[dict[str, float]]:
    """Return what each rank of a run has counted."""
    paths = sorted(folder.glob(f"{run}.rank-*.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def test_what_is_sent_is_received_once(forks: Forks) -> None:
    counted = traffic(forks.folder, "0-4")
    assert len(counted) == 4
    assert sum(x["sent"] for x in counted) == sum(x["received"] for x in counted) > 0
    assert traffic(forks.folder, "0-1")[0]["sent"] == 0


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_plan_knows_the_traffic(forks: Forks, case: str, count: int) -> None:
    family, settings = CASES[case]
    config = configured(**FEW, **settings)
    counted = traffic(forks.folder, f"{list(CASES).index(case)}-{count}")
    known = outline(forks.folder / family, config)
    predicted = plan(known, config, ranks=count, bits=counted[0]["bits"])
    assert predicted.sent == pytest.approx([x["sent"] for x in counted], rel=0.02)
    assert predicted.received == pytest.approx([x["received"] for x in counted], rel=0.02)


GRID: dict[str, Any] = {"systems": ("rtn", "optq"), "levels": (5, 9, 17, 33)}
"""Eight points."""


def swept(folder: Path, **runs: dict[str, Any]) -> tuple[dict[str, list[int]], str]:
    """Sweep over one matrix in `folder`/NAME each; return exit codes by name, and stderr."""
    given = [{"sweep": GRID, "output": str(folder / name), **run} for name, run in runs.items()]
    codes, errors = forked(given)
    return dict(zip(runs, codes, strict=True)), errors


def lines(folder: Path) -> list[bytes]:
    """The lines of a sweep's table."""
    return (folder / "sweep.jsonl").read_bytes().splitlines()


def test_ranks_share_the_points_of_a_sweep(tmp_path: Path) -> None:
    runs: dict[str, dict[str, Any]] = {
        "alone": {"count": 0},
        "three": {"count": 3},
        "dying": {"count": 2, "dies": 2},
        "differing": {"count": 2, "differ": True},
    }
    codes, errors = swept(tmp_path, **runs)
    assert codes == {"alone": [0], "three": [0] * 3, "dying": [2, -9], "differing": [2, 2]}, errors
    whole = read_table(tmp_path / "alone" / "sweep.jsonl")
    assert read_table(tmp_path / "three" / "sweep.jsonl") == whole
    assert len(whole) == 8
    # Each rank has prepared its first point, and rank 0's are every third.
    prepared = [row.preparation_seconds for row in read_table(tmp_path / "three" / "sweep.jsonl")]
    assert prepared == [1.0] * 3 + [0.0] * 5
    assert "rank 1 has another weights than rank 0" in errors
    assert not (tmp_path / "differing" / "sweep.jsonl").exists()
    # Two rounds were finished.
    assert re.search("rank 0: another rank of this run has ended", errors)
    before = lines(tmp_path / "dying")
    assert len(before) == 4
    assert swept(tmp_path, dying={"count": 4})[0] == {"dying": [0] * 4}
    assert lines(tmp_path / "dying")[:4] == before
    assert read_table(tmp_path / "dying" / "sweep.jsonl") == whole
    assert not any((tmp_path / "dying" / "points").iterdir())


def test_the_command_sweeps_on_ranks(toy_directory: Path, toy_text: Path, tmp_path: Path) -> None:
    data = ("--text", str(toy_text), "--calibration", str(toy_text), "--context-length", "64")
    few = "--max-windows 2 --samples 4 --sequence-length 32 --device cpu --keep --quiet"
    grid = "--methods waterfilled,rtn --lmbda 1e-7 --sensitivity none --levels 8"
    sweep = ["sweep", str(toy_directory), *data, *few.split(), *grid.split()]
    runs = [
        {"count": count, "command": [*sweep, "-o", str(tmp_path / f"{count}")]} for count in (0, 2)
    ]
    codes, errors = forked(runs)
    assert codes == [[0], [0, 0]], errors
    alone, shared = (read_table(tmp_path / name / "sweep.jsonl") for name in ("0", "2"))
    assert len(alone) == 2
    assert shared == alone
    kept = {path.name for path in (tmp_path / "2" / "points").iterdir()}
    assert kept == {row.point for row in alone}


def test_a_setting_that_ranks_cannot_share_is_refused_by_all(forks: Forks) -> None:
    assert forks.codes["refused"] == [2, 2]
    assert "a search for a target does not run on several ranks" in forks.errors
    assert not (forks.folder / "refused").exists()


def test_an_error_of_rank_0_is_that_of_all(forks: Forks) -> None:
    assert forks.codes["occupied"] == [2, 2]
    assert len(re.findall(r"rank \d: .*is not empty", forks.errors)) == 2
    assert [path.name for path in (forks.folder / "occupied").iterdir()] == ["note.txt"]


def torchrun(arguments: Sequence[str], *options: str) -> subprocess.Popen[str]:
    """A started `torchrun` of the command line."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, "-m", "cerwu_gpu", *arguments],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ranks_of(output: Path) -> list[int]:
    """The processes that compress into `output`, torchrun's own not among them (Linux)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if str(output).encode() in words and b"torch.distributed.run" not in words:
            found.append(int(path.parent.name))
    return sorted(found)


@pytest.fixture
def arguments(toy_directory: Path, tmp_path: Path) -> list[str]:
    """A compression of the toy, without its output."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 40, encoding="utf-8")
    few = "--samples 64 --sequence-length 64 --batch-size 4 --lmbda 1e-7 --device cpu --quiet"
    return ["compress", str(toy_directory), "--calibration", str(text), *few.split()]


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_a_killed_rank_ends_the_run_which_then_continues(
    arguments: list[str], toy_directory: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    one = subprocess.run(
        [sys.executable, "-m", "cerwu_gpu", *arguments, "-o", whole], env=environment()
    )
    assert one.returncode == 0
    run = torchrun([*arguments, "-o", str(out)], "--nproc-per-node", "2")
    limit = time.monotonic() + PATIENCE * 4
    while not any(tmp_path.glob(".out.work/*/block-00000")) and run.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.01)
    processes = ranks_of(out)
    assert len(processes) == 2
    begin = time.monotonic()
    os.kill(processes[-1], signal.SIGKILL)
    printed, _ = run.communicate(timeout=PATIENCE)
    assert time.monotonic() - begin < PATIENCE
    assert run.returncode != 0
    assert re.search(r"cerwu-gpu: (another rank of this run has ended|interrupted)", printed), (
        printed
    )
    assert ranks_of(out) == []
    assert not out.exists()
    assert any(tmp_path.glob(".out.work/*/block-00000"))
    # The same command, on two machines of one process each.
    port = str(free_port())
    meeting = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d")
    meeting = (*meeting, "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "cerwu")
    agents = [torchrun([*arguments, "-o", str(out)], *meeting) for _ in range(2)]
    texts = [agent.communicate(timeout=PATIENCE * 4)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], texts
    assert sum("compressed directory" in text for text in texts) == 1
    assert contents(out) == contents(whole)
    assert ranks_of(out) == []


def test_a_command_for_all_ranks_names_no_single_gpu() -> None:
    device = torch.device("cuda:3")
    assert str(Ranks(0, 8).everywhere(device)) == "cuda"
    assert Ranks().everywhere(device) == device


def test_shards_are_neighbours_and_ranks_have_them_in_order() -> None:
    for batches in (1, 2, 8, 9, 30):
        shards = [shard_of(batch, batches) for batch in range(batches)]
        assert shards == sorted(shards)
        assert set(shards) <= set(range(SHARDS))
        assert len(set(shards)) == min(batches, SHARDS)
    for count in (1, 2, 3, 8, 16):
        owners = [Ranks(0, count).of_shard(shard) for shard in range(SHARDS)]
        assert owners == sorted(owners)
        assert owners[0] == 0
        assert max(owners) < count


def test_owners_have_about_equal_costs() -> None:
    assert greedy_owners({"a": 5.0, "b": 3.0, "c": 3.0, "d": 2.0}, 2) == {
        "a": 0,
        "b": 1,
        "c": 1,
        "d": 0,
    }
    assert greedy_owners({"a": 1.0}, 4) == {"a": 0}
