"""What scripts/benchmark_kernels.py compares and measures: each section checks, then measures.

A section takes the sizes of a run and yields rows. Its comparison with the definitions comes first
and raises Mismatch: no time is told of a kernel that computes something else.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cerwu_gpu import backend
from cerwu_gpu.coding import streams
from cerwu_gpu.coding.tables import codes_from_counts, table_from_codes
from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.quantize.layer import quantize_stack
from cerwu_gpu.quantize.passes import LOOKAHEAD, Weights, scalar_pass, trellis_pass
from cerwu_gpu.quantize.problem import EXHAUSTIVE_LEVELS
from cerwu_gpu.reference import ans, hessian, weights
from cerwu_gpu.reference.ans import CodedMatrix
from cerwu_gpu.reference.dequantize import step_values
from cerwu_gpu.reference.obs import Alphabet
from cerwu_gpu.reference.weights import Reconstruction

BLOCK = 128
TIES = 1e-4
"""Largest share of symbols that may differ, where two candidates cost the same but for rounding."""

Row = dict[str, Any]
"""section, case, what, median, low, high (20 % and 80 %, seconds) and figures derived from them."""


class Mismatch(Exception):
    """A kernel does not compute what its definition says."""


@dataclass(frozen=True)
class Sizes:
    """How large the cases of a run are.

    Attributes:
        sides, levels: sides of the square matrices, and |G|, of the passes.
        coded: (m, n) of the coded matrix, and how many copies of it are decoded together.
        moments: (p, n) of the inputs of a Hessian.
        models: names in MODELS.
    """

    sides: tuple[int, ...]
    levels: tuple[int, ...]
    coded: tuple[int, int]
    copies: int
    moments: tuple[int, int]
    models: tuple[str, ...]


FULL = Sizes(
    sides=(512, 1024, 2048, 4096, 8192),
    levels=(16, 33, 64, 256, 1024),
    coded=(4096, 4096),
    copies=6,
    moments=(8192, 4096),
    models=("Pythia-70M", "Llama-3.2-1B", "Llama-3.1-8B"),
)
TINY = Sizes((24,), (5,), (9, 16), 2, (20, 24), ("toy",))

MODELS: dict[str, tuple[int, list[tuple[list[int], int]]]] = {
    "toy": (1, [([16, 8], 24)]),
    "Pythia-70M": (6, [([1536], 512), ([512], 512), ([2048], 512), ([512], 2048)]),
    "Llama-3.2-1B": (
        16,
        [([2048, 512, 512], 2048), ([2048], 2048), ([8192, 8192], 2048), ([2048], 8192)],
    ),
    "Llama-3.1-8B": (
        32,
        [([4096, 1024, 1024], 4096), ([4096], 4096), ([14336, 14336], 4096), ([4096], 14336)],
    ),
}
"""Blocks, and for each distinct input of a block: rows of the matrices that share it, columns."""


@contextmanager
def form(name: str) -> Iterator[None]:
    """The operations of the backend run as `torch` or as `triton`."""
    before = os.environ.get(backend.VARIABLE)
    os.environ[backend.VARIABLE] = name
    try:
        yield
    finally:
        del os.environ[backend.VARIABLE]
        if before is not None:
            os.environ[backend.VARIABLE] = before


def timed(section: str, case: str, what: str, run: Callable[[], object], **figures: Any) -> Row:
    """The median of many runs on a warm GPU."""
    from triton.testing import do_bench

    median, low, high = (ms / 1e3 for ms in do_bench(run, quantiles=(0.5, 0.2, 0.8)))
    spread = {"median": median, "low": low, "high": high}
    return {"section": section, "case": case, "what": what, **spread, **figures}


@dataclass(frozen=True)
class Pass:
    """A square matrix in index space with random weights, as quantize.passes takes it."""

    x: Tensor
    factor: Tensor
    alphabet: Alphabet
    row_class: Tensor
    column_class: Tensor
    weights: Weights

    @staticmethod
    def random(side: int, levels: int, device: torch.device, *, states: int = 0) -> "Pass":
        """|G| levels with costs of Gaussians, eight classes."""
        torch.manual_seed(side + levels)
        lowest = -(levels // 2)
        spread = levels / 8 * 2 ** (torch.arange(8) / 8)
        if states:
            spread = spread.repeat_interleave(2)
        levels_at = torch.arange(lowest, lowest + levels)
        rates = (levels_at / spread[:, None]).square() * 0.72 + spread.log2()[:, None] + 1.3
        if states:
            rates = torch.cat([rates, rates.amax(1, keepdim=True) + 16], dim=1)
        factor = torch.randn(side, side, device=device).triu_(1) * (0.3 / side**0.5)
        factor.diagonal().fill_(1)
        ones = torch.ones(side, device=device)
        return Pass(
            torch.randn(side, side, device=device) * (levels / 8),
            factor,
            Alphabet(rates.to(device), lowest, escapes=bool(states)),
            torch.randint(0, 4, (side,), device=device),
            torch.randint(0, 5, (side,), device=device),
            Weights(lmbda=0.05 * ones, importance=ones, curvature=0.01 * ones),
        )

    def scalar(self, columns: int | None = None) -> Tensor:
        """Symbols of the first columns."""
        exhaustive = self.alphabet.size <= EXHAUSTIVE_LEVELS
        return scalar_pass(*self._first(columns), block_size=BLOCK, exhaustive=exhaustive)

    def trellis(self, states: int, columns: int | None = None) -> Tensor:
        """Symbols of the first columns."""
        return trellis_pass(*self._first(columns), block_size=BLOCK, states=states)

    def _first(self, columns: int | None) -> tuple[Any, ...]:
        c = slice(columns)
        part = Weights(self.weights.lmbda, self.weights.importance[c], self.weights.curvature[c])
        factor = self.factor[c, c]
        return self.x[:, c], factor, self.alphabet, self.row_class, self.column_class[c], part

    def products(self) -> None:
        """What every blocked pass has to do besides: the trailing products, in float32."""
        rest, columns = self.x.clone(), self.x.shape[1]
        for first in range(0, columns, BLOCK):
            last = min(first + BLOCK, columns)
            error = self.x[:, first:last]
            rest[:, last:].addmm_(error, self.factor[first:last, last:], alpha=-1)


def column_loop(problem: Pass) -> Tensor:
    """GPTQ as it is described: blocks of columns, in each a loop over columns that rounds to the
    nearest level and moves the error on to the columns after it."""
    work, factor, alphabet = problem.x.clone(), problem.factor, problem.alphabet
    symbols = torch.empty_like(work, dtype=torch.int32)
    columns = work.shape[1]
    highest = alphabet.lowest + alphabet.size - 1
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        error = torch.empty_like(work[:, first:last])
        for j in range(first, last):
            rounded = work[:, j].round().clamp(alphabet.lowest, highest)
            symbols[:, j] = rounded.to(torch.int32)
            error[:, j - first] = (work[:, j] - rounded) / factor[j, j]
            work[:, j:last] -= error[:, j - first, None] * factor[None, j, j:last]
        work[:, last:] -= error @ factor[first:last, last:]
    return symbols


def _same_symbols(case: str, ours: Tensor, theirs: Tensor) -> float:
    """The share of symbols that differ.

    Raises:
        Mismatch: it is more than ties explain.
    """
    share = float((ours != theirs).double().mean())
    if share > TIES:
        raise Mismatch(f"{case}: {share:.2%} of the symbols differ from the definition's.")
    return share


def _both(run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    results = []
    for name in ("triton", "torch"):
        with form(name):
            results.append(run())
    return results[0], results[1]


def passes(sizes: Sizes, device: torch.device, measure: bool) -> Iterator[Row]:
    """One pass over a matrix: the kernel, torch's form, a GPTQ loop, and the products alone."""
    for side in sizes.sides:
        for levels in sizes.levels:
            case = f"{side} x {side}, |G| = {levels}"
            problem = Pass.random(side, levels, device)
            # One block: from the second on, a tie in the first would count once for every column.
            share = _same_symbols(case, *_both(lambda p=problem: p.scalar(BLOCK)))
            if not measure:
                continue
            with form("triton"):
                yield timed("pass", case, "kernel", problem.scalar, differing=share)
            if levels == 33:
                with form("torch"):
                    yield timed("pass", case, "torch form", problem.scalar)
                yield timed("pass", case, "GPTQ column loop", lambda p=problem: column_loop(p))
                yield timed("pass", case, "trailing products alone", problem.products)


def trellises(sizes: Sizes, device: torch.device, measure: bool) -> Iterator[Row]:
    """The same pass with 4 and 8 survivors for each row."""
    for side in sizes.sides:
        for states in (4, 8):
            case = f"{side} x {side}, {states} states"
            problem = Pass.random(side, 33, device, states=states)
            columns = BLOCK + LOOKAHEAD
            pair = _both(lambda p=problem, s=states, c=columns: p.trellis(s, c))
            share = _same_symbols(case, *pair)
            if measure:
                with form("triton"):
                    run = lambda p=problem, s=states: p.trellis(s)  # noqa: E731
                    yield timed("trellis", case, "kernel", run, differing=share)


def random_coded(m: int, n: int, states: int) -> tuple[CodedMatrix, Reconstruction]:
    """A matrix of about 2.5 bits a weight, with eight classes and no escapes."""
    noise = np.random.default_rng(0)
    quantizers = 2 if states else 1
    spread = 1.37 * 2 ** ((np.arange(8) - 3.5) / 8)
    integers = np.arange(-12, 13)
    counts = 1e6 * np.exp(-((integers / spread[:, None]) ** 2) / 2)
    tables = table_from_codes(codes_from_counts(counts.astype(np.int64)))
    row_class, column_class = noise.integers(0, 4, m), noise.integers(0, 5, n)
    scale = spread[row_class[:, None] + column_class].astype(np.float32)
    symbols = np.rint(noise.standard_normal((m, n), np.float32) * scale).clip(-12, 12) + 12
    tables = tables.repeat(quantizers, axis=0)
    parity = integers & 1
    words, lengths = streams.encode(
        symbols.astype(np.int32), tables, row_class, column_class, states, parity
    )
    coded = CodedMatrix(
        name=f"{m} x {n}",
        shape=(m, n),
        words=torch.from_numpy(words.view(np.int32)),
        lengths=torch.from_numpy(lengths.astype(np.int64)),
        tables=torch.from_numpy(tables),
        row_class=torch.from_numpy(row_class),
        column_class=torch.from_numpy(column_class),
        states=states,
        parity=torch.from_numpy(parity),
    )
    steps = torch.from_numpy(noise.integers(-2000, -1000, n).astype(np.int16))
    none = torch.empty(0, dtype=torch.int32)
    return coded, Reconstruction(-12, 25, none, steps, steps[:1])


def decoder(sizes: Sizes, device: torch.device, measure: bool) -> Iterator[Row]:
    """Streams to bfloat16 weights, beside a copy of as many bytes on the same GPU."""
    from cerwu_gpu.kernels.ans import Batch, Levels, launch, launch_weights

    for states in (0, 4, 8):
        coded, rule = random_coded(*sizes.coded, states)
        case = f"{states} states" if states else "no trellis"
        expected = weights.decode_weights([coded], [rule], torch.bfloat16)[0]
        symbols = ans.decode([coded])[0]
        batch = [_placed(coded, device)] * sizes.copies
        rules = [_placed(rule, device)] * sizes.copies
        with form("triton"):
            for ours in backend.decode_weights(batch, rules, torch.bfloat16):
                if not torch.equal(ours.cpu(), expected):
                    raise Mismatch(f"decoder, {case}: weights differ from the definition's.")
            if not all(torch.equal(ours.cpu(), symbols) for ours in backend.decode(batch)):
                raise Mismatch(f"decoder, {case}: symbols differ from the definition's.")
        if not measure:
            continue
        prepared = Batch(batch)
        levels = Levels(prepared, rules)
        steps = step_values(rules[0].column_step).repeat(sizes.copies)
        scales = step_values(rules[0].row_scale).repeat(sizes.copies * coded.shape[0])
        out = torch.empty(prepared.elements, dtype=torch.bfloat16, device=device)
        indices = torch.empty(prepared.elements, dtype=torch.int32, device=device)
        other = torch.empty_like(out)
        bits = 32 * len(coded.words) / symbols.numel()
        figures = {"elements": prepared.elements, "bytes": 2 * prepared.elements, "bits": bits}
        fused = lambda p=prepared, v=levels, s=steps, t=scales, o=out: launch_weights(  # noqa: E731
            p, v, s, t, o
        )
        with form("triton"):
            whole = lambda b=batch, r=rules: backend.decode_weights(b, r, torch.bfloat16)  # noqa: E731
            yield timed("decoder", case, "kernel, bfloat16 weights", fused, **figures)
            yield timed("decoder", case, "whole call, checks included", whole, **figures)
            run = lambda p=prepared, i=indices: launch(p, i)  # noqa: E731
            yield timed("decoder", case, "kernel, symbols", run, **figures)
        copy = lambda o=out, s=other: o.copy_(s)  # noqa: E731
        yield timed("decoder", case, "device copy of the weights", copy, **figures)


def moments(sizes: Sizes, device: torch.device, measure: bool) -> Iterator[Row]:
    """X^T X: torch's product and the kernel."""
    tokens, n = sizes.moments
    for dtype in (torch.bfloat16, torch.float32):
        case = f"{tokens} tokens, {n} columns, {str(dtype).removeprefix('torch.')}"
        x = torch.randint(-8, 9, (tokens, n), device=device).to(dtype)
        total, theirs = torch.zeros(2, n, n, dtype=torch.float64, device=device)
        with form("triton"):
            backend.accumulate_hessian(total, x)
        hessian.accumulate_hessian(theirs, x)
        if not torch.equal(total, theirs):
            raise Mismatch(f"Hessian, {case}: the kernel's sum differs from the definition's.")
        if measure:
            for name, what in (("triton", "kernel"), ("torch", "torch's product")):
                with form(name):
                    run = lambda t=total, y=x: backend.accumulate_hessian(t, y)  # noqa: E731
                    yield timed("hessian", case, what, run)


def models(sizes: Sizes, device: torch.device, measure: bool) -> Iterator[Row]:
    """All layers of a model, random weights and given H, end to end without the coding."""
    for name in sizes.models:
        blocks, inputs = MODELS[name]
        for quantizer in ("scalar", "trellis8"):
            config = CompressionConfig(quantizer=quantizer, lmbda=1e-3)
            case = f"{name}, {quantizer}"
            hessians = {n: _random_hessian(n, device) for _, n in inputs}
            _same_loss(case, inputs[0], hessians[inputs[0][1]], config)
            if not measure:
                continue
            seconds = 0.0
            with form("triton"):
                for _ in range(blocks):
                    for rows, n in inputs:
                        stack = [torch.randn(m, n, device=device) for m in rows]
                        torch.cuda.synchronize()
                        begin = perf_counter()
                        quantize_stack(stack, hessians[n], config)
                        torch.cuda.synchronize()
                        seconds += perf_counter() - begin
            counted = blocks * sum(sum(rows) * n for rows, n in inputs)
            spread = dict.fromkeys(("median", "low", "high"), seconds)
            row = {"section": "model", "case": case, "what": "one run", "elements": counted}
            yield row | spread


def _same_loss(
    case: str, stack: tuple[list[int], int], hessian: Tensor, config: CompressionConfig
) -> None:
    """The kernels' result is as good as the definitions', on the first rows of a stack."""
    rows, n = stack
    weight = torch.randn(min(rows[0], 64), n, device=hessian.device)
    losses = []
    for name in ("triton", "torch"):
        with form(name):
            losses.append(quantize_stack([weight], hessian, config).relative_losses[0])
    if abs(losses[0] / losses[1] - 1) > 0.01:
        raise Mismatch(f"{case}: relative loss {losses[0]:.4g}, by definition {losses[1]:.4g}.")


def _random_hessian(n: int, device: torch.device) -> Tensor:
    """(2/p) X X^T of inputs with correlations and unequal sizes."""
    torch.manual_seed(n)
    x = torch.randn(2 * n, n, device=device) * torch.logspace(-1, 1, n, device=device)
    x += x.roll(1, dims=1)
    return x.T @ x / n


def _placed(thing: Any, device: torch.device) -> Any:
    fields = {k: v.to(device) if torch.is_tensor(v) else v for k, v in vars(thing).items()}
    return type(thing)(**fields)


SECTIONS = {
    "pass": passes,
    "trellis": trellises,
    "decoder": decoder,
    "hessian": moments,
    "model": models,
}
