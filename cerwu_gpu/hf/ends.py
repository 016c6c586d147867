"""Forward passes through a model without its blocks: embedding, final norm, head."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from cerwu_gpu.calibration.capture import replaced, split
from cerwu_gpu.errors import CalibrationError


@dataclass(frozen=True)
class Passage:
    """One forward pass without the blocks, with its autograd graph.

    Attributes:
        rows: the looked-up rows of the input embedding [batch, sequence, d], a leaf.
        first: the first block's input [batch, sequence, width], computed from `rows`.
        last: the last block's output [batch, sequence, width], a leaf.
        head_input, scores: the head's input [batch, sequence, d], computed from `last`, and its
            output [batch, sequence, vocabulary]; None where it has no module of its own or was not
            applied once.
        logits: [batch, sequence, vocabulary], computed from `scores`; of a model without a
            head its last hidden states.
    """

    rows: Tensor
    first: Tensor
    last: Tensor
    head_input: Tensor | None
    scores: Tensor | None
    logits: Tensor


class Ends:
    """All of a model but its blocks.

    While the model runs, its blocks are replaced by stand-ins: the first one takes what the model
    gives it, the last one hands out the hidden states that are given here.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[tuple[str, nn.Module]],
        wrap: Callable[[Tensor], Any],
        inputs: Callable[[Tensor], Tensor],
        options: Mapping[str, Any],
    ) -> None:
        """Take the model; nothing is run yet.

        Args:
            wrap: turns hidden states into what a block returns (capture.Capture).
            inputs: returns the model's input ids for tokens, int64 [batch, sequence].
            options: arguments of a run besides the tokens.
        """
        self._model = model
        self._blocks = [block for _, block in blocks]
        self._wrap = wrap
        self._inputs = inputs
        self._options = options

    @torch.no_grad()
    def head_input(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return the head's input [batch, sequence, d] after the blocks gave `hidden`; no logits
        are computed.

        Raises:
            CalibrationError: the model does not apply its head once.
        """
        head = output_embeddings(self._model)
        assert head is not None, "head.find_head finds it"
        inputs: list[Tensor] = []

        def forward(x: Tensor) -> Tensor:
            inputs.append(x)
            return x.new_zeros((*x.shape[:-1], 1))

        with replaced([head], [forward]):
            self._run(tokens, hidden)
        if len(inputs) != 1:
            raise CalibrationError(
                f"the model applied its head {len(inputs)} times instead of once: leave it out."
            )
        return inputs[0]

    def logits(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits [batch, sequence, vocabulary] after the blocks gave `hidden`."""
        return self._run(tokens, hidden)[1]

    def passage(self, tokens: Tensor, hidden: Tensor) -> Passage:
        """Run the ends for `tokens` [batch, sequence] with the blocks' output `hidden`.

        Raises:
            CalibrationError: the model does not look its tokens up in its input embedding.
        """
        embedding: Any = self._model.get_input_embeddings().weight
        last = hidden.detach().requires_grad_()
        lookup = _Lookup(embedding)
        with torch.enable_grad(), lookup, self._head_noted() as noted:
            first, logits = self._run(tokens, last)
        if lookup.rows is None:
            raise CalibrationError(
                "the model does not look its tokens up in its input embedding: "
                "its architecture is not supported."
            )
        head_input, scores = noted[0] if len(noted) == 1 else (None, None)
        return Passage(lookup.rows, first, last, head_input, scores, logits)

    def _run(self, tokens: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """Return (the first block's input, the logits) with `last` for the last block's output."""
        firsts: list[Tensor] = []

        def stand_in(index: int) -> Callable[..., Any]:
            def forward(*arguments: Any, **keywords: Any) -> Any:
                hidden = split(arguments, keywords)[0]
                if index == 0:
                    firsts.append(hidden)
                final = index == len(self._blocks) - 1
                return self._wrap(last.to(hidden.device) if final else hidden)

            return forward

        with replaced(self._blocks, [stand_in(index) for index in range(len(self._blocks))]):
            ids = self._inputs(tokens).to(self._model.device)
            output = self._model(input_ids=ids, **self._options)
        return firsts[0], logits_or_states(output)

    @contextmanager
    def _head_noted(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yield a list that receives (input, output) of every call of the head."""
        noted: list[tuple[Tensor, Tensor]] = []
        head = output_embeddings(self._model)
        if head is None:
            yield noted
            return
        handle = head.register_forward_hook(
            lambda _, inputs, output: noted.append((inputs[0], output))
        )
        try:
            yield noted
        finally:
            handle.remove()


def logits_or_states(output: Any) -> Tensor:
    """Return the logits in a model's output; of a model without a head its last hidden states."""
    logits: Tensor | None = getattr(output, "logits", None)
    result: Tensor = output[0] if logits is None else logits
    return result


def output_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """Return the module of the head; None where there is none."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return head


class _Lookup(TorchFunctionMode):
    """A mode that makes the rows looked up in one embedding a leaf of the graph.

    A hook on the module would see them scaled where the module also scales (Gemma 3).
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.rows: Tensor | None = None
        self._weight = weight

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is functional.embedding and args[1] is self._weight:
            self.rows = output.detach().requires_grad_()
            output = self.rows.clone()  # CTRL scales it in place
        return output


@contextmanager
def ends_placed(
    model: PreTrainedModel, blocks: Sequence[tuple[str, nn.Module]], device: torch.device
) -> Iterator[None]:
    """Keep all of the model but its blocks on `device` inside the context."""
    with ExitStack() as stack:
        for module in _outside(model, {id(block) for _, block in blocks}):
            home = _home(module)
            if home is not None and home != device:
                stack.callback(module.to, home)
                module.to(device)
        yield


def _outside(module: nn.Module, blocks: set[int]) -> Iterator[nn.Module]:
    """Yield the largest modules that hold no block and lie in none."""
    for child in module.children():
        if id(child) in blocks:
            continue
        if any(id(inner) in blocks for inner in child.modules()):
            yield from _outside(child, blocks)
        else:
            yield child


def _home(module: nn.Module) -> torch.device | None:
    """Return the module's device; None where it holds no tensors."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return None
