"""Run a model whose blocks stay compressed in memory.

Every weight in a transformer block is held as the words of its streams; a block is decoded when it
runs and taken out of the model when it has run. On a CPU the next block is decoded into its memory;
on a GPU the next block is decoded on a stream of its own while this one computes. What lies outside
the blocks (embeddings, head, norms) is dense, in its stored dtype: the head's matrix product needs
all of it at once, and the embedding is mostly tied to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cerwu_gpu.container.reader import CompressedDirectory, StoredWeight, decode_stored
from cerwu_gpu.errors import ModelError

REMEDY = "load it dense (without resident), or write a dense copy with cerwu_gpu.decompress."


@dataclass(frozen=True)
class Slot:
    """The place of a compressed weight while its block runs: attribute `name` of `module`.

    Attributes:
        stored: the weight as it stays in memory.
        resting: parameter without data (device meta) that the module holds otherwise.
    """

    module: nn.Module
    name: str
    stored: StoredWeight
    resting: nn.Parameter


class Memory:
    """Decoded weights of a block that has run, for the next block to write over.

    A copy or a pickle of it is empty. Fresh memory costs a fifth of the decoder's time on a CPU,
    where the system clears each page. On a GPU torch's own allocator does the same.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._stream: torch.cuda.Stream | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_free": [], "_stream": None}

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """Return the stream of a GPU on which blocks are decoded ahead."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self._stream

    def take(self, stored: StoredWeight) -> Tensor:
        """Return memory for a weight, reused from one that has run if shape and dtype fit."""
        layout = torch.Size(stored.entry.shape), getattr(torch, stored.entry.dtype)
        for place, tensor in enumerate(self._free):
            # Tensors made in inference mode can be read and written in inference mode only.
            usable = torch.is_inference_mode_enabled() or not tensor.is_inference()
            if usable and (tensor.shape, tensor.dtype) == layout:
                return self._free.pop(place)
        return stored.empty()

    def keep(self, weights: Sequence[Tensor]) -> None:
        """Replace the reusable weights by these, which nobody reads any more."""
        self._free = list(weights)


class ResidentBlock:
    """One block's compressed weights, and the hooks that decode them around its forward.

    Args:
        slots: all of the block's compressed weights, on one device.
        dtype: cast what is decoded; None keeps the stored dtypes.
        memory: of all blocks.
    """

    def __init__(self, slots: tuple[Slot, ...], dtype: torch.dtype | None, memory: Memory) -> None:
        self._slots = slots
        self._dtype = dtype
        self._memory = memory
        self._reusable: list[Tensor] = []
        self._ahead: tuple[list[Tensor], torch.cuda.Event] | None = None
        self.following: ResidentBlock | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_reusable": [], "_ahead": None}

    # The hooks are methods, so that in a copy of the model they are those of the copy.

    def before(self, *_: Any) -> None:
        """Fill the modules, before the block runs."""
        self.fill()

    def after(self, *_: Any) -> None:
        """Empty the modules, and let the next block be decoded while this one's work, which is
        queued on the GPU by now, is done."""
        self.empty()
        device = self._slots[0].stored.matrices[0].coded.words.device
        if device.type == "cuda" and self.following is not None:
            self.following.decode_ahead(self._memory.stream(device))

    def decode_ahead(self, stream: torch.cuda.Stream) -> None:
        """Decode on `stream` while the current stream computes."""
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            weights = self._decoded()
            self._ahead = weights, stream.record_event()

    def fill(self) -> None:
        """Put the decoded weights into the modules.

        Raises:
            CorruptionError: what is in memory has changed.
        """
        if self._ahead is None:
            weights = self._decoded()
        else:
            weights, decoded = self._ahead
            self._ahead = None
            here = torch.cuda.current_stream(weights[0].device)
            here.wait_event(decoded)
            for weight in weights:
                weight.record_stream(here)  # else its memory might be given away while it is used
        for slot, weight in zip(self._slots, weights, strict=True):
            slot.module._parameters[slot.name] = nn.Parameter(weight, requires_grad=False)

    def empty(self) -> None:
        """Take the decoded weights out of the modules."""
        for slot in self._slots:
            slot.module._parameters[slot.name] = slot.resting
        self._memory.keep(self._reusable)
        self._reusable = []

    def _decoded(self) -> list[Tensor]:
        batch = [slot.stored for slot in self._slots]
        on_cpu = batch[0].matrices[0].coded.words.device.type == "cpu"
        memory = [self._memory.take(stored) for stored in batch] if on_cpu else None
        weights = dict(decode_stored(batch, memory))
        # With gradients, the graph of what was computed still reads the weights later.
        if on_cpu and not torch.is_grad_enabled():
            self._reusable = list(weights.values())
        return [weights[stored.name].to(self._dtype) for stored in batch]


def stored_in_blocks(
    directory: CompressedDirectory, blocks: list[str], device: torch.device, verify: bool
) -> dict[str, StoredWeight]:
    """Return the compressed weights whose names lie in `blocks` (prefixes), read into memory.

    Raises:
        CorruptionError: a checksum is wrong (with `verify`).
    """
    prefixes = tuple(f"{block}." for block in blocks)
    names = [name for name in directory.compressed() if name.startswith(prefixes)]
    read = directory.all_stored(names, device=device, verify=verify)
    return {stored.name: owned(stored) for stored in read}


def owned(stored: StoredWeight) -> StoredWeight:
    """Return a copy in memory: on the CPU, words that were read are a view of the file, which may
    not stay as it is."""
    matrices = tuple(
        replace(x, coded=replace(x.coded, words=x.coded.words.clone())) for x in stored.matrices
    )
    return replace(stored, matrices=matrices)


def placeholder(stored: StoredWeight, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor of the weight's shape and dtype on the CPU that holds one number only."""
    kind = dtype or getattr(torch, stored.entry.dtype)
    return torch.zeros((), dtype=kind).expand(stored.entry.shape)


def keep_compressed(
    model: PreTrainedModel,
    blocks: list[tuple[str, nn.Module]],
    stored: Mapping[str, StoredWeight],
    dtype: torch.dtype | None,
) -> None:
    """Put compressed weights into the blocks of `model`, in the place of the dense ones.

    The model can then be run (forward, generate) but not be saved, moved, cast or trained.

    Args:
        blocks: names and modules, in the order in which they run.
        stored: name of a weight in a block -> the weight.
        dtype: cast what is decoded; None keeps the stored dtypes.
    """
    _check_unshared(model, stored)
    slots = {name: _slot(model, name, weight) for name, weight in stored.items()}
    device = next(iter(stored.values())).matrices[0].coded.words.device
    model.to(device)  # type: ignore[arg-type]
    last: ResidentBlock | None = None
    memory = Memory()
    for prefix, block in blocks:
        inside = tuple(slot for name, slot in slots.items() if name.startswith(f"{prefix}."))
        if not inside:
            continue
        resident = ResidentBlock(inside, dtype, memory)
        resident.empty()
        if last is not None:
            last.following = resident
        block.register_forward_pre_hook(resident.before)
        block.register_forward_hook(resident.after, always_call=True)
        last = resident
    model.requires_grad_(False)
    _refuse_what_needs_weights(model)


def _slot(model: PreTrainedModel, name: str, stored: StoredWeight) -> Slot:
    """Return the weight's place, emptied so that the model can be moved to its device."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    dense = module.get_parameter(attribute)
    resting = nn.Parameter(torch.empty_like(dense, device="meta"), requires_grad=False)
    module._parameters[attribute] = None
    return Slot(module, attribute, stored, resting)


def _check_unshared(model: PreTrainedModel, stored: Mapping[str, StoredWeight]) -> None:
    """Refuse weights that two modules share, since only one of them would get it.

    Raises:
        ModelError: there is one.
    """
    owned = {id(model.get_parameter(name)) for name in stored}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in owned and name not in stored:
            raise ModelError(f"{name} is shared between modules: load the model dense.")


def _refuse_what_needs_weights(model: PreTrainedModel) -> None:
    """Refuse saving, moving and casting, which would silently leave out the blocks' weights."""
    model.register_state_dict_pre_hook(_no_state)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(_no_state)  # type: ignore[no-untyped-call]
    model._apply = _no_move  # type: ignore[method-assign]


def _no_state(*_: Any) -> NoReturn:
    _refuse("saved, and has no state dict")


def _no_move(*_: Any, **__: Any) -> NoReturn:
    _refuse("moved or cast")


def _refuse(what: str) -> NoReturn:
    raise ModelError(f"a model with resident='compressed' cannot be {what}: {REMEDY}")
