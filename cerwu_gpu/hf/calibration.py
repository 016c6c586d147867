"""The blocks of a transformers model with the statistics of their inputs, one in work at a time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cerwu_gpu.blocks import InputStatistics, Matrix
from cerwu_gpu.errors import CalibrationError
from cerwu_gpu.hf.capture import Call, capture
from cerwu_gpu.hf.ends import Ends, ends_placed
from cerwu_gpu.hf.head import find_head, head_modules, head_statistics
from cerwu_gpu.hf.inputs import InputMoments, Label, observed
from cerwu_gpu.hf.models import check_tokens
from cerwu_gpu.hf.structure import find_blocks
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.progress import counted


class BlockWeights:
    """The chosen weights of one block, as matrices."""

    def __init__(self, prefix: str, block: nn.Module, layouts: Sequence[WeightLayout]) -> None:
        """`layouts` of the whole model: those of other blocks are passed over."""
        self.layouts = tuple(x for x in layouts if x.name.startswith(f"{prefix}."))
        self.modules: dict[str, nn.Module] = {}
        for layout in self.layouts:
            owner = layout.name.removeprefix(f"{prefix}.").rpartition(".")[0]
            self.modules[layout.name] = block.get_submodule(owner)
        self._layout_of = {layout.name: layout for layout in self.layouts}

    def parameter(self, name: str) -> nn.Parameter:
        return self.modules[name].get_parameter(name.rpartition(".")[2])

    def matrices(self, keys: dict[Label, str], device: torch.device) -> list[Matrix]:
        """All matrices, float32 on `device`, copies that later changes do not touch."""
        return [
            Matrix(
                name=layout.name,
                part=part,
                weight=layout.matrix(self.parameter(layout.name).detach(), part).to(
                    device, torch.float32, copy=True
                ),
                input=keys[layout.name, part],
            )
            for layout in self.layouts
            for part in range(layout.parts)
        ]

    def store(self, name: str, part: int, weight: Tensor) -> None:
        self._layout_of[name].store(self.parameter(name), part, weight)


class CalibratedBlock:
    """One block in work on its device (pipeline.Block).

    Its calibration inputs are streamed through once, with the original weights, when matrices,
    statistics or replace is first asked for.
    """

    def __init__(
        self, name: str, module: nn.Module, weights: BlockWeights, stream: "_Stream"
    ) -> None:
        self.name = name
        self._module = module
        self._weights = weights
        self._stream = stream
        self._moments = InputMoments(weights.layouts)
        self._statistics: dict[str, InputStatistics] | None = None
        self._passed = False

    @property
    def inputs(self) -> dict[Label, str]:
        """(parameter name, part) -> key of its input in `statistics`."""
        self.statistics()
        return self._moments.keys

    def matrices(self) -> list[Matrix]:
        return self._weights.matrices(self.inputs, self._stream.device)

    def statistics(self) -> dict[str, InputStatistics]:
        """Key -> statistics of that input.

        Raises:
            CalibrationError: an activation is not finite.
        """
        if self._statistics is None:
            with observed(self._weights.modules, self._weights.layouts, self._moments):
                self._stream.observe(self._module, self._moments)
            self._statistics = self._moments.statistics(self._stream.device)
        return self._statistics

    def pass_by(self) -> None:
        """Stream the inputs through and look at none: what becomes of the block is known."""
        self._stream.observe(self._module, self._moments)
        self._passed = True

    def known(
        self, inputs: dict[Label, str], statistics: dict[str, InputStatistics]
    ) -> "KnownBlock":
        """The same block after `pass_by`, with what was found out earlier."""
        return KnownBlock(self.name, self._weights, inputs, statistics, self._stream.device)

    def replace(self, name: str, part: int, weight: Tensor) -> None:
        if not self._passed:
            self.statistics()
        self._weights.store(name, part, weight)

    def finish(self) -> None:
        """Take the stream past the block."""
        if not self._passed:
            self.statistics()
        self._stream.advance(self._module)


class KnownBlock:
    """One block in work whose statistics are known already (pipeline.Block)."""

    def __init__(
        self,
        name: str,
        weights: BlockWeights,
        inputs: dict[Label, str],
        statistics: dict[str, InputStatistics],
        device: torch.device,
    ) -> None:
        self.name = name
        self.inputs = inputs
        self._weights = weights
        self._statistics = statistics
        self._device = device

    def matrices(self) -> list[Matrix]:
        return self._weights.matrices(self.inputs, self._device)

    def statistics(self) -> dict[str, InputStatistics]:
        return self._statistics

    def pass_by(self) -> None:
        """Nothing is streamed through it."""

    def replace(self, name: str, part: int, weight: Tensor) -> None:
        self._weights.store(name, part, weight)


class CalibratedBlocks:
    """The model's blocks in order (pipeline.Blocks), then, where `layouts` has them, the head and
    the input embedding as a block each (head.py).

    The model's weights change in place as blocks are replaced, so iterate once. One block at a
    time is on `device`, with its Hessians and the calibration activations; the model stays where
    it is. Blocks behind the last chosen weight are not run.
    """

    from_cache = False

    def __init__(
        self,
        model: PreTrainedModel,
        layouts: Sequence[WeightLayout],
        tokens: Tensor,
        *,
        device: torch.device | str | None = None,
        batch_size: int = 8,
        sequential: bool = False,
        correct_drift: bool = False,
        progress: bool = False,
    ) -> None:
        """Prepare; nothing is run yet.

        Args:
            model: put into eval mode.
            layouts: the weights to compress (structure.find_weights).
            tokens: int64 [samples, sequence], the calibration text.
            device: where blocks are worked on; None: where the model is.
            batch_size: samples that run through a block together.
            sequential: feed each block with the outputs of the replaced blocks before it, instead
                of the original ones.
            correct_drift: carry both streams; statistics are of the inputs behind the replaced
                blocks, with their moments against the original ones (InputStatistics.cross).
            progress: show a bar over the blocks on stderr.

        Raises:
            CalibrationError: no tokens.
            ModelError: the model has no blocks, or no embedding for the tokens.
        """
        if tokens.numel() == 0:
            raise CalibrationError("there are no calibration tokens: give a longer text.")
        check_tokens(model, tokens, tokens.shape[1])
        self._model = model.train(False)
        self._layouts = tuple(layouts)
        self._blocks = find_blocks(model)
        self._heads = head_modules(model, layouts)
        self._batches = torch.split(tokens, batch_size)
        self._device = model.device if device is None else torch.device(device)
        self._sequential = sequential
        self._correct_drift = correct_drift
        self._progress = progress

    def __len__(self) -> int:
        return len(self._blocks) + len(self._heads)

    def __iter__(self) -> Iterator[CalibratedBlock | KnownBlock]:
        captured = capture(self._model, self._blocks, self._batches, self._device)
        stream = _Stream(self._model, captured.hidden, self._device, self._sequential)
        if self._correct_drift:
            stream.drifted = list(stream.hidden)
        needed = self._needed()
        with counted(
            len(self), what="blocks", unit="block", shown=self._progress, every=0
        ) as shown:
            for index, (name, module) in enumerate(self._blocks):
                stream.calls = captured.calls[index]
                weights = BlockWeights(name, module, self._layouts)
                if index >= needed:
                    yield KnownBlock(name, weights, {}, {}, self._device)
                else:
                    with placed(module, self._device):
                        block = CalibratedBlock(name, module, weights, stream)
                        yield block
                        if index + 1 < needed or self._needs_outputs:
                            block.finish()
                shown.update()
            for head in self._after_blocks(Ends(self._model, self._blocks, captured.wrap), stream):
                yield head
                shown.update()

    @property
    def _needs_outputs(self) -> bool:
        """Whether the head is chosen, so that what the last block gives is looked at."""
        owners = {name for name, _ in self._heads}
        return bool(owners) and find_head(self._model).head.rpartition(".")[0] in owners

    def _needed(self) -> int:
        """How many blocks have to run: up to the last one with a chosen weight, or all of them."""
        if self._needs_outputs:
            return len(self._blocks)
        chosen = [bool(BlockWeights(*block, self._layouts).layouts) for block in self._blocks]
        return max((index + 1 for index, some in enumerate(chosen) if some), default=0)

    def _after_blocks(self, ends: Ends, stream: "_Stream") -> Iterator[KnownBlock]:
        """The head and the input embedding, with their module on the device."""
        for name, module in self._heads:
            weights = BlockWeights(name, module, self._layouts)
            with ends_placed(self._model, self._blocks, self._device):
                inputs, statistics = head_statistics(
                    self._model,
                    weights.layouts[0],
                    ends,
                    self._batches,
                    stream.hidden,
                    stream.drifted,
                )
            with placed(module, self._device):
                yield KnownBlock(name, weights, inputs, statistics, self._device)


class _Stream:
    """The calibration activations in front of the block in work."""

    def __init__(
        self, model: PreTrainedModel, hidden: list[Tensor], device: torch.device, sequential: bool
    ) -> None:
        self.device = device
        self.calls: dict[int, Call] = {}
        self._model = model
        self.hidden = hidden
        self.drifted: list[Tensor] | None = None
        self._sequential = sequential

    def observe(self, block: nn.Module, moments: InputMoments) -> None:
        """Run the block with its original weights; unless the replaced block is to give them,
        its outputs are the next block's inputs. With drift, run it on both streams."""
        first = 0
        for index, hidden in enumerate(self.hidden):
            samples = range(first, first + hidden.shape[0])
            first = samples.stop
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
        """Put the activations in front of the next block."""
        behind = self.hidden if self._sequential else self.drifted or []
        for index, hidden in enumerate(behind):
            behind[index] = self._run(block, hidden)

    @torch.no_grad()
    def _run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        with eager_experts(self._model):
            return self.calls[hidden.shape[0]].run(block, hidden)


@contextmanager
def eager_experts(model: PreTrainedModel) -> Iterator[None]:
    """Fused implementations of experts never show one expert's input."""
    before = getattr(model.config, "_experts_implementation", None)
    if before in (None, "eager"):
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


@contextmanager
def placed(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Have the module on `device` for a while."""
    home = next(module.parameters()).device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)
