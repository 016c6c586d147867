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
from pathlib import Path
from typing import Any

import pytest

from cerwu_gpu.hf.plan import outline, plan
from cerwu_gpu.ranks import SHARDS, Ranks, greedy_owners, shard_of
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
    """A port of 127.0.0.1 that nobody listens on."""
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
    """The exit codes of the ranks of each run, and what they print on stderr."""
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toys as directories, and each compressed by different numbers of ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    runs = []
    for number, (family, settings) in enumerate(CASES.values()):
        model = folder / family
        toy(family, **WIDER.get(family, {})).save_pretrained(model)
        for count in COUNTS:
            output, both = folder / f"{number}-{count}", {**FEW, **settings}
            runs.append(
                {"model": str(model), "output": str(output), "count": count, "settings": both}
            )
    codes, errors = forked(runs)
    assert not any(code for one in codes for code in one), errors
    return folder


@pytest.mark.parametrize("count", COUNTS[1:])
@pytest.mark.parametrize("case", CASES)
def test_any_number_of_ranks_gives_the_same_bytes(folder: Path, case: str, count: int) -> None:
    number = list(CASES).index(case)
    alone, shared = contents(folder / f"{number}-0"), contents(folder / f"{number}-{count}")
    assert "model.safetensors" in alone
    assert shared == alone


def test_what_is_sent_is_received_once(folder: Path) -> None:
    traffic = [json.loads(path.read_text()) for path in sorted(folder.glob("0-4.rank-*.json"))]
    assert len(traffic) == 4
    assert sum(x["sent"] for x in traffic) == sum(x["received"] for x in traffic) > 0
    assert json.loads((folder / "0-1.rank-0.json").read_text())["sent"] == 0


def test_a_setting_that_ranks_cannot_share_is_refused_by_all(folder: Path, tmp_path: Path) -> None:
    settings = {**FEW, "bits": 3.0}
    del settings["lmbda"]
    run = {"model": str(folder / "llama"), "output": str(tmp_path / "out"), "count": 2}
    codes, errors = forked([{**run, "settings": settings}])
    assert codes == [[2, 2]]
    assert "a search for a target does not run on several ranks" in errors
    assert not any(tmp_path.glob("**/*.safetensors"))


def test_an_error_of_rank_0_is_that_of_all(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note.txt").write_text("mine")
    run = {"model": str(folder / "llama"), "output": str(tmp_path / "out"), "count": 2}
    codes, errors = forked([{**run, "settings": FEW}])
    assert codes == [[2, 2]]
    assert len(re.findall(r"rank \d: .*is not empty", errors)) == 2


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
    while not (tmp_path / ".out.work" / "fingerprint.json").exists() and run.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.01)
    processes = ranks_of(out)
    assert len(processes) == 2
    begin = time.monotonic()
    os.kill(processes[-1], signal.SIGKILL)
    printed, _ = run.communicate(timeout=PATIENCE)
    assert time.monotonic() - begin < PATIENCE
    assert run.returncode != 0
    assert re.search(r"cerwu-gpu: (another rank of this run has ended|interrupted)", printed)
    assert ranks_of(out) == []
    assert not out.exists()
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


def test_a_plan_knows_the_traffic(folder: Path) -> None:
    for case, (family, settings) in CASES.items():
        number = list(CASES).index(case)
        config = configured(**FEW, **settings)
        for count in (2, 4):
            counted = [
                json.loads((folder / f"{number}-{count}.rank-{rank}.json").read_text())
                for rank in range(count)
            ]
            known = outline(folder / family, config)
            predicted = plan(known, config, ranks=count, bits=counted[0]["bits"])
            for rank, one in enumerate(counted):
                assert predicted.sent[rank] == pytest.approx(one["sent"], rel=0.02)
                assert predicted.received[rank] == pytest.approx(one["received"], rel=0.02)
