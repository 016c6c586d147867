"""Gradients of KL(original || compressed) by a model's floats, block by block or whole."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cerwu_gpu.calibration.blockwise import Backbone
from cerwu_gpu.calibration.capture import Capture
from cerwu_gpu.calibration.running import Batch, Runner, evaluating, placed, samples
from cerwu_gpu.compression.distill import Student

Ends = Callable[[Tensor, Tensor], Tensor]
"""From tokens [batch, sequence] and the blocks' output to the logits of predictions [count,
vocabulary]."""


def floats_of(module: nn.Module, compressed: Sequence[str]) -> dict[str, nn.Parameter]:
    """Return the floats that a file stores as they are and that may be tuned: vectors (norms,
    biases) that are not compressed."""
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.dim() == 1 and parameter.is_floating_point() and name not in compressed
    }


class BlockwiseStudent(Student):
    """A model that runs block by block; memory holds the graph of one block at a time.

    It is made of the original model, whose last hidden states and parameters outside of the blocks
    it keeps. Blocks are worked on where the adapter works on them.
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
    ) -> None:
        """Run the original model.

        Args:
            backbone: with its original weights.
            tokens, held_out: int64 [samples, sequence], of the training and of the evaluation.
            ends: makes the model behind the blocks, for the captured calls of a batch.
            outer: a context in which all but the blocks are on the device.
            batch_size: samples per step.
        """
        self._backbone = backbone
        self._ends = ends
        self._outer = outer
        self._device = device
        names = [layout.name for layout in backbone.layouts]
        self.floats = floats_of(backbone.module, names)
        prefixes = tuple(f"{name}." for name, _ in backbone.blocks)
        self._outside = {
            name: parameter
            for name, parameter in backbone.module.named_parameters()
            if not name.startswith(prefixes)
        }
        self._originals = {name: p.detach().clone() for name, p in self._outside.items()}
        self._training = torch.split(tokens, batch_size)
        self._judging = torch.split(held_out, batch_size)
        self.batches = len(self._training)
        with torch.no_grad(), self._outer():
            self._teacher = [
                [self._forward(batch)[1].cpu() for batch in batches]
                for batches in (self._training, self._judging)
            ]

    def gradients(self, batch: int) -> dict[str, Tensor]:
        tokens, backbone = self._training[batch], self._backbone
        with torch.inference_mode(False), self._outer():
            captured, hidden, inputs = self._forward(tokens)
            last = hidden.detach().requires_grad_()
            outside = {n: p for n, p in self.floats.items() if n in self._outside}
            gradients = {name: torch.zeros_like(p) for name, p in self.floats.items()}
            with _tracked(self.floats.values()):
                loss = self._divergence(captured, tokens, last, self._teacher[0][batch])
                wanted = [last, *outside.values()]
                gradient, *rest = torch.autograd.grad(loss, wanted, allow_unused=True)
                gradients.update(
                    {n: g for n, g in zip(outside, rest, strict=True) if g is not None}
                )
                for index in reversed(range(len(backbone.blocks))):
                    name, block = backbone.blocks[index]
                    inside = {n: p for n, p in self.floats.items() if n.startswith(f"{name}.")}
                    x = inputs[index].detach().requires_grad_()
                    call = captured.calls[index][len(tokens)]
                    with placed(block, self._device), backbone.single_products():
                        with torch.enable_grad():
                            output = call.run(block, x)
                        gradient, *rest = torch.autograd.grad(
                            output, [x, *inside.values()], gradient, allow_unused=True
                        )
                    gradients.update(
                        {n: g for n, g in zip(inside, rest, strict=True) if g is not None}
                    )
        return gradients

    @torch.no_grad()
    def divergence(self) -> float:
        total, count = 0.0, 0
        with self._outer():
            for tokens, teacher in zip(self._judging, self._teacher[1], strict=True):
                captured, hidden, _ = self._forward(tokens)
                total += float(self._divergence(captured, tokens, hidden, teacher)) * len(tokens)
                count += len(tokens)
        return total / count

    def _forward(self, tokens: Tensor) -> tuple[Capture, Tensor, list[Tensor]]:
        """Return the captured calls, the last block's output, and the blocks' inputs."""
        backbone = self._backbone
        with placed(backbone.blocks[0][1], self._device):  # capture runs the first block
            captured = backbone.capture([tokens], self._device)
        hidden, inputs = captured.hidden[0], []
        for (_, block), calls in zip(backbone.blocks, captured.calls, strict=True):
            inputs.append(hidden)
            with placed(block, self._device), torch.no_grad(), backbone.single_products():
                hidden = calls[len(tokens)].run(block, hidden)
        return captured, hidden, inputs

    def _divergence(
        self, captured: Capture, tokens: Tensor, hidden: Tensor, teacher: Tensor
    ) -> Tensor:
        """Return KL(original || compressed) per prediction, as a scalar with its graph."""
        ends = self._ends(captured)
        with torch.no_grad(), self._original_outside():
            log_p = ends(tokens, teacher.to(hidden.device)).float().log_softmax(-1)
        with torch.set_grad_enabled(hidden.requires_grad):
            log_q = ends(tokens, hidden).float().log_softmax(-1)
            return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

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


class ModuleStudent(Student):
    """A module that runs whole and gives logits [samples, classes]; made of the original one."""

    def __init__(
        self,
        module: nn.Module,
        batches: Sequence[Batch],
        held_out: Sequence[Batch],
        logits: Callable[[Any], Tensor],
        *,
        compressed: Sequence[str],
        device: torch.device,
    ) -> None:
        """Run the original module.

        Args:
            batches, held_out: of the training and of the evaluation.
            logits: from the module's output to logits [samples, classes].
            compressed: names of the parameters that are quantized.
        """
        self._module = module
        self._training, self._judging = batches, held_out
        self._logits = logits
        self._device = device
        self.floats = floats_of(module, compressed)
        self.batches = len(batches)
        with torch.no_grad():
            self._teacher = [
                [self._run(batch).float().log_softmax(1) for batch in part]
                for part in (batches, held_out)
            ]

    def gradients(self, batch: int) -> dict[str, Tensor]:
        with torch.inference_mode(False), torch.enable_grad(), _tracked(self.floats.values()):
            loss = self._divergence(self._training[batch], self._teacher[0][batch])
            values = torch.autograd.grad(loss, list(self.floats.values()), allow_unused=True)
        return {
            name: torch.zeros_like(parameter) if value is None else value
            for (name, parameter), value in zip(self.floats.items(), values, strict=True)
        }

    @torch.no_grad()
    def divergence(self) -> float:
        total, count = 0.0, 0
        for batch, teacher in zip(self._judging, self._teacher[1], strict=True):
            total += float(self._divergence(batch, teacher)) * samples(batch)
            count += samples(batch)
        return total / count

    def _divergence(self, batch: Batch, teacher: Tensor) -> Tensor:
        log_q = self._run(batch).float().log_softmax(1)
        return functional.kl_div(log_q, teacher, reduction="batchmean", log_target=True)

    def _run(self, batch: Batch) -> Tensor:
        with evaluating(self._module, self._device):
            return self._logits(Runner(self._module, {}, self._device).run(batch))


@contextmanager
def _tracked(parameters: Any) -> Iterator[None]:
    """Make parameters require gradients inside the context."""
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
