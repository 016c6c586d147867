"""Calibration block by block: one block at a time is on the device, with its Hessians.

A backbone runs its blocks one after the other on hidden states; its adapter supplies the
computation before the first and after the last one (`Backbone`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cerwu_gpu.calibration.capture import Call, Capture, capture
from cerwu_gpu.calibration.moments import InputMoments
from cerwu_gpu.calibration.products import module_products
from cerwu_gpu.calibration.running import placed
from cerwu_gpu.calibration.shards import TokenBatch, token_batches
from cerwu_gpu.compression.blocks import Block, BlockWeights, InputStatistics, KnownBlock, Matrix
from cerwu_gpu.errors import CalibrationError
from cerwu_gpu.layout import Label, WeightLayout
from cerwu_gpu.progress import counted
from cerwu_gpu.ranks import Ranks


@dataclass(frozen=True)
class Drift:
    """Dependence of a block's calibration inputs on the replaced blocks before it.

    Attributes:
        sequential: each block is fed with the outputs of the replaced blocks before it, instead of
            the original ones.
        corrected: both streams are carried; statistics are of the inputs behind the replaced
            blocks, with their moments against the original ones (InputStatistics.cross).
    """

    sequential: bool = False
    corrected: bool = False


class OuterBlocks:
    """Matrices outside of the blocks (a head, an embedding): none, unless an adapter has some.

    Attributes:
        needs_outputs: whether the last block's output is an input of one of them.
    """

    needs_outputs = False

    def __len__(self) -> int:
        return 0

    def of(self, stream: "Stream", captured: Capture) -> Iterator[Block]:
        """Yield the matrices as blocks; `stream` holds the hidden states after the last block."""
        return iter(())


@dataclass(frozen=True)
class Backbone:
    """A module that runs its blocks one after the other.

    Attributes:
        module: the whole model, in eval mode.
        blocks: names and modules, in the order in which they run.
        layouts: of the weights to compress.
        run: runs the whole module on a batch, int64 [batch, sequence], whatever it returns.
        outer: matrices outside of the blocks.
        single_products: a context in which the module shows the input of every single matrix;
            fused implementations of experts do not.
    """

    module: nn.Module
    blocks: list[tuple[str, nn.Module]]
    layouts: tuple[WeightLayout, ...]
    run: Callable[[Tensor], object]
    outer: OuterBlocks
    single_products: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def home(self) -> torch.device:
        """Device of the module."""
        return next(self.module.parameters()).device

    def weights(self, prefix: str, device: torch.device) -> BlockWeights:
        """Return the chosen weights whose names begin with `prefix`."""
        layouts = [x for x in self.layouts if x.name.startswith(f"{prefix}.")]
        return BlockWeights(self.module, layouts, device)

    def chosen(self) -> list[bool]:
        """Return for each block whether it has a chosen weight."""
        return [bool(self.weights(name, self.home).layouts) for name, _ in self.blocks]

    def capture(self, batches: Sequence[Tensor], device: torch.device) -> Capture:
        """Return the hidden states and arguments that the module passes to its blocks."""
        return capture(self.run, self.blocks, batches, device)


class CalibratedBlock:
    """One block on its device (blocks.Block).

    Its calibration inputs are streamed through once, with the original weights, when matrices,
    statistics or replace is first asked for.
    """

    def __init__(
        self, name: str, module: nn.Module, weights: BlockWeights, stream: "Stream"
    ) -> None:
        self.name = name
        self._module = module
        self._weights = weights
        self._stream = stream
        self._moments = InputMoments(weights.layouts, stream.ranks)
        self._statistics: dict[str, InputStatistics] | None = None
        self._propagated = False

    @property
    def inputs(self) -> dict[Label, str]:
        """Key in `statistics` of each matrix's input."""
        self.statistics()
        return self._moments.keys

    def matrices(self) -> list[Matrix]:
        return self._weights.matrices(self.inputs)

    def statistics(self) -> dict[str, InputStatistics]:
        """Return key -> statistics of that input.

        Raises:
            CalibrationError: an activation is not finite.
        """
        if self._statistics is None:
            with module_products(self._weights, self._moments.add, before=True):
                self._stream.ranks.agree(self._observe)
            self._statistics = self._moments.statistics(self._stream.device)
            self._propagated = True
        return self._statistics

    def _observe(self) -> None:
        self._stream.observe(self._module, self._moments)

    def propagate(self) -> None:
        """Stream the inputs through the block once, without accumulating statistics."""
        if not self._propagated:
            self._observe()
            self._propagated = True

    def known(
        self, inputs: Mapping[Label, str], statistics: dict[str, InputStatistics]
    ) -> KnownBlock:
        """Return this block after `propagate`, with statistics of an earlier run."""
        return KnownBlock(self.name, self._weights, inputs, statistics)

    def replace(self, name: str, part: int, weight: Tensor) -> None:
        self.propagate()
        self._weights.store(name, part, weight)

    def finish(self) -> None:
        """Advance the stream past the block."""
        if not self._propagated:
            self.statistics()
        self._stream.advance(self._module)


class CalibratedBlocks:
    """The blocks in order (blocks.Blocks), then the matrices outside of them.

    The weights change in place as blocks are replaced, so iterate once. One block at a time is on
    `device`, with its Hessians and the calibration activations; the module stays where it is.
    Blocks behind the last chosen weight are not run.
    """

    def __init__(
        self,
        backbone: Backbone,
        tokens: Tensor,
        *,
        device: torch.device | str | None = None,
        batch_size: int = 8,
        drift: Drift | None = None,
        ranks: Ranks | None = None,
        progress: bool = False,
    ) -> None:
        """Take the data; nothing is run yet.

        Args:
            backbone: with its original weights.
            tokens: int64 [samples, sequence], the calibration inputs.
            device: of the work; None: the module's.
            batch_size: samples that run through a block together.
            drift: which inputs a block sees; default: the original ones.
            ranks: share the samples; default: this process has all.
            progress: show a bar over the blocks on stderr.

        Raises:
            CalibrationError: no tokens.
        """
        if tokens.numel() == 0:
            raise CalibrationError("there are no calibration tokens: give a longer text.")
        self._backbone = backbone
        self._ranks = ranks or Ranks()
        self._tokens = tokens.numel()
        self._batches = token_batches(tokens, batch_size, self._ranks)
        self._device = backbone.home if device is None else torch.device(device)
        self._drift = drift or Drift()
        self._progress = progress

    def __len__(self) -> int:
        return len(self._backbone.blocks) + len(self._backbone.outer)

    def __iter__(self) -> Iterator[Block]:
        backbone = self._backbone
        with placed(backbone.blocks[0][1], backbone.home):  # capture runs the first block
            captured = backbone.capture([batch.tokens for batch in self._batches], self._device)
        stream = Stream(
            backbone,
            self._batches,
            self._tokens,
            captured.hidden,
            self._device,
            self._drift,
            self._ranks,
        )
        needed = self._needed()
        with counted(
            len(self), what="blocks", unit="block", shown=self._progress, interval=0
        ) as shown:
            for index, (name, module) in enumerate(backbone.blocks):
                stream.calls = captured.calls[index]
                weights = backbone.weights(name, self._device)
                if index >= needed:
                    yield KnownBlock(name, weights, {}, {})
                else:
                    with placed(module, self._device):
                        block = CalibratedBlock(name, module, weights, stream)
                        yield block
                        if index + 1 < needed or backbone.outer.needs_outputs:
                            block.finish()
                shown.update()
            for outer in backbone.outer.of(stream, captured):
                yield outer
                shown.update()

    def _needed(self) -> int:
        """Return the number of blocks to run: up to the last with a chosen weight, or all."""
        backbone = self._backbone
        if backbone.outer.needs_outputs:
            return len(backbone.blocks)
        return max((i + 1 for i, chosen in enumerate(backbone.chosen()) if chosen), default=0)


class Stream:
    """The calibration activations in front of a block.

    Attributes:
        device: of the activations.
        batches: this rank's batches.
        tokens: number of all ranks' tokens.
        ranks: share the samples.
        hidden: per batch, the original activations [batch, sequence, width], or with
            Drift.sequential those behind the replaced blocks.
        drifted: those behind the replaced blocks, where both are carried.
        calls: batch size -> the arguments of the block.
    """

    def __init__(
        self,
        backbone: Backbone,
        batches: Sequence[TokenBatch],
        tokens: int,
        hidden: list[Tensor],
        device: torch.device,
        drift: Drift,
        ranks: Ranks,
    ) -> None:
        self.device = device
        self.batches = batches
        self.tokens = tokens
        self.ranks = ranks
        self.hidden = hidden
        self.drifted: list[Tensor] | None = list(hidden) if drift.corrected else None
        self.calls: dict[int, Call] = {}
        self._backbone = backbone
        self._sequential = drift.sequential

    def observe(self, block: nn.Module, moments: InputMoments) -> None:
        """Run the block with its original weights on all streams, watched by `moments`.

        Its outputs become the next block's inputs, unless the replaced block computes those.
        """
        for index, (batch, hidden) in enumerate(zip(self.batches, self.hidden, strict=True)):
            moments.begin(batch.shard)
            samples = batch.samples
            if self.drifted is not None:
                with moments.record(samples):
                    output = self._run(block, hidden)
                with moments.forward(samples):
                    self._run(block, self.drifted[index])
            else:
                with moments.forward(samples):
                    output = self._run(block, hidden)
            if not self._sequential:
                self.hidden[index] = output

    def advance(self, block: nn.Module) -> None:
        """Run the replaced block on the streams that depend on it."""
        behind = self.hidden if self._sequential else self.drifted or []
        for index, hidden in enumerate(behind):
            behind[index] = self._run(block, hidden)

    @torch.no_grad()
    def _run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        with self._backbone.single_products():
            return self.calls[hidden.shape[0]].run(block, hidden)
