"""Layers by kind: what has the same name in every block belongs together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BLOCK_LISTS = (["layers"], ["h"], ["blocks"])
"""How lists of blocks are called; what such a name follows tells nothing."""


@dataclass(frozen=True)
class Place:
    """What is reported of one kind of matrix in one block, the mean over its experts.

    Attributes:
        block: its number; None for matrices outside the blocks.
        bits, limit, loss: per weight; limit None where it was not computed.
    """

    name: str
    block: int | None
    weights: int
    bytes: int
    loss: float | None
    limit: float | None

    @property
    def bits(self) -> float:
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
    def weights(self) -> int:
        return sum(place.weights for place in self.places)

    @property
    def bytes(self) -> int:
        return sum(place.bytes for place in self.places)

    @property
    def bits(self) -> float:
        return 8 * self.bytes / self.weights

    @property
    def gap(self) -> float | None:
        return mean_gap(self.places)

    @property
    def loss(self) -> float | None:
        """Mean over the blocks."""
        known = [place.loss for place in self.places if place.loss is not None]
        return sum(known) / len(known) if known else None


def mean_gap(places: Sequence[Place]) -> float | None:
    """Bits per weight above the limit, over all weights whose limit is known."""
    known = [(place.gap, place.weights) for place in places if place.gap is not None]
    total = sum(weights for _, weights in known)
    return sum(gap * weights for gap, weights in known) / total if known else None


def kinds(layers: Sequence[Mapping[str, Any]]) -> list[Kind]:
    """The layers of a report (LayerReport as JSON), by kind in the order of their first block."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for layer in layers:
        name = kind_and_block(layer["name"])[0]
        found.setdefault(name, {}).setdefault(layer["name"], []).append(layer)
    return [
        Kind(name, tuple(_place(own, parts) for own, parts in members.items()))
        for name, members in found.items()
    ]


def kind_and_block(name: str) -> tuple[str, int | None]:
    """ "model.layers.7.mlp.up_proj.weight" is "mlp.up_proj" of block 7.

    The block's number is the first part of the name that is a number. What stands before it is left
    out if it is the usual list of blocks, whose name tells nothing.
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
        values = [part.get(field) for part in parts]
        known: list[float] = [value for value in values if value is not None]
        if len(known) < len(parts):
            return None
        return sum(value * own for value, own in zip(known, sizes, strict=True)) / weights

    return Place(
        name=name,
        block=kind_and_block(name)[1],
        weights=weights,
        bytes=sum(part["words_bytes"] + part["side_bytes"] for part in parts),
        loss=mean("relative_loss"),
        limit=mean("limit_bits"),
    )
