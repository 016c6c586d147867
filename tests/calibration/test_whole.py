"""Hessians of convolutions and linear layers against those from torch's own unfold in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cerwu_gpu import CalibrationError
from cerwu_gpu.calibration import moments
from cerwu_gpu.calibration.whole import CalibratedLayers
from cerwu_gpu.models.selection import select_in_module as find_weights

RTOL = 1e-5  # float32 products, float64 sums

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "strided": {"stride": (2, 1)},
    "padded": {"padding": (1, 2)},
    "same, an even kernel": {"padding": "same", "kernel_size": (2, 4)},
    "same, dilated": {"padding": "same", "dilation": (2, 1)},
    "valid": {"padding": "valid"},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
    "circular, same": {"padding": "same", "padding_mode": "circular", "dilation": 2},
    "dilated": {"dilation": (1, 3), "padding": 2},
    "grouped": {"groups": 3, "stride": 2, "padding": 1},
    "depthwise": {"groups": 6, "padding": 1},
    "wide depthwise": {"groups": 6, "out_channels": 12},
    "one by one": {"kernel_size": 1},
}
PAD_MODE = {"zeros": "constant", "reflect": "reflect", "circular": "circular"}


def batches(*shape: int, count: int = 3) -> list[Tensor]:
    return [torch.randn(*shape) for _ in range(count)]


def hessians(
    module: nn.Module, inputs: list[Any], **settings: Any
) -> dict[tuple[str, int], Tensor]:
    """(parameter, part) -> H, whatever the number of lots."""
    found = {}
    for lot in CalibratedLayers(module, find_weights(module).chosen, inputs, **settings):
        statistics = lot.statistics()
        for matrix in lot.matrices():
            found[matrix.name, matrix.part] = statistics[matrix.input].hessian
    return found


def unfolded(layer: nn.Conv2d, x: Tensor) -> list[Tensor]:
    """Per group, the patches [n, all positions] float64, by way of the layer's own settings."""
    (kh, kw), (dh, dw) = layer.kernel_size, layer.dilation
    if layer.padding == "same":
        top, left = dh * (kh - 1) // 2, dw * (kw - 1) // 2
        padding = (left, dw * (kw - 1) - left, top, dh * (kh - 1) - top)
    elif layer.padding == "valid":
        padding = (0, 0, 0, 0)
    else:
        padding = (layer.padding[1],) * 2 + (layer.padding[0],) * 2
    padded = functional.pad(x.double(), padding, PAD_MODE[layer.padding_mode])
    groups = []
    for own in padded.chunk(layer.groups, dim=1):
        patches = functional.unfold(own, (kh, kw), dilation=(dh, dw), stride=layer.stride)
        groups.append(patches.transpose(0, 1).flatten(1))
    return groups


@pytest.mark.parametrize("settings", CONVOLUTIONS.values(), ids=CONVOLUTIONS.keys())
def test_a_convolution_is_its_matrix_and_has_the_hessian_of_its_patches(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cerwu_gpu.models.selection.LEAST_WEIGHTS", 0)
    layer = nn.Conv2d(**{"in_channels": 6, "out_channels": 6, "kernel_size": 3, **settings})
    inputs = batches(2, 6, 9, 8)
    patches = [
        torch.cat(own, dim=1) for own in zip(*(unfolded(layer, x) for x in inputs), strict=True)
    ]
    found = hessians(layer, inputs)
    assert len(found) == layer.groups
    for group, own in enumerate(patches):
        expected = 2 / 6 * own @ own.T
        torch.testing.assert_close(
            found["weight", group].double(), expected, rtol=RTOL, atol=RTOL * float(expected.max())
        )
    (layout,) = find_weights(layer).chosen
    matrices = [layout.matrix(layer.weight.detach(), part) for part in range(layout.parts)]
    outputs = [w.double() @ x for w, x in zip(matrices, patches, strict=True)]
    theirs = torch.cat([layer(x).transpose(0, 1).flatten(1) for x in inputs], dim=1).double()
    ours = torch.cat(outputs) + (layer.bias.detach().double()[:, None])
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-4)


def test_a_linear_layer_counts_all_positions_of_a_sample() -> None:
    layer, inputs = nn.Linear(5, 3), batches(2, 4, 7, 5)
    rows = torch.cat(inputs).reshape(-1, 5).double()
    torch.testing.assert_close(
        hessians(layer, inputs)["weight", 0].double(), 2 / 6 * rows.T @ rows, rtol=RTOL, atol=RTOL
    )


class Twice(nn.Module):
    """One linear layer is called twice, another one has the same parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.first, self.second):
            self.seen.append(x.detach())
            x = torch.tanh(layer(x))
        return x


def test_a_shared_weight_counts_all_its_inputs() -> None:
    module, inputs = Twice(), batches(5, 4)
    found = hessians(module, inputs)
    assert found.keys() == {("first.weight", 0)}
    rows = torch.cat(module.seen[3:]).double()  # the first run is the trace
    torch.testing.assert_close(
        found["first.weight", 0].double(), 2 / 15 * rows.T @ rows, rtol=RTOL, atol=RTOL
    )


class Branches(nn.Module):
    """Two weights see the same tensor, a third one a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(4, 2)
        self.odd = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(x.clone() if self.odd else x)
        return torch.cat([self.a(x), y, self.c(x[:1].expand_as(x))], dim=-1)


def test_weights_of_one_input_share_one_hessian() -> None:
    module = Branches()
    (lot,) = CalibratedLayers(module, find_weights(module).chosen, batches(3, 4))
    keys = {matrix.name: matrix.input for matrix in lot.matrices()}
    assert keys["a.weight"] == keys["b.weight"] != keys["c.weight"]
    assert len(lot.statistics()) == 2


def test_sharing_an_input_only_sometimes_is_refused() -> None:
    module, inputs = Branches(), batches(3, 4)
    layers = CalibratedLayers(module, find_weights(module).chosen, inputs)
    module.odd = True
    with pytest.raises(CalibrationError, match=r"a\.weight shares its input with b\.weight"):
        [group.statistics() for group in layers]


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.Linear(6 * 3 * 3, 4),
    )


@pytest.mark.parametrize("budget", [1, 12 * 27**2 * 3, 1 << 30], ids=["singly", "some", "all"])
def test_hessians_do_not_depend_on_the_lots(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "ROWS", 12 * 10)  # positions are drawn
    monkeypatch.setattr("cerwu_gpu.models.selection.LEAST_WEIGHTS", 0)
    module, inputs = network(), batches(4, 3, 8, 8)
    lots = CalibratedLayers(module, find_weights(module).chosen, inputs, hessian_bytes=budget)
    assert len(lots) == {1: 3, 1 << 30: 1}.get(budget, 2)
    expected = hessians(module, inputs)
    before = {name: p.clone() for name, p in module.named_parameters()}
    for lot in lots:
        for matrix in lot.matrices():
            own = lot.statistics()[matrix.input].hessian
            assert torch.equal(own, expected[matrix.name, matrix.part])
            lot.replace(matrix.name, matrix.part, torch.zeros_like(matrix.weight))
    assert all(
        not parameter.any() for name, parameter in module.named_parameters() if "weight" in name
    )
    assert torch.equal(module[0].bias, before["0.bias"])


def test_drawn_positions_estimate_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, inputs = nn.Conv2d(2, 2, 3), batches(8, 2, 18, 18, count=8)
    whole = hessians(layer, inputs)["weight", 0]
    monkeypatch.setattr(moments, "ROWS", 64 * 32)
    sampled = hessians(layer, inputs)["weight", 0]
    assert not torch.equal(sampled, whole)
    assert float((sampled - whole).norm() / whole.norm()) < 0.2
    assert torch.equal(sampled, hessians(layer, inputs)["weight", 0])
    assert not torch.equal(sampled, hessians(layer, inputs, seed=1)["weight", 0])


def test_sequential_inputs_come_from_replaced_layers() -> None:
    module, inputs = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), batches(4, 3)
    lots = iter(CalibratedLayers(module, find_weights(module).chosen, inputs, sequential=True))
    next(lots).replace("0.weight", 0, torch.zeros(3, 3))
    hessian = next(lots).statistics()["1.weight"].hessian
    bias = module[0].bias.detach()
    torch.testing.assert_close(hessian, 2 * torch.outer(bias, bias), rtol=RTOL, atol=RTOL)


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"input": x}],
    ids=["tensor", "tuple", "list", "dict"],
)
def test_batches_come_in_any_form(wrap: Callable[[Tensor], Any]) -> None:
    layer, inputs = nn.Linear(3, 2), batches(4, 3)
    expected = hessians(layer, inputs)
    found = hessians(layer, [wrap(x) for x in inputs])
    assert torch.equal(found["weight", 0], expected["weight", 0])


def test_an_input_that_is_not_finite_is_named() -> None:
    layer, inputs = nn.Linear(3, 2), batches(4, 3)
    inputs[1][2, 0] = torch.inf
    with pytest.raises(CalibrationError, match=r"input of weight is not finite .* batch 1"):
        hessians(layer, inputs)


def test_a_module_that_does_not_take_the_batch_is_one_sentence() -> None:
    with pytest.raises(CalibrationError, match=r"Linear cannot be run on a batch .* inputs alone"):
        hessians(nn.Linear(3, 2), [(torch.zeros(4, 3), torch.zeros(4))])


def test_modes_come_back() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.BatchNorm1d(3), nn.Linear(3, 2))
    module[2].eval()
    hessians(module, batches(4, 3))
    assert [child.training for child in module] == [True, True, False, True]
    assert int(module[2].num_batches_tracked) == 0
