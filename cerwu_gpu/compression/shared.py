"""The quantized and coded matrices of a block, between the ranks that share the work."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from cerwu_gpu.compression.blocks import Block
from cerwu_gpu.container.journal import Journal
from cerwu_gpu.container.matrix import EncodedMatrix
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.ranks import Ranks
from cerwu_gpu.report import LayerReport


@dataclass(frozen=True)
class Coding:
    """A matrix on its way through the coder."""

    name: str
    part: int
    encoded: Future[EncodedMatrix]
    loss: float
    limit: float | None
    events: tuple[str, ...]

    def report(self) -> LayerReport:
        """Return the report of the coded matrix."""
        encoded = self.encoded.result()
        rows, columns = encoded.part.rows, encoded.part.columns
        words, side = 4 * len(encoded.words), len(encoded.side)
        return LayerReport(
            name=self.name,
            part=self.part,
            shape=(rows, columns),
            bits_per_weight=8 * (words + side) / (rows * columns),
            relative_loss=self.loss,
            words_bytes=words,
            side_bytes=side,
            limit_bits=self.limit,
            events=self.events,
        )


class SharedBlocks:
    """The blocks of a pass that several ranks quantize together."""

    def __init__(
        self,
        ranks: Ranks,
        layouts: Mapping[str, WeightLayout],
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        """Take the layouts and dtypes of the parameters, by name."""
        self._ranks = ranks
        self._layouts = layouts
        self._dtypes = dtypes

    def held(self, journal: Journal | None, index: int) -> bool:
        """Return whether the journal of rank 0 holds block number `index`."""
        return self._ranks.from_first(lambda: journal is not None and journal.holds(index))

    def weights(self, journal: Journal | None, index: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and quantized parameters of a block in the journal of rank 0."""
        if self._ranks.alone:
            yield from () if journal is None else journal.weights(index)
            return
        weights = {} if journal is None else dict(journal.weights(index))
        for name in self._ranks.from_first(lambda: list(weights)):
            empty = torch.empty(self._layouts[name].shape, dtype=self._dtypes[name])
            weight = weights.pop(name) if self._ranks.first else empty
            self._ranks.broadcast(weight.contiguous(), 0)
            yield name, weight

    def kept(self, weight: Tensor) -> Tensor:
        """Return a quantized matrix if other ranks need it, else nothing of it."""
        return weight.new_empty(0) if self._ranks.alone else weight

    def searched(
        self,
        search: Callable[[], list[tuple[Coding, Tensor]]],
        block: Block,
        device: torch.device,
    ) -> list[Coding]:
        """Search on each rank what it owns, and give all of them the quantized weights.

        Args:
            search: quantizes this rank's matrices, writes them back and returns them with their
                weights [m, n] float32.
            block: takes the weights of the others, on `device`.

        Returns:
            On rank 0 all coded matrices; elsewhere none.

        Raises:
            CerwuError: that of the first rank that raised one, on all of them.
        """
        ranks = self._ranks
        if ranks.alone:
            return [coding for coding, _ in search()]
        mine: list[tuple[Coding, Tensor]] = []

        def labels() -> list[tuple[str, int]]:
            mine.extend(search())
            return [(coding.name, coding.part) for coding, _ in mine]

        for source, names in enumerate(ranks.together(labels)):
            for place, (name, part) in enumerate(names):
                shape, dtype = self._layouts[name].matrix_shape, self._dtypes[name]
                if source == ranks.index:
                    ranks.broadcast(mine[place][1].to(dtype).contiguous(), source)
                    continue
                weight = torch.empty(shape, dtype=dtype, device=device)
                ranks.broadcast(weight, source)
                block.replace(name, part, weight.to(torch.float32))
        coded = [(x.encoded.result(), x.name, x.part, x.loss, x.limit, x.events) for x, _ in mine]
        return [_coding(*one) for some in ranks.to_first(coded) for one in some]


def _coding(
    encoded: EncodedMatrix,
    name: str,
    part: int,
    loss: float,
    limit: float | None,
    events: tuple[str, ...],
) -> Coding:
    """Return a matrix that is coded."""
    future: Future[EncodedMatrix] = Future()
    future.set_result(encoded)
    return Coding(name, part, future, loss, limit, events)
