"""Distillation of what a file stores as floats anyway: norms and biases, the integers frozen.

The floats minimise KL(original || compressed) on the calibration data; held-out data decides when
to stop, and whether to keep the result.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cerwu_gpu.config import Distillation
from cerwu_gpu.progress import tracked

WARM_UP = 5
"""Number of steps over which the learning rate rises."""
EVALUATIONS = 8
"""Approximate number of evaluations on held-out data."""
PATIENCE = 2
"""Number of evaluations without an improvement after which it stops."""
GRADIENT_NORM = 1.0
"""Largest norm of a step's gradient; larger ones are scaled down."""


class Student(ABC):
    """A compressed model whose floats are tuned toward its original.

    Attributes:
        floats: parameters to tune, by name.
        batches: number of training batches.
    """

    floats: Mapping[str, nn.Parameter]
    batches: int

    @abstractmethod
    def gradients(self, batch: int) -> dict[str, Tensor]:
        """Return the gradients of the mean KL(original || compressed) [nats per prediction] on a
        training batch, by the floats' names."""

    @abstractmethod
    def divergence(self) -> float:
        """Return the mean KL(original || compressed) [nats per prediction] on held-out data."""


@dataclass(frozen=True)
class Distilled:
    """Result of a distillation.

    Attributes:
        steps: number of steps behind the kept floats; 0: none were better.
        before, after: KL(original || compressed) on held-out data [nats per prediction].
    """

    steps: int
    before: float
    after: float


def distil(
    student: Student, settings: Distillation, *, seed: int = 0, progress: bool = False
) -> Distilled:
    """Tune the floats in place by AdamW; the result is never worse on held-out data.

    The optimiser works on float32 copies, and gradients are those at the stored values: floats are
    rounded to their dtype after every step (straight through).

    Args:
        student: the compressed model.
        settings: number of steps and learning rate, which follows a cosine after WARM_UP steps.
        seed: order of the batches.
        progress: show a bar over the steps on stderr.
    """
    masters = {name: p.detach().float().clone() for name, p in student.floats.items()}
    optimizer = torch.optim.AdamW(masters.values(), lr=settings.learning_rate, weight_decay=0.0)
    best = {name: master.clone() for name, master in masters.items()}
    before = least = student.divergence()
    steps = misses = 0
    stride = max(1, settings.steps // EVALUATIONS)
    order = _order(student.batches, settings.steps, seed)
    for step, batch in enumerate(
        tracked(order, what="distillation", unit="step", shown=progress), start=1
    ):
        gradients = student.gradients(batch)
        for name, master in masters.items():
            master.grad = gradients[name].to(master.device, torch.float32)
        torch.nn.utils.clip_grad_norm_(masters.values(), GRADIENT_NORM)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, settings.steps)
        optimizer.step()
        _store(student, masters)
        if step % stride == 0 or step == settings.steps:
            divergence = student.divergence()
            if divergence < least:
                least, steps, misses = divergence, step, 0
                best = {name: master.clone() for name, master in masters.items()}
            else:
                misses += 1
                if misses == PATIENCE:
                    break
    _store(student, best)
    return Distilled(steps, before, least)


def _order(batches: int, steps: int, seed: int) -> list[int]:
    """Return the batch of each step: all in random order, then all in another one."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps:
        order += torch.randperm(batches, generator=generator).tolist()
    return order[:steps]


def _schedule(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step, counted from 1."""
    if step <= WARM_UP:
        return step / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP + 1)))


@torch.no_grad()
def _store(student: Student, values: Mapping[str, Tensor]) -> None:
    """Copy values into the floats, rounded to their dtype."""
    for name, parameter in student.floats.items():
        parameter.copy_(values[name])
