"""Kill a compression at random moments, start it again, and compare the bytes.

    python scripts/kill_and_resume.py MODEL [--kills 10] [--seed 0] [--signals KILL TERM INT]
        [--ranks 1] [--json FILE] [options of cerwu-gpu compress]

One run is left alone. Each of the others gets a signal once (by default SIGKILL), at a moment drawn
evenly from the time that the first one took, and is then started again with the same arguments.
Every file must be the same in the end, and a run that could end by itself must have exit code 0,
2 or 130; one line per kill has the result, and the exit code is 1 if one differs.

With --ranks each run is so many processes on CPUs, as torchrun would start them; one of them, drawn
at random, gets the signal, the others SIGTERM as from torchrun, and all must end within a minute.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Instead of this folder, whose evaluate.py would shadow Hugging Face's package evaluate.
sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ["TQDM_DISABLE"] = "1"  # the libraries' bars; read when they are imported
os.environ["OMP_NUM_THREADS"] = "1"  # the threads of a process are not those of its forks

from torch import distributed as dist

import cerwu_gpu.api  # noqa: F401  once, here: the runs are forks of this process
from cerwu_gpu.cli import main as command
from cerwu_gpu.container.work import work_path
from scripts.ranks_equal import digests, free_port

PATIENCE = 60
"""Seconds within which the death of a rank ends the run."""


@dataclass(frozen=True)
class Started:
    """The processes of a run, by rank, and the store in which they meet, as torchrun has one."""

    processes: list[int]
    store: dist.TCPStore | None

    def codes(self) -> list[int]:
        """Wait for all processes, and return their exit codes; where one fails the others get
        SIGTERM, as from torchrun."""
        ended: dict[int, int] = {}
        while len(ended) < len(self.processes):
            process, status = os.wait()
            ended[process] = os.waitstatus_to_exitcode(status)
            for other in set(self.processes) - ended.keys() if ended[process] else ():
                os.kill(other, signal.SIGTERM)
        return [ended[process] for process in self.processes]

    def finish(self) -> None:
        """Wait for a run that must succeed."""
        ended = self.codes()
        if any(ended):
            sys.exit(f"a run ended with {ended}")


def start(arguments: Sequence[str], output: Path, ranks: int) -> Started:
    """Fork the processes that compress into `output`, before any torch thread runs."""
    store = None
    if ranks > 1:
        store = dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(ranks):
        process = os.fork()
        if process == 0:
            code = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                if store is not None:
                    os.environ |= environment(rank, ranks, store.port)
                command(["compress", *arguments, "--output", str(output), "--quiet"])
            except SystemExit as end:
                code = int(end.code or 0)
            finally:
                os._exit(code)
        processes.append(process)
    return Started(processes, store)


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return what torchrun tells a process on one machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": ranks}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "forked"}
    own_store = {"TORCHELASTIC_USE_AGENT_STORE": True, "GLOO_SOCKET_IFNAME": "lo"}
    return {name: str(value) for name, value in {**numbers, **meeting, **own_store}.items()}


def killed(
    run: Started, victim: int, output: Path, moment: float, number: signal.Signals
) -> tuple[str, list[int], float]:
    """Send a signal to one process of a run after `moment` seconds; return the run's progress in
    words, all exit codes, and the seconds until the last process had ended."""
    time.sleep(moment)
    begin = time.perf_counter()
    os.kill(run.processes[victim], number)
    ended = run.codes()
    seconds = time.perf_counter() - begin
    if output.exists():
        return "had finished", ended, seconds
    blocks = len(list(work_path(output).glob("*/block-*")))
    return f"had {blocks} finished blocks", ended, seconds


def allowed(number: signal.Signals) -> tuple[int, ...]:
    """Return the exit codes that a run may have after a signal."""
    return (0, -number) if number == signal.SIGKILL else (0, 2, 130)


def main() -> int:
    """Run the check and return the exit code: 1 if a resumed run differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signals", nargs="+", default=["KILL"], choices=["KILL", "TERM", "INT"])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the results")
    options, rest = parser.parse_known_args()
    arguments = [options.model, *rest]
    signals = [signal.Signals[f"SIG{name}"] for name in options.signals]
    moments = random.Random(options.seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
    differing, results = 0, []
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        start(arguments, Path(folder) / "undisturbed", options.ranks).finish()
        whole = time.perf_counter() - begin
        expected = digests(Path(folder) / "undisturbed")
        print(f"undisturbed: {whole:.1f} s, {len(expected)} files")
        for number in range(1, options.kills + 1):
            output = Path(folder) / f"killed-{number}"
            moment, victim = moments.uniform(0, whole), moments.randrange(options.ranks)
            sent = signals[(number - 1) % len(signals)]
            run = start(arguments, output, options.ranks)
            state, ended, seconds = killed(run, victim, output, moment, sent)
            others = [code for rank, code in enumerate(ended) if rank != victim]
            right = ended[victim] in allowed(sent) and set(others) <= {0, 2, 130}
            begin = time.perf_counter()
            if not output.exists():
                start(arguments, output, options.ranks).finish()
            tidy = {path.name for path in Path(folder).glob(f"*{output.name}*")} <= {
                output.name,
                *(f"{output.name}.report.{kind}" for kind in ("json", "html")),
            }
            same = digests(output) == expected and tidy and right and seconds < PATIENCE
            differing += not same
            print(
                f"{sent.name} {number} to rank {victim} after {moment:.1f} s: exit codes {ended} "
                f"{seconds:.1f} s later, it {state}; {time.perf_counter() - begin:.1f} s more, "
                f"{'same' if same else 'OTHER'} bytes",
                flush=True,
            )
            results.append(
                {
                    "signal": sent.name,
                    "rank": victim,
                    "moment": round(moment, 1),
                    "exit codes": ended,
                    "seconds until all had ended": round(seconds, 1),
                    "state": f"it {state}",
                    "same bytes": same,
                }
            )
    if options.json:
        kept = {"ranks": options.ranks, "undisturbed seconds": round(whole, 1), "kills": results}
        options.json.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    print(f"{options.kills} kills, {differing} differing results")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
