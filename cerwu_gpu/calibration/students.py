"""Gradients of KL(original || compressed) by what is tuned, block by block or whole."""

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cerwu_gpu.calibration.blockwise import Backbone
from cerwu_gpu.calibration.capture import Call, Capture, first_input
from cerwu_gpu.calibration.row_factors import RowFactors
from cerwu_gpu.calibration.running import Batch, Runner, evaluating, placed, samples
from cerwu_gpu.calibration.spill import TensorStore
from cerwu_gpu.compression.distill import Student
from cerwu_gpu.layout import WeightLayout

Ends = Callable[[Tensor, Tensor], Tensor]
"""From tokens [batch, sequence] and the blocks' output to the logits of predictions [count,
vocabulary]."""
LOGITS = 2**23
"""Approximate number of logits in memory at a time."""


def floats_of(module: nn.Module, compressed: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the floats that a file stores as they are and that may be tuned: vectors (norms,
    biases) that are not compressed."""
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.dim() == 1 and parameter.is_floating_point() and name not in compressed
    }


def factors_of(layouts: Sequence[WeightLayout]) -> dict[str, Tensor]:
    """Return factors 1 for the rows of compressed weights, float32 [parts * m] by name."""
    return {x.name: torch.ones(x.parts * x.matrix_shape[0]) for x in layouts}


class BlockwiseStudent(Student):
    """A model that runs block by block; memory holds the graph of one block at a time.

    It is made of the original model, whose last hidden states (spill.py) and parameters outside of
    the blocks it keeps. Blocks are worked on where the adapter works on them.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokens: Tensor,
        held_out: Tensor,
        ends: Callable[[Capture], Ends],
        outer: Callable[[], AbstractContextManager[None]],
        *,
        device: torch.device,
        batch_size: int,
        vocabulary: int,
        overlap: int | None = None,
        folder: Path | None = None,
    ) -> None:
        """Run the original model.

        Args:
            backbone: with its original weights.
            tokens, held_out: int64 [samples, sequence], of the training and of the evaluation.
            ends: makes the model behind the blocks, for the captured calls of the blocks.
            outer: a context in which all but the blocks are on the device.
            batch_size: samples per step.
            vocabulary: number of logits per token.
            overlap: number of last positions of a sequence that predict nothing, where logits can
                be had for a part of a sequence; None: they cannot.
            folder: where hidden states go that memory does not take.
        """
        self._backbone = backbone
        self._outer = outer
        self._device = device
        layouts = backbone.layouts
        self.floats = floats_of(backbone.module, [layout.name for layout in layouts])
        self.factors = factors_of(layouts)
        prefixes = tuple(f"{name}." for name, _ in backbone.blocks)
        self._outside = {
            name: parameter
            for name, parameter in backbone.module.named_parameters()
            if not name.startswith(prefixes)
        }
        tuned = (*self.floats, *self.factors)
        self._inside = [
            {n for n in tuned if n.startswith(f"{name}.")} for name, _ in backbone.blocks
        ]
        self._originals = {name: p.detach().clone() for name, p in self._outside.items()}
        self._training = torch.split(tokens, batch_size)
        self._judging = torch.split(held_out, batch_size)
        self.batches = len(self._training)
        self._positions = max(1, LOGITS // vocabulary)
        self._overlap = overlap
        every = (*self._training, *self._judging)
        distinct = list({len(batch): batch for batch in every}.values())
        with torch.no_grad(), self._outer():
            with placed(backbone.blocks[0][1], device):  # capture runs the first block
                captured = backbone.capture(distinct, device)
            self._calls: list[dict[int, Call]] = captured.calls
            self._wrap = captured.wrap
            self._ends = ends(captured)
            self._teacher = TensorStore(folder)
            for batch in every:
                self._teacher.append(self._forward(self._start(batch))[0])

    def gradients(self, batch: int) -> dict[str, Tensor]:
        tokens = self._training[batch]
        with torch.inference_mode(False), self._outer(), _tracked(self.floats.values()):
            sums = _Sums(self._tunable())
            outside = sums.select(self._outside)
            with torch.enable_grad(), self._scaled(outside):
                start = self._start(tokens)
            hidden, inputs = self._forward(start.detach())
            gradient, count = self._of_predictions(tokens, hidden, batch, sums, outside)
            gradient = gradient / count
            sums.divide(count)
            for index in reversed(range(len(self._backbone.blocks))):
                block = self._backbone.blocks[index][1]
                inside = sums.select(self._inside[index])
                x = inputs[index].detach().requires_grad_()
                with placed(block, self._device), self._scaled(inside):
                    with torch.enable_grad():
                        output = self._run(index, x)
                    gradient = sums.add(output, inside, gradient, [x])[0]
            if start.requires_grad:
                sums.add(start, outside, gradient, [])
        return {name: gradient.cpu() for name, gradient in sums.gradients.items()}

    @torch.no_grad()
    def divergence(self) -> float:
        total, count = 0.0, 0
        with self._outer():
            outside = self._on_device(self._outside)
            for index, tokens in enumerate(self._judging, len(self._training)):
                with self._scaled(outside):
                    start = self._start(tokens)
                hidden, _ = self._forward(start)
                for piece in self._pieces(tokens):
                    log_p = self._log_p(tokens, index, piece)
                    with self._scaled(outside):
                        log_q = self._ends(tokens[piece], hidden[piece]).float().log_softmax(-1)
                    total += float(_divergences(log_p, log_q).double().cpu().sum())
                    count += len(log_q)
        return total / count

    def _of_predictions(
        self,
        tokens: Tensor,
        hidden: Tensor,
        batch: int,
        sums: "_Sums",
        outside: Mapping[str, Tensor],
    ) -> tuple[Tensor, int]:
        """Return the gradient of the sum of KLs at the blocks' output, and the number of KLs."""
        gradient, count = torch.zeros_like(hidden), 0
        for piece in self._pieces(tokens):
            p = self._log_p(tokens, batch, piece).exp_()
            last = hidden[piece].detach().requires_grad_()
            with torch.enable_grad(), self._scaled(outside):
                logits = self._ends(tokens[piece], last)
            difference = logits.detach().float().softmax(-1).sub_(p)
            del p  # logits take most of the memory
            gradient[piece] += sums.add(logits, outside, difference.to(logits.dtype), [last])[0]
            count += len(difference)
        return gradient, count

    def _pieces(self, tokens: Tensor) -> Iterator[tuple[slice, slice]]:
        """Yield parts of a batch [samples, sequence] whose logits fit into memory, with every
        prediction in one of them."""
        samples, length = tokens.shape
        cut = self._overlap is not None and self._positions < length
        rows = 1 if cut else max(1, self._positions // length)
        for row in range(0, samples, rows):
            if not cut or self._overlap is None:
                yield slice(row, row + rows), slice(None)
                continue
            for first in range(0, length - self._overlap, self._positions):
                yield slice(row, row + 1), slice(first, first + self._positions + self._overlap)

    @torch.no_grad()
    def _log_p(self, tokens: Tensor, batch: int, piece: tuple[slice, slice]) -> Tensor:
        """Return the original's log-probabilities [count, vocabulary] on a part of a batch."""
        hidden = self._teacher[batch][piece].to(self._device)
        with self._original_outside():
            return self._ends(tokens[piece], hidden).float().log_softmax(-1)

    def _tunable(self) -> dict[str, Tensor]:
        """Return what is tuned, by name: parameters, and factors as leaves on the device."""
        factors = {
            name: factor.to(self._device, copy=True).requires_grad_()
            for name, factor in self.factors.items()
        }
        return {**self.floats, **factors}

    @contextmanager
    def _scaled(self, tunable: Mapping[str, Tensor]) -> Iterator[None]:
        """Multiply the rows of weights by those factors that are among `tunable`."""
        layouts = [layout for layout in self._backbone.layouts if layout.name in tunable]
        weights = {x.name: self._backbone.module.get_parameter(x.name) for x in layouts}
        with RowFactors(layouts, weights, tunable), self._backbone.single_products():
            yield

    def _start(self, tokens: Tensor) -> Tensor:
        """Return the first block's input."""
        return first_input(self._backbone.run, self._backbone.blocks, self._wrap, tokens).to(
            self._device
        )

    @torch.no_grad()
    def _forward(self, hidden: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the last block's output and the blocks' inputs."""
        inputs = []
        for index, (_, block) in enumerate(self._backbone.blocks):
            inputs.append(hidden)
            inside = self._on_device(self._inside[index])
            with placed(block, self._device), self._scaled(inside):
                hidden = self._run(index, hidden)
        return hidden, inputs

    def _on_device(self, names: Container[str]) -> dict[str, Tensor]:
        """Return the factors among `names`, on the device."""
        return {n: x.to(self._device) for n, x in self.factors.items() if n in names}

    def _run(self, index: int, hidden: Tensor) -> Tensor:
        return self._calls[index][len(hidden)].run(self._backbone.blocks[index][1], hidden)

    @contextmanager
    def _original_outside(self) -> Iterator[None]:
        """Put the original parameters outside of the blocks in place inside the context."""
        tuned = {name: parameter.data for name, parameter in self._outside.items()}
        for name, parameter in self._outside.items():
            parameter.data = self._originals[name].to(parameter.device)
        try:
            yield
        finally:
            for name, parameter in self._outside.items():
                parameter.data = tuned[name]


class _Sums:
    """Gradients by what is tuned, summed over the places where it is used.

    Attributes:
        tunable: parameters and factors that require gradients, by name.
        gradients: of those that any output depends on, zeros of others.
    """

    def __init__(self, tunable: Mapping[str, Tensor]) -> None:
        self.tunable = tunable
        self.gradients = {name: torch.zeros_like(x).detach() for name, x in tunable.items()}

    def select(self, names: Container[str]) -> dict[str, Tensor]:
        """Return those among `names`."""
        return {name: x for name, x in self.tunable.items() if name in names}

    def add(
        self,
        output: Tensor,
        tunable: Mapping[str, Tensor],
        gradient: Tensor,
        inputs: Sequence[Tensor],
    ) -> list[Tensor]:
        """Add what `tunable` gets from a gradient at an output; return that of other inputs."""
        wanted = [*inputs, *tunable.values()]
        values = torch.autograd.grad(output, wanted, gradient, allow_unused=True)
        for name, value in zip(tunable, values[len(inputs) :], strict=True):
            if value is not None:
                self.gradients[name] = self.gradients[name].to(value.device) + value
        return [
            torch.zeros_like(x) if value is None else value
            for x, value in zip(inputs, values[: len(inputs)], strict=True)
        ]

    def divide(self, count: int) -> None:
        """Divide all gradients."""
        self.gradients = {name: value / count for name, value in self.gradients.items()}


def _divergences(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) [count] of log-probabilities [count, classes]; `log_q` is overwritten."""
    return log_q.sub_(log_p).neg_().mul_(log_p.exp()).sum(-1)


class ModuleStudent(Student):
    """A module that runs whole and gives logits [samples, classes]; made of the original one."""

    def __init__(
        self,
        module: nn.Module,
        batches: Sequence[Batch],
        held_out: Sequence[Batch],
        logits: Callable[[Any], Tensor],
        *,
        layouts: Sequence[WeightLayout],
        device: torch.device,
        folder: Path | None = None,
    ) -> None:
        """Run the original module.

        Args:
            batches, held_out: of the training and of the evaluation.
            logits: from the module's output to logits [samples, classes].
            layouts: of the quantized weights.
            folder: where logits go that memory does not take.
        """
        self._module = module
        self._training, self._judging = batches, held_out
        self._logits = logits
        self._layouts = layouts
        self._weights = {x.name: module.get_parameter(x.name) for x in layouts}
        self._device = device
        self.floats = floats_of(module, [layout.name for layout in layouts])
        self.factors = factors_of(layouts)
        self.batches = len(batches)
        self._teacher = TensorStore(folder)
        with torch.no_grad():
            for batch in (*batches, *held_out):
                self._teacher.append(self._run(batch).float().log_softmax(1))

    def gradients(self, batch: int) -> dict[str, Tensor]:
        with torch.inference_mode(False), torch.enable_grad(), _tracked(self.floats.values()):
            factors = {n: x.clone().requires_grad_() for n, x in self.factors.items()}
            log_q = self._run(self._training[batch], factors).float().log_softmax(1)
            log_p = self._teacher[batch].to(log_q.device)
            loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
            tunable = {**self.floats, **factors}
            values = torch.autograd.grad(loss, list(tunable.values()), allow_unused=True)
        return {
            name: torch.zeros_like(x) if value is None else value
            for (name, x), value in zip(tunable.items(), values, strict=True)
        }

    @torch.no_grad()
    def divergence(self) -> float:
        total, count = 0.0, 0
        for index, batch in enumerate(self._judging):
            log_q = self._run(batch, self.factors).float().log_softmax(1)
            log_p = self._teacher[len(self._training) + index].to(log_q.device)
            total += float(_divergences(log_p, log_q).double().cpu().sum())
            count += samples(batch)
        return total / count

    def _run(self, batch: Batch, factors: Mapping[str, Tensor] | None = None) -> Tensor:
        with evaluating(self._module, self._device):
            here = {n: x.to(self._device) for n, x in (factors or {}).items()}
            layouts = [layout for layout in self._layouts if layout.name in here]
            with RowFactors(layouts, self._weights, here):
                return self._logits(Runner(self._module, {}, self._device).run(batch))


@contextmanager
def _tracked(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Make parameters require gradients inside the context."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
