"""Language models whose blocks stay on disk: a block has its weights only while it is placed.

transformers builds the model and reads everything but the matrices of the blocks. Those stay on the
meta device; where a block is due (calibration.running.placed) they are read from the safetensors
shards or the .gguf file, by transformers' own conversion, which renames tensors and joins experts,
and let go afterwards. Tensors that need no conversion are views of the mapped file, which the
system may drop and read again. After a pass the quantized weights come from its journal, decoded.

The conversion is `PreTrainedModel._load_pretrained_model`, taken when transformers calls it, with
everything that it was given.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import swap_tensors
from transformers import PreTrainedModel
from transformers.utils import logging

from cerwu_gpu.calibration.capture import replaced
from cerwu_gpu.calibration.running import attach_source, placed
from cerwu_gpu.checkpoint.gguf import tensors_in_file
from cerwu_gpu.checkpoint.tensors import (
    Checkpoint,
    Entries,
    GgufCheckpoint,
    SafetensorsCheckpoint,
)
from cerwu_gpu.container.journal import Journal
from cerwu_gpu.errors import ModelError
from cerwu_gpu.files import checksum
from cerwu_gpu.hf.models import is_conv1d
from cerwu_gpu.memory import give_back
from cerwu_gpu.models.selection import find_blocks

Conversion = Callable[..., Any]
"""PreTrainedModel._load_pretrained_model of (model, entries, files, settings)."""

OUTSIDE = -1
"""Number of no block."""
NO_SAFETENSORS = "its weights are in no safetensors files"
WHOLE_GGUF = "transformers decodes a .gguf file of this architecture by itself"
BLOCKS_FIRST = "a block has its first parameter, which tells the device of a model"
"""Reasons to read a model whole."""
HOME = torch.device("cpu")
"""Device of what stays in memory."""


class WeightsOnDisk:
    """The matrices of a model's blocks, read when a block is placed (running.WeightSource).

    A model's other parameters and its buffers stay in memory, and so do the vectors of its blocks
    (norms, biases), which a distillation tunes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        blocks: Sequence[tuple[str, nn.Module]],
        names: Mapping[str, int],
        checkpoint: Checkpoint,
        convert: Conversion,
        settings: Any,
    ) -> None:
        """Take a model on the meta device; nothing is read yet.

        Args:
            blocks: names and modules of the blocks.
            names: parameter -> number of its block, of the parameters that stay on disk.
            checkpoint: its tensors.
            convert: reads tensors into a model, with these `settings`.
        """
        self._model = model
        self._blocks = {id(block): index for index, (_, block) in enumerate(blocks)}
        self._modules = [block for _, block in blocks]
        self._names = names
        self._checkpoint = checkpoint
        self._convert = convert
        self._settings = settings
        self._outline = deepcopy(model)
        self._present: dict[int, int] = {}  # number of uses of each block that is placed
        self._journal: Journal | None = None
        self._digests: dict[str, str] = {}

    # Reading.

    def load(self) -> Any:
        """Read what stays in memory; return what the conversion returns (its report first)."""
        with self._checkpoint.outer() as entries:
            result = self._convert(self._model, dict(entries), None, self._settings)
        report = result[0]
        read = self._kept_on_disk(report)
        report.missing_keys -= read
        for name in read:
            # Otherwise transformers initialises it at random.
            self._model.get_parameter(name)._is_hf_initialized = True  # type: ignore[attr-defined]
        return result

    def _kept_on_disk(self, report: Any) -> set[str]:
        """Return the parameters on disk that can be read; add to `report` what is wrong with
        others."""
        read: set[str] = set()
        for index in range(len(self._modules)):
            names = self._of_block(index)
            values = self._checkpoint.direct(names)
            if self._checkpoint.converts(index):
                values |= self._converted(index, names, report)
            for name, value in values.items():
                shape = self._model.get_parameter(name).shape
                if value.shape != shape:
                    report.mismatched_keys.add((name, value.shape, shape))
                self._put(name, torch.empty(shape, dtype=value.dtype, device="meta"))
            read |= values.keys()
        return read

    def _of_block(self, index: int) -> list[str]:
        return [name for name, number in self._names.items() if number == index]

    def _read(self, index: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Return original values of parameters of a block, each in memory of its own."""
        values = self._checkpoint.direct(names)
        if len(values) < len(names):
            values |= self._converted(index, [name for name in names if name not in values])
        return values

    def _converted(self, index: int, names: Sequence[str], report: Any = None) -> dict[str, Tensor]:
        """Return those of the parameters of a block that its conversion gives.

        Args:
            report: receives its problems.

        Raises:
            ModelError: it has problems, and there is no report.
        """
        mapping = deepcopy(self._settings.weight_mapping)
        trial = report is not None
        places = {"": "meta"} if trial else None  # a trial computes nothing
        settings = replace(self._settings, device_map=places, weight_mapping=mapping)
        with self._checkpoint.block(index, trial=trial) as entries:
            result, parameters = self._in_outline(entries, settings)
        values = {name: parameters[name] for name in names if name not in result.missing_keys}
        problems = (*result.mismatched_keys, *result.conversion_errors, *result.error_msgs)
        if report is not None:
            report.mismatched_keys |= result.mismatched_keys
            report.conversion_errors |= result.conversion_errors
            report.error_msgs += result.error_msgs
        elif problems:
            raise ModelError(
                f"block {index} cannot be read again ({problems[0]}): fetch the model."
            )
        return values

    def _in_outline(self, entries: Entries, settings: Any) -> tuple[Any, dict[str, Tensor]]:
        """Return the conversion's report and all parameters, those that it gave with values."""
        outline = self._outline
        with _quiet():
            report = self._convert(outline, dict(entries), None, settings)[0]
        parameters = {name: parameter.detach() for name, parameter in outline.named_parameters()}
        for name, parameter in parameters.items():
            if name not in report.missing_keys:
                owner, _, last = name.rpartition(".")
                empty = nn.Parameter(torch.empty_like(parameter, device="meta"), False)
                setattr(outline.get_submodule(owner), last, empty)
        return report, parameters

    # WeightSource.

    @contextmanager
    def placed(self, module: nn.Module, device: torch.device) -> Iterator[None]:
        index = self._blocks[id(module)]
        if self._present.get(index, 0):
            self._present[index] += 1
            try:
                yield
            finally:
                self._present[index] -= 1
            return
        with torch.inference_mode(False):
            versions = self._fill(index, device)
        _move(module, device)
        self._present[index] = 1
        try:
            yield
        finally:
            self._present[index] = 0
            with torch.inference_mode(False):
                self._let_go(versions)
            _move(module, HOME)
            give_back()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        index: int | None = None
        values: dict[str, Tensor] = {}
        for name, tensor in self._model.state_dict().items():
            if name not in self._names:
                yield name, tensor
                continue
            if self._names[name] != index:
                values.clear()
                index = self._names[name]
                values = self._read(index, self._of_block(index))
            yield name, values[name]

    def _fill(self, index: int, device: torch.device) -> dict[str, int]:
        """Put a block's weights in place; return their versions, which a change increases."""
        names = self._of_block(index)
        values: dict[str, Tensor] = {}
        if self._journal is not None and self._journal.holds(index):
            values = dict(self._journal.weights(index))
        values |= self._read(index, [name for name in names if name not in values])
        versions = {}
        for name in names:
            self._put(name, values.pop(name).to(device))
            versions[name] = self._model.get_parameter(name)._version
        return versions

    def _let_go(self, versions: Mapping[str, int]) -> None:
        """Take a block's weights away, but keep the digests of those that were replaced."""
        for name, version in versions.items():
            parameter = self._model.get_parameter(name)
            if parameter._version != version:
                self._digests[name] = checksum(parameter)
            self._put(name, torch.empty_like(parameter, device="meta"))

    def _put(self, name: str, value: Tensor) -> None:
        """Give a parameter new values; it stays the same object for all that know it."""
        parameter = self._model.get_parameter(name)
        swap: Any = swap_tensors
        swap(parameter, nn.Parameter(value, parameter.requires_grad))

    # Passes.

    def restore(self) -> None:
        """Take original weights from now on, and put them into what stays in memory."""
        if self._journal is None and not self._digests:
            return
        self._journal = None
        self._digests.clear()
        with self._checkpoint.outer() as entries:
            report, values = self._in_outline(entries, self._settings)
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            if name not in self._names and name not in report.missing_keys:
                parameter.data = values[name].to(parameter.device)

    def quantized(self, journal: Journal) -> None:
        """Take the quantized weights of blocks from a journal from now on."""
        self._journal = journal

    def value(self, name: str) -> Tensor | None:
        """Return the original values of a parameter on disk; None for any other one."""
        index = self._names.get(name)
        return None if index is None else self._read(index, [name])[name]

    def replaced(self, name: str) -> str | None:
        """Return the SHA-256 of the weight that replaced a parameter on disk; None where that is in
        memory, or was not replaced."""
        return self._digests.get(name)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Make the whole model run inside the context: each block is placed for its own run."""
        home = self._model.device

        def as_placed(block: nn.Module) -> Callable[..., Any]:
            forward = block.forward

            def run(*arguments: Any, **keywords: Any) -> Any:
                with placed(block, home):
                    return forward(*arguments, **keywords)

            return run

        with replaced(self._modules, [as_placed(block) for block in self._modules]):
            yield


def _move(module: nn.Module, device: torch.device) -> None:
    """Move all but meta tensors to a device."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta and tensor.device != device:
            tensor.data = tensor.data.to(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide transformers' progress bars inside the context."""
    bars: Any = logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


@contextmanager
def blocks_on_disk() -> Iterator[list[str]]:
    """Make transformers leave the blocks of a language model on disk inside the context.

    The model's blocks get a source (running.weight_source). The list receives the reason where a
    model is read whole instead.
    """
    base: Any = PreTrainedModel
    convert = base.__dict__["_load_pretrained_model"]
    reasons: list[str] = []
    with tensors_in_file() as gguf:

        def load(
            model: PreTrainedModel,
            entries: Any,
            files: Any,
            settings: Any,
            *rest: Any,
            **options: Any,
        ) -> Any:
            whole = convert.__func__
            streamable = entries is None and _are_safetensors(files)
            if not streamable and not gguf:
                reasons.append(WHOLE_GGUF if entries is not None else NO_SAFETENSORS)
                return whole(model, entries, files, settings, *rest, **options)
            try:
                blocks = find_blocks(model, is_conv1d)
            except ModelError:  # CausalLM has the sentence for it
                blocks = []
            names = _matrices(model, blocks)
            first = next(name for name, _ in model.named_parameters())
            if first in names:
                reasons.append(BLOCKS_FIRST)
            if first in names or not blocks:
                entries = gguf[-1].all() if gguf else entries
                return whole(model, entries, files, settings, *rest, **options)
            checkpoint: Checkpoint
            if gguf:
                checkpoint = GgufCheckpoint(gguf[-1])
            else:
                checkpoint = SafetensorsCheckpoint(
                    [Path(file) for file in files], model, settings, names
                )
            source = WeightsOnDisk(model, blocks, names, checkpoint, whole, settings)
            result = source.load()
            for module in (model, *(block for _, block in blocks)):
                attach_source(module, source)
            return result

        base._load_pretrained_model = staticmethod(load)
        try:
            yield reasons
        finally:
            base._load_pretrained_model = convert


def _are_safetensors(files: Any) -> bool:
    return bool(files) and all(str(file).endswith(".safetensors") for file in files)


def _matrices(model: PreTrainedModel, blocks: Sequence[tuple[str, nn.Module]]) -> dict[str, int]:
    """Return the blocks' parameters of two axes or more that nothing outside shares, with the
    number of their block."""
    places: dict[int, set[int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        inside = (i for i, (block, _) in enumerate(blocks) if name.startswith(f"{block}."))
        places.setdefault(id(parameter), set()).add(next(inside, OUTSIDE))
    return {
        name: min(places[id(parameter)])
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
        and len(places[id(parameter)]) == 1
        and OUTSIDE not in places[id(parameter)]
    }
