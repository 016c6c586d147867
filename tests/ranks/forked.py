"""Compress models on several ranks, which are forks of one process, so that nothing is imported
more than once: `python -m tests.ranks.forked` with a JSON list of runs on stdin."""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from tests.conftest import TEXT, trained_tokenizer  # isort: skip  # first: it sets TRITON_INTERPRET

import torch

import cerwu_gpu.api  # noqa: F401  # before the forks
from cerwu_gpu import CerwuError
from cerwu_gpu.ranks import joined
from tests.configs import compress_flat, configured


def work(run: dict[str, Any], index: int) -> None:
    """Be rank number `index`; with a count of 0 no rank at all."""
    if run["count"]:
        os.environ |= {
            "TORCHELASTIC_RUN_ID": "forked",
            "RANK": str(index),
            "LOCAL_RANK": str(index),
            "WORLD_SIZE": str(run["count"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(run["port"]),
        }
    torch.set_num_threads(1)
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
