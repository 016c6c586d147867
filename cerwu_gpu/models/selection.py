"""Choose the parameters of a model to compress, by its module tree and by name."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from cerwu_gpu.container.header import DTYPES
from cerwu_gpu.errors import ConfigError, ModelError
from cerwu_gpu.files import dtype_name
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.spec import STREAM_SYMBOLS_LIMIT

LEAST_WEIGHTS = 128
"""Minimum size of a group's matrix: a smaller one takes more bytes coded, with its tables."""
UNKNOWN_EXPERTS = "experts of unknown layout"
OWN_FORWARD = "a linear layer that applies its weight in its own way"
LINEAR = ("FalconLinear",)
"""Classes of linear layers whose forward is their own and applies the whole weight."""

IsTransposed = Callable[[nn.Module], bool]
"""Predicate of linear layers whose weight is [inputs, outputs], as GPT-2's Conv1D."""


@dataclass(frozen=True)
class Selection:
    """The parameters to compress.

    Attributes:
        chosen: in the order of the model.
        left: name -> reason, for every other parameter with two axes or more.
        unasked: names of those in `left` that were chosen and cannot be compressed, or would grow.
    """

    chosen: tuple[WeightLayout, ...]
    left: dict[str, str]
    unasked: tuple[str, ...] = ()

    def events(self, *, strict: bool) -> tuple[str, ...]:
        """Return a sentence for each parameter in `unasked`.

        Raises:
            ModelError: there is one, and `strict`.
        """
        events = tuple(f"{name}: left as it is, {self.left[name]}" for name in self.unasked)
        if events and strict:
            raise ModelError(f"{events[0]} (strict): exclude it.")
        return events


def no_transposed(module: nn.Module) -> bool:
    """Return False: no linear layer is transposed."""
    return False


def find_blocks(
    model: nn.Module, is_transposed: IsTransposed = no_transposed
) -> list[tuple[str, nn.Module]]:
    """Return the blocks in order, with their names: the elements of the largest nn.ModuleList (by
    parameters) whose elements hold weight matrices, in a model that takes text outside of `towers`.

    Raises:
        ModelError: there is no such list.
    """
    blocks = _largest_list(model, is_transposed)
    if not blocks:
        raise ModelError(
            f"{type(model).__name__} has no list of blocks with linear layers: "
            "its architecture is not supported."
        )
    return blocks


def _largest_list(model: nn.Module, is_transposed: IsTransposed) -> list[tuple[str, nn.Module]]:
    """Return the blocks of `find_blocks`; none where there is no such list."""
    best: tuple[int, list[tuple[str, nn.Module]]] = (0, [])
    apart = towers(model) if _takes_text(model) else []
    inside = {id(child) for _, tower in apart for child in tower.modules()}
    for name, module in model.named_modules():
        if (
            id(module) not in inside
            and isinstance(module, nn.ModuleList)
            and all(holds_matrices(child, is_transposed) for child in module)
        ):
            size = sum(parameter.numel() for parameter in module.parameters())
            if size > best[0]:
                best = size, [(f"{name}.{i}", block) for i, block in enumerate(module)]
    return best[1]


def _takes_text(module: nn.Module) -> bool:
    """Return whether a module takes text, as far as transformers says what it takes."""
    return "text" in getattr(module, "input_modalities", "text")


def towers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the parts of a model that take images or sound and no text, as transformers says in
    `input_modalities`, with their names."""
    outermost: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{tower}.") for tower, _ in outermost)
        if name and not inside and not _takes_text(module):
            outermost.append((name, module))
    return outermost


def tower_blocks(
    model: nn.Module, is_transposed: IsTransposed = no_transposed
) -> list[tuple[str, nn.Module]]:
    """Return the blocks of all `towers` in order, with their names."""
    return [
        (f"{tower}.{name}", block)
        for tower, module in towers(model)
        for name, block in _largest_list(module, is_transposed)
    ]


def holds_matrices(module: nn.Module, is_transposed: IsTransposed = no_transposed) -> bool:
    """Return whether a linear layer or a parameter of experts lies in `module`."""
    return any(
        isinstance(child, nn.Linear) or is_transposed(child) or _expert_parameters(child)
        for child in module.modules()
    )


def select_in_blocks(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    outer: Sequence[WeightLayout] = (),
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    *,
    is_transposed: IsTransposed = no_transposed,
) -> Selection:
    """Choose weights of the blocks' linear layers and experts, and of those in `outer`, by glob
    patterns.

    A pattern is compared with the parameter's name, with and without a final ".weight"; exclude
    wins over include. Norms, biases, routers and embeddings that are not in `outer` are left alone.

    Raises:
        ConfigError: a pattern matches nothing, or no weight is left.
    """
    candidates: dict[str, WeightLayout] = {}
    left: dict[str, str] = {}
    for prefix, block in blocks:
        for layout, reason in _block_weights(prefix, block, is_transposed):
            if reason is None:
                candidates[layout.name] = layout
            else:
                left[layout.name] = reason
    candidates.update({layout.name: layout for layout in outer})

    def default(name: str) -> str:
        inside = any(name.startswith(f"{prefix}.") for prefix, _ in blocks)
        return "not the weight of a linear layer" if inside else "outside the blocks"

    chosen, left = _choose(model, candidates, left, include, exclude, default)
    unknown = [x for x, reason in left.items() if reason in (UNKNOWN_EXPERTS, OWN_FORWARD)]
    unasked = [x for x in unknown if matches(x, include) and not matches(x, exclude)]
    return Selection(chosen, left, tuple(unasked))


def select_in_module(
    module: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> Selection:
    """Choose weights of linear layers and 2-D convolutions by glob patterns.

    A parameter that several modules share is one weight, under its first name. Patterns are
    compared with names with and without a final ".weight"; exclude wins over include. Convolutions
    of many tiny groups (LEAST_WEIGHTS; depthwise ones) are left alone unless a pattern of `include`
    other than "*" matches them.

    Raises:
        ModelError: the module has no such weight.
        ConfigError: a pattern matches nothing, or no weight is left.
    """
    layouts, left = _module_weights(module)
    if not layouts:
        raise ModelError(
            f"{type(module).__name__} has no linear layer and no 2-D convolution: "
            "there is nothing to compress."
        )

    def default(_: str) -> str:
        return "not the weight of a linear layer or 2-D convolution"

    chosen, left = _choose(module, layouts, left, include, exclude, default)
    named = [pattern for pattern in include if pattern != "*"]
    small = tuple(x.name for x in chosen if _is_small(x) and not matches(x.name, named))
    for name in small:
        rows, columns = layouts[name].matrix_shape
        parts = layouts[name].parts
        left[name] = f"its {parts} matrices of {rows * columns} weights would grow coded"
    chosen = tuple(layout for layout in chosen if layout.name not in small)
    if not chosen:
        raise ConfigError("all weights are too small to gain: name them in include to code them.")
    return Selection(chosen, left, small)


def _choose(
    module: nn.Module,
    candidates: Mapping[str, WeightLayout],
    left: Mapping[str, str],
    include: Sequence[str],
    exclude: Sequence[str],
    default: Callable[[str], str],
) -> tuple[tuple[WeightLayout, ...], dict[str, str]]:
    """Return the chosen candidates, and the reason to leave each other parameter with two axes or
    more; `default` returns that of a parameter that is no candidate.

    Raises:
        ConfigError: a pattern matches nothing, or no weight is left.
        ModelError: a chosen matrix is wider than the format's streams.
    """
    parameters = dict(module.named_parameters())
    rest = [name for name in parameters if name not in candidates]
    names = set(chosen_names(candidates, rest, include, exclude))
    reasons = dict(left)
    for name, parameter in parameters.items():
        if parameter.dim() >= 2 and name not in names:
            reasons.setdefault(name, "not chosen" if name in candidates else default(name))
    chosen = tuple(layout for name, layout in candidates.items() if name in names)
    for layout in chosen:
        columns = layout.matrix_shape[1]
        if columns > STREAM_SYMBOLS_LIMIT:
            raise ModelError(
                f"{layout.name} has matrices of {columns:,} columns: the format takes at most "
                f"{STREAM_SYMBOLS_LIMIT:,}: exclude it."
            )
    return chosen, reasons


def _block_weights(
    prefix: str, block: nn.Module, is_transposed: IsTransposed
) -> Iterator[tuple[WeightLayout, str | None]]:
    """Yield linear weights and expert parameters of a block, with a reason to leave it or None."""
    unique = {name for name, _ in block.named_parameters()}  # a shared parameter has one name only
    routers = {id(router) for module in block.modules() for router in _routers(module)}
    for path, module in block.named_modules():
        stem = f"{path}." if path else ""
        transposed = is_transposed(module)
        if (isinstance(module, nn.Linear) or transposed) and f"{stem}weight" in unique:
            reason = "router" if id(module) in routers else None
            if reason is None and not transposed and not _applies_whole(module):
                reason = OWN_FORWARD
            shape = tuple(module.get_parameter("weight").shape)
            yield WeightLayout(f"{prefix}.{stem}weight", shape, 1, transposed), reason
        for name in _expert_parameters(module):
            shape = tuple(getattr(module, name).shape)
            known = hasattr(module, "is_transposed")  # set by transformers; the shape is ambiguous
            transposed = known and bool(module.is_transposed)
            layout = WeightLayout(f"{prefix}.{stem}{name}", shape, shape[0], transposed)
            yield layout, None if known else UNKNOWN_EXPERTS


def _applies_whole(module: nn.Module) -> bool:
    """Return whether a linear layer is known to apply its whole weight to each input (DeepSeek-V4
    has one that applies a part of it to a part of the input)."""
    return type(module).forward is nn.Linear.forward or type(module).__name__ in LINEAR


def _expert_parameters(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters [experts, ., .]."""
    return [
        name
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and not name.endswith("bias") and not isinstance(module, _ConvNd)
    ]


def _routers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield linear layers with one output, or one per expert, in the children beside the
    experts."""
    counts = {child: _expert_counts(child) for child in module.children()}
    experts = {1, *(count for numbers in counts.values() for count in numbers)}
    if len(experts) > 1:
        for child in (child for child, numbers in counts.items() if not numbers):
            for layer in child.modules():
                if isinstance(layer, nn.Linear) and layer.out_features in experts:
                    yield layer


def _expert_counts(module: nn.Module) -> set[int]:
    """Return the numbers of experts that `module` holds directly, as parameters or as a list."""
    if isinstance(module, nn.ModuleList) and all(map(holds_matrices, module)):
        return {len(module)}
    return {getattr(module, name).shape[0] for name in _expert_parameters(module)}


def _module_weights(module: nn.Module) -> tuple[dict[str, WeightLayout], dict[str, str]]:
    """Return the layouts of usable matrices by name, and name -> reason of the other ones."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    layouts: dict[str, set[WeightLayout]] = {}
    left: dict[str, str] = {}
    for parameter, groups in _matrices(module):
        name = names.get(id(parameter))
        if name is None:
            continue  # computed from other parameters, as by torch.nn.utils.parametrize
        if dtype_name(parameter.dtype) not in DTYPES:
            left[name] = f"its dtype is {parameter.dtype}"
        elif parameter.numel() == 0:
            left[name] = "it has no elements"
        else:
            layout = WeightLayout(name, tuple(parameter.shape), groups, False)
            layouts.setdefault(name, set()).add(layout)
    left |= {
        name: "shared between different groups" for name, uses in layouts.items() if len(uses) > 1
    }
    usable = {name: next(iter(uses)) for name, uses in layouts.items() if name not in left}
    return {name: usable[name] for name in names.values() if name in usable}, left


def _matrices(module: nn.Module) -> Iterator[tuple[Tensor, int]]:
    """Yield weight and number of groups of linear layers and 2-D convolutions, shared ones too."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            yield child.weight, 1
        elif isinstance(child, nn.Conv2d):
            yield child.weight, child.groups


def _is_small(layout: WeightLayout) -> bool:
    rows, columns = layout.matrix_shape
    return layout.parts > 1 and rows * columns < LEAST_WEIGHTS


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a pattern matches the name, with or without its final ".weight"."""
    stem = name.removesuffix(".weight")
    return any(fnmatchcase(name, p) or fnmatchcase(stem, p) for p in patterns)


def chosen_names(
    candidates: Iterable[str],
    rest: Iterable[str],
    include: Sequence[str],
    exclude: Sequence[str],
) -> list[str]:
    """Return the candidates that `include` matches and `exclude` does not.

    Args:
        candidates: names of parameters that can be compressed.
        rest: names of all other parameters, which `exclude` may match as well.

    Raises:
        ConfigError: a pattern matches nothing, or no name is left.
    """
    candidates = list(candidates)
    _check(include, candidates, "include", "weight that can be compressed")
    _check(exclude, [*candidates, *rest], "exclude", "parameter of the model")
    chosen = [x for x in candidates if matches(x, include) and not matches(x, exclude)]
    if not chosen:
        raise ConfigError("include and exclude leave no weight to compress: loosen them.")
    return chosen


def _check(patterns: Sequence[str], names: Sequence[str], field: str, what: str) -> None:
    for pattern in patterns:
        if not any(matches(name, (pattern,)) for name in names):
            raise ConfigError(f"{field} pattern {pattern!r} matches no {what}: check its spelling.")


def require_values(module: nn.Module) -> None:
    """Refuse modules whose parameters have no values yet.

    Raises:
        ConfigError: a lazy module was not run, or a parameter is on the meta device.
    """
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.is_meta:
            raise ConfigError(f"{name} has no values yet: run or load the module first.")


def require_coded(module: nn.Module, names: Iterable[str]) -> None:
    """Refuse weights of a type that is not compressed, before any work is done.

    Raises:
        ModelError: there is one; it is named.
    """
    for name in names:
        dtype = dtype_name(module.get_parameter(name).dtype)
        if dtype not in DTYPES:
            raise ModelError(
                f"{name} is in {dtype}, which is not compressed: give the model in one of "
                f"{', '.join(DTYPES)}, or exclude it."
            )


def require_separate(module: nn.Module) -> None:
    """Refuse parameters that lie in the same memory and are not one.

    Raises:
        ModelError: there is a pair; changing one would change the other.
    """
    places: dict[int, list[tuple[int, int, str]]] = {}
    for name, parameter in module.named_parameters():
        if parameter.numel() and not parameter.is_meta:
            steps = zip(parameter.shape, parameter.stride(), strict=True)
            begin = parameter.data_ptr()
            last = sum((size - 1) * stride for size, stride in steps)
            end = begin + (last + 1) * parameter.element_size()
            storage = parameter.untyped_storage().data_ptr()
            places.setdefault(storage, []).append((begin, end, name))
    for inside in places.values():
        inside.sort()
        for (_, end, name), (begin, _, other) in pairwise(inside):
            if begin < end:
                raise ModelError(
                    f"{name} and {other} lie in the same memory and are two parameters: make "
                    "them one, or give one of them a copy."
                )


def require_finite(module: nn.Module, names: Iterable[str]) -> None:
    """Refuse NaN and infinite weights before any work is done.

    Raises:
        ModelError: there is one; it is named.
    """
    chosen = list(names)
    for _ in finite(((name, module.get_parameter(name)) for name in chosen), chosen):
        pass


def finite(
    tensors: Iterable[tuple[str, Tensor]], names: Iterable[str]
) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors, but refuse NaN and infinity in those of `names`.

    Raises:
        ModelError: there is one; it is named.
    """
    chosen = set(names)
    for name, tensor in tensors:
        if name in chosen and not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"{name} holds weights that are NaN or infinite: fetch the model again, "
                "or exclude it."
            )
        yield name, tensor
