"""Benchmarks of the quantizer: one pass over a matrix, and all layers of a model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from cerwu_gpu.block_problem import Alphabet, BlockProblem
from cerwu_gpu.config import CompressionConfig, from_settings
from cerwu_gpu.quantize.layer import quantize_stack
from cerwu_gpu.quantize.passes import LOOKAHEAD, scalar_pass, trellis_pass
from cerwu_gpu.quantize.problem import EXHAUSTIVE_LEVELS
from cerwu_gpu.spec import TRELLIS_NEXT
from scripts.benchmark_timing import Mismatch, Row, Sizes, form, timed

BLOCK = 128
TIES = 1e-4
"""Largest share of symbols that may differ, where two candidates cost the same but for rounding."""
COMPARED_LEVELS = 33
"""|G| at which the slow forms are measured, too."""

MODELS: dict[str, tuple[int, list[tuple[list[int], int]]]] = {
    "toy": (1, [([6, 4], 10)]),
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


@dataclass(frozen=True)
class Pass:
    """A square matrix in index space with random weights, as quantize.passes takes it."""

    columns: BlockProblem

    @staticmethod
    def random(
        side: int, levels: int, device: torch.device, *, states: int = 0, escapes: bool = False
    ) -> "Pass":
        """Return a random pass with |G| levels, costs of Gaussians and eight classes."""
        torch.manual_seed(side + levels)
        lowest = -(levels // 2)
        spread = levels / 8 * 2 ** (torch.arange(8) / 8)
        if states:
            spread = spread.repeat_interleave(2)
        levels_at = torch.arange(lowest, lowest + levels)
        rates = (levels_at / spread[:, None]).square() * 0.72 + spread.log2()[:, None] + 1.3
        if states or escapes:
            rates = torch.cat([rates, rates.amax(1, keepdim=True) + 16], dim=1)
        factor = torch.randn(side, side, device=device).triu_(1) * (0.3 / side**0.5)
        factor.diagonal().fill_(1)
        ones = torch.ones(side, device=device)
        columns = BlockProblem(
            x=torch.randn(side, side, device=device) * (levels / 8),
            factor=factor,
            alphabet=Alphabet(rates.to(device), lowest, escapes=bool(states) or escapes),
            row_class=torch.randint(0, 4, (side,), device=device),
            column_class=torch.randint(0, 5, (side,), device=device),
            lmbda=0.05 * ones,
            importance=ones,
            curvature=0.01 * ones,
        )
        return Pass(columns)

    def scalar(self, columns: int | None = None) -> Tensor:
        """Return the symbols of the first columns."""
        exhaustive = self.columns.alphabet.size <= EXHAUSTIVE_LEVELS
        return scalar_pass(self._first(columns), block_size=BLOCK, exhaustive=exhaustive)

    def trellis(self, states: int, columns: int | None = None) -> Tensor:
        """Return the symbols of the first columns."""
        return trellis_pass(self._first(columns), block_size=BLOCK, states=states)

    def _first(self, columns: int | None) -> BlockProblem:
        part = slice(columns)
        return self.columns.block(part, self.columns.x[:, part])

    def products(self) -> None:
        """Compute the trailing products of every blocked pass, in float32."""
        x, factor = self.columns.x, self.columns.factor
        rest, columns = x.clone(), x.shape[1]
        for first in range(0, columns, BLOCK):
            last = min(first + BLOCK, columns)
            rest[:, last:].addmm_(x[:, first:last], factor[first:last, last:], alpha=-1)


def column_loop(problem: Pass) -> Tensor:
    """Run GPTQ as it is described: blocks of columns, in each a loop over columns that rounds to
    the nearest level and moves the error on to the columns after it."""
    work, factor = problem.columns.x.clone(), problem.columns.factor
    alphabet = problem.columns.alphabet
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


def _same_symbols(case: str, run: Callable[[], Tensor]) -> float:
    """Return the share of symbols that differ between the kernel and its definition.

    Raises:
        Mismatch: it is more than ties explain.
    """
    with form("triton"):
        ours = run()
    with form("torch"):
        theirs = run()
    share = float((ours != theirs).double().mean())
    if share > TIES:
        raise Mismatch(f"{case}: {share:.2%} of the symbols differ from the definition's.")
    return share


def passes(sizes: Sizes, device: torch.device, measure: bool) -> Iterator[Row]:
    """Time a pass over a matrix: the kernel, torch's form, a GPTQ loop, and the products alone."""
    for side in sizes.sides:
        for levels in sizes.levels:
            case = f"{side} x {side}, |G| = {levels}"
            problem = Pass.random(side, levels, device)
            # One block: from the second on, a tie in the first would count once for every column.
            share = _same_symbols(case, partial(problem.scalar, BLOCK))
            if not measure:
                continue
            with form("triton"):
                yield timed("pass", case, "kernel", problem.scalar, differing=share)
            if levels == COMPARED_LEVELS:
                with form("torch"):
                    yield timed("pass", case, "torch form", problem.scalar)
                yield timed("pass", case, "GPTQ column loop", partial(column_loop, problem))
                yield timed("pass", case, "trailing products alone", problem.products)


def trellises(sizes: Sizes, device: torch.device, measure: bool) -> Iterator[Row]:
    """Time a pass with 4, 8, 16 and 32 survivors for each row."""
    for side in sizes.sides:
        for states in TRELLIS_NEXT:
            case = f"{side} x {side}, {states} states"
            problem = Pass.random(side, COMPARED_LEVELS, device, states=states)
            share = _same_symbols(case, partial(problem.trellis, states, BLOCK + LOOKAHEAD))
            if measure:
                with form("triton"):
                    run = partial(problem.trellis, states)
                    yield timed("trellis", case, "kernel", run, differing=share)


def models(sizes: Sizes, device: torch.device, measure: bool) -> Iterator[Row]:
    """Time all layers of a model, random weights and given H, end to end without the coding."""
    for name in sizes.models:
        blocks, inputs = MODELS[name]
        for quantizer in ("scalar", "trellis8"):
            config = from_settings(quantizer=quantizer, lmbda=1e-3)
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
    """Check the kernels' loss against the definitions', on the first rows of a stack."""
    rows, n = stack
    weight = torch.randn(min(rows[0], 64), n, device=hessian.device)
    losses = []
    for name in ("triton", "torch"):
        with form(name):
            losses.append(quantize_stack([weight], hessian, config).relative_losses[0])
    if abs(losses[0] / losses[1] - 1) > 0.01:
        raise Mismatch(f"{case}: relative loss {losses[0]:.4g}, by definition {losses[1]:.4g}.")


def _random_hessian(n: int, device: torch.device) -> Tensor:
    """Return (2/p) X X^T of inputs with correlations and unequal sizes."""
    torch.manual_seed(n)
    x = torch.randn(2 * n, n, device=device) * torch.logspace(-1, 1, n, device=device)
    x += x.roll(1, dims=1)
    return x.T @ x / n
