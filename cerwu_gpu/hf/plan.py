"""Predictions of a compression from config.json alone: memory, traffic, work and size.

The model is built on the meta device, and one batch runs through it there, so that it shows which
matrices share their input, as calibration sees them.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from cerwu_gpu.calibration.capture import replaced
from cerwu_gpu.calibration.moments import InputMoments
from cerwu_gpu.calibration.products import Product, module_products
from cerwu_gpu.compression.blocks import BlockWeights, search_cost
from cerwu_gpu.config import (
    Bits,
    Calibration,
    CompressionConfig,
    ImageCalibration,
    ImageTextCalibration,
)
from cerwu_gpu.errors import ConfigError, ModelError, reason
from cerwu_gpu.files import local_path
from cerwu_gpu.hf.causal_lm import SENSITIVITY_TOKENS, runs_whole, select
from cerwu_gpu.hf.head import find_head
from cerwu_gpu.hf.models import is_conv1d
from cerwu_gpu.hf.sources import usual_samples
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.models.selection import find_blocks
from cerwu_gpu.ranks import Ranks, greedy_owners, shard_of

FLOAT32, FLOAT64 = 4, 8
"""Bytes of a number."""
FEW_TOKENS = 8
"""Length of the batch that runs on the meta device."""


@dataclass(frozen=True)
class Outline:
    """Sizes of a model, from which a plan follows.

    Attributes:
        blocks: per block, and for head and embedding one by one, name and cost of each input with
            its (rows, columns).
        crossed: inputs whose cross moments are taken where drift is corrected: not the experts'.
        block_bytes: per block, bytes of its parameters in the checkpoint.
        outer_bytes: of all other parameters.
        hidden: width of the hidden states; `itemsize` bytes each.
        outputs: number of rows of all chosen matrices, and of these matrices.
        vocabulary: rows of the head if it is chosen, else 0.
    """

    blocks: list[dict[str, tuple[int, int]]]
    crossed: frozenset[str]
    block_bytes: list[int]
    outer_bytes: int
    hidden: int
    itemsize: int
    outputs: int
    vocabulary: int

    @property
    def weights(self) -> int:
        """Number of weights that are quantized."""
        return sum(m * n for block in self.blocks for m, n in block.values())


@dataclass(frozen=True)
class Plan:
    """Predictions for one run.

    Attributes:
        ranks: number of processes.
        memory: part -> bytes of the rank that needs most of them together.
        read: bytes of the checkpoint that each rank reads, from the disk or the system's cache.
        sent, received: bytes of tensors between ranks, of each rank.
        operations: stage -> floating-point operations of all ranks.
        file_bytes: of the compressed directory's tensors.
    """

    ranks: int
    memory: dict[str, int]
    read: list[int]
    sent: list[int]
    received: list[int]
    operations: dict[str, float]
    file_bytes: int

    @property
    def peak(self) -> int:
        """Bytes of the rank that needs most."""
        return sum(self.memory.values())


def outline(source: str | Path, config: CompressionConfig) -> Outline:
    """Return the outline of a causal language model from its config.json.

    Args:
        source: hub name or local directory.

    Raises:
        ModelError: there is no such configuration, or the model cannot be run on the meta device.
        ConfigError: the settings choose no weight.
    """
    auto: Any = AutoModelForCausalLM
    try:
        settings = AutoConfig.from_pretrained(local_path(source))
        with torch.device("meta"):
            model = auto.from_config(settings, dtype=settings.dtype or torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{source} has no configuration of a causal language model ({reason(error)}): give a "
            "directory with a config.json, or a Hub name."
        ) from error
    model.train(False)
    chosen = select(model, config.include, config.exclude, head=not config.keep_head).chosen
    blocks = find_blocks(model, is_conv1d)
    keys = _inputs_of(model, blocks, chosen)
    tables, inside, crossed = [], [], set()
    for name, block in blocks:
        layouts = [x for x in chosen if x.name.startswith(f"{name}.")]
        moments = InputMoments(layouts)
        moments.keys.update({label: keys[label] for label in _labels(layouts)})
        rows = Counter[str]()
        for layout in layouts:
            for part in range(layout.parts):
                rows[keys[layout.name, part]] += layout.matrix_shape[0]
        tables.append({key: (rows[key], n) for key, n in moments.inputs().items()})
        crossed |= {keys[x.name, 0] for x in layouts if x.parts == 1}
        inside.append(sum(x.numel() * x.element_size() for x in block.parameters()))
    outer = [x for x in chosen if not any(x.name.startswith(f"{name}.") for name, _ in blocks)]
    for layout in outer:
        tables.append({layout.name: layout.matrix_shape})
    head = find_head(model) if outer else None
    if head is not None and head.head is not None:
        crossed.add(head.head)
    total = sum(x.numel() * x.element_size() for x in model.parameters())
    labels = [layout for layout in chosen for _ in range(layout.parts)]
    return Outline(
        blocks=tables,
        crossed=frozenset(crossed),
        block_bytes=inside,
        outer_bytes=total - sum(inside),
        hidden=int(model.get_input_embeddings().weight.shape[1]),
        itemsize=model.dtype.itemsize,
        outputs=sum(layout.matrix_shape[0] for layout in labels) + len(labels),
        vocabulary=0 if head is None else int(model.get_parameter(head.head).shape[0]),
    )


def _labels(layouts: Sequence[WeightLayout]) -> Iterator[tuple[str, int]]:
    for layout in layouts:
        for part in range(layout.parts):
            yield layout.name, part


def _inputs_of(
    model: Any, blocks: Sequence[tuple[str, nn.Module]], chosen: Sequence[WeightLayout]
) -> dict[tuple[str, int], str]:
    """Return the name of the input of each matrix; each one of an expert has its own.

    Raises:
        ModelError: the model cannot be run on the meta device.
    """
    by_name = {layout.name: layout for layout in chosen}
    keys = {(name, part): by_name[name].key(part) for name, part in _labels(chosen)}
    seen: dict[int, tuple[Tensor, str]] = {}

    def note(product: Product) -> None:
        x = product.x
        first = seen.setdefault(id(x), (x, by_name[product.name].key(0)))[1]
        keys[product.name, 0] = first

    device = torch.device("meta")
    weights = BlockWeights(model, [x for x in chosen if x.parts == 1], device)
    ids = torch.zeros(1, FEW_TOKENS, dtype=torch.int64, device=device)
    # A mask of four axes is taken as it is; any other one is looked into.
    mask = torch.zeros(1, 1, FEW_TOKENS, FEW_TOKENS, dtype=model.dtype, device=device)
    try:
        with (
            torch.no_grad(),
            _experts_skipped(model, [x for x in chosen if x.parts > 1]),
            module_products(weights, note, before=True),
        ):
            model(input_ids=ids, attention_mask=mask, use_cache=False)
    except Exception as error:  # whatever the model's code makes of tensors without values
        raise ModelError(
            f"{type(model).__name__} cannot be run without its weights ({reason(error)}): there is "
            "no plan for it."
        ) from error
    return keys


@contextmanager
def _experts_skipped(model: nn.Module, experts: Sequence[WeightLayout]) -> Iterator[None]:
    """Make modules of experts return their first argument: their routing needs values."""
    owners = {layout.name.rpartition(".")[0] for layout in experts}
    modules = [model.get_submodule(owner) for owner in sorted(owners)]

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.empty_like(hidden)

    with replaced(modules, [forward] * len(modules)):
        yield


def plan(model: Outline, config: CompressionConfig, *, ranks: int, bits: float) -> Plan:
    """Return the predictions for one pass.

    Args:
        ranks: number of processes.
        bits: per quantized weight.

    Raises:
        ConfigError: there is no plan for runs of these settings.
    """
    images = isinstance(config.calibration, ImageCalibration | ImageTextCalibration)
    for given, what in (
        (config.data_free, "compression without data"),
        (config.distillation, "a distillation (distill 0 is none)"),
        (images, "calibration by images"),
        (config.target and not isinstance(config.target, Bits), "a search for a size or a quality"),
    ):
        if given:
            raise ConfigError(f"{what} has no plan: drop it.")
    whole = runs_whole(config)
    calibration = config.text if isinstance(config.calibration, Calibration) else Calibration()
    length, size = calibration.sequence_length, calibration.batch_size
    widest = max(n for block in model.blocks for _, n in block.values())
    samples = calibration.samples or usual_samples(widest, calibration)
    batches = -(-samples // size)
    shards = Counter(shard_of(batch, batches) for batch in range(batches))
    measured = -(-min(samples, -(-SENSITIVITY_TOKENS // length)) // size)
    gradient_shards = Counter(shard_of(batch, measured) for batch in range(measured))
    if not config.needs_gradients:
        gradient_shards.clear()
    layout = Ranks(0, ranks)
    traffic = Traffic(ranks)
    traffic.broadcast(0, FLOAT64 * samples * length)  # the tokens
    crosses, memory = config.corrects_drift, [Counter[str]() for _ in range(ranks)]
    holders = [layout.of_shard(shard) for shard in gradient_shards]
    for holder in [0] * (0 in holders) + [x for x in holders if x]:  # rank 0 adds its own up
        traffic.broadcast(holder, FLOAT64 * model.outputs)
        if model.vocabulary:
            traffic.broadcast(holder, FLOAT64 * (2 * model.hidden**2 + model.vocabulary + 1))
    shards_of = [[s for s in shards if layout.of_shard(s) == rank] for rank in range(ranks)]
    held = [min(1, len(shards_of[0])), *map(len, shards_of[1:])]
    for number, block in enumerate(model.blocks):
        costs = {key: search_cost(m, n) for key, (m, n) in block.items()}
        owners = greedy_owners(costs, ranks)
        peaks = [Counter[str]() for _ in range(ranks)]
        outside = number >= len(model.block_bytes)
        for key, (m, n) in block.items():
            owner, weights = owners[key], m * n
            sums = 1 + (crosses and key in model.crossed)
            summed = not outside or key in model.crossed
            traffic.broadcast(owner, model.itemsize * weights)
            traffic.send(owner, 0, weights * bits / 8)
            for rank in range(ranks):
                live = 2 if rank == 0 and len(shards_of[0]) > 1 else held[rank]
                peaks[rank]["weights of a block"] += FLOAT32 * weights
                if summed:
                    traffic.send(rank, owner, held[rank] * sums * FLOAT64 * n * n)
                    peaks[rank]["sums"] += live * sums * FLOAT64 * n * n
                if rank == owner:
                    peaks[rank]["Hessians"] += sums * FLOAT32 * n * n
        for rank, peak in enumerate(peaks):
            windows = sum(shards[s] for s in shards_of[rank]) * size * length * model.hidden
            peak["activations"] = (1 + crosses) * windows * model.itemsize
            peak["head, embedding and norms"] = model.outer_bytes
            if whole:  # for the text that it writes
                peak["all blocks"] = sum(model.block_bytes)
            peak["coded"] = int(bits / 8 * sum(m * n for m, n in block.values()))
            if peak.total() > memory[rank].total():
                memory[rank] = peak
    highest = max(range(ranks), key=lambda rank: memory[rank].total())
    return Plan(
        ranks=ranks,
        memory=dict(memory[highest]),
        read=[_read(model, rank, gradient_shards, layout, whole) for rank in range(ranks)],
        sent=[round(x) for x in traffic.sent],
        received=[round(x) for x in traffic.received],
        operations=_operations(model, samples * length, crosses, bool(gradient_shards)),
        file_bytes=round(model.weights * bits / 8) + _plain_bytes(model),
    )


class Traffic:
    """Bytes between ranks, counted as `ranks.Ranks` counts them."""

    def __init__(self, ranks: int) -> None:
        self.sent, self.received = [0.0] * ranks, [0.0] * ranks

    def send(self, source: int, target: int, size: float) -> None:
        """Count a message; none from a rank to itself."""
        if source != target:
            self.sent[source] += size
            self.received[target] += size

    def broadcast(self, source: int, size: float) -> None:
        """Count a message to all others."""
        for target in range(len(self.sent)):
            self.send(source, target, size)


def _read(model: Outline, rank: int, shards: Mapping[int, int], layout: Ranks, whole: bool) -> int:
    """Return the bytes that a rank reads: all once where the model is whole in memory, else the
    blocks for calibration, twice for each batch of the sensitivities, and on rank 0 for the digest
    of the model. The first block is read once more before each of these, to see how blocks are
    called, and once to see whether they run one by one."""
    if whole:
        return model.outer_bytes + sum(model.block_bytes)
    batches = sum(count for shard, count in shards.items() if layout.of_shard(shard) == rank)
    times = 1 + 2 * batches + (rank == 0)
    first = model.block_bytes[0] * (2 + batches)
    return model.outer_bytes + times * sum(model.block_bytes) + first


def _operations(model: Outline, tokens: int, crosses: bool, gradients: bool) -> dict[str, float]:
    """Return the operations by stage: two for each weight or entry of H and token, every expert
    taken for used by every token; the search's are those of `search_cost`."""
    moments = sum(n * n for block in model.blocks for _, n in block.values())
    passes = 3 if crosses else 1
    forward = 2.0 * tokens * model.weights * passes
    searched = sum(search_cost(m, n) for block in model.blocks for m, n in block.values())
    backward = 6.0 * min(tokens, SENSITIVITY_TOKENS) * model.weights if gradients else 0.0
    return {
        "sensitivity": backward,
        "calibrate": forward + 2.0 * tokens * moments * (1 + crosses),
        "quantize": float(searched),
        "code": float(model.weights),
    }


def _plain_bytes(model: Outline) -> int:
    """Return the bytes of what is not quantized."""
    total = sum(model.block_bytes) + model.outer_bytes
    return max(0, total - model.weights * model.itemsize)
