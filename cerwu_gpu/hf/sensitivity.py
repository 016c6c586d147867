"""How much an error of each output costs the model: mean squared gradients of its loss."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from cerwu_gpu.errors import CalibrationError
from cerwu_gpu.hf.calibration import BlockWeights, eager_experts, placed
from cerwu_gpu.hf.capture import Call, capture
from cerwu_gpu.hf.ends import Ends, Passage, ends_placed
from cerwu_gpu.hf.head import (
    LOOKUP,
    HeadWeights,
    find_head,
    head_modules,
    lookup_frequencies,
    lookup_sensitivities,
    tied_sensitivities,
)
from cerwu_gpu.hf.inputs import ExpertProducts, InputMoments, Label, not_finite, observed
from cerwu_gpu.hf.models import check_tokens
from cerwu_gpu.hf.structure import find_blocks
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.progress import tracked

LOGITS = 2**25
"""About this many logits are in memory at a time, at least those of one sequence."""


def output_sensitivities(
    model: PreTrainedModel,
    layouts: Sequence[WeightLayout],
    tokens: Tensor,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[Label, Tensor]:
    """alpha_i = mean over tokens of (dL/dy_i)^2 for every output y_i of every chosen matrix.

    L is the sum of the negative log likelihoods [nats] of a sequence's tokens, so the gradient at
    a token includes its effect on all later ones. The mean runs over the tokens that reach the
    matrix; an expert that no token reaches gets zeros. The head and the input embedding, where
    `layouts` has them, get what head.py says.

    One backward pass, block by block: each is run again on its kept input, so that memory holds
    the graph of one block and one batch's hidden states between the blocks. Gradients are in the
    model's dtype, the loss in float32, squares are summed in float64.

    Args:
        model: put into eval mode, otherwise left as it is; its weights must be the original ones.
        layouts: the weights to compress (structure.find_weights).
        tokens: int64 [samples, sequence], the calibration text.
        device: where blocks are worked on; None: where the model is.
        batch_size: samples that run through a block together.
        progress: show a bar over the batches on stderr.

    Returns:
        (parameter name, part) -> alpha [m] float32 on the CPU; and (parameter name, LOOKUP) of
        the input embedding -> [d, d], for head.BlocksWithLookups.

    Raises:
        CalibrationError: no tokens, sequences of one token, or a gradient that is not finite.
        ModelError: the model has no blocks, or no embedding for the tokens.
    """
    if tokens.numel() == 0 or tokens.shape[1] < 2:
        raise CalibrationError(
            "sensitivities need sequences of at least 2 tokens: give a longer text."
        )
    check_tokens(model, tokens, tokens.shape[1])
    work = model.device if device is None else torch.device(device)
    backward = _Backward(model.train(False), layouts, work)
    batches = torch.split(tokens, batch_size)
    with torch.inference_mode(False), ends_placed(model, find_blocks(model), work):
        for batch in tracked(batches, what="sensitivities", unit="batch", shown=progress):
            backward.add(batch)
    return backward.sensitivities(tokens)


class _Squares:
    """Sums of squares per output, float64, and how many tokens they are of."""

    def __init__(self) -> None:
        self._sums: dict[Label, Tensor] = {}
        self._tokens: dict[Label, int] = {}

    def watch(self, label: Label, output: Tensor) -> None:
        """Add the gradient at `output` [..., m] when it is computed.

        Raises:
            CalibrationError: then, where its square is not finite.
        """

        def note(gradient: Tensor) -> None:
            rows = gradient.detach().reshape(-1, gradient.shape[-1]).float()
            self.add(label, rows.square().sum(dim=0).double(), len(rows))

        if output.requires_grad:  # else nothing of the text reaches it
            output.register_hook(note)  # type: ignore[no-untyped-call]

    def add(self, label: Label, squares: Tensor, tokens: int) -> None:
        """Add the sum [m] float64 of the squares at so many tokens."""
        if not bool(torch.isfinite(squares).all()):
            name, part = label
            raise CalibrationError(
                f"the gradient at the output of {name}{f'[{part}]' if part else ''} is not finite: "
                "check the weights, or save the model as float32 and compress that."
            )
        self._sums[label] = self._sums[label] + squares if label in self._sums else squares
        self._tokens[label] = self._tokens.get(label, 0) + tokens

    def mean(self, label: Label, rows: int) -> Tensor:
        """Mean squares [rows] float64 on the CPU; zeros without a token."""
        if label not in self._sums:
            return torch.zeros(rows, dtype=torch.float64)
        return self._sums[label].cpu() / max(self._tokens[label], 1)


class _Ends:
    """Expected squares at the logits, and second moments of the head's inputs and of the gradients
    at the looked-up rows, of batches of tokens."""

    def __init__(self, head: HeadWeights) -> None:
        self.head = head
        self._tokens = 0
        self._squares: Tensor | float = 0.0
        self._inputs: Tensor | float = 0.0
        self._gradients: Tensor | float = 0.0

    def note(self, passage: Passage) -> None:
        """Before the passage's graph is used up.

        Raises:
            CalibrationError: the model has no head that is applied once.
        """
        if passage.scores is None or passage.head_input is None:
            raise CalibrationError("the model does not apply its head once: leave the head out.")
        self._tokens += passage.rows.shape[0] * passage.rows.shape[1]
        self._inputs = self._inputs + _second_moment(passage.head_input)
        self._squares = self._squares + _expected_squares(passage.scores, passage.logits)

    def note_rows(self, gradient: Tensor) -> None:
        """The gradient at the looked-up rows [batch, sequence, d]."""
        self._gradients = self._gradients + _second_moment(gradient)

    def sensitivities(self, layout: WeightLayout, tokens: Tensor) -> dict[Label, Tensor]:
        """Of the head or the input embedding; for the latter with what LOOKUP says.

        Raises:
            CalibrationError: something is not finite.
        """
        logits, hessian, moment = (
            torch.as_tensor(total).cpu() / self._tokens
            for total in (self._squares, 2 * self._inputs, self._gradients)
        )
        if not all(bool(torch.isfinite(mean).all()) for mean in (logits, hessian, moment)):
            raise CalibrationError(
                f"the gradient at {layout.name} is not finite: "
                "check the weights, or save the model as float32 and compress that."
            )
        if layout.name != self.head.embedding:
            return {(layout.name, 0): logits}
        frequencies = lookup_frequencies(tokens, layout.shape[0])
        alpha, addition = (
            tied_sensitivities(logits, frequencies, moment, hessian)
            if self.head.tied
            else lookup_sensitivities(frequencies, moment)
        )
        return {(layout.name, 0): alpha, (layout.name, LOOKUP): addition}


def _second_moment(x: Tensor) -> Tensor:
    """Sum over tokens of x x^T [d, d] float64, of x [..., d]."""
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    return (rows.T @ rows).double()


def _expected_squares(scores: Tensor, logits: Tensor) -> Tensor:
    """Sum over tokens of the expected squared gradient [vocabulary] float64 at the head's output.

    The next token is drawn from the model's own distribution p: (slope)^2 p (1 - p). Logits are an
    elementwise function of `scores` (softcapping, a scale) with this slope.
    """
    p = torch.softmax(logits.detach()[:, :-1].float(), dim=-1)
    squares = p - p.square()
    if logits is not scores:
        (slope,) = torch.autograd.grad(logits.sum(), scores, retain_graph=True)
        squares *= slope[:, :-1].float().square()
    return squares.flatten(0, 1).sum(dim=0).double()


class _Backward:
    """Forward and backward passes, batch after batch."""

    def __init__(
        self, model: PreTrainedModel, layouts: Sequence[WeightLayout], device: torch.device
    ) -> None:
        self._model = model
        self._blocks = find_blocks(model)
        self._layouts = tuple(layouts)
        self._device = device
        self._squares = _Squares()
        self._ends = _Ends(find_head(model)) if head_modules(model, layouts) else None
        chosen = [bool(BlockWeights(*block, layouts).layouts) for block in self._blocks]
        # No gradient is asked for in front of the first chosen weight.
        self._first = 0 if self._ends is not None or True not in chosen else chosen.index(True)
        self._samples = 0

    def add(self, tokens: Tensor) -> None:
        """Add the gradients of one batch, int64 [batch, sequence]."""
        with placed(self._blocks[0][1], self._device):  # capture runs the first block
            captured = capture(self._model, self._blocks, [tokens], self._device)
        ends = Ends(self._model, self._blocks, captured.wrap)
        runs = [calls[len(tokens)] for calls in captured.calls]
        hidden = captured.hidden[0]
        inputs = []
        with eager_experts(self._model):
            for (name, block), call in zip(self._blocks, runs, strict=True):
                inputs.append(hidden)
                with placed(block, self._device), torch.no_grad():
                    hidden = call.run(block, hidden)
                    if not bool(torch.isfinite(hidden).all()):
                        self._blame(name, block, call, inputs[-1], hidden)
            self._samples += len(tokens)
            gradient, entries = self._through_ends(ends, tokens, hidden)
            for index in reversed(range(self._first, len(self._blocks))):
                (name, block), call = self._blocks[index], runs[index]
                x = inputs.pop().detach().requires_grad_()
                with placed(block, self._device), self._watched(name, block), torch.enable_grad():
                    (gradient,) = torch.autograd.grad(call.run(block, x), x, gradient)
        if self._ends is not None:
            pieces = torch.split(gradient, [len(rows) for rows, _ in entries])
            for (rows, first), piece in zip(entries, pieces, strict=True):
                self._ends.note_rows(torch.autograd.grad(first, rows, piece)[0])

    def _blame(
        self, name: str, block: nn.Module, call: Call, hidden: Tensor, output: Tensor
    ) -> NoReturn:
        """Say which input of a chosen weight is not finite first, or else that the output is not.

        Raises:
            CalibrationError: always.
        """
        samples = range(self._samples, self._samples + len(hidden))
        weights = BlockWeights(name, block, self._layouts)
        moments = InputMoments(weights.layouts)
        with observed(weights.modules, weights.layouts, moments), moments.forward(samples):
            call.run(block, hidden)
        raise CalibrationError(not_finite(f"the output of {name}", output, samples))

    def _through_ends(
        self, ends: Ends, tokens: Tensor, hidden: Tensor
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The loss's gradient at the blocks' output `hidden`; and, of a few sequences at a time,
        the embedding's rows with the first block's input computed from them."""
        embedding: Any = self._model.get_input_embeddings().weight
        some = max(1, LOGITS // (tokens.shape[1] * embedding.shape[0]))
        gradients, entries = [], []
        pieces = zip(torch.split(tokens, some), torch.split(hidden, some), strict=True)
        for piece, outputs in pieces:
            passage = ends.passage(piece, outputs)
            if self._ends is not None:
                self._ends.note(passage)
            logits, targets = passage.logits[:, :-1].float(), piece[:, 1:].to(self._device)
            loss = functional.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), reduction="sum"
            )
            gradients.append(torch.autograd.grad(loss, passage.last)[0])
            entries.append((passage.rows, passage.first))
        return torch.cat(gradients), entries

    @contextmanager
    def _watched(self, name: str, block: nn.Module) -> Iterator[None]:
        """While this is open, gradients at the outputs of the block's matrices are noted."""
        weights = BlockWeights(name, block, self._layouts)
        experts = [layout for layout in weights.layouts if len(layout.shape) == 3]

        def linear_hook(label: Label) -> Any:
            return lambda module, arguments, output: self._squares.watch(label, output)

        with ExitStack() as stack:
            for layout in weights.layouts:
                if layout not in experts:
                    hook = linear_hook((layout.name, 0))
                    handle = weights.modules[layout.name].register_forward_hook(hook)
                    stack.callback(handle.remove)
            if experts:
                stack.enter_context(ExpertProducts(weights.modules, experts, self._watch_expert))
            yield

    def _watch_expert(self, layout: WeightLayout, part: int, x: Tensor, output: Tensor) -> None:
        self._squares.watch((layout.name, part), output)

    def sensitivities(self, tokens: Tensor) -> dict[Label, Tensor]:
        """What the passes over `tokens` add up to."""
        result: dict[Label, Tensor] = {}
        for layout in self._layouts:
            if self._ends is not None and layout.name in self._ends.head.names:
                result.update(self._ends.sensitivities(layout, tokens))
                continue
            for part in range(layout.parts):
                label = layout.name, part
                result[label] = self._squares.mean(label, layout.matrix_shape[0])
        return {label: alpha.float() for label, alpha in result.items()}
