"""Benchmarks of decoding streams, and of second moments of inputs."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from cerwu_gpu import backend
from cerwu_gpu.coded import CodedMatrix, Reconstruction
from cerwu_gpu.coding import streams
from cerwu_gpu.coding.tables import codes_from_counts, table_from_codes
from cerwu_gpu.reference import ans, hessian, weights
from cerwu_gpu.spec import PRECISION, TRELLIS_NEXT
from cerwu_gpu.steps import step_values
from scripts.benchmark_timing import Mismatch, Row, Sizes, form, placed, timed


def random_coded(m: int, n: int, states: int) -> tuple[CodedMatrix, Reconstruction]:
    """Return a matrix of about 2.5 bits per weight, with eight classes and no escapes."""
    noise = np.random.default_rng(0)
    quantizers = 2 if states else 1
    spread = 1.37 * 2 ** ((np.arange(8) - 3.5) / 8)
    integers = np.arange(-12, 13)
    counts = 1e6 * np.exp(-((integers / spread[:, None]) ** 2) / 2)
    tables = table_from_codes(codes_from_counts(counts.astype(np.int64)))
    row_class, column_class = noise.integers(0, 4, m), noise.integers(0, 5, n)
    scale = spread[row_class[:, None] + column_class].astype(np.float32)
    symbols = np.rint(noise.standard_normal((m, n), np.float32) * scale).clip(-12, 12) + 12
    symbols = symbols.astype(np.int32)
    tables = tables.repeat(quantizers, axis=0)
    coded = coded_of(symbols, tables, row_class, column_class, states)
    steps = torch.from_numpy(noise.integers(-2000, -1000, n).astype(np.int16))
    none = torch.empty(0, dtype=torch.int32)
    return coded, Reconstruction(-12, 25, none, steps, steps[:1])


def coded_of(
    symbols: NDArray[np.int32],
    tables: NDArray[np.int64],
    row_class: NDArray[np.int64],
    column_class: NDArray[np.int64],
    states: int,
) -> CodedMatrix:
    """Code the symbols [m, n] of an alphabet; odd symbols have odd parity."""
    second = None
    if states:  # the parity of a symbol's index is its own
        second = backend.trellis_quantizers(torch.from_numpy(symbols), states).numpy()
    words, lengths = streams.encode(symbols, tables, row_class, column_class, second)
    m, n = symbols.shape
    return CodedMatrix(
        name=f"{m} x {n}",
        shape=(m, n),
        words=torch.from_numpy(words.view(np.int32)),
        lengths=torch.from_numpy(lengths.astype(np.int64)),
        tables=torch.from_numpy(tables),
        row_class=torch.from_numpy(row_class),
        column_class=torch.from_numpy(column_class),
        states=states,
        parity=torch.arange(tables.shape[1]) & 1,
    )


def decode_constriction(
    words: NDArray[np.uint32], lengths: NDArray[np.uint32], table: NDArray[np.int64], m: int, n: int
) -> NDArray[np.int32]:
    """Decode a matrix that has one table [K] for all elements, by constriction's own decoder."""
    symbols = np.empty((m, n), dtype=np.int32)
    model = streams.Categorical(table / (1 << PRECISION), perfect=True)
    for first, part in enumerate(np.split(words, np.cumsum(lengths)[:-1])):
        rows = symbols[first :: len(lengths)]
        rows[:] = streams.AnsCoder(part).decode(model, rows.size).reshape(rows.shape)
    return symbols


def decoder(sizes: Sizes, device: torch.device, measure: bool) -> Iterator[Row]:
    """Time streams to bfloat16 weights, and a copy of as many bytes on the same GPU."""
    for states in (0, *TRELLIS_NEXT):
        case = f"{states} states" if states else "no trellis"
        coded, rule = random_coded(*sizes.coded, states)
        batch = [placed(coded, device)] * sizes.copies
        rules = [placed(rule, device)] * sizes.copies
        expected = weights.decode_weights([coded], [rule], torch.bfloat16)[0]
        symbols = ans.decode([coded])[0]
        with form("triton"):
            decoded = backend.decode_weights(batch, rules, torch.bfloat16)
            if not all(torch.equal(x.cpu(), expected) for x in decoded):
                raise Mismatch(f"decoder, {case}: weights differ from the definition's.")
            if not all(torch.equal(x.cpu(), symbols) for x in backend.decode(batch)):
                raise Mismatch(f"decoder, {case}: symbols differ from the definition's.")
        if measure:
            yield from _decoder_times(case, batch, rules, 32 * len(coded.words) / symbols.numel())


def _decoder_times(
    case: str, batch: list[CodedMatrix], rules: list[Reconstruction], bits: float
) -> Iterator[Row]:
    from cerwu_gpu.kernels.ans import Batch, Levels, launch, launch_weights

    prepared = Batch(batch)
    levels = Levels(prepared, rules)
    steps = step_values(torch.cat([rule.column_step for rule in rules]))
    scales = step_values(
        torch.cat([r.row_scale.expand(m.shape[0]) for m, r in zip(batch, rules, strict=True)])
    )
    out = torch.empty(prepared.elements, dtype=torch.bfloat16, device=prepared.device)
    copy = torch.empty_like(out)
    indices = torch.empty_like(out, dtype=torch.int32)
    runs = {
        "kernel, bfloat16 weights": partial(launch_weights, prepared, levels, steps, scales, out),
        "whole call, checks included": partial(
            backend.decode_weights, batch, rules, torch.bfloat16
        ),
        "kernel, symbols": partial(launch, prepared, indices),
        "device copy of the weights": partial(copy.copy_, out),
    }
    with form("triton"):
        for what, run in runs.items():
            elements = prepared.elements
            yield timed(
                "decoder", case, what, run, elements=elements, bytes=2 * elements, bits=bits
            )


def moments(sizes: Sizes, device: torch.device, measure: bool) -> Iterator[Row]:
    """Time X^T X by torch's product and by the kernel."""
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
                    run = partial(backend.accumulate_hessian, total, x)
                    yield timed("hessian", case, what, run)
