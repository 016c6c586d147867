r"""Sensitivities: mean squared gradients of a model's loss by each output.

**Block by block** (`blockwise_sensitivities`): one backward pass in which each block is run again
on its stored input, so that memory holds the graph of one block. One batch's hidden states between
the blocks are in memory or in a file. The adapter supplies the computation after the last block
(`Tail`).

**Whole modules** (`module_sensitivities`). With a loss of the user's, L is its sum over the
samples. Without one the output is taken for the logits of classes, and L for the negative log
likelihood of a label drawn from the model's own distribution p, softened by TEMPERATURE. The
expectation over labels of the squared gradient is that of the logits' gradient S v, for
S S^T = diag(p) - p p^T and any v with independent entries +-1:

    S = (I - p 1^T) diag(sqrt(p)),   E_v[(J^T S v)_i^2] = (J^T (diag(p) - p p^T) J)_ii.

One v per sample takes one backward pass, whatever the number of classes, and unlike drawn labels
gives an estimate for samples of which the model is almost certain.

A convolution makes the same error at all positions of a sample, and where the network pools them
the errors add up, because gradients at different positions are alike. So the square of the sum over
positions is counted, not the sum of squares: with x_p the inputs and g_ip the gradients at output i
at the positions p of a sample,

    alpha_i = mean over samples |sum_p g_ip x_p|^2 / mean over samples sum_p |x_p|^2,

the squared gradient of the loss by the weights of row i over the trace of H/2. With one position
per sample, or with independent gradients, it is the mean of g_i^2.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from cerwu_gpu.calibration.blockwise import Backbone
from cerwu_gpu.calibration.capture import Call, Capture
from cerwu_gpu.calibration.moments import InputMoments, not_finite
from cerwu_gpu.calibration.products import (
    Product,
    input_rows,
    module_products,
    output_rows,
    positions,
)
from cerwu_gpu.calibration.running import Batch, Runner, evaluating, placed, samples
from cerwu_gpu.calibration.shards import ShardSums, TokenBatch, token_batches
from cerwu_gpu.calibration.stack import stack
from cerwu_gpu.errors import CalibrationError
from cerwu_gpu.layout import Label, WeightLayout
from cerwu_gpu.progress import tracked
from cerwu_gpu.ranks import Ranks

Loss = Callable[[Any, Any], Tensor]
"""Loss of (the module's output, the batch): one per sample [samples], in nats."""

TEMPERATURE = 4.0
"""Temperature of the softmax. Networks are almost certain of their training images, where the
curvature of the loss predicts little about other images: at 1, ResNet-20 needs more bits."""
SENSITIVITY_SAMPLES = 1024
"""Number of samples used to estimate a whole module's sensitivities. They span orders of magnitude
across outputs, so a small sample suffices."""
GRADIENT_ELEMENTS = 1 << 24
"""Number of elements of gradients by weights in memory at a time; at least those of one sample."""


class SquaredGradients:
    """Weighted means of squared gradients per output, as sums [m] float64 and total weights."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        self._sums: ShardSums[tuple[str, Label]] = ShardSums(ranks or Ranks())

    def begin(self, shard: int) -> None:
        """Take what follows for a shard of the calibration batches; they come in order."""
        self._sums.begin(shard)

    def watch_outputs(self, product: Product) -> None:
        """Arrange to add the squared gradient at a product's output [..., m], summed over rows.

        Raises:
            CalibrationError: in the backward pass, where it is not finite.
        """
        label = product.name, product.part

        def note(gradient: Tensor) -> None:
            rows = gradient.detach().reshape(-1, gradient.shape[-1]).float()
            self.add(label, rows.square().sum(dim=0).double(), len(rows))

        _when_computed(product, note)

    def watch_weights(self, product: Product, groups: int) -> None:
        """Arrange to add the squared gradient by a weight of `groups` matrices, over samples.

        Raises:
            CalibrationError: in the backward pass, where it is not finite in float32.
        """

        def note(gradient: Tensor) -> None:
            squares, energy = gradient_squares(product, gradient)
            for part, square in enumerate(squares.chunk(groups)):
                self.add((product.name, part), square, energy[part])

        _when_computed(product, note)

    def add(self, label: Label, squares: Tensor, weight: Tensor | int) -> None:
        """Add a sum of squares [m] float64 and its weight in the mean.

        Raises:
            CalibrationError: they are not finite.
        """
        if not bool(torch.isfinite(squares).all() & torch.isfinite(torch.as_tensor(weight)).all()):
            name, part = label
            raise CalibrationError(
                f"the gradient at the output of {name}{f'[{part}]' if part else ''} is not finite: "
                "check the weights, or save the model as float32 and compress that."
            )
        self._sums.add(("squares", label), squares)
        self._sums.add(("weight", label), torch.as_tensor(weight, dtype=torch.float64))

    def means(self, layouts: Iterable[WeightLayout], device: torch.device) -> dict[Label, Tensor]:
        """Return the mean squares [m] float32 on the CPU of all matrices, zeros without any; the
        sums, on `device`, are freed."""
        rows = {
            (layout.name, part): layout.matrix_shape[0]
            for layout in layouts
            for part in range(layout.parts)
        }
        shapes = {("squares", label): torch.Size((m,)) for label, m in rows.items()}
        shapes |= {("weight", label): torch.Size(()) for label in rows}
        totals = self._sums.shared(shapes, device)
        return {
            label: (totals["squares", label] / totals["weight", label]).cpu().float()
            if float(totals["weight", label]) > 0
            else torch.zeros(m)
            for label, m in rows.items()
        }


def _when_computed(product: Product, note: Callable[[Tensor], None]) -> None:
    """Call `note` with the gradient at a product's output in the backward pass."""
    assert product.output is not None
    if product.output.requires_grad:  # else no loss depends on it
        product.output.register_hook(note)  # type: ignore[no-untyped-call]


class Tail(Protocol):
    """A model without its blocks, in a backward pass over one batch."""

    def gradient(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return the loss's gradient at the blocks' output `hidden` [batch, sequence, width]."""
        ...

    def note_inputs(self, gradient: Tensor) -> None:
        """Use the gradient at the first block's input, after `gradient`."""
        ...


def blockwise_sensitivities(
    backbone: Backbone,
    tokens: Tensor,
    tail: Callable[[Capture, int], Tail],
    outer: AbstractContextManager[None],
    *,
    to_inputs: bool,
    device: torch.device | str | None = None,
    batch_size: int = 8,
    spool: Path | None = None,
    ranks: Ranks | None = None,
    progress: bool = False,
) -> dict[Label, Tensor]:
    """Return alpha_i = mean over tokens of (dL/dy_i)^2 for every output y_i of every chosen matrix
    in the blocks.

    L is the sum of the losses [nats] of a sequence's tokens, so the gradient at a token includes
    its effect on all others. The mean runs over the tokens that reach the matrix; an expert that no
    token reaches gets zeros. Gradients are in the model's dtype, squares are summed in float64.

    Args:
        backbone: with its original weights.
        tokens: int64 [samples, sequence], the calibration inputs.
        tail: returns the model without its blocks, given the capture of a batch and its shard.
        outer: a context in which the model without its blocks is on the device.
        to_inputs: carry the gradient to the first block's input for `tail`.
        device: of the work; None: the model's.
        batch_size: samples that run through a block together.
        spool: directory for a file that keeps a batch's hidden states in front of all blocks until
            its backward pass; None: they stay in memory.
        ranks: share the samples; default: this process has all.
        progress: show a bar over the batches on stderr.

    Returns:
        (parameter name, part) -> alpha [m] float32 on the CPU.

    Raises:
        CalibrationError: no tokens, sequences of one token, or a gradient that is not finite.
    """
    if tokens.numel() == 0 or tokens.shape[1] < 2:
        raise CalibrationError(
            "sensitivities need sequences of at least 2 tokens: give a longer text."
        )
    work = backbone.home if device is None else torch.device(device)
    ranks = ranks or Ranks()
    backward = _Backward(backbone, tail, work, to_inputs, spool, ranks)
    batches = token_batches(tokens, batch_size, ranks)

    def add() -> None:
        for batch in tracked(batches, what="sensitivities", unit="batch", shown=progress):
            backward.add(batch)

    with torch.inference_mode(False), outer:
        ranks.agree(add)
    return backward.squares.means(backbone.layouts, work)


class _Backward:
    """Forward and backward passes, batch after batch."""

    def __init__(
        self,
        backbone: Backbone,
        tail: Callable[[Capture, int], Tail],
        device: torch.device,
        to_inputs: bool,
        spool: Path | None,
        ranks: Ranks,
    ) -> None:
        self._backbone = backbone
        self._spool = spool
        self._tail = tail
        self._device = device
        self.squares = SquaredGradients(ranks)
        chosen = backbone.chosen()
        # No gradient is needed in front of the first chosen weight.
        self._first = 0 if to_inputs or True not in chosen else chosen.index(True)
        self._to_inputs = to_inputs

    def add(self, batch: TokenBatch) -> None:
        """Add the gradients of one batch."""
        tokens = batch.tokens
        self.squares.begin(batch.shard)
        backbone, blocks = self._backbone, self._backbone.blocks
        with placed(blocks[0][1], self._device):  # capture runs the first block
            captured = backbone.capture([tokens], self._device)
        tail = self._tail(captured, batch.shard)
        calls = [calls[len(tokens)] for calls in captured.calls]
        hidden = captured.hidden[0]
        with backbone.single_products(), stack(self._spool) as inputs:
            for (name, block), call in zip(blocks, calls, strict=True):
                inputs.append(hidden)
                with placed(block, self._device), torch.no_grad():
                    output = call.run(block, hidden)
                    if not bool(torch.isfinite(output).all()):
                        self._blame(name, block, call, hidden, output, batch.samples)
                hidden = output
            gradient = tail.gradient(tokens, hidden)
            for index in reversed(range(self._first, len(blocks))):
                (name, block), call = blocks[index], calls[index]
                x = inputs.pop().detach().requires_grad_()
                weights = backbone.weights(name, self._device)
                with (
                    placed(block, self._device),
                    module_products(weights, self.squares.watch_outputs),
                    torch.enable_grad(),
                ):
                    (gradient,) = torch.autograd.grad(call.run(block, x), x, gradient)
        if self._to_inputs:
            tail.note_inputs(gradient)

    def _blame(
        self,
        name: str,
        block: nn.Module,
        call: Call,
        hidden: Tensor,
        output: Tensor,
        numbers: range,
    ) -> NoReturn:
        """Raise an error that names the first input that is not finite, or else the output.

        Raises:
            CalibrationError: always.
        """
        weights = self._backbone.weights(name, self._device)
        moments = InputMoments(weights.layouts)
        with module_products(weights, moments.add, before=True), moments.forward(numbers):
            call.run(block, hidden)
        raise CalibrationError(not_finite(f"the output of {name}", output, numbers))


def module_sensitivities(
    module: nn.Module,
    layouts: Sequence[WeightLayout],
    batches: Sequence[Batch],
    *,
    loss: Loss | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: bool = False,
) -> dict[Label, Tensor]:
    """Return alpha of every output of every chosen weight (module docstring).

    One backward pass over the first SENSITIVITY_SAMPLES samples. Gradients are in the module's
    dtype, products in float32, squares are summed in float64. Several uses of a weight count as
    independent. A weight that the loss does not depend on gets zeros.

    Args:
        module: run in eval mode with its original weights; no gradient is left in it.
        layouts: the weights to compress (models.selection).
        batches: the inputs of the whole module (running.materialized).
        loss: one per sample; None: that of drawn labels.
        seed: draws the directions v.

    Returns:
        (parameter name, part) -> alpha [m] float32 on the CPU.

    Raises:
        CalibrationError: the outputs are no logits [samples, classes] and there is no loss, the
            loss is not one number per sample, or a gradient is not finite.
    """
    squares = SquaredGradients()
    parts = {layout.name: layout.parts for layout in layouts}
    weights: dict[str, Tensor] = {name: module.get_parameter(name) for name in parts}
    target = torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    count = 0

    def watch(product: Product) -> None:
        squares.watch_weights(product, parts[product.name])

    with evaluating(module, target), _requiring_grad(weights), torch.inference_mode(False):
        runner = Runner(module, weights, target)
        for batch in tracked(batches, what="sensitivities", unit="batch", shown=progress):
            if count >= SENSITIVITY_SAMPLES:
                break
            with torch.enable_grad():
                output = runner.run(batch, watch)
                total = _total(output, batch, loss, generator)
                torch.autograd.grad(total, list(weights.values()), allow_unused=True)
            count += samples(batch)
    return squares.means(layouts, target)


def _total(output: Any, batch: Batch, loss: Loss | None, generator: torch.Generator) -> Tensor:
    """Return the scalar L of a batch."""
    if loss is not None:
        return losses(loss, output, batch).sum()
    logits = required_logits(output)
    return (logits.float() * drawn_gradient(logits, generator)).sum()


def drawn_gradient(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return S v (module docstring) for logits [samples, classes], with its shape."""
    p = torch.softmax(logits.detach().float() / TEMPERATURE, dim=1)
    drawn = p.sqrt() * drawn_signs(p, generator)
    return drawn - p * drawn.sum(dim=1, keepdim=True)


def drawn_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return independent entries +-1 in the shape of a tensor, float32."""
    signs = torch.randint(0, 2, like.shape, generator=generator) * 2 - 1
    return signs.to(like.device, torch.float32)


def losses(loss: Loss, output: Any, batch: Batch) -> Tensor:
    """Return a user's loss for a batch, [samples].

    Raises:
        CalibrationError: it is not one number per sample.
    """
    values = loss(output, batch)
    if not isinstance(values, Tensor) or values.shape != (samples(batch),):
        raise CalibrationError(
            "the loss must give one number per sample, without a mean or a sum over them."
        )
    return values


def required_logits(output: Any) -> Tensor:
    """Return an output that is a tensor of logits [samples, classes], or the logits of an output
    object of transformers.

    Raises:
        CalibrationError: the output is something else.
    """
    named = isinstance(output, Mapping) and "logits" in output
    logits = output["logits"] if named else output
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 2:
        raise CalibrationError(
            "the module's output is no tensor of logits [samples, classes]: give a loss, or take "
            "sensitivity none or relative."
        )
    return logits


@contextmanager
def _requiring_grad(weights: Mapping[str, Tensor]) -> Any:
    """Make the weights require gradients inside the context."""
    frozen = [weight for weight in weights.values() if not weight.requires_grad]
    for weight in frozen:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def gradient_squares(product: Product, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum over samples of |sum_p g_ip x_p|^2 [m], and of sum_p |x_p|^2 [groups],
    float64."""
    count = positions(product)
    flat = output_rows(product, gradient.detach())
    m = flat.shape[1]
    g = flat.reshape(-1, count, m)
    squares, energy, first = g.new_zeros(m, dtype=torch.float64), torch.zeros(()), 0
    for rows in input_rows(product, None):
        groups, n = len(rows), rows.shape[2]
        x = rows.reshape(groups, -1, count, n)
        taken = x.shape[1]
        slope = g[first : first + taken].reshape(taken, count, groups, -1)
        first += taken
        energy = energy + x.square().sum(dim=(1, 2, 3)).double()
        step = max(1, GRADIENT_ELEMENTS // (m * n))
        for inputs, slopes in zip(
            torch.split(x, step, dim=1), torch.split(slope, step), strict=True
        ):
            weights = torch.einsum("gspn,spgm->gsmn", inputs, slopes)
            squares += weights.square().sum(dim=(1, 3)).flatten().double()
    return squares, energy
