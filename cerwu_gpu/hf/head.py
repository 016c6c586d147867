r"""The input embedding and the head as matrices [vocabulary, d] to be compressed.

How they count, in the units of design.md 2.3 (cost per token of an error e in row v):

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
`BlocksWithLookups` adds what G changes, kept as LOOKUP among the sensitivities.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cerwu_gpu.blocks import Block, Blocks, InputStatistics
from cerwu_gpu.errors import ModelError
from cerwu_gpu.hf.ends import Ends, output_embeddings
from cerwu_gpu.hf.inputs import InputMoments, Label
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.threads import one_thread

LOOKUP = -1
"""Among sensitivities, (name, LOOKUP) of the input embedding: what is added to its Hessian [d, d]
where the gradients at the looked-up rows are known."""

NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class HeadWeights:
    """Names, as in model.named_parameters(), of the two matrices [vocabulary, d].

    Attributes:
        embedding: the input embedding.
        head: the output embedding; the same name where the two are one parameter.
    """

    embedding: str
    head: str

    @property
    def tied(self) -> bool:
        return self.embedding == self.head

    @property
    def names(self) -> tuple[str, ...]:
        """The distinct parameters, the head first."""
        return (self.head,) if self.tied else (self.head, self.embedding)


def find_head(model: PreTrainedModel) -> HeadWeights:
    """The input embedding and the head.

    Raises:
        ModelError: the model lacks one, or it is no plain nn.Embedding or nn.Linear.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = []
    for module, kind, what in (
        (model.get_input_embeddings(), nn.Embedding, "input embedding"),
        (output_embeddings(model), nn.Linear, "head"),
    ):
        weight: Any = getattr(module, "weight", None)
        if not isinstance(module, kind) or id(weight) not in names:
            raise ModelError(
                f"{type(model).__name__} has no {what} that can be compressed: "
                "leave embeddings and head as they are."
            )
        found.append(names[id(weight)])
    return HeadWeights(*found)


def head_layouts(model: PreTrainedModel) -> list[WeightLayout]:
    """The head and, unless it is the same parameter, the input embedding.

    Raises:
        ModelError: as `find_head`.
    """
    return [
        WeightLayout(name, tuple(model.get_parameter(name).shape), 1, False)
        for name in find_head(model).names
    ]


def head_modules(
    model: PreTrainedModel, layouts: Sequence[WeightLayout]
) -> list[tuple[str, nn.Module]]:
    """The modules that own the head and the embedding, with their names, if `layouts` has them:
    what is treated like further blocks after the last one."""
    chosen = {layout.name for layout in layouts}
    embeddings = (model.get_input_embeddings(), output_embeddings(model))
    owned = {id(parameter) for module in embeddings if module for parameter in module.parameters()}
    if not any(id(model.get_parameter(name)) in owned for name in chosen):
        return []
    owners = [name.rpartition(".")[0] for name in find_head(model).names if name in chosen]
    return [(owner, model.get_submodule(owner)) for owner in owners]


def head_statistics(
    model: PreTrainedModel,
    layout: WeightLayout,
    ends: Ends,
    batches: Sequence[Tensor],
    hidden: Sequence[Tensor],
    drifted: Sequence[Tensor] | None = None,
) -> tuple[dict[Label, str], dict[str, InputStatistics]]:
    """The inputs and statistics of the head or the embedding, as of a block that holds only it.

    Args:
        layout: of the head or the input embedding.
        ends: of the model, on the device of `hidden`.
        batches, hidden: the tokens [batch, sequence] and the last block's output for them.
        drifted: that of the compressed blocks, where both streams are carried.

    Raises:
        CalibrationError: an activation is not finite.
    """
    device = hidden[0].device
    if layout.name != find_head(model).head:
        rows, columns = layout.shape
        hessian = torch.eye(columns, device=device) * (2 / rows)
        count = sum(tokens.numel() for tokens in batches)
        key = layout.key(0)
        return {(layout.name, 0): key}, {key: InputStatistics(hessian, count)}
    moments = InputMoments([layout])
    first = 0
    for index, (tokens, outputs) in enumerate(zip(batches, hidden, strict=True)):
        samples = range(first, first + len(tokens))
        first = samples.stop
        if drifted is not None:
            with moments.record(samples):
                moments.add(layout, 0, ends.head_input(tokens, outputs))
            outputs = drifted[index]
        with moments.forward(samples):
            moments.add(layout, 0, ends.head_input(tokens, outputs))
    return moments.keys, moments.statistics(device)


def lookup_frequencies(tokens: Tensor, vocabulary: int) -> Tensor:
    """f [vocabulary] float64, sum 1: each token's share of `tokens` (int64, any shape) after one
    more occurrence of every token."""
    counts = torch.bincount(tokens.flatten().cpu(), minlength=vocabulary).double() + 1
    return counts / counts.sum()


def lookup_sensitivities(frequencies: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Of an embedding that is only looked up (see above), float64.

    Args:
        frequencies: f [vocabulary].
        moment: G [d, d].

    Returns:
        (a [vocabulary], what is added to the Hessian [d, d]).
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
    """Of a head that is also the input embedding (see above), float64.

    Args:
        logits: alpha [vocabulary].
        frequencies: f [vocabulary].
        moment: G [d, d].
        hessian: H [d, d] of the head's input.

    Returns:
        (a [vocabulary], what is added to the Hessian [d, d]).
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


class BlocksWithLookups:
    """The same blocks, their Hessians with what `sensitivities` holds as LOOKUP added."""

    def __init__(self, blocks: Blocks, sensitivities: Mapping[Label, Tensor]) -> None:
        self._blocks = blocks
        self._additions = {
            name: added for (name, part), added in sensitivities.items() if part == LOOKUP
        }

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Block]:
        for block in self._blocks:
            yield _WithLookups(block, self._additions) if self._additions else block


class _WithLookups:
    """A block (pipeline.Block) with more in its Hessians."""

    def __init__(self, block: Block, additions: Mapping[str, Tensor]) -> None:
        self.name = block.name
        self.matrices = block.matrices
        self.pass_by = block.pass_by
        self.replace = block.replace
        self._block = block
        self._additions = additions

    def statistics(self) -> dict[str, InputStatistics]:
        """Key -> statistics; an input is named after the matrix that sees it first, so that of an
        embedding or head has the parameter's name."""
        statistics = self._block.statistics()
        for name in statistics.keys() & self._additions.keys():
            found = statistics[name]
            added = self._additions[name].to(found.hessian)
            cross = None if found.cross is None else found.cross + added
            joined = InputStatistics(found.hessian + added, found.tokens, cross)
            statistics = {**statistics, name: joined}
        return statistics
