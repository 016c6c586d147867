"""Names of a checkpoint's tensors beside those of the model that transformers makes of them.

transformers 5 renames and fuses tensors when it loads (`core_model_loading`), and undoes that when
it saves. A compressed directory has the model's own names; what it takes to write those of the
source again is here, and so is what transformers leaves in the source.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import load_state_dict
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from cerwu_gpu.errors import FormatError, ModelError, reason
from cerwu_gpu.files import read_json

CHECKPOINT_FILES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""Names of a checkpoint's file, or of the index of several, in the order in which transformers
looks for them."""
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Types of numbers that need no scale beside them."""
UNLOADED = "it is quantized, and transformers does not load it"
"""Reason to leave a tensor of a quantized checkpoint."""
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|masked_bias)$")
_SCALE = re.compile(r"[._](weight_)?(scale(_inv|_2)?|scales|scale_shift|qzeros|g_idx|absmax)$")

_BLOCK = re.compile(r"^(.*?\.\d+)\..*$")

Patterns = tuple[tuple[str, ...], tuple[str, ...]]
"""A conversion of transformers: the patterns of its sources and of its targets."""


@dataclass(frozen=True)
class Inventory:
    """The tensors in a model directory, under their own names.

    Attributes:
        tensors: shapes and dtypes, on the meta device.
        files: name of a tensor -> the file that holds it.
        quantized: names of those that are in another form there.
    """

    tensors: Mapping[str, Tensor]
    files: Mapping[str, Path]
    quantized: frozenset[str] = frozenset()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the values of some tensors; views of the file, where it is safetensors."""
        read: dict[str, Tensor] = {}
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.files[name], []).append(name)
        for file, inside in by_file.items():
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as tensors:
                    read.update({name: tensors.get_tensor(name) for name in inside})
            else:
                values = load_state_dict(file)
                read.update({name: values[name] for name in inside})
        return read


@dataclass(frozen=True)
class SourceNames:
    """Names, tensors and reasons of a source that the model's own names leave out.

    Attributes:
        conversions: those that transformers used when it loaded the source; None: those that it
            undoes by itself when it saves.
        renamed: start of a name that transformers would save -> start of the source's name.
        carried: tensors that transformers did not load, by the source's names.
        left: name of a tensor of the source that is not in the result -> reason.
        events: sentences about what was carried or left though nobody asked for it.
    """

    conversions: tuple[Patterns, ...] | None = None
    renamed: Mapping[str, str] = field(default_factory=dict)
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    events: tuple[str, ...] = ()

    def described(self) -> dict[str, Any]:
        """Return what config.json has of them (docs/format.md); nothing for most models."""
        content: dict[str, Any] = {}
        if self.conversions is not None:
            content["conversions"] = [[list(one) for one in pair] for pair in self.conversions]
        if self.renamed:
            content["renamed"] = dict(self.renamed)
        if self.carried:
            content["carried"] = sorted(self.carried)
        return content


def read_checkpoint(folder: Path) -> Inventory:
    """Return the tensors of the checkpoint that transformers would load from a directory.

    Raises:
        ModelError: a file cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    files: dict[str, Path] = {}
    for file in checkpoint_files(folder):
        try:
            inside = load_state_dict(file, map_location="meta")
        except Exception as error:  # whatever the parsers make of a damaged file
            raise ModelError(f"{file} cannot be read: {reason(error)}") from error
        tensors.update(inside)
        files.update(dict.fromkeys(inside, file))
    return Inventory(tensors, files)


def dequantized(checkpoint: Inventory) -> Inventory:
    """Return the tensors of a checkpoint in fp8 or mxfp4 as a model gets them: without scales, and
    blocks under the name of the weight that they are of."""
    tensors: dict[str, Tensor] = {}
    files: dict[str, Path] = {}
    quantized = set()
    for name, tensor in checkpoint.tensors.items():
        stem = _SCALE.sub("", name)
        if stem != name and {stem, f"{stem}.weight", f"{stem}_blocks"} & checkpoint.tensors.keys():
            continue
        weight = name.removesuffix("_blocks")
        files[weight] = checkpoint.files[name]
        if weight != name or tensor.dtype not in FLOATING:
            quantized.add(weight)
            tensor = torch.empty(tensor.shape, dtype=torch.bfloat16, device="meta")
        tensors[weight] = tensor
    return Inventory(tensors, files, frozenset(quantized))


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the files with tensors that transformers would load from a directory."""
    for single, index in CHECKPOINT_FILES:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            stem, _, ending = single.rpartition(".")
            return sorted(folder.glob(f"{stem}-*-of-*.{ending}"))
    return []


def loaded_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str | None]:
    """Return, for each tensor of a checkpoint, the model's name of what it becomes (of several, the
    first), and None where transformers does not load it."""
    return _loaded(model, names, get_model_conversion_mapping(model))


def _loaded(
    model: PreTrainedModel, names: Iterable[str], conversions: list[WeightTransform]
) -> dict[str, str | None]:
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    state: dict[str, Any] = model.state_dict()  # as transformers does; its order matters for none
    prefix = model.base_model_prefix
    targets: dict[str, str | None] = {}
    for name in sorted(names, key=dot_natural_key):
        target, _ = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, _ = rename_source_key(name, [], [], prefix, state)
        targets[name] = target if target in state else None
    return targets


def source_names(model: PreTrainedModel, checkpoint: Inventory | None) -> SourceNames:
    """Return what it takes to write a model under the names of its source.

    Args:
        checkpoint: what it was loaded from; None: it was in memory, and what transformers remembers
            of its loading decides.

    Raises:
        ModelError: weights are stored in a type that needs scales.
    """
    used = getattr(model, "_weight_conversions", None)
    usual = _reverted(model, None)
    if checkpoint is None:
        if used is None or _reverted(model, used) == usual:
            return SourceNames()
        return SourceNames(_patterns(used))
    loaded = loaded_names(model, checkpoint.tensors)
    _check_numbers(model, checkpoint, loaded)
    carried, left, events = _not_loaded(model, checkpoint, loaded)
    wanted = {name for name, target in loaded.items() if target is not None}
    conversions = None
    if usual != wanted and used is not None and _reverted(model, used) != usual:
        conversions = _patterns(used)
        usual = _reverted(model, used)
    renamed, unnamed = _renamed(model, usual, wanted, loaded)
    for name, target in unnamed.items():
        left[name] = f"stored once, as {target}"
    return SourceNames(conversions, renamed, checkpoint.read(carried), left, tuple(events))


def _check_numbers(
    model: PreTrainedModel, checkpoint: Inventory, loaded: Mapping[str, str | None]
) -> None:
    """Refuse weights that are nothing without their scales.

    Raises:
        ModelError: there is one; it is named.
    """
    state: dict[str, Tensor] = model.state_dict()
    for name, tensor in checkpoint.tensors.items():
        target = loaded[name]
        is_weight = target is not None and state[target].is_floating_point()
        if is_weight and tensor.dim() >= 2 and tensor.dtype not in FLOATING:
            raise ModelError(
                f"{name} is stored as {_dtype(tensor)}, and config.json has no quantization_config "
                "that says how it is scaled: give the model in bfloat16, float16 or float32."
            )
        if loaded[name] is None and _SCALE.search(name):
            stem = _SCALE.sub("", name)
            if stem in checkpoint.tensors or f"{stem}.weight" in checkpoint.tensors:
                raise ModelError(
                    f"{name} scales a weight, and config.json has no quantization_config that says "
                    "how: give the model in bfloat16, float16 or float32."
                )


def _not_loaded(
    model: PreTrainedModel, checkpoint: Inventory, loaded: Mapping[str, str | None]
) -> tuple[list[str], dict[str, str], list[str]]:
    """Return the names of tensors to carry, name -> reason of those to leave, and events."""
    carried, left = [], {}
    for name in (name for name, target in loaded.items() if target is None):
        tensor = checkpoint.tensors[name]
        if _COMPUTED.search(name) or _is_mask(name, tensor):
            left[name] = "a constant that the model computes"
        elif name in checkpoint.quantized:
            left[name] = UNLOADED
        else:
            carried.append(name)
    events = [f"{name} is left out: {why}" for name, why in left.items() if why == UNLOADED]
    if carried:
        tensors = [checkpoint.tensors[name] for name in carried]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        events.append(
            f"{len(carried)} tensors that {type(model).__name__} does not load are kept as they "
            f"are ({size:,} bytes), among them {min(carried)}"
        )
    return carried, left, events


def _is_mask(name: str, tensor: Tensor) -> bool:
    """Return whether a tensor is a causal mask, as older versions of transformers stored it."""
    square = tensor.dim() == 4 and tensor.shape[:2] == (1, 1) and tensor.shape[2] == tensor.shape[3]
    return square and name.endswith(".bias")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _reverted(model: PreTrainedModel, conversions: list[WeightTransform] | None) -> set[str]:
    """Return the names that transformers would save the model under."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            state[name] = torch.empty_like(tensor, device="meta")
        seen.add(id(tensor))
    with _conversions(model, conversions):
        return set(revert_weight_conversion(model, state))


@contextmanager
def _conversions(
    model: PreTrainedModel, conversions: list[WeightTransform] | None
) -> Iterator[None]:
    """Let a model remember other conversions for a while."""
    before = getattr(model, "_weight_conversions", None)
    model._weight_conversions = conversions  # type: ignore[assignment]
    try:
        yield
    finally:
        model._weight_conversions = before  # type: ignore[assignment]


def _patterns(conversions: Iterable[WeightTransform]) -> tuple[Patterns, ...]:
    return tuple(
        (tuple(one._original_source_patterns), tuple(one._original_target_patterns))
        for one in conversions
    )


def _renamed(
    model: PreTrainedModel,
    saved: set[str],
    wanted: set[str],
    loaded: Mapping[str, str | None],
) -> tuple[dict[str, str], dict[str, str]]:
    """Return how saved names become the source's, and the source's names that none becomes, each
    with the model's name of what it holds."""
    groups: dict[str, tuple[list[str], list[str]]] = {}
    for name in sorted(wanted - saved, key=dot_natural_key):
        groups.setdefault(str(loaded[name]), ([], []))[0].append(name)
    for name, target in loaded_names(model, saved - wanted).items():
        groups.setdefault(str(target), ([], []))[1].append(name)
    exact: dict[str, str] = {}
    unnamed: dict[str, str] = {}
    for target, (sources, reverted) in groups.items():
        if len(sources) == len(reverted):
            exact.update(zip(reverted, sources, strict=True))
        else:
            unnamed.update(dict.fromkeys(sources, target))
    return _by_prefix(exact, saved), unnamed


def _by_prefix(exact: dict[str, str], saved: set[str]) -> dict[str, str]:
    """Return the renaming of one prefix that stands for all of `exact`, if there is one."""
    if exact:
        name, new = next(iter(exact.items()))
        common = 0
        while common < min(len(name), len(new)) and name[-1 - common] == new[-1 - common]:
            common += 1
        ends = (i for i in range(len(name) - common, len(name)) if i and name[i - 1] == ".")
        for end in ends:
            prefix = {name[:end]: new[: len(new) - len(name) + end]}
            if {x: y for x in saved if (y := rename(x, prefix)) != x} == exact:
                return prefix
    return exact


def rename(name: str, renamed: Mapping[str, str]) -> str:
    """Return a name with its start replaced, by the longest entry that is the name or a prefix of
    it with its final dot."""
    if name in renamed:
        return renamed[name]
    start = max((x for x in renamed if x.endswith(".") and name.startswith(x)), key=len, default="")
    return renamed[start] + name.removeprefix(start) if start else name


class StartRenaming(WeightRenaming):
    """Conversion of the source's names to those that the other conversions know."""

    __slots__ = ("renamed", "saving")

    def __init__(self, renamed: Mapping[str, str], *, saving: bool = False) -> None:
        """Take the renaming of saved names to the source's; it acts when a model is saved."""
        super().__init__(source_patterns="(.+)", target_patterns="(.+)")
        self.renamed = dict(renamed)
        self.saving = saving

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return (rename(source_key, self.renamed) if self.saving else source_key), None

    def reverse_transform(self) -> "StartRenaming":
        return StartRenaming(self.renamed, saving=not self.saving)


def remember(model: PreTrainedModel, described: Mapping[str, Any]) -> None:
    """Let a loaded model save its weights under the names of its source.

    Args:
        described: `SourceNames.described`, as config.json has it.
    """
    conversions: list[WeightTransform] | None = None
    if "conversions" in described:
        known = {tuple(map(tuple, pair)) for pair in described["conversions"]}
        usual = get_model_conversion_mapping(model)
        conversions = [one for one in usual if _patterns([one])[0] in known]
    if "renamed" in described:
        if conversions is None:
            conversions = get_model_conversion_mapping(model, add_legacy=False)
            conversions = [one for one in conversions if not hasattr(one, "prefix_to_add")]
        conversions = [StartRenaming(described["renamed"]), *conversions]
    model._weight_conversions = conversions  # type: ignore[assignment]


def under_source_names(
    model: PreTrainedModel, tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors of a model under the names, and in the parts, of its source.

    Args:
        model: its class knows the conversions, or `remember` gave it some.
        tensors: of the model's own names; those of a block one after the other.
    """
    for _, block in groupby(tensors, key=lambda pair: _BLOCK.sub(r"\1", pair[0])):
        yield from revert_weight_conversion(model, dict(block)).items()


def source_of(folder: Path) -> dict[str, Any]:
    """Return what a config.json says of the source's names (`SourceNames.described`).

    Raises:
        FormatError: it is malformed.
    """
    try:
        return checked(read_json(folder / "config.json")["quantization_config"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise FormatError(f"{folder}: config.json is missing or malformed.") from None


def carried_names(folder: Path) -> set[str]:
    """Return the names of stored tensors that the model of config.json does not load.

    Raises:
        FormatError: as `source_of`.
    """
    return set(source_of(folder).get("carried", ()))


def checked(quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a quantization_config about the source's names.

    Raises:
        TypeError: one of them has another form than `SourceNames.described` gives it.
    """

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)

    forms: dict[str, Any] = {
        "conversions": lambda value: (
            isinstance(value, list)
            and all(isinstance(x, list) and len(x) == 2 and all(map(texts, x)) for x in value)
        ),
        "renamed": lambda value: isinstance(value, dict) and texts(list(value.values())),
        "carried": texts,
    }
    content = {key: quantization[key] for key in forms if key in quantization}
    for key, value in content.items():
        if not forms[key](value):
            raise TypeError(f"{key} is malformed")
    return content


def add_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Add tensors to a model directory of safetensors files, as a shard of their own."""
    if not tensors:
        return
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        places: dict[str, str] = content["weight_map"]
    else:
        with safe_open(folder / SAFE_WEIGHTS_NAME, "pt") as file:
            places = dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
        content = {"metadata": {}}
    shards = sorted(set(places.values()))
    count = len(shards) + 1
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    moved = dict(zip(shards, names, strict=False))
    for old, new in moved.items():
        (folder / old).rename(folder / f"{new}.moved")
    for new in moved.values():
        (folder / f"{new}.moved").rename(folder / new)
    last = names[-1]
    save_file({n: x.contiguous() for n, x in tensors.items()}, folder / last, {"format": "pt"})
    places = {n: moved[file] for n, file in places.items()} | dict.fromkeys(tensors, last)
    content["metadata"]["total_size"] = sum((folder / name).stat().st_size for name in names)
    content["weight_map"] = dict(sorted(places.items()))
    index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
