"""From calibrated blocks to coded tensors, one block in work at a time (docs/method.md).

Only names and tensors are known here; `cerwu_gpu.hf` supplies the blocks of a transformers model.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cerwu_gpu.blocks import Block, Blocks, InputStatistics, Matrix
from cerwu_gpu.config import GRADUAL, CompressionConfig
from cerwu_gpu.container.journal import CodedWeight, Journal
from cerwu_gpu.container.matrix import EncodedMatrix, encode_matrix
from cerwu_gpu.container.writer import DirectoryWriter
from cerwu_gpu.errors import CalibrationError, CerwuError, ModelError
from cerwu_gpu.files import dtype_name
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.progress import Clock
from cerwu_gpu.quantize.layer import NARROW_COLUMNS, QuantizedStack, quantize_stack
from cerwu_gpu.quantize.objective import drift_target
from cerwu_gpu.quantize.sensitivity import row_sensitivity, squared_gradient
from cerwu_gpu.quantize.symbols import QuantizedMatrix
from cerwu_gpu.quantize.target import Estimate, Probe, estimate, probe
from cerwu_gpu.report import LayerReport
from cerwu_gpu.threads import run, worker_count

SAMPLED_BLOCKS = 8
"""Blocks that an estimate of the rate looks into."""


def compress_blocks(
    blocks: Iterable[Block],
    layouts: Mapping[str, WeightLayout],
    dtypes: Mapping[str, torch.dtype],
    writer: DirectoryWriter,
    config: CompressionConfig,
    clock: Clock,
    gradients: Mapping[tuple[str, int], Tensor] | None = None,
    journal: Journal | None = None,
) -> list[LayerReport]:
    """Quantize, code and store every matrix of every block; the model gets the quantized weights.

    Args:
        blocks: in order; the next one is asked for when the previous one is done.
        layouts, dtypes: of every compressed parameter, by name.
        writer: takes the coded tensors.
        config: how to quantize.
        clock: gets the stages calibrate, quantize and code.
        gradients: (name, part) -> mean squared gradient [m] at the outputs of each matrix, for
            config.sensitivity layer, row and balanced.
        journal: keeps finished blocks; those that it holds already are taken from it.

    Raises:
        CerwuError: with `config.strict`, at the first event.
        OutputError: the disk refuses something.
    """
    reports: list[LayerReport] = []
    iterator = enumerate(blocks)
    # Coding runs beside the next block's calibration and search; on a GPU it costs no time.
    with ThreadPoolExecutor(1, "coding") as coder:
        waiting: Future[list[CodedWeight]] | None = None
        while True:
            with clock.stage("calibrate"):
                index, block = next(iterator, (0, None))
            current = None
            if block is not None and journal is not None and journal.holds(index):
                current = coder.submit(journal.read, index)
                with clock.stage("calibrate"):
                    _restore(block, layouts, journal.weights(index))
            elif block is not None:
                coding = _search(block, layouts, dtypes, config, clock, gradients or {}, coder)
                current = coder.submit(_finished, index, layouts, dtypes, coding, journal, waiting)
            with clock.stage("code"):
                for weight in waiting.result() if waiting is not None else ():
                    weight.add_to(writer)
                    reports += weight.reports
            waiting = current
            if block is None:
                return reports


def _restore(
    block: Block, layouts: Mapping[str, WeightLayout], weights: Iterable[tuple[str, Tensor]]
) -> None:
    """Take a block that is finished to where it was: its inputs seen, its weights replaced."""
    block.pass_by()
    for name, weight in weights:
        for part in range(layouts[name].parts):
            block.replace(name, part, layouts[name].matrix(weight, part).to(torch.float32))


def _search(
    block: Block,
    layouts: Mapping[str, WeightLayout],
    dtypes: Mapping[str, torch.dtype],
    config: CompressionConfig,
    clock: Clock,
    gradients: Mapping[tuple[str, int], Tensor],
    coder: ThreadPoolExecutor,
) -> list["_Coding"]:
    """Quantize and code a block; on a GPU the coding goes on in the coder afterwards."""
    with clock.stage("calibrate"):
        statistics = block.statistics()
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
                partial(_search_stack, stack, layouts, dtypes, statistics, config, gradients, coder)
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
    gradients: Mapping[tuple[str, int], Tensor],
    coder: ThreadPoolExecutor,
) -> list[_Part]:
    """Quantize the matrices of a stack.

    On a CPU they are coded here, by the worker that searched; elsewhere beside the next search.
    """
    name = layouts[stack[0].name].key(stack[0].part)
    found, events = _quantize(name, stack, statistics, config, gradients)
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


def sample_stacks(
    blocks: Blocks,
    config: CompressionConfig,
    gradients: Mapping[tuple[str, int], Tensor],
) -> list[Probe]:
    """Some rows of some stacks, spread over the model, for a fast estimate of its rate.

    All blocks are walked through, so that a cache behind them is complete afterwards.
    """
    taken: dict[int, list[Probe]] = {}
    weights: dict[int, int] = {}
    every = max(1, len(blocks) // SAMPLED_BLOCKS)
    for index, block in enumerate(blocks):
        group = min(index // every, (len(blocks) - 1) // every)
        statistics = block.statistics()
        matrices = block.matrices()
        size = sum(matrix.weight.numel() for matrix in matrices)
        weights[group] = weights.get(group, 0) + size
        if group in taken:
            continue
        taken[group] = [_probe(stack, statistics, config, gradients) for stack in stacks(matrices)]
    probes = []
    for group, members in taken.items():
        scale = weights[group] / max(1.0, sum(member.weights for member in members))
        probes += [
            replace(each, weights=each.weights * scale, matrices=each.matrices * scale)
            for each in members
        ]
    return probes


def estimate_model(probes: Sequence[Probe], config: CompressionConfig) -> Estimate:
    """Bits per weight and loss of the whole model at config.lmbda, from a sample of its rows."""

    def stored(matrix: QuantizedMatrix) -> tuple[float, float]:
        encoded = encode_matrix(matrix, 0.0)
        return 32.0 * len(encoded.words), 8.0 * len(encoded.side)

    return estimate(probes, config, stored)


def _probe(
    stack: Sequence[Matrix],
    statistics: Mapping[str, InputStatistics],
    config: CompressionConfig,
    gradients: Mapping[tuple[str, int], Tensor],
) -> Probe:
    hessian = _used_hessian(statistics[stack[0].input])
    alpha = stack_sensitivities(stack, statistics, config, gradients)
    weights = [matrix.weight for matrix in stack]
    return probe(stack[0].name, weights, hessian, alpha)


def _used_hessian(statistics: InputStatistics) -> Tensor:
    """H, or the identity where no token was seen."""
    hessian = statistics.hessian
    if statistics.tokens:
        return hessian
    return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)


def stacks(matrices: Sequence[Matrix]) -> list[list[Matrix]]:
    """Matrices that see the same input, together: one factorisation and one pass for all."""
    by_input: dict[str, list[Matrix]] = {}
    for matrix in matrices:
        by_input.setdefault(matrix.input, []).append(matrix)
    return list(by_input.values())


def stack_sensitivities(
    stack: Sequence[Matrix],
    statistics: Mapping[str, InputStatistics],
    config: CompressionConfig,
    gradients: Mapping[tuple[str, int], Tensor],
) -> list[Tensor]:
    """alpha [m_k] of each matrix of a stack (quantize/sensitivity.py).

    An expert that sees a share of the tokens counts by that share: J is a mean over all tokens.
    """
    own = statistics[stack[0].input]
    gradual = config.sensitivity in GRADUAL and not config.needs_gradients
    kind = "none" if gradual else config.sensitivity
    seen = [other.tokens for other in statistics.values() if other.tokens]
    share = (own.tokens or min(seen, default=1)) / max(seen, default=1)
    return [
        share
        * row_sensitivity(
            kind,
            matrix.weight,
            _used_hessian(own),
            squared_gradient(gradients, matrix.name, matrix.part),
        )
        for matrix in stack
    ]


def _quantize(
    name: str,
    stack: list[Matrix],
    statistics: Mapping[str, InputStatistics],
    config: CompressionConfig,
    gradients: Mapping[tuple[str, int], Tensor],
) -> tuple[QuantizedStack, tuple[str, ...]]:
    """The stack quantized, and what did not go as planned."""
    events = []
    own = statistics[stack[0].input]
    hessian = _used_hessian(own)
    if own.tokens == 0:
        events.append("no calibration token reached it: quantized against H = I")
    elif not bool(hessian.diagonal().any()):
        events.append("its inputs are 0 for every calibration token: quantized against H = I")
    found = [gradients.get((matrix.name, matrix.part)) for matrix in stack]
    if any(gradient is not None and not gradient.any() for gradient in found):
        events.append("no gradient reached its outputs: it counts like the mean of all others")
    try:
        alpha = stack_sensitivities(stack, statistics, config, gradients)
        targets = [matrix.weight for matrix in stack]
        if own.cross is not None:
            moved = drift_target(torch.cat(targets), hessian=hessian, cross=own.cross)
            targets = list(torch.split(moved, [len(target) for target in targets]))
        quantized = quantize_stack(targets, hessian, config, alpha)
    except CerwuError as error:
        raise type(error)(f"{name}: {error}") from None
    if quantized.damping != config.damping:
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
