"""Products that are noticed while a module runs."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cerwu_gpu.calibration.products import Product, module_products
from cerwu_gpu.compression.blocks import BlockWeights
from cerwu_gpu.layout import WeightLayout


class Left(nn.Module):
    """A linear layer whose weight is multiplied from the left, as in Mamba."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 3)

    def forward(self, x: Tensor, name: str) -> Tensor:
        columns: Tensor = x.mT if x.dim() > 1 else x
        weight: Any = self.inner.weight
        if name == "@":
            return weight @ columns
        return torch.matmul(weight, columns) if name == "matmul" else weight.matmul(columns)


@pytest.mark.parametrize("name", ["@", "matmul", "method"])
@pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 4, 5)])
def test_a_product_from_the_left_is_noticed(name: str, shape: tuple[int, ...]) -> None:
    module, x = Left(), torch.randn(shape, requires_grad=True)
    weights = BlockWeights(
        module, [WeightLayout("inner.weight", (3, 5), 1, False)], torch.device("cpu")
    )
    rows = x.detach().reshape(-1, 5)
    seen: list[Product] = []
    with module_products(weights, seen.append, before=True):
        plain = module(x, name)
    assert seen[0].output is None and len(seen) == 1
    assert torch.equal(seen[0].x.reshape(-1, 5), rows)
    seen.clear()
    gradients: list[Tensor] = []
    with module_products(weights, seen.append):
        output = module(x, name)
        noted: Any = seen[0].output
        noted.register_hook(gradients.append)
    torch.testing.assert_close(output, plain)
    cost = torch.randn_like(output)
    (output * cost).sum().backward()
    expected = cost if cost.dim() == 1 else cost.mT
    assert torch.equal(gradients[0].reshape(-1, 3), expected.reshape(-1, 3))


def test_tokens_of_stacked_experts_are_those_that_reach_them() -> None:
    """Experts that are multiplied in one batch get zeros for the other tokens."""
    module: Any = nn.Module()
    module.experts = nn.Parameter(torch.randn(3, 5, 4))
    layout = WeightLayout("experts", (3, 5, 4), 3, True)
    weights = BlockWeights(module, [layout], torch.device("cpu"))
    x = torch.randn(3, 6, 5)
    x[0, 2:], x[1, :4], x[2] = 0, 0, 0  # expert 2 gets none
    x.requires_grad_()
    seen: list[Product] = []
    gradients: dict[int, Tensor] = {}
    with module_products(weights, seen.append):
        output = torch.bmm(x, module.experts)
        for product in seen:
            noted: Any = product.output
            noted.register_hook(lambda g, part=product.part: gradients.update({part: g}))
    assert torch.equal(output, torch.bmm(x, module.experts))
    cost = torch.randn_like(output)
    (output * cost).sum().backward()
    rows = {0: slice(0, 2), 1: slice(4, 6), 2: slice(0, 0)}
    for product in seen:
        assert torch.equal(product.x, x[product.part, rows[product.part]])
        assert torch.equal(gradients[product.part], cost[product.part, rows[product.part]])
    assert [product.part for product in seen] == [0, 1, 2]
