"""The part of docs/benchmarks.md that scripts/benchmark_cpu.py measures."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

CPU_COMMAND = "python scripts/benchmark_cpu.py"
Row = Mapping[str, Any]


def cpu_sections(results: Mapping[str, Any] | None) -> list[str]:
    """Return headings, tables and sentences; without results, how to get them."""
    parts = ["## On a CPU"]
    if results is None:
        return [*parts, f"**Not yet measured.** `{CPU_COMMAND}` measures and writes this page."]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    parts.append(
        f"{results['cpu']}, {results['threads']} threads, {results['date']}, {versions}; load "
        f"before the run {results['load_before']:.2f}. What is compared was measured in turn in "
        "one run; the fastest turn of each counts. Figures per weight and per symbol are of one "
        "thread."
    )
    rows: Sequence[Row] = results["rows"]
    for section, build in (
        ("block", _search),
        ("layer", _search),
        ("busy", _busy),
        ("decode", _decode),
        ("model", _model),
    ):
        of_section = [row for row in rows if row["section"] == section]
        if of_section:
            parts += [f"### {TITLES[section]}", NOTES[section], "\n".join(build(of_section))]
        if section == "layer":
            parts += list(_authors(rows))
    stages = results.get("stages")
    if stages:
        parts += ["### Compressing the demo's model", "\n".join(_stages(stages))]
    return parts


TITLES = {
    "block": "The search of one block of 128 columns",
    "layer": "The search of a whole layer",
    "busy": "Beside a busy process",
    "decode": "Decoding",
    "model": "Loading and running a compressed model",
}
NOTES = {
    "block": "4096 rows, tables of eight classes, 33 levels and an escape.",
    "layer": "As the default settings quantize it: two passes, of which the first sees 512 rows. "
    "*All* has the factorisations, the refit of steps and scales and the report's limit besides.",
    "busy": "The same layer on all threads, alone and beside a process that keeps one core busy.",
    "decode": "A matrix of 8192 x 4096 symbols at about 2.5 bits.",
    "model": "Each way in a fresh process, the fastest loading of three; memory is the peak less "
    "the peak after the imports.",
}


def _search(rows: Sequence[Row]) -> Iterator[str]:
    yield "| case | torch form, ns per weight | compiled, ns per weight | ratio |"
    yield "|---|---|---|---|"
    for case in dict.fromkeys(row["case"] for row in rows):
        times = {row["what"]: row["ns_per_weight"] for row in rows if row["case"] == case}
        slow, fast = times["torch form"], times["compiled"]
        yield f"| {case} | {slow:.0f} | {fast:.0f} | {slow / fast:.1f} |"


def _authors(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row["section"] == "authors":
            yield f"{row['case']}, {row['what']}: {row['ns_per_weight']:.0f} ns per weight."


def _busy(rows: Sequence[Row]) -> Iterator[str]:
    yield "| quantizer | form | alone | beside it | ratio |"
    yield "|---|---|---|---|---|"
    for row in rows:
        alone, beside = row["seconds_alone"], row["seconds_beside"]
        times = f"{alone:.2f} s | {beside:.2f} s | {beside / alone:.1f}"
        yield f"| {row['case']} | {row['what']} | {times} |"


def _decode(rows: Sequence[Row]) -> Iterator[str]:
    yield "| matrix | what | million symbols a second and core |"
    yield "|---|---|---|"
    for row in rows:
        yield f"| {row['case']} | {row['what']} | {row['million_per_second']:.0f} |"


def _model(rows: Sequence[Row]) -> Iterator[str]:
    yield "| resident | seconds to load | memory of the model | a forward of 64 tokens | tokens/s |"
    yield "|---|---|---|---|---|"
    for row in rows:
        yield (
            f"| {row['case']} | {row['seconds_to_load']:.2f} | {row['model_bytes'] / 1e6:.0f} MB | "
            f"{row['seconds_of_a_forward']:.2f} s | {row['tokens_per_second']:.2f} |"
        )


def _stages(stages: Mapping[str, float]) -> Iterator[str]:
    yield "| stage | seconds |"
    yield "|---|---|"
    for stage, seconds in stages.items():
        yield f"| {stage} | {seconds:.1f} |"
    yield f"| all | {sum(stages.values()):.1f} |"
