"""Which form of an operation runs where, and what can be forced."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from cerwu_gpu import backend
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.reference import ans, hessian, obs, trellis, weights
from cerwu_gpu.reference.weights import Reconstruction
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
    """The kernels that the backend took, by name."""
    taken = []
    true_kernel = backend._kernel

    def noted(family, name, device):
        taken.append(name)
        return true_kernel(family, name, device)

    monkeypatch.setattr(backend, "_kernel", noted)
    monkeypatch.delenv("CERWU_GPU_BACKEND", raising=False)
    return taken


def block(device, tables=3):
    """Arguments of the quantizers: 6 rows, 5 columns, an alphabet of 7 and an escape."""
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
    return x, factor, obs.Alphabet(rates.to(device), -3, escapes=True), *others


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
    arguments = block(device)
    matrix, rule = coded(device)
    start = torch.zeros(6, dtype=torch.int64, device=device)
    options = {"states": 4, "start": start, "commit": 4}
    x = torch.ones(3, 5, device=device)
    ours, theirs = torch.zeros(2, 5, 5, dtype=torch.float64, device=device)
    backend.accumulate_hessian(ours, x)
    hessian.accumulate_hessian(theirs, x)
    return [
        (
            backend.quantize_block(*arguments, exhaustive=False)[0],
            obs.quantize_block(*arguments, exhaustive=False)[0],
        ),
        (
            backend.quantize_block_trellis(*arguments, **options)[0],
            trellis.quantize_block_trellis(*arguments, **options)[0],
        ),
        (backend.decode([matrix])[0], ans.decode([matrix])[0]),
        (
            backend.decode_weights([matrix], [rule], torch.float16)[0],
            weights.decode_weights([matrix], [rule], torch.float16)[0],
        ),
        (ours, theirs),
    ]


NAMES = ["quantize_block", "quantize_block_trellis", "decode", "decode_weights"]


def test_on_the_cpu_the_definitions_run(calls):
    assert all(torch.equal(*pair) for pair in run_all(CPU))
    assert calls == []


def test_triton_can_be_forced_in_the_interpreter(calls, force, device):
    force("triton")
    assert all(torch.equal(*pair) for pair in run_all(device))
    assert sorted(calls) == sorted([*NAMES, "accumulate_hessian"])


@pytest.mark.gpu
def test_on_a_gpu_the_measured_kernels_run(calls):
    assert all(torch.equal(*pair) for pair in run_all(CUDA))
    assert sorted(calls) == sorted(NAMES)


@pytest.mark.gpu
def test_torch_can_be_forced_on_a_gpu(calls, force):
    force("torch")
    assert all(torch.equal(*pair) for pair in run_all(CUDA))
    assert calls == []


@pytest.mark.parametrize(
    ("value", "device", "measured", "expected"),
    [
        ("", CPU, True, False),
        ("", CUDA, True, True),
        ("", CUDA, False, False),
        ("torch", CPU, True, False),
        ("torch", CUDA, True, False),
        ("triton", CUDA, True, True),
        ("triton", CUDA, False, True),
    ],
)
def test_the_device_and_the_variable_decide(force, value, device, measured, expected):
    force(value)
    assert backend._takes_kernel(device, measured=measured) == expected


def test_triton_on_the_cpu_needs_the_interpreter(force, monkeypatch):
    force("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="on device cpu: unset it, or set TRITON_INTERPRET=1"):
        backend.accumulate_hessian(torch.zeros(2, 2), torch.ones(1, 2))


def test_an_unknown_form_is_refused(force):
    force("cuda")
    matrix, _ = coded(CPU)
    sentence = "CERWU_GPU_BACKEND is 'cuda': set it to torch or triton"
    with pytest.raises(ConfigError, match=sentence):
        backend.decode([matrix])
    with pytest.raises(ConfigError, match=sentence):
        backend.quantize_block(*block(CPU), exhaustive=False)


def test_without_triton_torch_s_forms_run(force, monkeypatch):
    monkeypatch.setattr(backend, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="Triton is not installed"):
        assert not backend._takes_kernel(CUDA)
    force("triton")
    with pytest.raises(ConfigError, match="pip install triton"):
        backend._takes_kernel(CUDA)


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
