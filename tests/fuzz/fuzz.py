"""Damages golden directories many times, and counts what reading them then does.

    python tests/fuzz/fuzz.py --mutations 50000
    CERWU_GPU_BACKEND=torch python tests/fuzz/fuzz.py --mutations 5000 --doors reader
    CERWU_GPU_BACKEND=triton TRITON_INTERPRET=1 python tests/fuzz/fuzz.py --mutations 300 --small

Half of the mutations are accidents, half are attacks: changes after which every checksum is right
again. They take turns at the doors: the reader, verify, info, load_compressed, from_pretrained,
decompress and, where it is installed, the loader of vLLM. Each must end in a CerwuError that names
a tensor or a file, or in the very same weights; an attack may also end in other weights.
from_pretrained reads config.json and headers before it asks us: whatever it refuses then is counted
as foreign. Workers with limited memory and time do the reading, so that a crash or a hang is one
more count; so is memory beyond twice that of the honest directory and 50 MB. Exit status 1:
something was neither.
"""

import argparse
import json
import os
import resource
import selectors
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from traceback import walk_tb
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402 - the checkout goes on the path before the package is imported
import torch

from cerwu_gpu.container.breakdown import breakdown
from cerwu_gpu.container.reader import (
    CompressedDirectory,
    decode_stored,
    inventory,
    open_directory,
    verify,
)
from cerwu_gpu.errors import CerwuError
from cerwu_gpu.serving.loading import is_compressed
from tests.fuzz.mutations import mutate

GOLDEN = ROOT / "tests" / "golden"
SECONDS = 60.0
"""A mutation that takes longer hangs."""
EXTRA_MEMORY = 4 << 30
"""Address space that a worker gets beyond what it has after the honest directory: a crash below."""
SMALL = 64
"""Weights of one directory that Triton's interpreter has the time for."""
BAD = ("crash", "hang", "unnamed", "wrong weights by accident", "memory")
MEMORY = 50 << 20
"""Bytes that a damaged directory may take beyond twice what the honest one takes."""


def kinds() -> list[str]:
    return sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))


def chosen(directory: CompressedDirectory, *, small: bool) -> list[str]:
    """Names of the compressed weights that are decoded: all, or the smallest ones."""
    sizes = {name: entry.weights for name, entry in directory.compressed().items()}
    names = sorted(sizes, key=lambda name: (sizes[name], name))
    sums = accumulate(sizes[name] for name in names)
    return [name for name, total in zip(names, sums, strict=True) if not small or total <= SMALL]


def read(path: Path, names: list[str]) -> dict[str, bytes]:
    """Every plain tensor and the weights `names`, as bytes with their dtype and shape.

    Raises:
        CerwuError: as reading does; OverflowError: a weight is too large for the interpreter.
    """
    directory = open_directory(path)
    tensors = dict(directory.plain())
    entries = directory.compressed()
    if set(names) == set(entries):
        tensors |= dict(directory.weights())
    else:
        if any(name in entries and entries[name].weights > 8 * SMALL for name in names):
            raise OverflowError
        batch = [directory.stored(name) for name in names if name in entries]
        tensors |= dict(decode_stored(batch))
    return {name: description(tensor) for name, tensor in tensors.items()}


def described(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: description(tensor) for name, tensor in model.state_dict().items()}


def through_info(path: Path) -> dict[str, bytes]:
    inventory(path)
    breakdown(path)
    return {}


def through_load(path: Path) -> dict[str, bytes]:
    from cerwu_gpu.serving.loading import load_compressed

    return described(load_compressed(path))


def through_transformers(path: Path) -> dict[str, bytes]:
    """The result of from_pretrained.

    Raises:
        CerwuError: as reading does; Foreign: transformers refuses it by itself.
    """
    from transformers import AutoModelForCausalLM

    try:
        weights = described(AutoModelForCausalLM.from_pretrained(path))
        if not is_compressed(path):
            raise Foreign("config.json names no method, and transformers asks nobody")
        return weights
    except (CerwuError, Foreign):
        raise
    except Exception as error:
        names = [frame.f_globals["__name__"] for frame, _ in walk_tb(error.__traceback__)]
        ours = any(name.startswith("cerwu_gpu.") for name in names)
        if ours or isinstance(error, MemoryError):
            raise
        raise Foreign(f"{type(error).__name__}: {error}") from error


def through_decompress(path: Path) -> dict[str, bytes]:
    from cerwu_gpu.serving.loading import decompress

    with tempfile.TemporaryDirectory() as place:
        decompress(path, Path(place) / "plain")
        return {file.name: b"" for file in (Path(place) / "plain").iterdir()}


def through_vllm(path: Path) -> dict[str, bytes]:
    """The weights that vLLM would be given; no engine is started."""
    from vllm.config.load import LoadConfig

    from cerwu_gpu.vllm.loader import CerwuLoader

    given: Any = SimpleNamespace(
        model=str(path), quantization="cerwu", trust_remote_code=False, revision=None
    )
    weights = CerwuLoader(LoadConfig()).get_all_weights(given, torch.nn.Module())
    return {name: description(tensor) for name, tensor in weights}


class Foreign(Exception):
    """transformers refuses a directory before it asks us."""


DOORS: dict[str, Callable[[Path], dict[str, bytes]]] = {
    "verify": lambda path: verify(path) or {},
    "info": through_info,
    "load_compressed": through_load,
    "from_pretrained": through_transformers,
    "decompress": through_decompress,
}
if find_spec("vllm") is not None:
    DOORS["vllm"] = through_vllm
"""The ways into a directory besides the reader itself; those of transformers models come last."""


def description(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + data


def doors_of(kind: str, doors: Sequence[str]) -> list[str]:
    """Those of the doors that a golden directory has; only transformers models have all."""
    loads = "model_type" in json.loads((GOLDEN / kind / "config.json").read_text("utf-8"))
    return [name for name in doors if loads or name in ("reader", "verify", "info")]


class Subject:
    """A copy of one golden directory that is damaged again and again."""

    def __init__(
        self, kind: str, place: Path, *, small: bool = False, doors: Sequence[str] = ("reader",)
    ) -> None:
        self.kind, self.path = kind, place / kind
        shutil.copytree(GOLDEN / kind, self.path)
        directory = open_directory(self.path)
        self.names = chosen(directory, small=small)
        self.doors = doors_of(kind, doors)
        self.honest = {name: self._through(name) for name in self.doors}
        self.known = [*read(self.path, self.names), *directory.compressed(), kind]
        self.known += os.listdir(self.path)

    def _through(self, door: str) -> dict[str, bytes]:
        return read(self.path, self.names) if door == "reader" else DOORS[door](self.path)

    def outcome(self, number: int) -> tuple[str, str]:
        """What reading after mutation `number` does, and what it said."""
        attack = number % 2 == 1
        seed = f"{self.kind} {number}"
        door = self.doors[number // 2 % len(self.doors)]
        # What transformers makes of an attack on config.json is not ours before it asks us.
        described = door in ("load_compressed", "decompress", "vllm") or (
            door == "from_pretrained" and not attack
        )
        file, changed = mutate(self.path, seed, self.names, attack=attack, described=described)
        raw = file.read_bytes()
        file.write_bytes(changed)
        try:
            return self._read(attack, door)
        finally:
            file.write_bytes(raw)

    def _read(self, attack: bool, door: str) -> tuple[str, str]:
        try:
            weights = self._through(door)
        except Foreign as error:
            return "foreign", str(error)
        except CerwuError as error:
            message = str(error)
            named = any(name in message for name in self.known)
            # An attacker may have changed the name itself.
            return ("detected" if named or attack else "unnamed"), message
        except OverflowError:
            return "too large", ""
        except Exception as error:
            return "crash", f"{door}: {type(error).__name__}: {error}"
        if weights == self.honest[door]:
            return "harmless", ""
        return ("wrong weights" if attack else "wrong weights by accident"), door


def peak() -> int:
    """Bytes that this process had in memory at most."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def work(kind: str, first: int, last: int, small: bool, doors: Sequence[str]) -> None:
    """Say `ready`, then before and after each mutation what is going on; one JSON a line."""
    torch.set_num_threads(1)
    os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers comes
    with tempfile.TemporaryDirectory() as place:
        subject = Subject(kind, Path(place), small=small, doors=doors)
        honest = peak()
        say({"ready": honest})
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + EXTRA_MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for number in range(first, last):
            say({"start": number})
            outcome, message = subject.outcome(number)
            if outcome not in BAD and peak() > 2 * honest + MEMORY:
                outcome, message = "memory", f"{peak():,} bytes"
            say({"done": number, "outcome": outcome, "message": message[:300], "peak": peak()})


def say(event: dict[str, Any]) -> None:
    print(json.dumps(event), flush=True)


class Tally:
    """Counts per way of mutating, and the largest memory."""

    def __init__(self) -> None:
        self.counts = {"accidents": Counter[str](), "attacks": Counter[str]()}
        self.honest = self.largest = 0
        self.bad: list[str] = []

    def add(self, kind: str, number: int, outcome: str, message: str = "") -> None:
        self.counts["attacks" if number % 2 else "accidents"][outcome] += 1
        if outcome in BAD:
            self.bad.append(f"{kind} {number}: {outcome} {message}")

    def lines(self) -> Iterator[str]:
        for name, counts in self.counts.items():
            found = ", ".join(f"{what} {count}" for what, count in sorted(counts.items()))
            yield f"{name}: tried {counts.total()}, {found}"
        total = sum(self.counts.values(), Counter())
        yield ", ".join(f"{what} {total[what]}" for what in ("crash", "hang", "unnamed"))
        yield f"largest memory {self.largest >> 20} MiB, honest files {self.honest >> 20} MiB"
        yield from self.bad


def fuzz_kind(kind: str, count: int, small: bool, doors: Sequence[str], tally: Tally) -> None:
    """`count` mutations of one directory; a worker that ends or hangs is replaced."""
    number = 0
    while number < count:
        number = _supervise(kind, number, count, small, doors, tally)


def _supervise(
    kind: str, first: int, last: int, small: bool, doors: Sequence[str], tally: Tally
) -> int:
    """Run one worker; return the first mutation that is not done."""
    command = [sys.executable, __file__, "--worker", kind, str(first), str(last)]
    command += ["--small"] if small else []
    command += ["--doors", *doors]
    running = None
    with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0) as worker:
        assert worker.stdout is not None
        waiting = selectors.DefaultSelector()
        waiting.register(worker.stdout, selectors.EVENT_READ)
        while True:
            if not waiting.select(SECONDS if running is not None else 600.0):
                worker.kill()
                break
            line = worker.stdout.readline()
            if not line:
                break
            event = json.loads(line)
            if "ready" in event:
                tally.honest = max(tally.honest, event["ready"])
            elif "start" in event:
                running = event["start"]
            else:
                running, first = None, event["done"] + 1
                tally.largest = max(tally.largest, event["peak"])
                tally.add(kind, event["done"], event["outcome"], event["message"])
    if first == last:
        return last
    if running is None:
        raise RuntimeError(f"the worker for {kind} did not start")
    outcome = "hang" if worker.returncode == -9 else "crash"
    tally.add(kind, running, outcome, f"exit status {worker.returncode}")
    return running + 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Damage golden directories and read them.")
    parser.add_argument("--mutations", type=int, default=50000)
    parser.add_argument(
        "--doors", nargs="+", default=["reader", *DOORS], choices=["reader", *DOORS]
    )
    parser.add_argument("--small", action="store_true", help="only the smallest matrices")
    parser.add_argument("--kinds", nargs="*", default=kinds())
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        kind, first, last = options.worker
        work(kind, int(first), int(last), options.small, options.doors)
        return 0
    if "vllm" not in DOORS:
        print("vLLM is not installed: its loader is no door (make test-vllm).", file=sys.stderr)
    tally = Tally()
    doors = ["reader"] if options.small else options.doors
    chosen_kinds = [kind for kind in options.kinds if doors_of(kind, doors)]
    for kind in chosen_kinds:
        count = -(-options.mutations // len(chosen_kinds))
        fuzz_kind(kind, count, options.small, doors, tally)
        print(f"{kind} done", file=sys.stderr)
    print("\n".join(tally.lines()))
    return 1 if tally.bad else 0


if __name__ == "__main__":
    sys.exit(main())
