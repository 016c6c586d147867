"""Quantize and code calibrated blocks, one at a time (docs/method.md)."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from cerwu_gpu.compression.blocks import Block, InputStatistics, Matrix, search_cost
from cerwu_gpu.compression.shared import Coding, SharedBlocks
from cerwu_gpu.config import GRADIENT_BASED, CompressionConfig, Sensitivity
from cerwu_gpu.container.journal import CodedWeight, Journal
from cerwu_gpu.container.matrix import EncodedMatrix, encode_matrix
from cerwu_gpu.container.writer import DirectoryWriter
from cerwu_gpu.errors import CalibrationError, CerwuError, ModelError
from cerwu_gpu.files import dtype_name
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.memory import give_back
from cerwu_gpu.progress import Clock
from cerwu_gpu.quantize.layer import NARROW_COLUMNS, QuantizedStack, Stack, quantize_stacks
from cerwu_gpu.quantize.objective import drift_target
from cerwu_gpu.quantize.sensitivity import Sensitivities, row_sensitivity
from cerwu_gpu.quantize.symbols import QuantizedMatrix
from cerwu_gpu.ranks import Ranks
from cerwu_gpu.report import LayerReport
from cerwu_gpu.threads import run, worker_count

T = TypeVar("T")

BATCH_STACKS = {"cpu": 16, "gpu": 1024}
"""Most stacks of a batch: on a CPU more would save nothing, and leave workers idle."""
BATCH_ELEMENTS = {"cpu": 1 << 22, "gpu": 1 << 27}
"""Most numbers in the Hessians and weights of a batch, which takes some 50 bytes for each."""


def compress_blocks(
    blocks: Iterable[Block],
    layouts: Mapping[str, WeightLayout],
    dtypes: Mapping[str, torch.dtype],
    writer: DirectoryWriter | None,
    config: CompressionConfig,
    clock: Clock,
    sensitivities: Sensitivities | None = None,
    journal: Journal | None = None,
    ranks: Ranks | None = None,
) -> list[LayerReport]:
    """Quantize, code and store every matrix of every block; the model gets the quantized weights.

    Args:
        blocks: in order; the next one is taken when the previous one is finished.
        layouts, dtypes: of every compressed parameter, by name.
        writer: stores the coded tensors; None on ranks that do not write.
        config: how to quantize.
        clock: collects the seconds of the stages calibrate, quantize and code.
        sensitivities: squared gradients for sensitivity layer, row and balanced, and additions to
            Hessians.
        journal: stores finished blocks; those that it holds already are read from it. None: they
            are not stored, or by rank 0.
        ranks: share the work; default: this process does all.

    Raises:
        CerwuError: with `config.strict`, at the first event.
        OutputError: the disk refuses a write.
    """
    reports: list[LayerReport] = []

    def store(coded: Future[list[CodedWeight]] | None) -> None:
        with clock.stage("code"):
            for weight in coded.result() if coded is not None else ():
                assert writer is not None, "rank 0 alone has coded weights"
                weight.add_to(writer)
                reports.extend(weight.reports)

    # Coding overlaps the next block's calibration and search; on a GPU it costs no time.
    with ThreadPoolExecutor(1, "coding") as coder:
        shared = SharedBlocks(ranks or Ranks(), layouts, dtypes)
        work = _Pass(
            layouts, dtypes, config, clock, sensitivities or Sensitivities(), coder, shared
        )
        pending: Future[list[CodedWeight]] | None = None
        for index, block in enumerate(_timed(blocks, clock)):
            if shared.held(journal, index):
                current = coder.submit(_read, journal, index)
                with clock.stage("calibrate"):
                    _restore(block, layouts, shared.weights(journal, index))
            else:
                coding = work.search(block)
                current = coder.submit(work.coded, index, coding, journal, pending)
            store(pending)
            pending = current
        store(pending)
    return reports


def _read(journal: Journal | None, index: int) -> list[CodedWeight]:
    """Return the journaled weights of a block; none on ranks without a journal."""
    return [] if journal is None else journal.read(index)


def _timed(blocks: Iterable[Block], clock: Clock) -> Iterator[Block]:
    """Yield the blocks; the time to make each counts as calibration."""
    iterator = iter(blocks)
    while True:
        with clock.stage("calibrate"):
            block = next(iterator, None)
        if block is None:
            return
        yield block


def _restore(
    block: Block, layouts: Mapping[str, WeightLayout], weights: Iterable[tuple[str, Tensor]]
) -> None:
    """Replace the weights of a block by journaled ones."""
    for name, weight in weights:
        for part in range(layouts[name].parts):
            block.replace(name, part, layouts[name].matrix(weight, part).to(torch.float32))


@dataclass(frozen=True)
class _Quantized:
    """A matrix after the search.

    Attributes:
        weight: [m, n] float32, as it is stored.
        find_limit: see QuantizedStack.
        seconds: time of the search's worker that the coding took.
    """

    coding: Coding
    weight: Tensor
    find_limit: Callable[[], float | None]
    seconds: float


@dataclass(frozen=True)
class _Pass:
    """The settings of `compress_blocks`, and the thread that codes."""

    layouts: Mapping[str, WeightLayout]
    dtypes: Mapping[str, torch.dtype]
    config: CompressionConfig
    clock: Clock
    sensitivities: Sensitivities
    coder: ThreadPoolExecutor
    shared: SharedBlocks

    def search(self, block: Block) -> list[Coding]:
        """Quantize and code a block; on a GPU the coding goes on in the coder afterwards.

        Each rank does what it owns; all of them get the quantized weights, and rank 0 what is
        coded.
        """
        with self.clock.stage("calibrate"):
            statistics = with_additions(block.statistics(), self.sensitivities)
        matrices = block.matrices()
        device = matrices[0].weight.device if matrices else torch.device("cpu")
        coding = self.shared.searched(
            partial(self._searched, block, matrices, statistics, device), block, device
        )
        by_input = [matrix for stack in stacks(matrices) for matrix in stack]
        places = {(matrix.name, matrix.part): place for place, matrix in enumerate(by_input)}
        return sorted(coding, key=lambda x: places[x.name, x.part])

    def _searched(
        self,
        block: Block,
        matrices: Sequence[Matrix],
        statistics: Mapping[str, InputStatistics],
        device: torch.device,
    ) -> list[tuple[Coding, Tensor]]:
        """Quantize what this rank owns of a block, and write it back; return it with the weights
        [m, n] that others need."""
        give_back()  # what calibration took, before the search takes more
        wide = any(len(x.hessian) > NARROW_COLUMNS for x in statistics.values())
        owned = [stack for stack in stacks(matrices) if statistics[stack[0].input].here]
        # The longest first, so that no worker is left with it alone.
        order = sorted(batches(owned, _weights), key=lambda batch: -sum(map(_cost, batch)))
        coding, seconds = [], 0.0
        # Batches that are searched one by one are also written back one by one, to save memory.
        together = device.type == "cpu" and not wide
        for group in [order] if together else [[batch] for batch in order]:
            with self.clock.stage("quantize"):
                results = run(partial(self._search_batch, batch, statistics) for batch in group)
                quantized = [matrix for batch in results for matrix in batch]
                limits = run([matrix.find_limit for matrix in quantized], device)
            for matrix, limit in zip(quantized, limits, strict=True):
                block.replace(matrix.coding.name, matrix.coding.part, matrix.weight)
                coding.append(
                    (replace(matrix.coding, limit=limit), self.shared.kept(matrix.weight))
                )
                seconds += matrix.seconds / worker_count()
            del results, quantized
        self.clock.move(seconds, "quantize", "code")
        return coding

    def _search_batch(
        self, batch: list[list[Matrix]], statistics: Mapping[str, InputStatistics]
    ) -> list[_Quantized]:
        """Quantize the matrices of stacks of equal shape.

        On a CPU they are coded here, by the worker that searched; elsewhere during the next search.
        """
        return [
            self._finished(matrix, result, loss, find_limit, events)
            for stack, (quantized, events) in zip(
                batch, self._quantize(batch, statistics), strict=True
            )
            for matrix, result, loss, find_limit in zip(
                stack,
                quantized.matrices,
                quantized.relative_losses,
                quantized.find_limits,
                strict=True,
            )
        ]

    def _finished(
        self,
        matrix: Matrix,
        result: QuantizedMatrix,
        loss: float,
        find_limit: Callable[[], float | None],
        events: tuple[str, ...],
    ) -> _Quantized:
        """Return a quantized matrix with its weights, coded or on its way through the coder."""
        dtype = self.dtypes[matrix.name]
        weight = result.weight(dtype).to(torch.float32)
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(
                f"{self._key(matrix)}: its quantized weights are beyond {dtype_name(dtype)}: "
                "exclude it."
            )
        begin = time.perf_counter()
        if weight.device.type == "cpu":
            encoded: Future[EncodedMatrix] = Future()
            encoded.set_result(encode_matrix(result, loss))
        else:
            encoded = self.coder.submit(encode_matrix, result, loss)
        seconds = time.perf_counter() - begin
        coding = Coding(matrix.name, matrix.part, encoded, loss, None, events)
        return _Quantized(coding, weight, find_limit, seconds)

    def _quantize(
        self, batch: list[list[Matrix]], statistics: Mapping[str, InputStatistics]
    ) -> list[tuple[QuantizedStack, tuple[str, ...]]]:
        """Return the quantized stacks of a batch, each with its events."""
        posed = [self._posed(stack, statistics) for stack in batch]
        names = [self._key(stack[0]) for stack in batch]
        both = zip(batch, quantize_named(posed, names, self.config), strict=True)
        return [(one, self._events(stack, one, statistics)) for stack, one in both]

    def _posed(self, stack: list[Matrix], statistics: Mapping[str, InputStatistics]) -> Stack:
        """Return what is to be quantized in place of a stack's weights, and against what."""
        seen = statistics[stack[0].input]
        hessian = used_hessian(seen)
        alpha = stack_sensitivities(stack, statistics, self.config, self.sensitivities)
        targets = [matrix.weight for matrix in stack]
        if seen.cross is not None:
            moved = drift_target(torch.cat(targets), hessian=hessian, cross=seen.cross)
            targets = list(torch.split(moved, [len(target) for target in targets]))
        return Stack(targets, hessian, alpha, seen.rows_seen)

    def _events(
        self,
        stack: list[Matrix],
        quantized: QuantizedStack,
        statistics: Mapping[str, InputStatistics],
    ) -> tuple[str, ...]:
        """Return what did not go as planned with a stack.

        Raises:
            CalibrationError: something, and it must not.
        """
        events, seen, config = [], statistics[stack[0].input], self.config
        if seen.tokens == 0:
            events.append("no calibration token reached it: quantized against H = I")
        elif not bool(used_hessian(seen).diagonal().any()):
            events.append("its inputs are 0 for every calibration token: quantized against H = I")
        if not all(self.sensitivities.reaches(matrix.name, matrix.part) for matrix in stack):
            events.append("no gradient reached its outputs: it counts like the mean of all others")
        rows, columns = seen.rows_seen, len(used_hessian(seen))
        if rows and rows < columns and quantized.damping is not None:
            events.append(
                f"{rows:,} calibration tokens for {columns:,} columns: its Hessian was taken with "
                f"a damping of {quantized.damping:.3g}"
            )
        if quantized.more_damping is not None:
            events.append(f"its Hessian needed a damping of {quantized.more_damping:.3g}")
        if events and config.strict:
            raise CalibrationError(
                f"{self._key(stack[0])}: {events[0]} (strict): give more calibration text, or "
                "exclude it."
            )
        return tuple(events)

    def _key(self, matrix: Matrix) -> str:
        return self.layouts[matrix.name].key(matrix.part)

    def coded(
        self,
        index: int,
        coding: Sequence[Coding],
        journal: Journal | None,
        previous: Future[list[CodedWeight]] | None,
    ) -> list[CodedWeight]:
        """Return the coded parameters of block number `index`, parts in order, and journal them.

        An error of the `previous` block is raised again: the journal has no gaps.
        """
        if previous is not None:
            previous.result()
        weights = []
        for name in dict.fromkeys(matrix.name for matrix in coding):
            parts = sorted((x for x in coding if x.name == name), key=lambda x: x.part)
            matrices = [part.encoded.result() for part in parts]
            side = b"".join(matrix.side for matrix in matrices)
            weight = CodedWeight(
                name=name,
                shape=self.layouts[name].shape,
                dtype=self.dtypes[name],
                transposed=self.layouts[name].transposed,
                parts=tuple(matrix.part for matrix in matrices),
                words=torch.from_numpy(np.concatenate([matrix.words for matrix in matrices])),
                side=torch.frombuffer(bytearray(side), dtype=torch.uint8),
                reports=tuple(part.report() for part in parts),
            )
            weights.append(weight)
        if journal is not None and weights:
            journal.write(index, weights)
            return journal.read(index)  # views of the file: the writer's shard takes no memory
        return weights


def _cost(stack: Sequence[Matrix]) -> float:
    """Return the approximate cost of a stack's search."""
    return search_cost(sum(len(matrix.weight) for matrix in stack), stack[0].weight.shape[1])


def _weights(stack: Sequence[Matrix]) -> list[Tensor]:
    """Return the matrices of a stack [m_k, n]."""
    return [matrix.weight for matrix in stack]


def used_hessian(statistics: InputStatistics) -> Tensor:
    """Return H, or the identity where no token was seen."""
    hessian = statistics.hessian
    if statistics.tokens:
        return hessian
    return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)


def with_additions(
    statistics: dict[str, InputStatistics], sensitivities: Sensitivities
) -> dict[str, InputStatistics]:
    """Return the statistics with the additions to their Hessians."""
    joined = dict(statistics)
    for name in statistics.keys() & sensitivities.hessian_additions.keys():
        plain = statistics[name]
        added = sensitivities.hessian_additions[name].to(plain.hessian)
        cross = None if plain.cross is None else plain.cross + added
        joined[name] = replace(plain, hessian=plain.hessian + added, cross=cross)
    return joined


def stacks(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    """Return the matrices grouped by input: a group shares a factorisation and a pass."""
    by_input: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        by_input.setdefault(matrix.input, []).append(matrix)
    return list(by_input.values())


def batches(items: Iterable[T], weights: Callable[[T], Sequence[Tensor]]) -> list[list[T]]:
    """Return the items in batches to be quantized together: those whose matrices `weights` [m_k, n]
    have equal shapes, as the experts of a mixture have.

    The batches do not depend on the number of workers, which share them.
    """
    by_shape: dict[tuple[int, ...], list[T]] = {}
    kind = "cpu"
    for item in items:
        first, *_ = matrices = weights(item)
        kind = "cpu" if first.device.type == "cpu" else "gpu"
        by_shape.setdefault((first.shape[1], *map(len, matrices)), []).append(item)
    result = []
    for (columns, *rows), alike in by_shape.items():
        room = BATCH_ELEMENTS[kind] // (columns * (columns + sum(rows)))
        size = max(1, min(room, BATCH_STACKS[kind]))
        result += [alike[first : first + size] for first in range(0, len(alike), size)]
    return result


def quantize_named(
    stacks: Sequence[Stack], names: Sequence[str], config: CompressionConfig
) -> list[QuantizedStack]:
    """Quantize stacks of equal shape together.

    Raises:
        CerwuError: one of them cannot be quantized; it is named.
    """
    try:
        return quantize_stacks(stacks, config)
    except CerwuError as error:
        if len(stacks) == 1:
            raise type(error)(f"{names[0]}: {error}") from error
    # One by one, so that the error names the right one.
    each = zip(stacks, names, strict=True)
    return [quantize_named([stack], [name], config)[0] for stack, name in each]


def stack_sensitivities(
    stack: Sequence[Matrix],
    statistics: Mapping[str, InputStatistics],
    config: CompressionConfig,
    sensitivities: Sensitivities,
) -> list[Tensor]:
    """Return alpha [m_k] of each matrix of a stack (quantize/sensitivity.py).

    An expert's alpha is multiplied by its share of the tokens: J is a mean over all tokens.
    """
    seen = statistics[stack[0].input]
    kind: Sensitivity = config.objective.sensitivity
    if kind in GRADIENT_BASED and not config.needs_gradients:
        kind = "none"
    tokens = [x.tokens for x in statistics.values() if x.tokens]
    share = (seen.tokens or min(tokens, default=1)) / max(tokens, default=1)
    return [
        share
        * row_sensitivity(
            kind,
            matrix.weight,
            used_hessian(seen),
            sensitivities.squared_gradient(matrix.name, matrix.part),
        )
        for matrix in stack
    ]
