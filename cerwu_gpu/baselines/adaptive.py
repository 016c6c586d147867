r"""An adaptive context model of the DeepCABAC kind: SLOW, serial, on the CPU, for study only.

An integer is a string of binary decisions, each with a state of its own that adapts:

    zero or not                 3 states, by the sign of the weight before it in the row
    negative or not             3 states, likewise
    |q| > 1, > 2, ... > 10      2 states each, by the sign of q
    the rest |q| - 11           exponential Golomb: its group in unary, each digit with a state,
                                then the position in the group, one bit a digit

A state holds two estimates of the probability of a 1, which move toward each decision by 1/16 and
by 1/128 of the way; their mean is used, kept inside the range of an arithmetic coder's own states.
The code length is the sum of -log2 of the probabilities, without an arithmetic coder's rounding.

Weights come row by row, each row from the left. The search prices its candidates with the states as
they are, and adapts them to each choice; that makes it serial, and prone to collapse onto few
integers (docs/method.md, section 13). numba compiles the loops.
"""

# mypy: allow-untyped-decorators

import math

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from cerwu_gpu.baselines.paper import PaperProblem

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

ABOVE_FLAGS = 10
"""Flags |q| > k with states of their own."""
GROUPS = 32
"""Groups of the exponential Golomb code, as many as integers of 32 bits need."""
SIGN = 3
ABOVE = SIGN + 3
GROUP = ABOVE + 2 * ABOVE_FLAGS
STATES = GROUP + GROUPS
"""The states, one after the other: zero, sign, above, group."""
FAST, SLOW = 1 / 16, 1 / 128
LEAST = 2.0**-7.25
"""Minimum probability of a decision, as in the states of CABAC."""


@njit
def _cost(states: Floats, number: int, one: bool) -> float:
    """Return the bits of a decision under state `number`."""
    p = min(max((states[number, 0] + states[number, 1]) / 2, LEAST), 1 - LEAST)
    return -math.log2(p if one else 1 - p)


@njit
def _adapt(states: Floats, number: int, one: bool) -> None:
    target = 1.0 if one else 0.0
    states[number, 0] += FAST * (target - states[number, 0])
    states[number, 1] += SLOW * (target - states[number, 1])


@njit
def _code(states: Floats, q: int, before: int, adapt: bool) -> float:
    """Return the bits of the integer q after the integer `before`; the states see it if `adapt`."""
    neighbour = 0 if before == 0 else (1 if before < 0 else 2)
    bits: float = _cost(states, neighbour, q != 0)
    if adapt:
        _adapt(states, neighbour, q != 0)
    if q == 0:
        return bits
    bits += _cost(states, SIGN + neighbour, q < 0)
    if adapt:
        _adapt(states, SIGN + neighbour, q < 0)
    magnitude = abs(q)
    for k in range(ABOVE_FLAGS):
        number = ABOVE + 2 * k + (1 if q < 0 else 0)
        above = magnitude > k + 1
        bits += _cost(states, number, above)
        if adapt:
            _adapt(states, number, above)
        if not above:
            return bits
    rest = magnitude - ABOVE_FLAGS - 1
    group = 0
    while rest >= 1 << group:
        bits += _cost(states, GROUP + group, True) + 1  # and a digit of the position
        if adapt:
            _adapt(states, GROUP + group, True)
        rest -= 1 << group
        group += 1
    bits += _cost(states, GROUP + group, False)
    if adapt:
        _adapt(states, GROUP + group, False)
    return bits


@njit
def _prices(states: Floats, reach: int, before: int, prices: Floats) -> None:
    """Fill `prices` [2 reach + 1] with the bits of -reach ... reach; flags are summed once."""
    neighbour = 0 if before == 0 else (1 if before < 0 else 2)
    prices[reach] = _cost(states, neighbour, False)
    for negative in (0, 1):
        shared = _cost(states, neighbour, True) + _cost(states, SIGN + neighbour, negative == 1)
        magnitude = 1
        while magnitude <= min(reach, ABOVE_FLAGS):
            number = ABOVE + 2 * (magnitude - 1) + negative
            q = -magnitude if negative else magnitude
            prices[reach + q] = shared + _cost(states, number, False)
            shared += _cost(states, number, True)
            magnitude += 1
        group = 0
        while magnitude <= reach:
            last = min(magnitude + (1 << group) - 1, reach)
            price = shared + _cost(states, GROUP + group, False)
            while magnitude <= last:
                prices[reach - magnitude if negative else reach + magnitude] = price
                magnitude += 1
            shared += _cost(states, GROUP + group, True) + 1
            group += 1


@njit
def _code_length(states: Floats, symbols: Integers) -> float:
    total = 0.0
    for i in range(symbols.shape[0]):
        before = 0
        for j in range(symbols.shape[1]):
            total += _code(states, symbols[i, j], before, True)
            before = symbols[i, j]
    return total


@njit
def _search(
    states: Floats,
    x: Floats,
    factor: Floats,
    reach: int,
    lmbda: Floats,
    importance: Floats,
    curvature: Floats,
    symbols: Integers,
) -> None:
    """Fill `symbols`; of equally good candidates the lowest wins."""
    prices = np.empty(2 * reach + 1)
    for i in range(x.shape[0]):
        before = 0
        for j in range(x.shape[1]):
            _prices(states, reach, before, prices)
            best, least = 0, math.inf
            for g in range(-reach, reach + 1):
                square = (x[i, j] - g) ** 2 - curvature[j] * g * g
                cost = importance[j] / 2 * square + lmbda[i] * prices[reach + g]
                if cost < least:
                    best, least = g, cost
            _code(states, best, before, True)
            symbols[i, j] = before = best
            error = x[i, j] - best
            x[i, j + 1 :] -= error * factor[j, j + 1 :]


class AdaptiveRate:
    """The adaptive model as a rate model; each call starts from fresh states (all 1/2)."""

    def search(self, problem: PaperProblem) -> Tensor:
        """Return the symbols [m, n] int32, chosen weight by weight."""
        x = problem.target.to("cpu", torch.float64).numpy().copy()
        symbols = np.zeros(x.shape, dtype=np.int64)
        _search(
            _fresh(),
            x,
            problem.factor.to("cpu", torch.float64).numpy(),
            problem.reach,
            problem.lmbda.to("cpu", torch.float64).numpy(),
            problem.importance.to("cpu", torch.float64).numpy(),
            problem.curvature.to("cpu", torch.float64).numpy(),
            symbols,
        )
        return torch.from_numpy(symbols).to(problem.target.device, torch.int32)

    def code_length(self, symbols: Tensor) -> float:
        """Return the bits of the symbols [m, n], coded row by row from fresh states."""
        return float(_code_length(_fresh(), symbols.to("cpu", torch.int64).numpy()))


def _fresh() -> Floats:
    return np.full((STATES, 2), 0.5)
