"""Compress models and sweep on several ranks, which are forks of one process, so that nothing is
imported more than once: `python -m tests.ranks.forked` with a JSON list of runs on stdin."""

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.conftest import TEXT, trained_tokenizer  # isort: skip  # first: it sets TRITON_INTERPRET

import torch

import cerwu_gpu.api  # noqa: F401  # before the forks
from cerwu_gpu import CerwuError, CompressionConfig
from cerwu_gpu.cli import main as command
from cerwu_gpu.ranks import joined
from cerwu_gpu.sweep.points import Axes, Point, grid_points
from cerwu_gpu.sweep.run import run_sweep
from cerwu_gpu.sweep.subject import Outcome
from tests.configs import compress_flat, configured
from tests.sweep.measured import OneMatrix


def work(run: dict[str, Any], index: int) -> None:
    """Be rank number `index`; with a count of 0 no rank at all."""
    if run["count"]:
        os.environ |= {
            "TORCHELASTIC_RUN_ID": "forked",
            "RANK": str(index),
            "GROUP_RANK": "0",
            "LOCAL_RANK": str(index),
            "WORLD_SIZE": str(run["count"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(run["port"]),
        }
    torch.set_num_threads(1)
    if "command" in run:
        command(run["command"])
    elif "sweep" in run:
        sweep({**run, "seed": index if run.get("differ") else 0}, index)
    else:
        compressed(run, index)


def compressed(run: dict[str, Any], index: int) -> None:
    """Compress a model."""
    with joined("cpu") as ranks:
        report = compress_flat(
            run["model"],
            Path(run["output"]),
            config=configured(**run["settings"]),
            text=TEXT * 8,
            tokenizer=trained_tokenizer(),
            device=ranks,
            progress=False,
        )
        counted = {"sent": ranks.sent, "received": ranks.received, "bits": report.bits_per_weight}
        Path(f"{run['output']}.rank-{index}.json").write_text(json.dumps(counted))


def sweep(run: dict[str, Any], index: int) -> None:
    """Sweep over one matrix; rank 1 dies in its point number run["dies"], if there is one."""
    points = grid_points(Axes(**run["sweep"]), CompressionConfig())

    class Subject(OneMatrix):
        def run(self, point: Point, folder: Path) -> Outcome:
            if index == 1 and len(self.ran) == run.get("dies"):
                os.kill(os.getpid(), signal.SIGKILL)
            return super().run(point, folder)

    with joined("cpu") as ranks:
        rows = run_sweep(Subject(run.get("seed", 0)), points, Path(run["output"]), ranks=ranks)
        assert [row.point for row in rows] == [point.key for point in points]


def main() -> None:
    """Do the runs, one after the other; print the exit codes of each one's ranks."""
    codes = []
    for run in json.load(sys.stdin):
        children = []
        for index in range(max(1, run["count"])):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    work(run, index)
                    code = 0
                except CerwuError as error:
                    print(f"rank {index}: {error}", file=sys.stderr)
                    code = 2
                except SystemExit as end:
                    code = int(end.code or 0)
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
        codes.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
