"""Trellis quantization against trying every path, and its machine against what it promises."""

from itertools import product

import numpy as np
import pytest
import torch

from cerwu_gpu.block_problem import Alphabet, BlockProblem
from cerwu_gpu.reference.dequantize import trellis_levels, trellis_quantizers, trellis_states
from cerwu_gpu.reference.trellis import Machine, quantize_block_trellis
from cerwu_gpu.spec import TRELLIS_NEXT, TRELLIS_QUANTIZER, TRELLIS_REGISTER
from tests.reference.straight_line import best_trellis_path, trellis_path_cost

LOWEST = -3


def problem(rows, columns, seed=0, lmbda=0.05, coupling=0.3):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.triu(coupling * torch.randn(columns, columns, generator=generator), 1)
    q = torch.arange(LOWEST, -LOWEST + 1).abs()
    rates = (q * torch.tensor([1.2, 1.0, 0.9, 0.7])[:, None]).float() + 1
    rates = torch.cat([rates, torch.full((4, 1), 30.0)], dim=1)
    return {
        "x": 1.8 * torch.randn(rows, columns, generator=generator),
        "factor": factor + torch.eye(columns),
        "alphabet": Alphabet(rates, LOWEST, escapes=True),
        "row_class": torch.zeros(rows, dtype=torch.int64),
        "column_class": torch.randint(0, 2, (columns,), generator=generator),
        "lmbda": torch.full((rows,), lmbda),
        "importance": 0.5 + torch.rand(columns, generator=generator),
        "curvature": torch.zeros(columns),
    }


def solve(given, states, commit=None, start=None):
    rows, columns = given["x"].shape
    start = torch.zeros(rows, dtype=torch.int64) if start is None else start
    return quantize_block_trellis(
        BlockProblem(**given), states=states, start=start, commit=commit or columns
    )


def straight(given, row, states):
    return {
        "factor": given["factor"].double().numpy(),
        "rates": given["alphabet"].rates.double().numpy(),
        "lowest": LOWEST,
        "row_table": (given["row_class"][row] + given["column_class"]).numpy(),
        "lmbda": float(given["lmbda"][row]),
        "importance": given["importance"].double().numpy(),
        "follow": TRELLIS_NEXT[states],
        "second": TRELLIS_QUANTIZER[states],
    }


@pytest.mark.parametrize("states", TRELLIS_NEXT)
def test_without_coupling_it_finds_the_best_of_all_paths(states):
    given = problem(6, 5, coupling=0.0)
    symbols, _, _ = solve(given, states)
    for row in range(6):
        terms = straight(given, row, states)
        x = given["x"][row].double().numpy()
        best = best_trellis_path(x, range(LOWEST, -LOWEST + 1), **terms)
        cost = trellis_path_cost(x, symbols[row].tolist(), **terms)
        assert cost == pytest.approx(trellis_path_cost(x, best, **terms), rel=1e-5)


@pytest.mark.parametrize("states", TRELLIS_NEXT)
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 16, 23])
def test_errors_are_those_of_the_path_it_chose(states, columns):
    given = problem(9, columns, seed=columns)
    symbols, error, end = solve(given, states)
    level = trellis_levels(symbols, trellis_quantizers(symbols, states)).double()
    back = given["x"].double() - error.double() @ given["factor"].double()
    torch.testing.assert_close(back, level, atol=1e-4, rtol=0)
    follow = torch.tensor(TRELLIS_NEXT[states])
    last = trellis_states(symbols & 1, states)[:, -1]
    assert torch.equal(end, follow[last, symbols[:, -1].long() & 1])


@pytest.mark.parametrize("states", TRELLIS_NEXT)
def test_survivors_beat_deciding_column_by_column(states):
    given = problem(64, 12, seed=3)
    costs = []
    for step in (1, 12):
        symbols = torch.empty(64, 12, dtype=torch.int32)
        rest, state = given["x"].clone(), torch.zeros(64, dtype=torch.int64)
        for first in range(0, 12, step):
            block = slice(first, first + step)
            part = dict(given, x=rest[:, block], factor=given["factor"][block, block])
            for name in ("column_class", "importance", "curvature"):
                part[name] = given[name][block]
            symbols[:, block], error, state = solve(part, states, start=state)
            rest[:, block.stop :] -= error @ given["factor"][block, block.stop :]
        costs.append(
            sum(
                trellis_path_cost(
                    given["x"][row].double().numpy(),
                    symbols[row].tolist(),
                    **straight(given, row, states),
                )
                for row in range(64)
            )
        )
    assert costs[1] < 0.95 * costs[0]


def test_a_prefix_is_committed_and_the_rest_only_looked_at():
    given = problem(5, 9)
    whole, errors, _ = solve(given, 4)
    part, part_errors, state = solve(given, 4, commit=4)
    assert torch.equal(part, whole[:, :4])
    assert torch.equal(part_errors, errors[:, :4])
    assert torch.equal(state, trellis_states(whole & 1, 4)[:, 4])


@pytest.mark.parametrize("states", TRELLIS_NEXT)
def test_every_state_is_reached_from_two(states):
    machine = Machine.of(states, torch.device("cpu"))
    for state in range(states):
        for way in (0, 1):
            before, parity = int(machine.before[way, state]), int(machine.parity[way, state])
            assert TRELLIS_NEXT[states][before][parity] == state
    assert sorted(machine.before.flatten().tolist()) == sorted([*range(states)] * 2)


@pytest.mark.parametrize("states", TRELLIS_NEXT)
def test_the_shift_register_is_the_same_machine(states):
    # Pairs of states that one run of parities leads to: each state has its own register.
    feedback, enter = TRELLIS_REGISTER[states]
    pairs, new = {(0, 0)}, [(0, 0)]
    while new:
        state, register = new.pop()
        assert TRELLIS_QUANTIZER[states][state] == register & 1
        for parity, follow in enumerate(TRELLIS_NEXT[states][state]):
            half = register // 2 ^ feedback * (register % 2) ^ enter * parity
            if (follow, half) not in pairs:
                pairs.add((follow, half))
                new.append((follow, half))
    assert sorted(state for state, _ in pairs) == [*range(states)]
    assert sorted(register for _, register in pairs) == [*range(states)]


@pytest.mark.parametrize(("states", "distance"), [(4, 9), (8, 10), (16, 11), (32, 12)])
def test_paths_that_part_meet_again_only_after_this_distance(states, distance):
    # Squared differences of levels: at least 1 where quantizers differ, 4 where parities do.
    second, follow = TRELLIS_QUANTIZER[states], TRELLIS_NEXT[states]
    parted = {(follow[state][0], follow[state][1]): 4 for state in range(states)}
    least = 1000
    while parted:
        later: dict[tuple[int, int], int] = {}
        for ((a, b), total), p, q in product(parted.items(), (0, 1), (0, 1)):
            after = total + (1 if second[a] != second[b] else 4 * (p != q))
            pair = follow[a][p], follow[b][q]
            if pair[0] == pair[1]:
                least = min(least, after)
            elif after < later.get(pair, least):
                later[pair] = after
        parted = later
    assert least == distance


@pytest.mark.parametrize("states", TRELLIS_NEXT)
def test_the_two_quantizers_interleave(states):
    # Levels reachable in one step from any state: all integers, with zero in both quantizers.
    symbols = torch.arange(-4, 5, dtype=torch.int32)[:, None]
    even = trellis_levels(symbols, trellis_quantizers(symbols, states))
    assert torch.equal(even[:, 0], 2 * symbols[:, 0])
    assert 0 < sum(TRELLIS_QUANTIZER[states]) < states


def test_large_weights_escape_with_the_right_parity():
    given = problem(2, 6, lmbda=1e-4, coupling=0.0)
    given["x"][0, 3] = 401.2
    symbols, _, _ = solve(given, 8)
    level = trellis_levels(symbols, trellis_quantizers(symbols, 8))
    assert abs(float(level[0, 3]) - 401.2) < 2.1
    assert np.abs(symbols.numpy()).max() > 100
