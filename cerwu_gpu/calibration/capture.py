"""Hidden states and arguments that a model passes to its blocks, recorded without running them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cerwu_gpu.calibration.running import moved
from cerwu_gpu.errors import CalibrationError


@dataclass(frozen=True)
class Call:
    """The arguments of one block besides the hidden states: masks, positions, settings."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Return the block's output [batch, sequence, width], with everything moved to `hidden`'s
        device."""
        arguments = moved(self.arguments, hidden.device)
        output = block(hidden, *arguments, **moved(self.keywords, hidden.device))
        return first_output(output)


@dataclass
class Capture:
    """The calibration stream in front of the first block.

    Attributes:
        hidden: per batch, the first block's input [batch, sequence, width], on the device of work.
        calls: calls[block][batch size] are the arguments of that block.
        wrap: turns hidden states into a block's output: a tensor, or a tuple that begins with it.
    """

    hidden: list[Tensor] = field(default_factory=list)
    calls: list[dict[int, Call]] = field(default_factory=list)
    wrap: Callable[[Tensor], Any] = lambda hidden: hidden


def first_output(output: Any) -> Tensor:
    """Return the hidden states in a block's output: a tensor, or a sequence that begins with it."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
    return hidden


@torch.no_grad()
def capture(
    run: Callable[[Tensor], object],
    blocks: Sequence[tuple[str, nn.Module]],
    batches: Sequence[Tensor],
    device: torch.device,
) -> Capture:
    """Send `batches` (int64 [batch, sequence] each) through everything but the blocks.

    Args:
        run: runs the model on a batch.
        blocks: names and modules, in order.
        batches: the calibration inputs.
        device: of the captured hidden states.

    Each block's forward is replaced meanwhile by one that records its arguments and returns its
    input. That is cheap whatever the model's size, and checks that the blocks can be run one by
    one: the model must pass the hidden states from block to block untouched, with arguments that
    depend on nothing but the batch size.

    Raises:
        CalibrationError: they cannot; the message names the block.
    """
    recorder = _Recorder([name for name, _ in blocks], Capture(calls=[{} for _ in blocks]))
    modules = [block for _, block in blocks]
    stand_ins = [recorder.stand_in(index, block.forward) for index, block in enumerate(modules)]
    with replaced(modules, stand_ins):
        for tokens in batches:
            recorder.start()
            run(tokens)
            recorder.finish(device)
    for tokens, hidden in zip(batches, recorder.captured.hidden, strict=True):
        if len(hidden) != len(tokens):  # XLNet's are [sequence, batch, width]
            raise CalibrationError(
                f"{blocks[0][0]} is given hidden states whose first axis is not the samples: the "
                "model's architecture is not supported."
            )
    return recorder.captured


def first_input(
    run: Callable[[Tensor], object],
    blocks: Sequence[tuple[str, nn.Module]],
    wrap: Callable[[Tensor], Any],
    batch: Tensor,
) -> Tensor:
    """Return the first block's input for a batch, with its graph where gradients are on.

    Args:
        run, blocks: as of `capture`.
        wrap: turns hidden states into a block's output (Capture).
        batch: int64 [batch, sequence].
    """
    inputs: list[Tensor] = []

    def stand_in(*arguments: Any, **keywords: Any) -> Any:
        hidden = split(arguments, keywords)[0]
        inputs.append(hidden)
        return wrap(hidden)

    modules = [block for _, block in blocks]
    with replaced(modules, [stand_in] * len(modules)):
        run(batch)
    return inputs[0]


@contextmanager
def replaced(
    modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]
) -> Iterator[None]:
    """Replace the forward of each module inside the context."""
    before = [module.__dict__.get("forward") for module in modules]
    for module, stand_in in zip(modules, forwards, strict=True):
        module.forward = stand_in
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                del module.forward
            else:
                module.forward = forward


class _Recorder:
    def __init__(self, names: list[str], captured: Capture) -> None:
        self.names = names
        self.captured = captured
        self._inputs: list[Tensor] = []
        self._real_run = False

    def start(self) -> None:
        self._inputs = []

    def finish(self, device: torch.device) -> None:
        if len(self._inputs) != len(self.names):
            raise CalibrationError(
                f"the model ran {len(self._inputs)} of its {len(self.names)} blocks: "
                "its architecture is not supported."
            )
        self.captured.hidden.append(self._inputs[0].to(device))

    def stand_in(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def record(*arguments: Any, **keywords: Any) -> Any:
            hidden, call = split(arguments, keywords)
            self._check_order(index, hidden)
            self._inputs.append(hidden)
            self._note(index, hidden.shape[0], call)
            if not self._real_run:
                # One real run shows whether a block returns a tensor or a tuple around it.
                self.captured.wrap = _wrapping(forward(*arguments, **keywords))
                self._real_run = True
            return self.captured.wrap(hidden)

        return record

    def _check_order(self, index: int, hidden: Tensor) -> None:
        if index != len(self._inputs) or (index and hidden is not self._inputs[-1]):
            raise CalibrationError(
                f"the model changes the hidden states before {self.names[index]} or does not run "
                "its blocks in order: its architecture is not supported."
            )

    def _note(self, index: int, batch: int, call: Call) -> None:
        known = self.captured.calls[index].setdefault(batch, call)
        if known is not call and not _same(
            (known.arguments, known.keywords), (call.arguments, call.keywords)
        ):
            raise CalibrationError(
                f"{self.names[index]} is given arguments that depend on the text: "
                "the model's architecture is not supported."
            )


def split(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Tensor, Call]:
    """Return the hidden states among a block's arguments, and the other ones."""
    if arguments:
        return arguments[0], Call(arguments[1:], keywords)
    rest = {name: value for name, value in keywords.items() if name != "hidden_states"}
    return keywords["hidden_states"], Call((), rest)


def _wrapping(output: Any) -> Callable[[Tensor], Any]:
    if not isinstance(output, tuple | list):
        return lambda hidden: hidden
    kind, rest = list if isinstance(output, list) else tuple, output[1:]
    return lambda hidden: kind((hidden, *rest))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return a is b or bool(a == b)
