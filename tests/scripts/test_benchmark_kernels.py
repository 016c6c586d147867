"""scripts/benchmark_kernels.py compares before it times, and its page says what was measured."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "benchmark_kernels.py"
with pytest.MonkeyPatch.context() as patch:
    # The script puts the checkout in place of its own folder, the first entry.
    patch.setattr(sys, "path", [str(ROOT), *sys.path])
    benchmark = importlib.import_module("scripts.benchmark_kernels")
    passes = importlib.import_module("scripts.benchmark_passes")
    writer = importlib.import_module("scripts.benchmark_page")


@pytest.fixture
def targets(tmp_path):
    """Where results would go, and the arguments that say so."""
    files = tmp_path / "results.json", tmp_path / "page.md"
    return files, ["--json", str(files[0]), "--page", str(files[1])]


@pytest.mark.slow
def test_every_section_agrees_with_the_definitions(targets, capsys):
    files, arguments = targets
    assert benchmark.main(["--check", *arguments]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"{name}: as defined" for name in benchmark.SECTIONS]
    assert not any(file.exists() for file in files)


@pytest.mark.parametrize("section", ["decoder", "hessian"])
def test_no_time_is_told_of_a_wrong_kernel(section, targets, capsys, monkeypatch):
    from cerwu_gpu.kernels import ans, hessian

    def wrong_weights(batch, rules, dtype, out):
        return [torch.zeros(matrix.shape, dtype=dtype) for matrix in batch]

    monkeypatch.setattr(ans, "decode_weights", wrong_weights)
    monkeypatch.setattr(hessian, "accumulate_hessian", lambda total, x: total.add_(1))
    files, arguments = targets
    assert benchmark.main(["--check", "--only", section, *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "differ" in captured.err
    assert not any(file.exists() for file in files)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_nothing_is_measured(targets):
    files, arguments = targets
    command = [sys.executable, str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "benchmark_kernels: no CUDA device here: use --check, or a GPU.\n"
    assert not any(file.exists() for file in files)


def test_the_gptq_loop_rounds_as_our_pass_does_without_rates():
    problem = passes.Pass.random(40, 9, torch.device("cpu"))
    for each in (problem.columns.lmbda, problem.columns.curvature):
        each.zero_()
    assert torch.equal(passes.column_loop(problem), problem.scalar())


def test_the_trailing_products_are_those_of_the_pass(monkeypatch):
    """Blocks of 16 columns of 40: two products, with 24 and 8 columns."""
    shapes = []
    true_product = torch.Tensor.addmm_

    def noted(total, a, b, **options):
        shapes.append((a.shape, b.shape))
        return true_product(total, a, b, **options)

    problem = passes.Pass.random(40, 9, torch.device("cpu"))
    monkeypatch.setattr(passes, "BLOCK", 16)
    monkeypatch.setattr(torch.Tensor, "addmm_", noted)
    problem.products()
    assert [shape for shape in shapes if 0 not in shape[1]] == [
        ((40, 16), (16, 24)),
        ((40, 16), (16, 8)),
    ]


def row(section, case, what, seconds, **figures):
    times = dict.fromkeys(("median", "low", "high"), seconds)
    return {"section": section, "case": case, "what": what, **times, **figures}


def test_the_page_tells_times_rates_and_ratios():
    case = "4096 x 4096, |G| = "
    rows = [
        row("pass", case + "33", "kernel", 0.01, differing=2e-5),
        row("pass", case + "33", "GPTQ column loop", 0.5),
        row("pass", case + "33", "trailing products alone", 0.004),
        row("pass", case + "1024", "kernel", 0.015, differing=0.0),
        row("decoder", "no trellis", "kernel, bfloat16 weights", 0.002, elements=10**8, bytes=2e8),
        row("decoder", "no trellis", "device copy of the weights", 0.001, elements=10**8),
    ]
    results = {"device": "a GPU", "cuda": "13", "date": "today", "versions": {"torch": "2"}}
    text = writer.page({**results, "rows": rows})
    assert "a GPU, CUDA 13, today, torch 2." in text
    for line in (
        "- 4096 x 4096, |G| = 33: 50 times as fast as the GPTQ column loop",
        "- 4096 x 4096, |G| = 33: 2.5 times the trailing products alone",
        "- 4096 x 4096, |G| = 1024: 1.5 times |G| = 33",
        "- decoding, no trellis: 2 times a device copy of the weights",
        "50 G weights/s, 100 GB/s",
    ):
        assert line in text


def test_the_page_in_the_repository_is_the_one_of_its_results():
    results = writer.stored("benchmark_kernels.json"), writer.stored("cpu.json")
    assert benchmark.PAGE.read_text(encoding="utf-8") == writer.page(*results)
