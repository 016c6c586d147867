r"""Trellis (dependent) quantization of one block of columns: the definition, in torch.

Two interleaved quantizers, quantizer 0 at the even multiples of the step and quantizer 1 at the odd
ones and zero; symbol k stands for the level

    v = 2k - [quantizer 1] sgn(k).

The quantizer follows from a machine with 4, 8, 16 or 32 states that the parity of k drives along
the row (spec.py). A Viterbi search keeps one survivor per state, each with its own residual x
inside the block (block_problem.py has the notation), and minimises over whole paths

    sum_j omega_j (1/2 (x_ij - v_ij)^2 - 1/2 beta_j v_ij^2) + lmbda_i r_ij(k_ij)

with the table (row_class_i + column_class_j) * 2 + quantizer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cerwu_gpu.block_problem import BlockProblem
from cerwu_gpu.spec import TRELLIS_NEXT, TRELLIS_QUANTIZER


@dataclass(frozen=True)
class Machine:
    """The trellis as index tensors: predecessors of every state and how they lead there.

    Attributes:
        quantizer: [S] float32, 0 or 1.
        before: [2, S] int64, the two states that lead to each state.
        parity: [2, S] int64, the parity of the symbol on the way.
    """

    quantizer: Tensor
    before: Tensor
    parity: Tensor

    @staticmethod
    def of(states: int, device: torch.device) -> "Machine":
        """Return the machine with so many states."""
        ways: list[list[tuple[int, int]]] = [[] for _ in range(states)]
        for state, follow in enumerate(TRELLIS_NEXT[states]):
            for parity in (0, 1):
                ways[follow[parity]].append((state, parity))
        pairs = torch.tensor(ways, device=device).permute(2, 1, 0)
        quantizer = torch.tensor(TRELLIS_QUANTIZER[states], dtype=torch.float32, device=device)
        return Machine(quantizer, pairs[0].contiguous(), pairs[1].contiguous())


def quantize_block_trellis(
    problem: BlockProblem, *, states: int, start: Tensor, commit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the first `commit` columns of a block, looking at all of its columns.

    Args:
        problem: rates [T * 2, K + 1], row 2c + quantizer; the last column is an escape.
        states: 4, 8, 16 or 32.
        start: [m] int64, the state in which each row enters the block.
        commit: the decisions of later columns are dropped; they only decide which path is best.

    Returns:
        symbols [m, commit] int32 (k above), errors x - v [m, commit] float32, and the state
        [m] int64 after column `commit`.
    """
    if problem.batch > 1:
        each = [
            quantize_block_trellis(problem.one(number), states=states, start=own, commit=commit)
            for number, own in enumerate(start.chunk(problem.batch))
        ]
        symbols, errors, end = (torch.cat(parts) for parts in zip(*each, strict=True))
        return symbols, errors, end
    problem = problem.one(0)
    search = _Search(problem, Machine.of(states, problem.x.device), start)
    search.solve(0, problem.x.shape[1])
    return search.best(commit)


class _Search:
    """Survivors of all rows: residuals work [B, S, m], costs [S, m] and the way back."""

    def __init__(self, problem: BlockProblem, machine: Machine, start: Tensor) -> None:
        self.problem = problem
        self.machine = machine
        self.work = problem.x.t()[:, None, :].repeat(1, len(machine.quantizer), 1)
        columns, states, rows = self.work.shape
        device = self.work.device
        self.cost = torch.full((states, rows), torch.inf, device=device)
        self.cost.scatter_(0, start[None, :], 0.0)
        self.symbol = torch.empty((columns, states, rows), dtype=torch.int32, device=device)
        self.error = torch.empty_like(self.work)
        self.ancestor = torch.empty((columns, states, rows), dtype=torch.int64, device=device)

    def solve(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Extend all survivors over columns first ... last - 1.

        Returns:
            Which survivor at `first` each one descends from, [S, m] int64, and the errors it made
            on the way, [last - first, S, m].
        """
        if last - first == 1:
            return self._extend(first)
        middle = first + max(1, (last - first) // 2)
        old, left = self.solve(first, middle)
        self._follow(first, middle, last, old, left)
        new, right = self.solve(middle, last)
        left = left.gather(1, new.expand_as(left))
        return old.gather(0, new), torch.cat([left, right])

    def _follow(self, first: int, middle: int, last: int, old: Tensor, error: Tensor) -> None:
        """Give each survivor the residual of its ancestor, less its own errors' effect."""
        rest = self.work[middle:last]
        rest = rest.gather(1, old.expand_as(rest))
        effect = self.problem.factor[first:middle, middle:last].t() @ error.flatten(1)
        self.work[middle:last] = rest - effect.view_as(rest)

    def _extend(self, j: int) -> tuple[Tensor, Tensor]:
        """Extend by one column: both parities from every state, then the better way into each."""
        x = self.work[j]
        costs, symbols = zip(*(self._step(x, j, parity) for parity in (0, 1)), strict=True)
        cost, symbol = torch.stack(costs), torch.stack(symbols)
        before, parity = self.machine.before, self.machine.parity
        ways = self.cost[before] + cost[parity, before]
        second = ways[1] < ways[0]
        self.cost = torch.where(second, ways[1], ways[0])
        arriving = symbol[parity, before]
        chosen = torch.where(second, arriving[1], arriving[0])
        ancestor = torch.where(second, before[1, :, None], before[0, :, None])
        offset = self.machine.quantizer[ancestor]
        level = 2 * chosen - offset * torch.sign(chosen)
        error = x.gather(0, ancestor) - level
        self.symbol[j] = chosen.to(torch.int32)
        self.error[j] = error
        self.ancestor[j] = ancestor
        return ancestor, error[None]

    def _step(self, x: Tensor, j: int, parity: int) -> tuple[Tensor, Tensor]:
        """Return the lowest cost of one parity from every state and its symbol, [S, m] float32.

        Candidates: the nearest level of that parity, and the next one toward zero.
        """
        offset = self.machine.quantizer[:, None]
        sign = torch.where(x < 0, -1.0, 1.0)
        quarter = (x.abs() + (offset - 2 * parity)) * 0.25
        outer = 2 * quarter.round().clamp_min(0) + parity
        inner = (outer - 2).clamp_min(parity)
        base = (self.problem.row_class + self.problem.column_class[j]) * 2
        base = (base + offset.to(torch.int64)) * self.problem.alphabet.rates.shape[1]
        omega, beta = self.problem.importance[j], self.problem.curvature[j]
        magnitude = x.abs()
        best_cost = best = None
        for k in (outer, inner):
            level = 2 * k - offset * (k > 0)
            cost = (magnitude - level).square() - beta * level.square()
            cost = cost.mul_(omega / 2).addcmul_(self.problem.lmbda, self._rate(k * sign, base))
            if best_cost is None or best is None:
                best_cost, best = cost, k
            else:
                better = cost < best_cost
                best_cost = torch.where(better, cost, best_cost)
                best = torch.where(better, k, best)
        assert best_cost is not None and best is not None
        return best_cost, best * sign

    def _rate(self, k: Tensor, base: Tensor) -> Tensor:
        alphabet = self.problem.alphabet
        index = k.to(torch.int64) - alphabet.lowest
        outside = (index < 0) | (index >= alphabet.size)
        index = torch.where(outside, alphabet.size, index)
        return alphabet.rates.view(-1)[base + index]

    def best(self, commit: int) -> tuple[Tensor, Tensor, Tensor]:
        """Trace the cheapest path of every row back and keep its first `commit` columns."""
        columns, _, rows = self.work.shape
        state = self.cost.argmin(dim=0, keepdim=True)
        symbols = torch.empty((commit, rows), dtype=torch.int32, device=state.device)
        errors = torch.empty((commit, rows), device=state.device)
        end = state
        for j in reversed(range(columns)):
            if j == commit - 1:
                end = state
            if j < commit:
                symbols[j] = self.symbol[j].gather(0, state)[0]
                errors[j] = self.error[j].gather(0, state)[0]
            state = self.ancestor[j].gather(0, state)
        return symbols.t(), errors.t(), end[0]
