"""From calibrated blocks to coded tensors, one block in work at a time (docs/method.md).

Only names and tensors are known here; `cerwu_gpu.hf` supplies the blocks of a transformers model.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cerwu_gpu.config import GRADUAL, CompressionConfig
from cerwu_gpu.container.journal import CodedWeight, Journal
from cerwu_gpu.container.matrix import EncodedMatrix, encode_matrix
from cerwu_gpu.container.writer import DirectoryWriter
from cerwu_gpu.errors import CalibrationError, CerwuError, ModelError
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.quantize.layer import QuantizedStack, quantize_stack
from cerwu_gpu.quantize.objective import drift_target
from cerwu_gpu.quantize.sensitivity import row_sensitivity, squared_gradient
from cerwu_gpu.quantize.symbols import QuantizedMatrix
from cerwu_gpu.quantize.target import Estimate, Probe, estimate, probe
from cerwu_gpu.report import LayerReport

SAMPLED_BLOCKS = 8
"""Blocks that an estimate of the rate looks into."""


@dataclass(frozen=True)
class Matrix:
    """One weight as a matrix, rows = outputs, columns = inputs.

    Attributes:
        name: parameter name in the model, e.g. "model.layers.0.self_attn.q_proj.weight".
        part: index along the leading axis for a parameter that holds several matrices
            (the experts of a mixture); 0 otherwise.
        weight: [m, n] float32 on the device of the work.
        input: key of the distinct input; matrices with the same key share one Hessian.
    """

    name: str
    part: int
    weight: Tensor
    input: str


@dataclass(frozen=True)
class InputStatistics:
    """Second moment of one distinct input.

    Attributes:
        hessian: [n, n] float32, H = (2/p) X X^T over the p tokens seen; zeros when p is 0.
        tokens: p.
        cross: [n, n] float32, (2/p) X X_hat^T of the original model's inputs X and those that
            the compressed model has, X_hat; `hessian` is then that of X_hat. None: X is both.
    """

    hessian: Tensor
    tokens: int
    cross: Tensor | None = None


class Block(Protocol):
    """One transformer block in work: its matrices, their inputs' statistics, and the way on."""

    name: str

    def matrices(self) -> Sequence[Matrix]:
        """The matrices to quantize; together they cover each chosen parameter whole."""
        ...

    def statistics(self) -> dict[str, InputStatistics]:
        """Stream the calibration inputs through the block; key -> statistics of that input."""
        ...

    def pass_by(self) -> None:
        """Instead of `statistics`, where `replace` will get what is known from an earlier run."""
        ...

    def replace(self, name: str, part: int, weight: Tensor) -> None:
        """Put the quantized `weight` [m, n] into the model, in the parameter's layout and dtype."""
        ...


class Blocks(Protocol):
    """The blocks in order; the next one is made when the previous one is finished."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Block]: ...


class Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to `name`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


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
    """Quantize a block; its matrices are on their way through the coder afterwards."""
    with clock.stage("calibrate"):
        statistics = block.statistics()
    coding = []
    for stack in stacks(block.matrices()):
        with clock.stage("quantize"):
            name = layouts[stack[0].name].key(stack[0].part)
            done, events = _quantize(name, stack, statistics, config, gradients)
        results = zip(stack, done.matrices, done.relative_losses, done.limits, strict=True)
        for matrix, result, loss, limit in results:
            weight = result.weight(dtypes[matrix.name]).to(torch.float32)
            if not bool(torch.isfinite(weight).all()):
                raise ModelError(
                    f"{layouts[matrix.name].key(matrix.part)}: its quantized weights are beyond "
                    f"{str(dtypes[matrix.name]).removeprefix('torch.')}: exclude it."
                )
            block.replace(matrix.name, matrix.part, weight)
            encoded = coder.submit(encode_matrix, result, loss)
            coding.append(_Coding(matrix.name, matrix.part, encoded, loss, limit, events))
    return coding


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
            moved = partial(drift_target, hessian=hessian, cross=own.cross)
            targets = [moved(weight) for weight in targets]
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
