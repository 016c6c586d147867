"""docs/benchmarks.md from the results of scripts/benchmark_kernels.py and benchmark_cpu.py."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from scripts.benchmark_cpu_page import CPU_COMMAND, cpu_sections

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "scripts" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
COMMAND = "python scripts/benchmark_kernels.py"
TITLES = {
    "pass": "One pass over a matrix",
    "trellis": "One pass with a trellis",
    "decoder": "Decoding",
    "hessian": "Second moments of inputs",
    "model": "All layers of a model",
}
NOTES = {
    "pass": "Blocks of 128 columns, float32, eight classes of tables. The GPTQ column loop is "
    "plain torch written from its description and knows no rates.",
    "trellis": "Alphabet of 33 and escapes; the path is judged 32 columns beyond each block.",
    "decoder": "Six matrices of 4096 x 4096 in one launch. Output counts 2 bytes a weight.",
    "hessian": "Added to a float64 sum; torch's product is the one that runs by default.",
    "model": "Random weights, H given; quantized to symbols and tables, the coding is not counted.",
}


def write_page(
    path: Path | None = None,
    *,
    gpu: Mapping[str, Any] | None = None,
    cpu: Mapping[str, Any] | None = None,
) -> None:
    """Write the page; missing figures are read from the results in the repository."""
    text = page(gpu or stored("benchmark_kernels.json"), cpu or stored("cpu.json"))
    path = path or PAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def stored(name: str) -> Any:
    """Return the results in the repository, or None."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def page(results: Mapping[str, Any] | None, cpu: Mapping[str, Any] | None = None) -> str:
    """Return the page; without results, a sentence with the command that makes them."""
    parts = [
        "# Benchmarks",
        f"Written by `{COMMAND}` and `{CPU_COMMAND}` from their own results. Every form is "
        "compared with its definition in torch before it is timed; where they differ, there is no "
        "time.",
        *cpu_sections(cpu),
        "## On a GPU",
    ]
    if results is None:
        parts += [
            "**Figures on a GPU: not yet measured.** "
            f"On a machine with a CUDA device, `{COMMAND}` measures them and writes this page.",
        ]
        return "\n\n".join(parts) + "\n"
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    parts.append(
        f"{results['device']}, CUDA {results['cuda']}, {results['date']}, {versions}. "
        "Times are medians; behind them the 20 % and 80 % quantiles."
    )
    rows = results["rows"]
    for section, title in TITLES.items():
        of_section = [row for row in rows if row["section"] == section]
        if of_section:
            parts += [f"### {title}", NOTES[section], _table(of_section)]
    ratios = list(_ratios(rows))
    if ratios:
        parts += ["### Ratios within this run", "\n".join(f"- {line}" for line in ratios)]
    return "\n\n".join(parts) + "\n"


def _table(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = ["| case | what | time | |", "|---|---|---|---|"]
    for row in rows:
        spread = f"{_time(row['median'])} ({_time(row['low'])} … {_time(row['high'])})"
        lines.append(f"| {row['case']} | {row['what']} | {spread} | {_figures(row)} |")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _figures(row: Mapping[str, Any]) -> str:
    """Return the rates of a row and its other figures, in words."""
    parts = []
    if "elements" in row:
        parts.append(f"{row['elements'] / row['median'] / 1e9:.3g} G weights/s")
    if "bytes" in row:
        parts.append(f"{row['bytes'] / row['median'] / 1e9:.3g} GB/s")
    if "bits" in row:
        parts.append(f"{row['bits']:.3g} bits each")
    if "differing" in row:
        parts.append(f"{row['differing']:.2g} of the symbols at ties")
    return ", ".join(parts)


def _ratios(rows: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """Yield the ratios of kernels to the other forms of the same run."""
    times = {(row["case"], row["what"]): row["median"] for row in rows}
    for (case, what), seconds in times.items():
        if what == "GPTQ column loop":
            kernel = times[case, "kernel"]
            products = times[case, "trailing products alone"]
            yield f"{case}: {seconds / kernel:.3g} times as fast as the GPTQ column loop"
            yield f"{case}: {kernel / products:.3g} times the trailing products alone"
        if what == "device copy of the weights":
            kernel = times[case, "kernel, bfloat16 weights"]
            yield f"decoding, {case}: {kernel / seconds:.3g} times a device copy of the weights"
        if what == "kernel" and case.endswith("|G| = 1024"):
            few = times[case.replace("= 1024", "= 33"), what]
            yield f"{case}: {seconds / few:.3g} times |G| = 33"
