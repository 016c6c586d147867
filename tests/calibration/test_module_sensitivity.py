"""What an error of each output costs, against the gradients that autograd gives by sample."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cerwu_gpu import CalibrationError
from cerwu_gpu.calibration.sensitivity import TEMPERATURE
from cerwu_gpu.calibration.sensitivity import module_sensitivities as output_sensitivities
from cerwu_gpu.models.selection import select_in_module as find_weights


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


LABELS = torch.tensor([0, 3, 1, 4])


def patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """[groups, n, positions] of one sample."""
    found = functional.unfold(x[None], layer.kernel_size, 1, layer.padding, layer.stride)
    return found[0].unflatten(0, (layer.groups, -1))


def test_rows_cost_the_squared_gradients_of_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cerwu_gpu.models.selection.LEAST_WEIGHTS", 0)
    module, x = network(), torch.randn(4, 3, 9, 9)
    squares = {name: torch.zeros(()) for name, _ in module.named_parameters()}
    energies = {"0.weight": torch.zeros(1), "2.weight": torch.zeros(2), "5.weight": torch.zeros(1)}
    for label, sample in zip(LABELS, x, strict=True):
        module.zero_grad()
        functional.cross_entropy(module(sample[None]), label[None]).backward()
        for name, parameter in module.named_parameters():
            squares[name] = (
                squares[name] + parameter.grad.flatten(1).square().sum(1)
                if (parameter.dim() > 1)
                else squares[name]
            )
        middle = module[1](module[0](sample[None]))[0].detach()
        energies["0.weight"] += patches(module[0], sample).square().sum((1, 2))
        energies["2.weight"] += patches(module[2], middle).square().sum((1, 2))
        energies["5.weight"] += module[:5](sample[None]).detach().square().sum()
    layouts = find_weights(module).chosen
    found = output_sensitivities(module, layouts, [x[:3], x[3:]], loss=Split())
    assert found.keys() == {("0.weight", 0), ("2.weight", 0), ("2.weight", 1), ("5.weight", 0)}
    for layout in layouts:
        own = torch.cat([found[layout.name, part] for part in range(layout.parts)])
        energy = energies[layout.name].repeat_interleave(layout.matrix_shape[0])
        torch.testing.assert_close(own, squares[layout.name] / energy, rtol=1e-4, atol=1e-9)


class Split:
    """The labels of one batch after the other."""

    def __init__(self) -> None:
        self.first = 0

    def __call__(self, output: Any, batch: Any) -> Tensor:
        own = LABELS[self.first : self.first + len(output)]
        self.first += len(output)
        return functional.cross_entropy(output, own, reduction="none")


def test_without_a_loss_it_is_the_expectation_over_the_models_own_labels() -> None:
    module, x = nn.Linear(6, 5), torch.randn(1, 6)
    many = x.expand(1000, 6)
    (found,) = output_sensitivities(module, find_weights(module).chosen, [many]).values()
    p = torch.softmax(module(x)[0].detach() / TEMPERATURE, dim=0)
    torch.testing.assert_close(found, p - p.square(), rtol=0.2, atol=0.01)


def test_no_trace_is_left() -> None:
    module = network().train()
    module[0].weight.requires_grad_(False)
    output_sensitivities(module, find_weights(module).chosen, [torch.randn(4, 3, 9, 9)])
    assert module.training
    assert not module[0].weight.requires_grad
    assert all(parameter.grad is None for parameter in module.parameters())


def test_losses_that_are_no_losses_of_samples_are_refused() -> None:
    module, x = network(), torch.randn(4, 3, 9, 9)
    layouts = find_weights(module).chosen
    with pytest.raises(CalibrationError, match="one number per sample"):
        output_sensitivities(module, layouts, [x], loss=lambda y, _: y.mean())
    with pytest.raises(CalibrationError, match="no tensor of logits"):
        output_sensitivities(module[:3], find_weights(module[:3]).chosen, [x])
    module[5].bias.data[0] = torch.nan
    with pytest.raises(CalibrationError, match=r"gradient at the output of 5\.weight"):
        output_sensitivities(module, layouts, [x])
