"""Run the commands on full disks, with little memory and with few open files.

    python scripts/limits.py MODEL TEXT [--only disk memory files] [--steps 10]
        [options of cerwu-gpu compress]

Every run must end with exit code 0, or with 2 and one sentence on stderr, and leave nothing but the
output, its reports and the work directory; once there is room, the same arguments must give the
bytes of an undisturbed run. One line per run has the result, and the exit code is 1 if one is
otherwise. Disks are file systems in memory, which only root can mount.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# Instead of this folder, whose evaluate.py would shadow Hugging Face's package evaluate.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts.ranks_equal import digests

MEMORY = (1 << 28, 8 << 30)
"""Least and most address space [bytes] of a run."""
FILES = (6, 7, 8, 10, 12, 16, 24, 32, 48, 64)
"""Numbers of files that a run may open."""
FEW_THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
"""Variables that keep the libraries from reserving memory for threads."""
SECONDS = 600
"""A run that takes longer hangs."""


def run(words: Sequence[object], limits: dict[int, int] | None = None) -> tuple[int, str]:
    """Run `cerwu-gpu` with limits of the system (resource.RLIMIT_... -> value); return its exit
    code and what it wrote to stderr."""

    def limit() -> None:
        for kind, value in (limits or {}).items():
            resource.setrlimit(kind, (value, value))

    command = [sys.executable, "-m", "cerwu_gpu", *map(str, words)]
    environment = {**os.environ, **FEW_THREADS, "PYTHONPATH": sys.path[0], "TQDM_DISABLE": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, env=environment, preexec_fn=limit, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return -1, "it hangs"
    return done.returncode, done.stderr.decode(errors="replace").strip()


def fault(code: int, said: str, left: set[str], allowed: set[str]) -> str | None:
    """Return why the end of a run is not as promised; None where it is."""
    if code not in (0, 2):
        return f"exit code {code}: {said[-300:]}"
    sentences = [line for line in said.splitlines() if line.startswith("cerwu-gpu: ")]
    if "Traceback" in said or (code == 2 and len(sentences) != 1):
        return f"exit code {code} without its one sentence: {said[-300:]}"
    if not left <= allowed:
        return f"left behind: {', '.join(sorted(left - allowed))}"
    return None


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


class Trial:
    """The commands on one model, and what they give when nothing disturbs them."""

    def __init__(self, model: str, text: str, options: Sequence[str], place: Path) -> None:
        self.compress = ["compress", model, "--calibration", text, "--quiet", *options]
        self.place = place
        self.compressed = place / "undisturbed"
        code, said = run([*self.compress, "-o", self.compressed])
        if code:
            sys.exit(said)
        self.expected = digests(self.compressed)
        self.faults = 0

    def report(self, what: str, code: int, said: str, problem: str | None) -> None:
        """Print the line of one run."""
        self.faults += problem is not None
        last = said.splitlines()[-1] if code == 2 and said else ""
        print(f"{what}: {problem or f'exit code {code}'} {last[:150]}", flush=True)

    def commands(self, folder: Path) -> dict[str, tuple[list[object], set[str]]]:
        """Return name -> arguments, and the names that it may leave in `folder`."""
        work = {".out.work", "out", "out.report.json", "out.report.html"}
        return {
            "compress": ([*self.compress, "-o", folder / "out"], work),
            "verify": (["verify", self.compressed], set()),
            "info": (["info", self.compressed], set()),
            "decompress": (["decompress", self.compressed, "-o", folder / "out"], {"out"}),
        }

    def limited(self, what: str, limits: dict[int, int], *, again: bool = True) -> None:
        """Run every command under limits; and where compress did not succeed, without them."""
        with tempfile.TemporaryDirectory(dir=self.place) as name:
            for command in ("info", "verify", "decompress", "compress"):
                folder = Path(name) / command
                folder.mkdir()
                words, allowed = self.commands(folder)[command]
                code, said = run(words, limits)
                problem = fault(code, said, entries(folder), allowed)
                if command == "compress" and problem is None and again:
                    problem = self.resumed(words, folder / "out", code)
                self.report(f"{what}, {command}", code, said, problem)

    def resumed(self, words: list[object], output: Path, code: int) -> str | None:
        """Return what is wrong with the output, after one more run where there is none yet."""
        if code != 0 and not output.exists():
            code, said = run(words)
            if code:
                return f"cannot be continued: {said[-300:]}"
        return None if digests(output) == self.expected else "OTHER bytes"


@contextmanager
def disk(size: int) -> Iterator[Path]:
    """Mount a file system of `size` bytes in memory."""
    with tempfile.TemporaryDirectory() as name:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", name], check=True)
        try:
            yield Path(name)
        finally:
            subprocess.run(["umount", name], check=True)


def full_disks(trial: Trial, steps: int) -> None:
    """Compress and decompress on disks from almost no room to a little more than is needed."""
    for command in ("compress", "decompress"):
        with disk(1 << 33) as large:
            words, _ = trial.commands(large)[command]
            run(words)
            need = sum(path.stat().st_size for path in large.rglob("*") if path.is_file())
        need *= 3 if command == "compress" else 1  # the journal, and what is being written
        for step in range(1, steps + 1):
            size = max(4096 * 4, need * step // steps)
            with disk(size) as small:
                words, allowed = trial.commands(small)[command]
                code, said = run(words)
                problem = fault(code, said, entries(small), allowed)
                if code == 2 and command == "decompress" and problem is None and entries(small):
                    problem = "half a model is left"
                subprocess.run(["mount", "-o", "remount,size=8G", str(small)], check=True)
                if command == "compress" and problem is None:
                    problem = trial.resumed(words, small / "out", code)
                trial.report(f"disk of {size:,} bytes, {command}", code, said, problem)


def main() -> int:
    """Run the trials and return the exit code: 1 if one did not end as promised."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--only", nargs="+", default=["disk", "memory", "files"])
    parser.add_argument("--steps", type=int, default=10)
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as place:
        trial = Trial(options.model, options.text, rest, Path(place))
        if "disk" in options.only:
            full_disks(trial, options.steps)
        if "memory" in options.only:
            least, most = MEMORY
            for step in range(options.steps):
                size = int(least * (most / least) ** (step / max(1, options.steps - 1)))
                trial.limited(f"{size >> 20} MiB of address space", {resource.RLIMIT_AS: size})
        if "files" in options.only:
            for count in FILES:
                trial.limited(f"{count} open files", {resource.RLIMIT_NOFILE: count})
        print(f"{trial.faults} faults")
    return 1 if trial.faults else 0


if __name__ == "__main__":
    sys.exit(main())
