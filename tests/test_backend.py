"""Which form of an operation runs where, and what can be forced."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from cerwu_gpu import backend
from cerwu_gpu.block_problem import Alphabet, BlockProblem
from cerwu_gpu.coded import Reconstruction
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.reference import ans, counts, dequantize, hessian, obs, trellis, weights
from tests.reference.test_ans import random_matrix

CUDA = torch.device("cuda")
CPU = torch.device("cpu")


@pytest.fixture
def force(monkeypatch):
    def set_variable(value):
        monkeypatch.setenv("CERWU_GPU_BACKEND", value)

    return set_variable


@pytest.fixture
def calls(monkeypatch):
    """The kernels and the compiled forms that the backend took, by form and name."""
    taken = {"kernel": [], "compiled": []}

    def noted(form, choose):
        def chosen(family, name, device):
            taken[form].append(name)
            return choose(family, name, device)

        return chosen

    monkeypatch.setattr(backend, "_kernel", noted("kernel", backend._kernel))
    monkeypatch.setattr(backend, "_forced_compiled", noted("compiled", backend._forced_compiled))
    monkeypatch.delenv("CERWU_GPU_BACKEND", raising=False)
    return taken


def block(device, tables=3):
    """A problem of 6 rows, 5 columns, an alphabet of 7 and an escape."""
    rates = torch.rand(tables, 8) + 1
    factor = torch.eye(5) + torch.randn(5, 5).triu(1) / 9
    arguments = (
        3 * torch.randn(6, 5),
        factor,
        torch.zeros(6, dtype=torch.int64),
        torch.zeros(5, dtype=torch.int64),
        torch.full((6,), 0.1),
        torch.ones(5),
        torch.full((5,), 0.01),
    )
    x, factor, *others = (argument.to(device) for argument in arguments)
    alphabet = Alphabet(rates.to(device), -3, escapes=True)
    return BlockProblem(x, factor, alphabet, *others)


def coded(device):
    """A matrix and what its symbols stand for."""
    _, matrix = random_matrix(np.random.default_rng(0), 6, 7, 9, 3, 4)
    fields = {k: v.to(device) for k, v in vars(matrix).items() if torch.is_tensor(v)}
    steps = torch.arange(7, dtype=torch.int16, device=device)
    none = torch.empty(0, dtype=torch.int32, device=device)
    return replace(matrix, **fields), Reconstruction(-4, 9, none, steps, steps[:6])


def run_all(device):
    """Every operation of the backend beside its definition: [(ours, theirs)]."""
    torch.manual_seed(0)
    problem = block(device)
    matrix, rule = coded(device)
    start = torch.zeros(6, dtype=torch.int64, device=device)
    options = {"states": 4, "start": start, "commit": 4}
    x = torch.ones(3, 5, device=device)
    ours, theirs = torch.zeros(2, 5, 5, dtype=torch.float64, device=device)
    symbols = torch.randint(-9, 10, (6, 7), dtype=torch.int32, device=device)
    classes = [torch.arange(length, device=device) % 2 for length in (6, 7)]
    second = dequantize.trellis_quantizers(symbols, 4)
    alphabet = {"tables": 3, "lowest": -4, "size": 9, "escapes": 2, "second": second}
    backend.accumulate_hessian(ours, x)
    hessian.accumulate_hessian(theirs, x)
    return [
        (
            backend.quantize_block(problem, exhaustive=False)[0],
            obs.quantize_block(problem, exhaustive=False)[0],
        ),
        (
            backend.quantize_block_trellis(problem, **options)[0],
            trellis.quantize_block_trellis(problem, **options)[0],
        ),
        (backend.decode([matrix])[0], ans.decode([matrix])[0]),
        (
            backend.decode_weights([matrix], [rule], torch.float16)[0],
            weights.decode_weights([matrix], [rule], torch.float16)[0],
        ),
        (ours, theirs),
        (
            backend.symbol_counts(symbols, *classes, **alphabet),
            counts.symbol_counts(symbols, *classes, **alphabet),
        ),
        (backend.trellis_quantizers(symbols, 4), second),
        (
            backend.dequantize(symbols, rule.column_step, rule.row_scale, second=second),
            dequantize.dequantize(symbols, rule.column_step, rule.row_scale, second=second),
        ),
    ]


NAMES = ["quantize_block", "quantize_block_trellis", "decode", "decode_weights"]
WITHOUT_KERNEL = ["symbol_counts", "trellis_quantizers", "dequantize"]


def test_on_the_cpu_the_compiled_forms_run(calls):
    assert all(torch.equal(*pair) for pair in run_all(CPU))
    assert calls == {"kernel": [], "compiled": [*NAMES, *WITHOUT_KERNEL]}


def test_the_definitions_can_be_forced(calls, force):
    force("torch")
    assert all(torch.equal(*pair) for pair in run_all(CPU))
    assert calls == {"kernel": [], "compiled": []}


def test_numba_can_be_forced(calls, force):
    force("numba")
    assert all(torch.equal(*pair) for pair in run_all(CPU))
    assert calls == {"kernel": [], "compiled": [*NAMES, *WITHOUT_KERNEL]}


def test_triton_can_be_forced_in_the_interpreter(calls, force, device):
    force("triton")
    assert all(torch.equal(*pair) for pair in run_all(device))
    assert calls["kernel"] == ["accumulate_hessian", *NAMES]
    assert calls["compiled"] == []


@pytest.mark.gpu
def test_on_a_gpu_the_measured_kernels_run(calls):
    assert all(torch.equal(*pair) for pair in run_all(CUDA))
    assert calls == {"kernel": NAMES, "compiled": []}


@pytest.mark.gpu
def test_torch_can_be_forced_on_a_gpu(calls, force):
    force("torch")
    assert all(torch.equal(*pair) for pair in run_all(CUDA))
    assert calls == {"kernel": [], "compiled": []}


@pytest.mark.parametrize(
    ("value", "device", "kernel", "expected"),
    [
        ("", CPU, True, "numba"),
        ("", CPU, False, "numba"),
        ("", CUDA, True, "triton"),
        ("", CUDA, False, "torch"),
        ("", torch.device("meta"), True, "torch"),
        ("torch", CPU, True, "torch"),
        ("torch", CUDA, True, "torch"),
        ("numba", CPU, True, "numba"),
        ("triton", CUDA, True, "triton"),
        ("triton", CPU, False, "torch"),
    ],
)
def test_the_device_and_the_variable_decide(force, value, device, kernel, expected):
    force(value)
    assert backend.form(device, kernel=kernel) == expected


@pytest.mark.parametrize("kernel", [True, False])
def test_numba_works_on_the_cpu_only(force, kernel):
    force("numba")
    with pytest.raises(ConfigError, match="on device meta: unset it, or work on the CPU"):
        backend._form_of("ans", ans.decode, torch.device("meta"), kernel=kernel)


def test_triton_on_the_cpu_needs_the_interpreter(force, monkeypatch):
    force("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="on device cpu: unset it, or set TRITON_INTERPRET=1"):
        backend.accumulate_hessian(torch.zeros(2, 2), torch.ones(1, 2))


def test_an_unknown_form_is_refused(force):
    force("cuda")
    matrix, _ = coded(CPU)
    sentence = "CERWU_GPU_BACKEND is 'cuda': set it to torch, numba or triton"
    with pytest.raises(ConfigError, match=sentence):
        backend.decode([matrix])
    with pytest.raises(ConfigError, match=sentence):
        backend.quantize_block(block(CPU), exhaustive=False)


def test_without_triton_torch_s_forms_run(force, monkeypatch):
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert backend.form(CUDA) == "torch"
    force("triton")
    with pytest.raises(ConfigError, match="pip install triton"):
        backend._form_of("ans", ans.decode, CUDA)


WITHOUT_NUMBA = """
import sys, warnings
{}
import torch
from cerwu_gpu import backend
row = torch.tensor([[0, 1, 0]], dtype=torch.int32)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        assert backend.trellis_quantizers(row, 4).tolist() == [[False, False, True]]
        assert backend.decode([]) == []
    assert backend.form(torch.device("cpu")) == "torch"
texts = [str(each.message) for each in seen]
assert len(texts) == 1 and "many times slower" in texts[0] and {!r} in texts[0], texts
"""


@pytest.mark.parametrize(
    ("setup", "word"),
    [
        ("sys.modules['numba'] = None", "pip install numba"),
        (
            "from numba.core import caching\ncaching.CacheImpl._locator_classes = []",
            "set NUMBA_CACHE_DIR to a directory that can be written",
        ),
    ],
    ids=["not installed", "no cache"],
)
def test_without_numba_torch_s_forms_run_and_one_warning_says_so(setup, word):
    program = WITHOUT_NUMBA.format(setup, word)
    subprocess.run([sys.executable, "-c", program], check=True)


FULL_DISK = """
import errno, warnings
import torch
from numba.core import caching

def save(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

caching.Cache._save_overload = save
from cerwu_gpu import backend
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(3):
        odd = torch.tensor([[1, 3]], dtype=torch.int32)
        assert backend.trellis_quantizers(odd, 4).tolist() == [[0, 1]]
    zero = torch.zeros(1, dtype=torch.int64)
    alphabet = {"tables": 1, "lowest": 0, "size": 3, "escapes": 0}
    for _ in range(2):
        counts = backend.symbol_counts(torch.tensor([[1]]), zero, zero, **alphabet)
        assert counts.tolist() == [[0, 1, 0]]
assert backend.form(torch.device("cpu")) == "numba"
texts = [str(each.message) for each in seen]
assert len(texts) == 1 and "No space left on device" in texts[0], texts
assert "NUMBA_CACHE_DIR" in texts[0], texts
"""


def test_where_numba_s_cache_is_full_a_result_is_torch_s_and_one_warning_says_so(tmp_path):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    environment.pop("CERWU_GPU_BACKEND", None)
    subprocess.run([sys.executable, "-c", FULL_DISK], check=True, env=environment)


def test_numba_that_is_forced_must_be_there():
    program = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch\n"
        "from cerwu_gpu import backend, errors\n"
        "try: backend.trellis_quantizers(torch.tensor([[1]], dtype=torch.int32), 4)\n"
        "except errors.ConfigError as error: assert 'pip install numba' in str(error)\n"
        "else: raise SystemExit(1)"
    )
    environment = {**os.environ, "CERWU_GPU_BACKEND": "numba", "PYTHONWARNINGS": "ignore"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_the_package_works_where_triton_cannot_be_imported():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, cerwu_gpu.backend as backend\n"
        "total = torch.zeros(2, 2); backend.accumulate_hessian(total, torch.ones(3, 2))\n"
        "assert total.tolist() == [[3, 3], [3, 3]]; assert backend.decode([]) == []"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_no_matrix_decodes_to_nothing(force):
    force("triton")
    assert backend.decode([]) == []
    assert backend.decode_weights([], [], torch.float32) == []
