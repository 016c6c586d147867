"""Kill a compression at random moments, start it again, and compare the bytes.

    python scripts/kill_and_resume.py MODEL [--kills 10] [--seed 0] [--signals KILL TERM INT]
        [options of cerwu-gpu compress]

One run is left alone. Each of the others gets a signal once (by default SIGKILL), at a moment drawn
evenly from the time that the first one took, and is then started again with the same arguments.
Every file must be the same in the end, and a run that could end by itself must have exit code 0,
2 or 130; one line per kill has the result, and the exit code is 1 if one differs.
"""

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# Instead of this folder, whose evaluate.py would shadow Hugging Face's package evaluate.
sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ["TQDM_DISABLE"] = "1"  # the libraries' bars; read when they are imported
os.environ["OMP_NUM_THREADS"] = "1"  # the threads of a process are not those of its forks

import cerwu_gpu.api  # noqa: F401  once, here: the runs are forks of this process
from cerwu_gpu.cli import main as command
from cerwu_gpu.container.work import work_path


def start(arguments: Sequence[str], output: Path) -> int:
    """Fork a process that compresses into `output`, before any torch thread runs; return its id."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            command(["compress", *arguments, "--output", str(output), "--quiet"])
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    return process


def finish(process: int) -> None:
    """Wait for a run that must succeed."""
    _, status = os.waitpid(process, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"a run ended with {os.waitstatus_to_exitcode(status)}")


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def killed(
    arguments: Sequence[str], output: Path, moment: float, number: signal.Signals
) -> tuple[str, int]:
    """Start a run, send it a signal after `moment` seconds, and return its progress in words and
    its exit code."""
    process = start(arguments, output)
    time.sleep(moment)
    os.kill(process, number)
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    if output.exists():
        return "had finished", code
    blocks = len(list(work_path(output).glob("*/block-*")))
    return f"had {blocks} finished blocks", code


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
    options, rest = parser.parse_known_args()
    arguments = [options.model, *rest]
    signals = [signal.Signals[f"SIG{name}"] for name in options.signals]
    moments = random.Random(options.seed)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in the background
    differing = 0
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        finish(start(arguments, Path(folder) / "undisturbed"))
        whole = time.perf_counter() - begin
        expected = digests(Path(folder) / "undisturbed")
        print(f"undisturbed: {whole:.1f} s, {len(expected)} files")
        for number in range(1, options.kills + 1):
            output = Path(folder) / f"killed-{number}"
            moment = moments.uniform(0, whole)
            sent = signals[(number - 1) % len(signals)]
            state, code = killed(arguments, output, moment, sent)
            begin = time.perf_counter()
            if not output.exists():
                finish(start(arguments, output))
            tidy = {path.name for path in Path(folder).glob(f"*{output.name}*")} <= {
                output.name,
                *(f"{output.name}.report.{kind}" for kind in ("json", "html")),
            }
            same = digests(output) == expected and tidy and code in allowed(sent)
            differing += not same
            print(
                f"{sent.name} {number} after {moment:.1f} s: exit code {code}, it {state}; "
                f"{time.perf_counter() - begin:.1f} s more, {'same' if same else 'OTHER'} bytes",
                flush=True,
            )
    print(f"{options.kills} kills, {differing} differing results")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
