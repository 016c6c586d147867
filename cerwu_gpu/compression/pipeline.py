"""From calibrated blocks to coded tensors, one block at a time (docs/method.md).

Only names and tensors are known here; `cerwu_gpu.calibration` supplies the blocks of a model.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cerwu_gpu.compression.blocks import Block, InputStatistics, Matrix
from cerwu_gpu.config import GRADIENT_BASED, CompressionConfig, Sensitivity
from cerwu_gpu.container.journal import CodedWeight, Journal
from cerwu_gpu.container.matrix import EncodedMatrix, encode_matrix
from cerwu_gpu.container.writer import DirectoryWriter
from cerwu_gpu.errors import CalibrationError, CerwuError, ModelError
from cerwu_gpu.files import dtype_name
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.progress import Clock
from cerwu_gpu.quantize.layer import NARROW_COLUMNS, QuantizedStack, quantize_stack
from cerwu_gpu.quantize.objective import drift_target
from cerwu_gpu.quantize.sensitivity import Sensitivities, row_sensitivity
from cerwu_gpu.report import LayerReport
from cerwu_gpu.threads import run, worker_count


def compress_blocks(
    blocks: Iterable[Block],
    layouts: Mapping[str, WeightLayout],
    dtypes: Mapping[str, torch.dtype],
    writer: DirectoryWriter,
    config: CompressionConfig,
    clock: Clock,
    sensitivities: Sensitivities | None = None,
    journal: Journal | None = None,
) -> list[LayerReport]:
    """Quantize, code and store every matrix of every block; the model gets the quantized weights.

    Args:
        blocks: in order; the next one is asked for when the previous one is done.
        layouts, dtypes: of every compressed parameter, by name.
        writer: takes the coded tensors.
        config: how to quantize.
        clock: gets the stages calibrate, quantize and code.
        sensitivities: squared gradients for sensitivity layer, row and balanced, and what
            is added to Hessians.
        journal: keeps finished blocks; those that it holds already are taken from it.

    Raises:
        CerwuError: with `config.strict`, at the first event.
        OutputError: the disk refuses something.
    """
    reports: list[LayerReport] = []
    known = sensitivities or Sensitivities()

    def store(coded: Future[list[CodedWeight]] | None) -> None:
        with clock.stage("code"):
            for weight in coded.result() if coded is not None else ():
                weight.add_to(writer)
                reports.extend(weight.reports)

    # Coding runs beside the next block's calibration and search; on a GPU it costs no time.
    with ThreadPoolExecutor(1, "coding") as coder:
        pending: Future[list[CodedWeight]] | None = None
        for index, block in enumerate(_timed(blocks, clock)):
            if journal is not None and journal.holds(index):
                current = coder.submit(journal.read, index)
                with clock.stage("calibrate"):
                    _restore(block, layouts, journal.weights(index))
            else:
                coding = _search(block, layouts, dtypes, config, clock, known, coder)
                current = coder.submit(_finished, index, layouts, dtypes, coding, journal, pending)
            store(pending)
            pending = current
        store(pending)
    return reports


def _timed(blocks: Iterable[Block], clock: Clock) -> Iterator[Block]:
    """Yield the blocks; the time that it takes to come to each counts as calibration."""
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
    """Replace the weights of a block that is finished."""
    for name, weight in weights:
        for part in range(layouts[name].parts):
            block.replace(name, part, layouts[name].matrix(weight, part).to(torch.float32))


def _search(
    block: Block,
    layouts: Mapping[str, WeightLayout],
    dtypes: Mapping[str, torch.dtype],
    config: CompressionConfig,
    clock: Clock,
    sensitivities: Sensitivities,
    coder: ThreadPoolExecutor,
) -> list["_Coding"]:
    """Quantize and code a block; on a GPU the coding goes on in the coder afterwards."""
    with clock.stage("calibrate"):
        statistics = with_additions(block.statistics(), sensitivities)
    work = stacks(block.matrices())
    device = work[0][0].weight.device if work else torch.device("cpu")
    wide = any(len(each.hessian) > NARROW_COLUMNS for each in statistics.values())
    # The longest first, so that no worker is left with it alone.
    order = sorted(work, key=lambda stack: -_cost(stack))
    coding, seconds = [], 0.0
    # One after the other they are also written back one after the other, which takes less memory.
    for together in [order] if device.type == "cpu" and not wide else [[each] for each in order]:
        with clock.stage("quantize"):
            found = run(
                partial(
                    _search_stack, stack, layouts, dtypes, statistics, config, sensitivities, coder
                )
                for stack in together
            )
            parts = [part for stack in found for part in stack]
            limits = run([part.find_limit for part in parts], device)
        for part, limit in zip(parts, limits, strict=True):
            block.replace(part.coding.name, part.coding.part, part.weight)
            coding.append(replace(part.coding, limit=limit))
            seconds += part.seconds / worker_count()
        del found, parts
    clock.move(seconds, "quantize", "code")
    places = {matrix: place for place, matrix in enumerate(_labels(work))}
    return sorted(coding, key=lambda each: places[each.name, each.part])


def _labels(work: Sequence[Sequence[Matrix]]) -> list[tuple[str, int]]:
    return [(matrix.name, matrix.part) for stack in work for matrix in stack]


def _cost(stack: Sequence[Matrix]) -> float:
    """Return about how long a stack takes, in units that do not matter: its factors, its rows."""
    columns = stack[0].weight.shape[1]
    return columns**2 * (4 * columns + sum(len(matrix.weight) for matrix in stack))


@dataclass(frozen=True)
class _Part:
    """A matrix that was searched.

    Attributes:
        weight: [m, n] float32, as it is stored.
        find_limit: see QuantizedStack.
        seconds: of the worker that searched, which the coding took.
    """

    coding: "_Coding"
    weight: Tensor
    find_limit: Callable[[], float | None]
    seconds: float


def _search_stack(
    stack: list[Matrix],
    layouts: Mapping[str, WeightLayout],
    dtypes: Mapping[str, torch.dtype],
    statistics: Mapping[str, InputStatistics],
    config: CompressionConfig,
    sensitivities: Sensitivities,
    coder: ThreadPoolExecutor,
) -> list[_Part]:
    """Quantize the matrices of a stack.

    On a CPU they are coded here, by the worker that searched; elsewhere beside the next search.
    """
    name = layouts[stack[0].name].key(stack[0].part)
    found, events = _quantize(name, stack, statistics, config, sensitivities)
    done = []
    results = zip(stack, found.matrices, found.relative_losses, found.find_limits, strict=True)
    for matrix, result, loss, find_limit in results:
        weight = result.weight(dtypes[matrix.name]).to(torch.float32)
        if not bool(torch.isfinite(weight).all()):
            raise ModelError(
                f"{layouts[matrix.name].key(matrix.part)}: its quantized weights are beyond "
                f"{dtype_name(dtypes[matrix.name])}: exclude it."
            )
        begin = time.perf_counter()
        if weight.device.type == "cpu":
            encoded: Future[EncodedMatrix] = Future()
            encoded.set_result(encode_matrix(result, loss))
        else:
            encoded = coder.submit(encode_matrix, result, loss)
        seconds = time.perf_counter() - begin
        coding = _Coding(matrix.name, matrix.part, encoded, loss, None, events)
        done.append(_Part(coding, weight, find_limit, seconds))
    return done


def used_hessian(statistics: InputStatistics) -> Tensor:
    """Return H, or the identity where no token was seen."""
    hessian = statistics.hessian
    if statistics.tokens:
        return hessian
    return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)


def with_additions(
    statistics: dict[str, InputStatistics], sensitivities: Sensitivities
) -> dict[str, InputStatistics]:
    """Return the statistics with what is added to their Hessians."""
    joined = dict(statistics)
    for name in statistics.keys() & sensitivities.hessian_additions.keys():
        known = statistics[name]
        added = sensitivities.hessian_additions[name].to(known.hessian)
        cross = None if known.cross is None else known.cross + added
        joined[name] = InputStatistics(known.hessian + added, known.tokens, cross)
    return joined


def stacks(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    """Return the matrices that see the same input together: one factorisation and one pass for
    all."""
    by_input: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        by_input.setdefault(matrix.input, []).append(matrix)
    return list(by_input.values())


def stack_sensitivities(
    stack: Sequence[Matrix],
    statistics: Mapping[str, InputStatistics],
    config: CompressionConfig,
    sensitivities: Sensitivities,
) -> list[Tensor]:
    """Return alpha [m_k] of each matrix of a stack (quantize/sensitivity.py).

    An expert that sees a share of the tokens counts by that share: J is a mean over all tokens.
    """
    own = statistics[stack[0].input]
    wanted = config.objective.sensitivity
    unused = wanted in GRADIENT_BASED and not config.needs_gradients
    kind: Sensitivity = "none" if unused else wanted
    seen = [other.tokens for other in statistics.values() if other.tokens]
    share = (own.tokens or min(seen, default=1)) / max(seen, default=1)
    return [
        share
        * row_sensitivity(
            kind,
            matrix.weight,
            used_hessian(own),
            sensitivities.squared_gradient(matrix.name, matrix.part),
        )
        for matrix in stack
    ]


def _quantize(
    name: str,
    stack: list[Matrix],
    statistics: Mapping[str, InputStatistics],
    config: CompressionConfig,
    sensitivities: Sensitivities,
) -> tuple[QuantizedStack, tuple[str, ...]]:
    """Return the stack quantized, and what did not go as planned."""
    events = []
    own = statistics[stack[0].input]
    hessian = used_hessian(own)
    if own.tokens == 0:
        events.append("no calibration token reached it: quantized against H = I")
    elif not bool(hessian.diagonal().any()):
        events.append("its inputs are 0 for every calibration token: quantized against H = I")
    if not all(sensitivities.reaches(matrix.name, matrix.part) for matrix in stack):
        events.append("no gradient reached its outputs: it counts like the mean of all others")
    try:
        alpha = stack_sensitivities(stack, statistics, config, sensitivities)
        targets = [matrix.weight for matrix in stack]
        if own.cross is not None:
            moved = drift_target(torch.cat(targets), hessian=hessian, cross=own.cross)
            targets = list(torch.split(moved, [len(target) for target in targets]))
        quantized = quantize_stack(targets, hessian, config, alpha)
    except CerwuError as error:
        raise type(error)(f"{name}: {error}") from error
    if quantized.damping != config.objective.damping:
        events.append(f"its Hessian needed a damping of {quantized.damping:.3g}")
    if events and config.strict:
        raise CalibrationError(
            f"{name}: {events[0]} (strict): give more calibration text, or exclude it."
        )
    return quantized, tuple(events)


@dataclass(frozen=True)
class _Coding:
    """A matrix on its way through the coder."""

    name: str
    part: int
    encoded: Future[EncodedMatrix]
    loss: float
    limit: float | None
    events: tuple[str, ...]

    def report(self) -> LayerReport:
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


def _finished(
    index: int,
    layouts: Mapping[str, WeightLayout],
    dtypes: Mapping[str, torch.dtype],
    coded: Sequence[_Coding],
    journal: Journal | None,
    before: Future[list[CodedWeight]] | None,
) -> list[CodedWeight]:
    """The parameters of a block, parts in order, when they are through the coder, and journaled.

    What failed in the block `before` is raised again: the journal has no gaps.
    """
    if before is not None:
        before.result()
    weights = []
    for name in dict.fromkeys(each.name for each in coded):
        parts = sorted((each for each in coded if each.name == name), key=lambda each: each.part)
        matrices = [each.encoded.result() for each in parts]
        side = b"".join(matrix.side for matrix in matrices)
        weight = CodedWeight(
            name=name,
            shape=layouts[name].shape,
            dtype=dtypes[name],
            transposed=layouts[name].transposed,
            parts=tuple(matrix.part for matrix in matrices),
            words=torch.from_numpy(np.concatenate([matrix.words for matrix in matrices])),
            side=torch.frombuffer(bytearray(side), dtype=torch.uint8),
            reports=tuple(each.report() for each in parts),
        )
        weights.append(weight)
    if journal is not None and weights:
        journal.write(index, weights)
    return weights
