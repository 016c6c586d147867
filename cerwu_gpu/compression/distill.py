"""Distillation of what a file stores besides its integers: norms, biases and the scales of rows.

They minimise KL(original || compressed) on the calibration data; held-out data decides when to
stop, how finely the scales are stored, and whether to keep the result.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cerwu_gpu.config import Distillation
from cerwu_gpu.container.state import load_state, save_state
from cerwu_gpu.errors import OutputError
from cerwu_gpu.progress import counted, note
from cerwu_gpu.spec import STEP_RESOLUTION
from cerwu_gpu.steps import LEAST_CODE, step_values
from cerwu_gpu.threads import one_thread

WARM_UP = 5
"""Number of steps over which the learning rate rises."""
EVALUATIONS = 5
"""Approximate number of evaluations on held-out data."""
PATIENCE = 3
"""Number of evaluations without an improvement after which it stops."""
GRADIENT_NORM = 1.0
"""Largest norm of a step's gradient; larger ones are scaled down."""
BETAS = (0.9, 0.95)
"""Decay of AdamW's moments: a distillation has few steps."""
UNITS = (4, 8, 16, 32)
"""Resolutions of stored scales: codes are multiples of a unit, of 2**(1/256) each; the first is
that of the training."""
SAVED_EVERY = 4
"""Number of steps after which the state is written to the disk."""


class Student(ABC):
    """A compressed model that is tuned toward its original.

    Attributes:
        floats: parameters to tune, by name, which the file stores as they are.
        factors: compressed weight -> float32 [parts * rows], factors on its rows, 1 at first.
        batches: number of training batches.
    """

    floats: Mapping[str, nn.Parameter]
    factors: Mapping[str, Tensor]
    batches: int

    @abstractmethod
    def gradients(self, batch: int) -> dict[str, Tensor]:
        """Return the gradients of the mean KL(original || compressed) [nats per prediction] on a
        training batch, by the names of floats and factors."""

    @abstractmethod
    def divergence(self) -> float:
        """Return the mean KL(original || compressed) [nats per prediction] on held-out data."""


class RowCodes(ABC):
    """The scales of rows in a file.

    Attributes:
        codes: compressed weight -> int16 [parts * rows], step codes (steps.py).
        weights: number of quantized weights in the file.
    """

    codes: Mapping[str, Tensor]
    weights: int

    @abstractmethod
    def size(self, codes: Mapping[str, Tensor]) -> int:
        """Return the bytes that these codes take in the file."""

    @abstractmethod
    def store(self, codes: Mapping[str, Tensor]) -> None:
        """Put these codes into the file, and the weights that it then has into the model."""


@dataclass(frozen=True)
class Distilled:
    """Result of a distillation.

    Attributes:
        steps: number of steps behind the kept values; 0: none were better.
        before, after: KL(original || compressed) on held-out data [nats per prediction].
        bytes: growth of the file by the scales.
    """

    steps: int
    before: float
    after: float
    bytes: int


def distil(
    student: Student,
    rows: RowCodes,
    settings: Distillation,
    *,
    seed: int = 0,
    room: int | None = None,
    state: Path | None = None,
    progress: bool = False,
) -> Distilled:
    """Tune floats and scales by AdamW; the result is never worse on held-out data.

    The optimiser works on relative changes in float32, and gradients are those at the stored
    values: after every step they are rounded as the file will have them (straight through). In the
    end scales get the resolution at which KL and the price of their bits are least. A bit costs
    2 ln(2) KL / weights: KL falls by a factor 4 with each bit per weight.

    Args:
        student: the compressed model.
        rows: its scales in the file.
        settings: number of steps and learning rate, which follows a cosine after WARM_UP steps.
        seed: order of the batches.
        room: most bytes by which the file may grow.
        state: file that keeps unfinished work, and from which it goes on.
        progress: show a bar over the steps on stderr.

    Raises:
        OutputError: `state` is damaged, or the disk refuses it.
    """
    tuning = _Tuning(student, rows, settings)
    if state is None or not tuning.load(state):
        tuning.before = tuning.least = student.divergence()
        if progress:
            note(f"held-out KL before distillation: {tuning.before:.5f} nats")
    stride = max(1, settings.steps // EVALUATIONS)
    order = _order(student.batches, settings.steps, seed)
    with counted(
        len(order), what="distillation", unit="step", shown=progress, initial=tuning.step
    ) as bar:
        while tuning.step < len(order) and tuning.misses < PATIENCE:
            tuning.advance(student.gradients(order[tuning.step]))
            if tuning.step % stride == 0 or tuning.step == settings.steps:
                divergence = student.divergence()
                tuning.judge(divergence)
                if progress:
                    note(f"held-out KL after {tuning.step} steps: {divergence:.5f} nats")
            if state is not None and tuning.step % SAVED_EVERY == 0:
                tuning.save(state)
            bar.update()
    if state is not None:
        tuning.save(state)
    return tuning.finish(room)


class _Tuning:
    """Values on their way through the optimiser: changes of vectors as shares of their root mean
    square, which differs by orders of magnitude between norms, and changes of ln(scale).

    Attributes:
        step: number of steps so far.
        before, least: KL on held-out data at first, and the least so far.
        misses: number of evaluations since.
    """

    before = least = math.inf
    step = misses = 0

    def __init__(self, student: Student, rows: RowCodes, settings: Distillation) -> None:
        self._student = student
        self._rows = rows
        self._settings = settings
        self._first = {name: p.detach().clone() for name, p in student.floats.items()}
        self._spread = {name: _root_mean_square(p) for name, p in self._first.items()}
        self._masters = {
            name: torch.zeros_like(x, dtype=torch.float32)
            for name, x in (*self._first.items(), *student.factors.items())
        }
        self._best = {name: master.clone() for name, master in self._masters.items()}
        self._best_step = 0
        self._optimizer = torch.optim.AdamW(
            self._masters.values(), lr=settings.learning_rate, betas=BETAS, weight_decay=0.0
        )

    def advance(self, gradients: Mapping[str, Tensor]) -> None:
        """Take one step along the gradients."""
        self.step += 1
        share = _schedule(self.step, self._settings.steps)
        with one_thread():  # sums of all elements round by the number of threads
            for name, master in self._masters.items():
                gradient = gradients[name].to(master.device, torch.float32)
                master.grad = gradient * self._spread.get(name, 1.0)
            torch.nn.utils.clip_grad_norm_(self._masters.values(), GRADIENT_NORM)
            for group in self._optimizer.param_groups:
                group["lr"] = self._settings.learning_rate * share
            self._optimizer.step()
        self._show(self._masters, UNITS[0])

    def judge(self, divergence: float) -> None:
        """Note the divergence on held-out data after this step."""
        if divergence < self.least:
            self.least, self._best_step, self.misses = divergence, self.step, 0
            self._best = {name: master.clone() for name, master in self._masters.items()}
        else:
            self.misses += 1

    def finish(self, room: int | None) -> Distilled:
        """Store the best values, or the first ones where none are better in the file."""
        student, rows = self._student, self._rows
        plain = rows.size(rows.codes)
        price = 8 * 2 * math.log(2) * self.before / max(rows.weights, 1)
        least, growth = self.before, 0
        chosen: dict[str, Tensor] | None = None
        coarser_is_worse = False
        for unit in (*UNITS, None) if self._best_step else ():
            codes = self._codes(self._best, unit)
            added = rows.size(codes) - plain
            too_large = room is not None and added > room
            if unit is not None and (too_large or coarser_is_worse):
                continue
            if unit == UNITS[0]:
                divergence = self.least
            else:
                self._show(self._best, unit)
                divergence = student.divergence()
            objective = divergence + price * added
            coarser_is_worse = objective >= least
            if objective < least:
                least, chosen, growth = objective, codes, added
        if chosen is not None:
            self._store(self._best, chosen)
            after = student.divergence()
            if after < self.before:
                return Distilled(self._best_step, self.before, after, growth)
        self._store({name: torch.zeros_like(x) for name, x in self._best.items()}, rows.codes)
        return Distilled(0, self.before, self.before, 0)

    def _codes(self, values: Mapping[str, Tensor], unit: int | None) -> dict[str, Tensor]:
        """Return the scales' codes at a resolution; None: the first ones."""
        codes = {}
        for name, first in self._rows.codes.items():
            moved = values[name].to(first.device)
            if unit is None or not bool(moved.any()):
                codes[name] = first
            else:
                exact = first + moved.double() * (STEP_RESOLUTION / math.log(2))
                rounded = (exact / unit).round() * unit
                codes[name] = rounded.clamp(LEAST_CODE, 32767 // unit * unit).to(torch.int16)
        return codes

    @torch.no_grad()
    def _show(self, values: Mapping[str, Tensor], unit: int | None) -> None:
        """Put values into the student, rounded as the file would have them."""
        self._show_floats(values)
        for name, codes in self._codes(values, unit).items():
            ratio = step_values(codes) / step_values(self._rows.codes[name])
            self._student.factors[name].copy_(ratio)

    @torch.no_grad()
    def _show_floats(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._student.floats.items():
            change = values[name] * self._spread[name]
            parameter.copy_(self._first[name].float() + change)

    @torch.no_grad()
    def _store(self, values: Mapping[str, Tensor], codes: Mapping[str, Tensor]) -> None:
        """Put values into the model and scales into the file."""
        self._show_floats(values)
        for factor in self._student.factors.values():
            factor.fill_(1.0)
        self._rows.store(codes)

    def save(self, path: Path) -> None:
        """Write the state to the disk."""
        tensors = {}
        for name, master in self._masters.items():
            moments = self._optimizer.state[master]
            tensors[f"value.{name}"], tensors[f"best.{name}"] = master, self._best[name]
            tensors[f"mean.{name}"] = moments["exp_avg"]
            tensors[f"square.{name}"] = moments["exp_avg_sq"]
        values = {
            "step": self.step,
            "best_step": self._best_step,
            "misses": self.misses,
            "before": self.before,
            "least": self.least,
        }
        save_state(path, tensors, values)

    def load(self, path: Path) -> bool:
        """Go on from the state on the disk; return whether there is one.

        Raises:
            OutputError: it is damaged.
        """
        found = load_state(path)
        if found is None:
            return False
        tensors, values = found
        try:
            self._take(tensors, values)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise OutputError(
                f"{path} is damaged ({error}): pass --restart (restart=True) to begin from the "
                "start."
            ) from None
        self._show(self._masters, UNITS[0])
        return True

    def _take(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        self.step, self._best_step = int(values["step"]), int(values["best_step"])
        self.misses = int(values["misses"])
        self.before, self.least = float(values["before"]), float(values["least"])
        for name, master in self._masters.items():
            master.copy_(tensors[f"value.{name}"])
            self._best[name].copy_(tensors[f"best.{name}"])
            self._optimizer.state[master] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": tensors[f"mean.{name}"].to(master.device),
                "exp_avg_sq": tensors[f"square.{name}"].to(master.device),
            }


def _root_mean_square(x: Tensor) -> float:
    """Return the root mean square of a tensor; 1 where all is 0."""
    return float(x.double().square().mean().sqrt()) or 1.0


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
