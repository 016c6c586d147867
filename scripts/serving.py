"""Compare a compressed directory in vLLM with its decompressed copy: tokens, memory, seconds.

    python scripts/serving.py SMALL       # a language model, as `make demo` and `compress` write it

vLLM continues 20 prompts greedily by 32 tokens in float32, in a process of its own for each form:
the dense copy by vLLM alone (no plugins), SMALL decoded while it is loaded, and SMALL compressed in
memory. The tokens must be equal. Memory is that of the process while vLLM's loader runs: the
largest resident set, files that are mapped included, and the largest anonymous memory. The prompts
are pieces of Python's documentation. Linux only; vLLM must be installed (`make test-vllm`).
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from scripts.benchmark_resident import peak_bytes
from scripts.streaming_memory import Peak, anonymous_bytes

RESULTS = ROOT / "scripts" / "results" / "serving.json"
FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "decoded at load": {},
    "compressed in memory": {"model_loader_extra_config": {"resident": "compressed"}},
}
PROMPTS, TOKENS = 20, 32
BAR = 1.25
"""Largest share of dense vLLM's memory that loading may take."""
Row = dict[str, Any]


def prompts(folder: str) -> list[list[int]]:
    """Return prompts of 8 to 46 tokens from all over Python's documentation."""
    from transformers import AutoTokenizer

    from cerwu_gpu.hf.text import demo_text

    tokens = AutoTokenizer.from_pretrained(folder)(demo_text()[1]).input_ids
    step = len(tokens) // PROMPTS
    return [tokens[n * step : n * step + 8 + 2 * n] for n in range(PROMPTS)]


@contextmanager
def watched(loader: Any, result: Row) -> Iterator[None]:
    """Put memory and seconds of a class of loaders into `result`."""
    load_model = loader.load_model

    def measured(*arguments: Any, **options: Any) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, begin = anonymous_bytes(), perf_counter()
        with Peak() as peak:
            model = load_model(*arguments, **options)
        result["load_seconds"] = perf_counter() - begin
        result["anonymous_before"], result["anonymous_peak"] = before, peak.bytes
        result["anonymous_after"] = anonymous_bytes()
        result["resident_peak"] = peak_bytes()
        return model

    loader.load_model = measured
    try:
        yield
    finally:
        loader.load_model = load_model


def measure(form: str, folder: str) -> Row:
    """Load a directory into vLLM in this process and continue the prompts."""
    from vllm import LLM, SamplingParams, __version__
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    from cerwu_gpu.vllm.loader import CerwuLoader

    result: Row = {"form": form, "vllm": __version__}
    asked = [{"prompt_token_ids": prompt} for prompt in prompts(folder)]
    with watched(BaseModelLoader if form == "dense" else CerwuLoader, result):
        begin = perf_counter()
        llm = LLM(folder, dtype="float32", max_model_len=256, **FORMS[form])
        result["ready_seconds"] = perf_counter() - begin
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    begin = perf_counter()
    answers = llm.generate(asked, sampling, use_tqdm=False)
    result["tokens_per_second"] = PROMPTS * TOKENS / (perf_counter() - begin)
    result["tokens"] = [list(answer.outputs[0].token_ids) for answer in answers]
    result["texts"] = [answer.outputs[0].text for answer in answers]
    return result


def in_fresh_process(form: str, folder: Path) -> Row:
    """Run `measure` in a new process and return its result."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **os.environ,
    }
    if form == "dense":
        environment["VLLM_PLUGINS"] = ""
    with TemporaryDirectory() as place:
        output = Path(place) / "row.json"
        command = [sys.executable, __file__, str(folder), "--form", form, "--json", str(output)]
        subprocess.run(command, env=environment, check=True)
        row: Row = json.loads(output.read_text(encoding="utf-8"))
    return row


def page(result: Row) -> str:
    """Return the rows as a Markdown table."""
    rows = {row["form"]: row for row in result["rows"]}
    dense = rows["dense"]
    titles = ["form", "seconds", "resident peak", "anonymous peak", "kept", "tokens/s"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for form, row in rows.items():
        shares = [f"{row[key] / dense[key]:.2f}" for key in ("resident_peak", "anonymous_peak")]
        sizes = [f"{row[key] / 1e6:,.0f} MB" for key in ("resident_peak", "anonymous_peak")]
        peaks = [f"{size} ({share})" for size, share in zip(sizes, shares, strict=True)]
        kept = (row["anonymous_after"] - row["anonymous_before"]) / 1e6
        cells = [form, f"{row['load_seconds']:.1f}", *peaks, f"{kept:,.0f} MB"]
        lines.append(f"| {' | '.join(cells)} | {row['tokens_per_second']:.0f} |")
    return "\n".join(lines)


def main() -> int:
    """Measure all forms and print a table; return 1 where tokens differ or memory exceeds BAR."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("small", type=Path, metavar="SMALL", help="a compressed language model")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file for the result")
    parser.add_argument("--form", choices=FORMS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.form is not None:
        given.json.write_text(json.dumps(measure(given.form, str(given.small))), encoding="utf-8")
        return 0
    from cerwu_gpu import decompress
    from scripts.benchmark_cpu import environment

    where = environment()
    with TemporaryDirectory() as place:
        dense = Path(place) / "dense"
        decompress(given.small, dense)
        folders = dict.fromkeys(FORMS, given.small.resolve()) | {"dense": dense}
        rows = [in_fresh_process(form, folder) for form, folder in folders.items()]
        size = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    tokens = [row.pop("tokens") for row in rows]
    texts = [row.pop("texts") for row in rows]
    result = {
        **where,
        "prompts": PROMPTS,
        "tokens_each": TOKENS,
        "dense_bytes": size,
        "equal": [sum(a == b for a, b in zip(tokens[0], of, strict=True)) for of in tokens],
        "first_text": texts[0][0],
        "rows": rows,
    }
    given.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(page(result))
    print(f"equal continuations: {result['equal']} of {PROMPTS}")
    keys = ("resident_peak", "anonymous_peak")
    small = all(row[key] <= BAR * rows[0][key] for row in rows for key in keys)
    return int(not small or set(result["equal"]) != {PROMPTS})


if __name__ == "__main__":
    sys.exit(main())
