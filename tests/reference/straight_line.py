"""Independent definitions for tests: straight lines of numpy in float64, no blocks, no tricks."""

import itertools
import math

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


def paper(weight, hessian, *, method, levels, lmbda, rate_model):
    """The authors' symbols [m, n] and step: their six lines, one after the other."""
    w, h = np.array(weight, dtype=np.float64), np.array(hessian, dtype=np.float64)
    identity, half = np.eye(len(h)), levels // 2
    lmbda = 0.0 if method == "optq" else lmbda
    step = np.abs(w).max() / half
    w, h = np.clip(w / step, -half, half), h * step**2
    h[np.diag(np.diag(h) == 0)] = 1.0
    h += 0.01 * np.mean(np.diag(h)) * identity
    gamma = 1 / (math.log(2) * w.var(ddof=1)) if method == "cerwu" else 0.0
    raised = h + lmbda * gamma * identity
    w = w @ h @ np.linalg.inv(raised)
    raised += 0.01 * np.mean(np.diag(raised)) * identity
    upper = np.linalg.cholesky(np.linalg.inv(raised)).T
    reach = levels if method == "cerwu" else half
    scale = np.diag(upper)
    symbols = obs(
        w,
        upper / scale[:, None],
        paper_rates(w, reach, rate_model)[None],
        -reach,
        np.zeros(w.shape, dtype=int),
        np.full(len(w), lmbda),
        1 / scale**2,
        lmbda * gamma * scale**2,
    )
    return symbols, step


def paper_rates(w, reach, rate_model):
    """Bits [2 reach + 1] of the integers -reach ... reach for the matrix w."""
    grid = range(-reach, reach + 1)
    if rate_model == "uniform":
        return np.zeros(2 * reach + 1)
    if rate_model == "histogram":
        near = np.clip(np.sign(w) * np.floor(np.abs(w) + 0.5), -reach, reach)
        counts = np.array([1 + np.sum(near == g) for g in grid])
        return -np.log2(counts / counts.sum())
    spread = w.std(ddof=1) * math.sqrt(2)
    below = [0.5 * math.erfc(-(g - 0.5) / spread) for g in range(-reach, reach + 2)]
    return -np.log2(np.maximum(np.diff(below), 1e-300))
