"""Ranking of shift registers as trellises: the gap of each one on Gaussian samples.

    python scripts/trellis_codes.py --bits 4 5       # about three minutes

A trellis of 2^n states is the systematic encoder of a convolutional code with the parity checks h0
and h1 (spec.TRELLIS_REGISTER has the registers in use). With every code of n bits whose paths part
and meet by parity alone, samples are quantized at about 1.2, 1.8 and 2.8 bits, coded at the entropy
of each quantizer's symbols, and compared with the rate-distortion function. The best codes are
measured again with more samples, beside Ungerboeck's of the largest free distance.
"""

# mypy: allow-untyped-decorators, allow-untyped-defs

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
from numba import njit
from numpy.typing import NDArray
from tqdm import tqdm

from cerwu_gpu.cli.output import table

Array = NDArray[Any]
Code = tuple[int, int]

UNGERBOECK: dict[int, Code] = {2: (0o5, 0o2), 3: (0o13, 0o4), 4: (0o23, 0o4), 5: (0o45, 0o10)}
"""Codes of the largest free distance for one dimension, by bits of the register."""
POINTS = ((1.0, 0.18), (0.6, 0.2), (0.3, 0.25))
"""Steps, in units of the samples' deviation, and lmbda in units of the squared step."""
LARGEST = 60
"""Largest magnitude of a symbol that has a rate of its own."""
PASSES = 3
FINALISTS = 6


def codes(bits: int) -> list[Code]:
    """Return all pairs (h0, h1) for a register of so many bits."""
    ends = (1 << bits) + 1
    return [(ends | h0, h1) for h0 in range(0, 1 << bits, 2) for h1 in range(2, 1 << bits, 2)]


def follow(code: Code) -> Array:
    """Return the next state [states, parity] int64."""
    feedback, enter = code[0] >> 1, code[1] >> 1
    states = np.arange(1 << (code[0].bit_length() - 1))
    half = states >> 1 ^ feedback * (states & 1)
    return np.stack([half, half ^ enter], axis=1)


@njit(cache=True, fastmath=True)
def search(x, following, rates, lmbda):
    """Return the symbols of the cheapest path and their quantizers; rates [2, 2 LARGEST + 1]."""
    count, states = len(x), len(following)
    total, arrived = np.full(states, 1e30), np.empty(states)
    total[0] = 0.0
    origin = np.empty((count, states), np.int16)
    taken = np.empty((count, states), np.int16)
    cost, symbol = np.empty((2, 2)), np.empty((2, 2), np.int16)
    for j in range(count):
        magnitude, sign = abs(x[j]), -1 if x[j] < 0 else 1
        for u in range(2):
            for p in range(2):
                outer = 2 * max(np.rint((magnitude + u - 2 * p) * 0.25), 0.0) + p
                cost[u, p] = 1e30
                for k in (outer, max(outer - 2, p)):
                    level = 2 * k - (u if k > 0 else 0)
                    place = min(max(int(k) * sign + LARGEST, 0), 2 * LARGEST)
                    price = 0.5 * (magnitude - level) ** 2 + lmbda * rates[u, place]
                    if price < cost[u, p]:
                        cost[u, p], symbol[u, p] = price, int(k) * sign
        arrived[:] = 1e30
        for s in range(states):
            for p in range(2):
                to, way = following[s, p], total[s] + cost[s & 1, p]
                if way < arrived[to]:
                    arrived[to], origin[j, to], taken[j, to] = way, s, symbol[s & 1, p]
        total[:] = arrived - arrived.min()
    state = np.argmin(total)
    symbols, second = np.empty(count, np.int64), np.empty(count, np.int64)
    for j in range(count - 1, -1, -1):
        symbols[j], state = taken[j, state], origin[j, state]
        second[j] = state & 1
    return symbols, second


def gap(x: Array, code: Code, step: float, lmbda: float, passes: int = PASSES) -> float:
    """Return bits above the rate-distortion function of samples x, all of one variance."""
    scaled, following = x / step, follow(code)
    half = np.rint(scaled / 2)
    symbols, second = np.concatenate([half, half]).astype(np.int64), np.repeat([0, 1], len(x))
    for _ in range(passes):
        symbols, second = search(scaled, following, _rates(symbols, second), lmbda)
    level = 2 * symbols - second * np.sign(symbols)
    loss = float(np.mean((scaled - level) ** 2)) * step**2
    pairs = np.unique(np.stack([second, symbols]), axis=1, return_counts=True)
    counts = pairs[1].astype(float)
    of_quantizer = np.bincount(second, minlength=2)[pairs[0][0]]
    bits = -float((counts * np.log2(counts / of_quantizer)).sum()) / len(x)
    return bits - 0.5 * math.log2(float(np.mean(x**2)) / loss)


def _rates(symbols: Array, second: Array) -> Array:
    """Return the bits [2, 2 LARGEST + 1] of each quantizer's symbols; q and -q share theirs."""
    places = np.clip(symbols, -LARGEST, LARGEST) + LARGEST + (2 * LARGEST + 1) * second
    counts = np.bincount(places, minlength=2 * (2 * LARGEST + 1)).reshape(2, -1) + 0.02
    counts = counts + counts[:, ::-1]
    rates: Array = -np.log2(counts / counts.sum(axis=1, keepdims=True))
    return rates


def ranked(bits: int, few: Array, many: Array) -> list[tuple[Code, list[float]]]:
    """Return the best codes by their gaps on `many` samples, chosen by those on `few`."""
    bar = tqdm(codes(bits), desc=f"{1 << bits} states", leave=False, disable=None)
    first = {code: mean(gap(few, code, *point) for point in POINTS) for code in bar}
    chosen = {*sorted(first, key=first.__getitem__)[:FINALISTS], UNGERBOECK[bits]}
    gaps = [(code, [gap(many, code, *point) for point in POINTS]) for code in sorted(chosen)]
    return sorted(gaps, key=lambda each: mean(each[1]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(prog="trellis_codes", description="Good codes for trellises.")
    parser.add_argument("--bits", type=int, nargs="+", choices=sorted(UNGERBOECK), default=[4, 5])
    parser.add_argument("--samples", type=int, default=400_000, help="for the last comparison")
    arguments = parser.parse_args(argv)
    many = np.random.default_rng(0).standard_normal(arguments.samples)
    few = np.random.default_rng(1).standard_normal(arguments.samples // 8)
    rows = [
        [str(1 << bits), f"{code[0]:o}", f"{code[1]:o}", f"{mean(gaps):.4f}"]
        + [f"{value:.4f}" for value in gaps]
        for bits in arguments.bits
        for code, gaps in ranked(bits, few, many)
    ]
    steps = [f"step {step:g}" for step, _ in POINTS]
    print(table(["states", "h0", "h1", "mean gap", *steps], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
