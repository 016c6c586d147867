"""Sums over calibration batches, shard by shard, so that they do not depend on who adds them up."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from cerwu_gpu.ranks import Ranks, shard_of

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class TokenBatch:
    """A batch of calibration samples.

    Attributes:
        tokens: int64 [batch, sequence].
        samples: numbers of the samples.
        shard: to which the batch belongs.
    """

    tokens: Tensor
    samples: range
    shard: int


def token_batches(tokens: Tensor, batch_size: int, ranks: Ranks) -> list[TokenBatch]:
    """Return this rank's batches of the calibration tokens, int64 [samples, sequence]."""
    pieces = torch.split(tokens, batch_size)
    batches, first = [], 0
    for number, piece in enumerate(pieces):
        samples = range(first, first + len(piece))
        first = samples.stop
        batches.append(TokenBatch(piece, samples, shard_of(number, len(pieces))))
    return [batch for batch in batches if ranks.of_shard(batch.shard) == ranks.index]


class ShardSums(Generic[K]):
    """Sums of tensors by key: each shard's by itself, the shards' then in their order.

    Rank 0 has the first shards and adds them up as they come; the other ranks keep each one.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._shard = 0
        self._sums: dict[K, dict[int, Tensor]] = {}

    def begin(self, shard: int) -> None:
        """Take what follows for a shard; they come in order."""
        if shard == self._shard:
            return
        self._shard = shard
        if self._ranks.first:
            for sums in self._sums.values():
                _add_up(sums)

    def buffer(self, key: K, make: Callable[[], Tensor]) -> Tensor:
        """Return this shard's sum, to be added to in place; `make` returns the first one, zeros."""
        sums = self._sums.setdefault(key, {})
        if self._shard not in sums:
            sums[self._shard] = make()
        return sums[self._shard]

    def add(self, key: K, tensor: Tensor) -> None:
        """Add a tensor, which nobody else may change afterwards, to this shard's sum."""
        sums = self._sums.setdefault(key, {})
        sums[self._shard] = sums[self._shard] + tensor if self._shard in sums else tensor

    def held(self) -> dict[K, list[int]]:
        """Return the shards of which this rank has sums, by key; of those that it has added up
        the first one."""
        if self._ranks.first:
            for sums in self._sums.values():
                _add_up(sums)
        return {key: sorted(sums) for key, sums in self._sums.items()}

    def pop(self, key: K) -> Tensor | None:
        """Return the sum of this rank's shards, and free it; None where there is none."""
        sums = self._sums.pop(key, None)
        if not sums:
            return None
        _add_up(sums)
        return next(iter(sums.values()))

    def moved(
        self, key: K, held: Sequence[Mapping[K, list[int]]], owner: int, empty: Callable[[], Tensor]
    ) -> Tensor | None:
        """Return the sum over all ranks on its owner, None elsewhere; this rank's sums are freed.

        Args:
            held: `held` of each rank.
            owner: the rank that gets the sum.
            empty: makes a tensor of the sum's shape, dtype and device.
        """
        ranks, total = self._ranks, None
        mine = self._sums.pop(key, {})
        for shard, rank in sorted(_places(key, held)):
            if rank == owner == ranks.index:
                part = mine.pop(shard)
            elif rank == ranks.index:
                ranks.send(mine.pop(shard).contiguous(), owner)
                continue
            elif owner == ranks.index:
                part = empty()
                ranks.receive(part, rank)
            else:
                continue
            total = part if total is None else total.add_(part)
        return total

    def shared(self, shapes: Mapping[K, torch.Size], device: torch.device) -> dict[K, Tensor]:
        """Return the sums over all ranks, float64 on every rank, zeros where there is none; this
        rank's sums are freed.

        Args:
            shapes: key -> shape of the sum.
            device: of the sums.
        """
        ranks = self._ranks
        if ranks.alone:
            none = partial(torch.zeros, dtype=torch.float64, device=device)
            here = {key: self.pop(key) for key in shapes}
            return {k: none(shapes[k]) if x is None else x.to(device) for k, x in here.items()}
        held = ranks.together(self.held)
        size = sum(shape.numel() for shape in shapes.values())
        shards = sorted({place for key in shapes for place in _places(key, held)})
        total = torch.zeros(size, dtype=torch.float64, device=device)
        for shard, rank in shards:
            part = torch.zeros_like(total)
            if rank == ranks.index:
                for key, place in _ranges(shapes):
                    sums = self._sums.get(key, {})
                    if shard in sums:
                        part[place] = sums[shard].to(part).flatten()
            ranks.broadcast(part, rank)
            total += part
        self._sums.clear()
        return {key: total[place].view(shapes[key]) for key, place in _ranges(shapes)}


def _add_up(sums: dict[int, Tensor]) -> None:
    """Replace the sums of shards by one, under the number of the first."""
    if len(sums) > 1:
        first, *rest = sorted(sums)
        total = sums[first]
        for shard in rest:
            total.add_(sums.pop(shard))
        sums[first] = total


def _places(key: K, held: Sequence[Mapping[K, list[int]]]) -> Iterator[tuple[int, int]]:
    """Yield the shards of which a rank has a sum, with that rank."""
    for rank, sums in enumerate(held):
        for shard in sums.get(key, ()):
            yield shard, rank


def _ranges(shapes: Mapping[K, torch.Size]) -> Iterator[tuple[K, slice]]:
    """Yield the place of each sum in a vector of all."""
    first = 0
    for key, shape in shapes.items():
        yield key, slice(first, first + shape.numel())
        first += shape.numel()
