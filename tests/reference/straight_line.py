"""Independent definitions for tests: straight lines of numpy in float64, no blocks, no tricks."""

import itertools

import numpy as np


def obs(x, factor, rates, lowest, table, lmbda, importance, curvature):
    """Rounded integers [m, n] of x under V = factor by the sentences of docs/method.md."""
    x = np.array(x, dtype=np.float64)
    m, n = x.shape
    grid = np.arange(rates.shape[1]) + lowest
    q = np.zeros((m, n), dtype=np.int64)
    for i in range(m):
        for j in range(n):
            square = 0.5 * (x[i, j] - grid) ** 2 - 0.5 * curvature[j] * grid**2
            cost = importance[j] * square + lmbda[i] * rates[table[i, j]]
            q[i, j] = grid[np.argmin(cost)]
            error = x[i, j] - q[i, j]
            for k in range(j + 1, n):
                x[i, k] -= error * factor[j, k]
    return q


def trellis_path_cost(
    x, symbols, factor, rates, lowest, row_table, lmbda, importance, follow, second
):
    """Cost of one row's path of trellis symbols, from state 0."""
    x = np.array(x, dtype=np.float64)
    state, total = 0, 0.0
    for j, k in enumerate(symbols):
        level = 2 * k - second[state] * np.sign(k)
        rate = rates[2 * row_table[j] + second[state], k - lowest]
        total += importance[j] * 0.5 * (x[j] - level) ** 2 + lmbda * rate
        x[j + 1 :] -= (x[j] - level) * factor[j, j + 1 :]
        state = follow[state][k & 1]
    return total


def best_trellis_path(x, integers, **problem):
    """The cheapest of all paths over the given integers, by trying every one."""
    paths = itertools.product(integers, repeat=len(x))
    return min(paths, key=lambda path: trellis_path_cost(x, path, **problem))
