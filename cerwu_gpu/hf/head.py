r"""The input embedding and the head as matrices [vocabulary, d] to be compressed.

Their costs, in the units of design.md 2.3 (per token, of an error e in row v):

* Head: 1/2 alpha_v e H e^T like any linear layer, H of its input, the last hidden state after the
  final norm. alpha_v is the *expected* square of dL/dy_v, s_v^2 p_v (1 - p_v) on average, p the
  model's own distribution and s_v the slope of the logit (1 without softcapping or scale). The
  text's own next tokens have the same mean, but show a rare token never or once.
* Embedding that is only looked up: f_v e G e^T, f_v the token's frequency and G = E[g g^T] [d, d]
  of the gradient g at the looked-up rows. With g^2 = tr(G) / d that is 1/2 a_v e H e^T for
  **H = (2 / vocabulary) G / g^2 and a_v = vocabulary f_v g^2**. Without sensitivities it is
  a = 1 and H = (2 / vocabulary) I: J is still the mean square of the output's error per token.
* Both at once (tied): 1/2 e (alpha_v H + 2 f_v G) e^T. Frequent tokens are also likely ones, so
  f_v / alpha_v varies little around 1 / A, A = sum(alpha), and one matrix serves all rows:
  **H' = H + (2 / A) G**. The row's sensitivity is the one with the same cost for errors as
  rounding leaves them, of covariance ~ H'^-1: **a_v = (1 - w) alpha_v + w A f_v** with the
  lookups' share w = tr((2 / A) G H'^-1) / d.

Frequencies are smoothed by one additional occurrence of every token, so that no row is free. The
blocks' statistics hold what needs no gradient: H of the head, (2 / vocabulary) I of the embedding;
what G changes are additions to Hessians among the sensitivities.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cerwu_gpu.calibration.blockwise import OuterBlocks, Stream
from cerwu_gpu.calibration.capture import Capture
from cerwu_gpu.calibration.moments import InputMoments
from cerwu_gpu.calibration.products import Product
from cerwu_gpu.calibration.running import placed
from cerwu_gpu.calibration.shards import ShardSums
from cerwu_gpu.compression.blocks import Block, BlockWeights, InputStatistics, KnownBlock
from cerwu_gpu.errors import CalibrationError, ModelError
from cerwu_gpu.hf.ends import Ends, Passage, ends_placed, output_embeddings
from cerwu_gpu.layout import Label, WeightLayout
from cerwu_gpu.quantize.sensitivity import Sensitivities
from cerwu_gpu.ranks import Ranks
from cerwu_gpu.threads import one_thread

NEGLIGIBLE = 1e-6
"""Share of the mean diagonal entry that is added to a Hessian before it is inverted."""


@dataclass(frozen=True)
class HeadWeights:
    """Names, as in model.named_parameters(), of the two matrices [vocabulary, d].

    Attributes:
        embedding: the input embedding.
        head: the output embedding; the same name where the two are one parameter, None where the
            model has none.
    """

    embedding: str
    head: str | None

    @property
    def tied(self) -> bool:
        return self.embedding == self.head

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the distinct parameters, the head first."""
        return (self.embedding,) if self.tied or self.head is None else (self.head, self.embedding)


def find_head(model: PreTrainedModel) -> HeadWeights:
    """Return the names of the input embedding and the head, if there is one.

    Raises:
        ModelError: the model lacks an embedding, or one is no plain nn.Embedding or nn.Linear.
    """
    head = output_embeddings(model)
    return HeadWeights(
        _weight_of(model, model.get_input_embeddings(), nn.Embedding, "input embedding"),
        None if head is None else _weight_of(model, head, nn.Linear, "head"),
    )


def _weight_of(
    model: PreTrainedModel, module: nn.Module | None, kind: type[nn.Module], what: str
) -> str:
    """Return the name of the weight of a module of this kind.

    Raises:
        ModelError: it is none.
    """
    weight: Any = getattr(module, "weight", None)
    name = next((name for name, x in model.named_parameters() if x is weight), None)
    if not isinstance(module, kind) or name is None:
        raise ModelError(
            f"{type(model).__name__} has no {what} that can be compressed: "
            "leave embeddings and head as they are."
        )
    return name


def head_layouts(model: PreTrainedModel, *, predicts: bool = True) -> list[WeightLayout]:
    """Return the layouts of the head and, unless it is the same parameter, the input embedding.

    Args:
        predicts: the model predicts tokens, so that it must have a head.

    Raises:
        ModelError: as `find_head`, or there is no head.
    """
    matrices = find_head(model)
    if predicts and matrices.head is None:
        _weight_of(model, None, nn.Linear, "head")
    shapes = {name: tuple(model.get_parameter(name).shape) for name in matrices.names}
    return [WeightLayout(name, shape, 1, False) for name, shape in shapes.items()]


def head_modules(
    model: PreTrainedModel, layouts: Sequence[WeightLayout]
) -> list[tuple[str, nn.Module]]:
    """Return the modules that own the head and the embedding, with their names, if `layouts` holds
    their weights; they are treated like further blocks after the last one."""
    chosen = {layout.name for layout in layouts}
    embeddings = (model.get_input_embeddings(), output_embeddings(model))
    owned = {id(parameter) for module in embeddings if module for parameter in module.parameters()}
    if not any(id(model.get_parameter(name)) in owned for name in chosen):
        return []
    owners = [name.rpartition(".")[0] for name in find_head(model).names if name in chosen]
    return [(owner, model.get_submodule(owner)) for owner in owners]


class HeadBlocks(OuterBlocks):
    """The head and the input embedding, where they are to be compressed, as a block each.

    Attributes:
        head: their names; None where neither is to be compressed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[tuple[str, nn.Module]],
        layouts: Sequence[WeightLayout],
        ends: Callable[[Capture], Ends],
        towers: Sequence[tuple[str, nn.Module]] = (),
    ) -> None:
        """Take the model and its blocks.

        Args:
            layouts: of the weights to compress.
            ends: returns the model without its blocks.
            towers: blocks with such weights that no text reaches.
        """
        self._ends = ends
        self._towers = towers
        self._model = model
        self._blocks = blocks
        self._layouts = {layout.name: layout for layout in layouts}
        self._modules = head_modules(model, layouts)
        self.head = find_head(model) if self._modules else None
        owners = {name for name, _ in self._modules}
        head = None if self.head is None else self.head.head
        self.needs_outputs = head is not None and head.rpartition(".")[0] in owners

    def __len__(self) -> int:
        return len(self._modules) + len(self._towers)

    def of(self, stream: Stream, captured: Capture) -> Iterator[Block]:
        ends = self._ends(captured)
        for name, module in self._modules:
            layout = next(x for x in self._layouts.values() if x.name.startswith(f"{name}."))
            with ends_placed(self._model, self._blocks, stream.device):
                inputs, statistics = self._statistics(layout, ends, stream)
            with placed(module, stream.device):
                weights = BlockWeights(self._model, [layout], stream.device)
                yield KnownBlock(name, weights, inputs, statistics)
        for name, module in self._towers:
            with placed(module, stream.device):
                yield self._unreached(name, stream)

    def _unreached(self, name: str, stream: Stream) -> KnownBlock:
        """Return a block that no text reaches, with H = I for each of its inputs."""
        layouts = [x for x in self._layouts.values() if x.name.startswith(f"{name}.")]
        inputs = {(x.name, part): x.key(part) for x in layouts for part in range(x.parts)}
        place = stream.device if stream.ranks.first else torch.device("meta")
        statistics = {
            x.key(part): InputStatistics(torch.eye(x.matrix_shape[1], device=place), 1)
            for x in layouts
            for part in range(x.parts)
        }
        weights = BlockWeights(self._model, layouts, stream.device)
        return KnownBlock(name, weights, inputs, statistics)

    def _statistics(
        self, layout: WeightLayout, ends: Ends, stream: Stream
    ) -> tuple[dict[Label, str], dict[str, InputStatistics]]:
        """Return the inputs and statistics of the head or the embedding.

        Raises:
            CalibrationError: an activation is not finite.
        """
        assert self.head is not None
        if layout.name != self.head.head:
            rows, columns = layout.shape
            hessian = torch.eye(columns, device=stream.device) * (2 / rows)
            if not stream.ranks.first:
                hessian = hessian.to("meta")
            key = layout.key(0)
            return {(layout.name, 0): key}, {key: InputStatistics(hessian, stream.tokens)}
        moments = InputMoments([layout], stream.ranks)
        for index, (batch, hidden) in enumerate(zip(stream.batches, stream.hidden, strict=True)):
            moments.begin(batch.shard)
            tokens, samples, outputs = batch.tokens, batch.samples, hidden
            if stream.drifted is not None:
                with moments.record(samples):
                    moments.add(Product(layout.name, ends.head_input(tokens, outputs), None))
                outputs = stream.drifted[index]
            with moments.forward(samples):
                moments.add(Product(layout.name, ends.head_input(tokens, outputs), None))
        statistics = moments.statistics(stream.device)
        return moments.keys, statistics


def lookup_frequencies(tokens: Tensor, vocabulary: int) -> Tensor:
    """Return f [vocabulary] float64, sum 1: the shares of all tokens in `tokens` (int64, any shape)
    with one occurrence of each added."""
    counts = torch.bincount(tokens.flatten().cpu(), minlength=vocabulary).double() + 1
    return counts / counts.sum()


def lookup_sensitivities(frequencies: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sensitivities of an embedding that is only looked up (see above), float64.

    Args:
        frequencies: f [vocabulary].
        moment: G [d, d].

    Returns:
        (a [vocabulary], the addition to the Hessian [d, d]).
    """
    vocabulary, columns = len(frequencies), len(moment)
    gradient = moment.trace() / columns
    if float(gradient) <= 0:
        return torch.zeros_like(frequencies), torch.zeros_like(moment)
    identity = torch.eye(columns, dtype=moment.dtype)
    return vocabulary * gradient * frequencies, 2 / vocabulary * (moment / gradient - identity)


def tied_sensitivities(
    logits: Tensor, frequencies: Tensor, moment: Tensor, hessian: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sensitivities of a head that is also the input embedding (see above), float64.

    Args:
        logits: alpha [vocabulary].
        frequencies: f [vocabulary].
        moment: G [d, d].
        hessian: H [d, d] of the head's input.

    Returns:
        (a [vocabulary], the addition to the Hessian [d, d]).
    """
    total = logits.sum()
    if float(total) <= 0:
        return torch.zeros_like(logits), torch.zeros_like(hessian)
    addition = 2 / total * moment
    both = hessian + addition
    if float(both.trace()) <= 0:
        return logits, addition
    both.diagonal().add_(NEGLIGIBLE * both.diagonal().mean())  # no text may span all directions
    with one_thread():
        share = torch.linalg.solve(both, addition).trace() / len(moment)
    return (1 - share) * logits + share * total * frequencies, addition


class HeadGradients:
    """Expected squared gradients at the logits, and second moments of the head's inputs and of the
    gradients at the looked-up rows, over batches of tokens."""

    def __init__(self, head: HeadWeights, ranks: Ranks | None = None) -> None:
        self.head = head
        self._sums: ShardSums[str] = ShardSums(ranks or Ranks())
        self._totals: dict[str, Tensor] = {}

    def begin(self, shard: int) -> None:
        """Take what follows for a shard of the calibration batches; they come in order."""
        self._sums.begin(shard)

    def finish(self, vocabulary: int, columns: int, device: torch.device) -> None:
        """Add up what all ranks have noted."""
        moment = torch.Size((columns, columns))
        shapes = {"inputs": moment, "gradients": moment, "squares": torch.Size((vocabulary,))}
        self._totals = self._sums.shared({**shapes, "tokens": torch.Size(())}, device)

    def note(self, passage: Passage, predicting: Callable[[Tensor], Tensor], weight: float) -> None:
        """Add a passage, before its graph is freed.

        Args:
            predicting: selects from logits [batch, sequence, ...] those that predict a token.
            weight: of the squares, where a sample of the tokens stands for all.

        Raises:
            CalibrationError: the model has no head that is applied once.
        """
        tokens = passage.rows.shape[0] * passage.rows.shape[1]
        self._sums.add("tokens", torch.tensor(tokens, dtype=torch.float64))
        if self.head.head is None:
            return
        if passage.scores is None or passage.head_input is None:
            raise CalibrationError("the model does not apply its head once: leave the head out.")
        self._sums.add("inputs", _second_moment(passage.head_input))
        squares = _expected_squares(passage.scores, passage.logits, predicting)
        self._sums.add("squares", weight * squares)

    def note_rows(self, gradient: Tensor) -> None:
        """Add the gradient at the looked-up rows [batch, sequence, d]."""
        self._sums.add("gradients", _second_moment(gradient))

    def sensitivities(self, layout: WeightLayout, tokens: Tensor) -> Sensitivities:
        """Return the sensitivities of the head or the input embedding, after `finish`.

        Raises:
            CalibrationError: a gradient is not finite.
        """
        totals = {name: total.cpu() for name, total in self._totals.items()}
        logits, hessian, moment = (
            total / totals["tokens"]
            for total in (totals["squares"], 2 * totals["inputs"], totals["gradients"])
        )
        if not all(bool(torch.isfinite(mean).all()) for mean in (logits, hessian, moment)):
            raise CalibrationError(
                f"the gradient at {layout.name} is not finite: "
                "check the weights, or save the model as float32 and compress that."
            )
        if layout.name != self.head.embedding:
            return Sensitivities({(layout.name, 0): logits.float()})
        frequencies = lookup_frequencies(tokens, layout.shape[0])
        alpha, addition = (
            tied_sensitivities(logits, frequencies, moment, hessian)
            if self.head.tied
            else lookup_sensitivities(frequencies, moment)
        )
        return Sensitivities({(layout.name, 0): alpha.float()}, {layout.name: addition.float()})


def _second_moment(x: Tensor) -> Tensor:
    """Return the sum over tokens of x x^T [d, d] float64, of x [..., d]."""
    rows = x.detach().reshape(-1, x.shape[-1]).float()
    return (rows.T @ rows).double()


def _expected_squares(
    scores: Tensor, logits: Tensor, predicting: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the sum over tokens of the expected squared gradient [vocabulary] float64 at the
    head's output.

    The next token is drawn from the model's own distribution p: (slope)^2 p (1 - p). Logits are an
    elementwise function of `scores` (softcapping, a scale) with this slope.
    """
    p = torch.softmax(predicting(logits.detach()).float(), dim=-1)
    squares = p - p.square()
    if logits is not scores:
        (slope,) = torch.autograd.grad(logits.sum(), scores, retain_graph=True)
        squares *= predicting(slope).float().square()
    return squares.sum(dim=0).double()
