"""scripts/benchmark_cpu.py compares before it times, and the page has what it measured."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
with pytest.MonkeyPatch.context() as patch:
    # The script puts the checkout in place of its own folder, the first entry.
    patch.setattr(sys, "path", [str(ROOT), *sys.path])
    benchmark = importlib.import_module("scripts.benchmark_cpu")
    page = importlib.import_module("scripts.benchmark_cpu_page")


def test_every_compiled_form_agrees_with_its_definition(tmp_path, capsys):
    target = tmp_path / "cpu.json"
    assert benchmark.main(["--check", "--json", str(target)]) == 0
    assert capsys.readouterr().out == "benchmark_cpu: every compiled form is as defined\n"
    assert not target.exists()


@pytest.mark.parametrize("form", ["obs", "trellis", "ans"])
def test_a_wrong_compiled_form_is_not_timed(form, monkeypatch, capsys):
    module = importlib.import_module(f"cerwu_gpu.compiled.{form}")
    if form == "ans":
        right = module.decode_weights

        def wrong(*arguments):
            return [-2 * weight for weight in right(*arguments)]

        monkeypatch.setattr(module, "decode_weights", wrong)
    else:
        name = "quantize_block" if form == "obs" else "quantize_block_trellis"
        right = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **b: tuple(x + 1 for x in right(*a, **b)))
    assert benchmark.main(["--check"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "differ from the definition's" in captured.err


def test_times_are_of_the_fastest_turn_and_leave_out_the_first(monkeypatch):
    clock = iter([0.0, 0.0, 3.0, 0.0, 2.0])  # the first turn asks for its beginning only
    monkeypatch.setattr(benchmark, "perf_counter", lambda: next(clock))
    assert benchmark.in_turn({"a": lambda: None}, turns=2) == {"a": 2.0}


def test_the_authors_figures_are_medians_of_their_runs(tmp_path, monkeypatch, capsys):
    rows = ["method,nbins,cpu_us_per_weight", "cerwu,16,2.0", "cerwu,16,4.0", "cerwu,16,3.0"]
    (tmp_path / "reference.csv").write_text("\n".join([*rows, "optq,16,9.0"]))
    monkeypatch.setenv("CERWU_GPU_DATA", str(tmp_path))
    (row,) = benchmark.authors()
    assert (row["case"], row["ns_per_weight"]) == ("|G| = 16", 3000)
    monkeypatch.delenv("CERWU_GPU_DATA")
    assert list(benchmark.authors()) == []
    assert "no figures of the authors' C++" in capsys.readouterr().out


def test_the_page_has_times_and_ratios():
    assert "Not yet measured" in page.cpu_sections(None)[1]
    case = {"section": "block", "case": "scalar"}
    rows = [
        {**case, "what": "torch form", "ns_per_weight": 120.4},
        {**case, "what": "compiled", "ns_per_weight": 20.1},
        {
            "section": "busy",
            "case": "scalar",
            "what": "compiled",
            "seconds_alone": 0.1,
            "seconds_beside": 0.15,
        },
        {"section": "decode", "case": "m", "what": "compiled", "million_per_second": 151.4},
        {"section": "authors", "case": "|G| = 16", "what": "w", "ns_per_weight": 2400.0},
    ]
    results = {
        "date": "today",
        "cpu": "a CPU",
        "threads": 2,
        "load_before": 0.1,
        "versions": {"torch": "2"},
        "rows": rows,
        "stages": {"load": 7.04, "quantize": 40.0},
    }
    text = "\n".join(page.cpu_sections(results))
    for line in (
        "a CPU, 2 threads, today, torch 2; load before the run 0.10.",
        "| scalar | 120 | 20 | 6.0 |",
        "| scalar | compiled | 0.10 s | 0.15 s | 1.5 |",
        "| m | compiled | 151 |",
        "| load | 7.0 |",
        "| all | 47.0 |",
    ):
        assert line in text


def test_a_layer_has_the_shapes_that_were_asked_for():
    weight, hessian, alpha = benchmark.random_layer(6, 4)
    assert (weight.shape, hessian.shape, alpha.shape) == ((6, 4), (4, 4), (6,))
    assert bool((torch.linalg.eigvalsh(hessian) > 0).all())
