"""Find the blocks of a transformers model and the weights in them, from the module tree alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cerwu_gpu.errors import ModelError
from cerwu_gpu.hf.head import head_layouts
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.patterns import chosen_names, matches

UNKNOWN_EXPERTS = "experts of unknown layout"


@dataclass(frozen=True)
class Weights:
    """Which parameters are compressed.

    Attributes:
        chosen: in the order of the model.
        left: name -> reason, for every other parameter with two axes or more.
        unknown: those of them that ought to be compressed and cannot be.
    """

    chosen: tuple[WeightLayout, ...]
    left: dict[str, str]
    unknown: tuple[str, ...] = ()


def find_blocks(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """The transformer blocks in order, with their names: the elements of the largest nn.ModuleList
    (by parameters) whose elements hold weight matrices.

    Raises:
        ModelError: there is no such list.
    """
    best: tuple[int, list[tuple[str, nn.Module]]] = (0, [])
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and all(map(holds_matrices, module)):
            size = sum(parameter.numel() for parameter in module.parameters())
            if size > best[0]:
                best = size, [(f"{name}.{i}", block) for i, block in enumerate(module)]
    if not best[1]:
        raise ModelError(
            f"{type(model).__name__} has no list of blocks with linear layers: "
            "its architecture is not supported."
        )
    return best[1]


def holds_matrices(module: nn.Module) -> bool:
    """Whether a linear layer or a parameter of experts lies in `module`."""
    return any(
        isinstance(child, nn.Linear | Conv1D) or _expert_parameters(child)
        for child in module.modules()
    )


def find_weights(
    model: PreTrainedModel,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    *,
    head: bool = False,
) -> Weights:
    """The weights of the blocks' linear layers and experts whose names match the glob patterns.

    A pattern is compared with the parameter's name, with and without a final ".weight"; exclude
    wins over include. With `head` the model's head and input embedding are candidates too, after
    the blocks; tied, they are one parameter. Norms, biases, routers and other embeddings are left
    alone.

    Raises:
        ConfigError: a pattern matches nothing, or no weight is left.
        ModelError: the model has no blocks, or with `head` none that can be compressed.
    """
    blocks = find_blocks(model)
    candidates: dict[str, WeightLayout] = {}
    left: dict[str, str] = {}
    for prefix, block in blocks:
        for layout, reason in _block_weights(prefix, block):
            if reason is None:
                candidates[layout.name] = layout
            else:
                left[layout.name] = reason
    if head:
        candidates.update({layout.name: layout for layout in head_layouts(model)})
    others = [name for name, _ in model.named_parameters() if name not in candidates]
    names = set(chosen_names(candidates, others, include, exclude))
    chosen = {name: layout for name, layout in candidates.items() if name in names}
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and name not in chosen:
            inside = any(name.startswith(f"{prefix}.") for prefix, _ in blocks)
            default = "not the weight of a linear layer" if inside else "outside the blocks"
            left.setdefault(name, "not chosen" if name in candidates else default)
    wanted = (name for name, why in left.items() if why == UNKNOWN_EXPERTS)
    unknown = [x for x in wanted if matches(x, include) and not matches(x, exclude)]
    return Weights(tuple(chosen.values()), left, tuple(unknown))


def _block_weights(prefix: str, block: nn.Module) -> Iterator[tuple[WeightLayout, str | None]]:
    """Every linear weight and expert parameter of a block, and the reason to leave it, if any."""
    own = {name for name, _ in block.named_parameters()}  # a shared parameter has one name only
    routers = {id(router) for module in block.modules() for router in _routers(module)}
    for path, module in block.named_modules():
        stem = f"{path}." if path else ""
        if isinstance(module, nn.Linear | Conv1D) and f"{stem}weight" in own:
            reason = "router" if id(module) in routers else None
            shape = tuple(module.weight.shape)
            transposed = isinstance(module, Conv1D)
            yield WeightLayout(f"{prefix}.{stem}weight", shape, 1, transposed), reason
        for name in _expert_parameters(module):
            shape = tuple(getattr(module, name).shape)
            known = hasattr(module, "is_transposed")  # set by transformers; the shape cannot tell
            transposed = known and bool(module.is_transposed)
            layout = WeightLayout(f"{prefix}.{stem}{name}", shape, shape[0], transposed)
            yield layout, None if known else UNKNOWN_EXPERTS


def _expert_parameters(module: nn.Module) -> list[str]:
    """Names of a module's own parameters [experts, ., .]."""
    return [
        name
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and not name.endswith("bias") and not isinstance(module, _ConvNd)
    ]


def _routers(module: nn.Module) -> Iterator[nn.Module]:
    """Linear layers with one output, or one per expert, in the children beside the experts."""
    counts = {child: _expert_counts(child) for child in module.children()}
    experts = {1, *(count for found in counts.values() for count in found)}
    if len(experts) > 1:
        for child in (child for child, found in counts.items() if not found):
            for layer in child.modules():
                if isinstance(layer, nn.Linear) and layer.out_features in experts:
                    yield layer


def _expert_counts(module: nn.Module) -> set[int]:
    """How many experts `module` itself holds, as parameters or as a list; empty if none."""
    if isinstance(module, nn.ModuleList) and all(map(holds_matrices, module)):
        return {len(module)}
    return {getattr(module, name).shape[0] for name in _expert_parameters(module)}
