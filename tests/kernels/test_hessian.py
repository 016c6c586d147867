"""The kernel of second moments against its definition, in integers: no order of sums moves them."""

import pytest
import torch

from cerwu_gpu.kernels import hessian
from cerwu_gpu.reference import hessian as reference
from tests.kernels.aot import Build, compile_all, report

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [
    pytest.param(1, 1, id="one element"),
    pytest.param(0, 5, id="no tokens"),
    pytest.param(40, 64, id="one whole tile"),
    pytest.param(33, 130, id="tiles and tokens that stick out"),
]


def integers(device, p, n, dtype=torch.float32):
    return torch.randint(-8, 9, (p, n)).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("p", "n"), SHAPES)
@pytest.mark.parametrize("sum_dtype", [torch.float32, torch.float64], ids=str)
def test_equals_the_reference(p, n, dtype, sum_dtype, device):
    before = integers(device, n, n)
    before = (before + before.T).to(sum_dtype)
    x = integers(device, p, n, dtype)
    ours, theirs = before.clone(), before.clone()
    hessian.accumulate_hessian(ours, x)
    reference.accumulate_hessian(theirs, x)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours.double(), before + x.double().T @ x.double())


@pytest.mark.parametrize("view", [lambda x: x[:, 3:73], lambda x: x[::2], lambda x: x.T])
def test_any_strides(view, device):
    x = view(integers(device, 80, 80))
    ours = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=device)
    hessian.accumulate_hessian(ours, x)
    assert torch.equal(ours, x.double().T @ x.double())


@pytest.mark.parametrize("form", [hessian, reference], ids=["kernel", "reference"])
def test_calls_are_added_in_the_dtype_of_the_sum(form, device):
    """2**24 + 1 is no float32."""
    total = torch.full((1, 1), 2.0**24, dtype=torch.float64, device=device)
    for _ in range(3):
        form.accumulate_hessian(total, torch.ones(1, 1, device=device))
    assert float(total) == 2**24 + 3


def test_one_triangle_is_the_mirror_image_of_the_other(device):
    x = torch.randn(70, 90, device=device).to(torch.bfloat16)
    total = torch.zeros(90, 90, dtype=torch.float64, device=device)
    hessian.accumulate_hessian(total, x)
    side = hessian.BLOCK_COLUMNS
    assert torch.equal(total[:side, side:], total[side:, :side].T)
    assert torch.allclose(total, x.double().T @ x.double(), rtol=1e-5, atol=1e-4)


def test_nothing_spills():
    builds = [
        Build(
            "cerwu_gpu.kernels.hessian",
            "accumulate_hessian_kernel",
            {
                "p_sum": "*fp64",
                "p_x": f"*{x}",
                "p_tiles": "*i64",
                **dict.fromkeys(("tokens", "n", "stride_x"), "i32"),
            },
            {"BN": hessian.BLOCK_COLUMNS, "BP": hessian.BLOCK_TOKENS, "PRECISION": precision},
            divisible=("n", "stride_x"),
            num_warps=hessian.WARPS,
            label=x,
        )
        for x, precision in (("bf16", "tf32"), ("fp16", "tf32"), ("fp32", "ieee"))
    ]
    found = compile_all(builds)
    print("\n" + report(found))
    assert [each for each in found if each.spills] == []
