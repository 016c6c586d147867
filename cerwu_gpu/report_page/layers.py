"""Layers by kind: matrices that have the same name in all blocks belong together."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BLOCK_LISTS = (["layers"], ["h"], ["blocks"])
"""Usual names of lists of blocks; a kind is named without them."""


@dataclass(frozen=True)
class Place:
    """Figures of one kind of matrix in one block, the mean over its experts.

    Attributes:
        block: its number; None for matrices outside the blocks.
        loss: relative squared error of the outputs; None where it is unknown.
        limit: bits per weight; None where it was not computed.
    """

    name: str
    block: int | None
    weights: int
    bytes: int
    loss: float | None
    limit: float | None

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.bytes / self.weights

    @property
    def gap(self) -> float | None:
        """Bits per weight above the limit."""
        return None if self.limit is None else self.bits - self.limit


@dataclass(frozen=True)
class Kind:
    """Matrices of the same name in all blocks."""

    name: str
    places: tuple[Place, ...]

    @property
    def bytes(self) -> int:
        """Stored bytes in all blocks."""
        return sum(place.bytes for place in self.places)

    @property
    def bits(self) -> float:
        """Stored bits per weight, over all blocks."""
        return 8 * self.bytes / sum(place.weights for place in self.places)

    @property
    def gap(self) -> float | None:
        """Bits per weight above the limit, over all blocks."""
        return mean_gap(self.places)

    @property
    def loss(self) -> float | None:
        """Mean over the blocks."""
        losses = [place.loss for place in self.places if place.loss is not None]
        return sum(losses) / len(losses) if losses else None


def mean_gap(places: Iterable[Place]) -> float | None:
    """Return the bits per weight above the limit, over all weights whose limit is known."""
    gaps = [(place.gap, place.weights) for place in places if place.gap is not None]
    total = sum(weights for _, weights in gaps)
    return sum(gap * weights for gap, weights in gaps) / total if gaps else None


def kinds(layers: Sequence[Mapping[str, Any]]) -> list[Kind]:
    """Return a report's layers (LayerReport as JSON) by kind, in the order of their first block."""
    grouped: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for layer in layers:
        kind, _ = kind_and_block(layer["name"])
        grouped.setdefault(kind, {}).setdefault(layer["name"], []).append(layer)
    return [
        Kind(kind, tuple(_place(name, parts) for name, parts in members.items()))
        for kind, members in grouped.items()
    ]


def kind_and_block(name: str) -> tuple[str, int | None]:
    """Split a parameter's name: "model.layers.7.mlp.up_proj.weight" is "mlp.up_proj" of block 7.

    The block's number is the first part of the name that is a number. What stands before it is left
    out if it ends in one of BLOCK_LISTS.
    """
    parts = name.removesuffix(".weight").split(".")
    for index, part in enumerate(parts):
        if part.isdecimal():
            before = [] if parts[:index][-1:] in BLOCK_LISTS else [*parts[:index], "*"]
            return ".".join([*before, *parts[index + 1 :]]), int(part)
    return ".".join(parts), None


def _place(name: str, parts: Sequence[Mapping[str, Any]]) -> Place:
    sizes: list[int] = [part["shape"][0] * part["shape"][1] for part in parts]
    weights = sum(sizes)

    def mean(field: str) -> float | None:
        values = [float(part[field]) for part in parts if part.get(field) is not None]
        if len(values) < len(parts):
            return None
        return sum(value * size for value, size in zip(values, sizes, strict=True)) / weights

    return Place(
        name=name,
        block=kind_and_block(name)[1],
        weights=weights,
        bytes=sum(part["words_bytes"] + part["side_bytes"] for part in parts),
        loss=mean("relative_loss"),
        limit=mean("limit_bits"),
    )
