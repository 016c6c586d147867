"""The compiled forms with numba's checks of every index, which are off otherwise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import tests.conftest, numpy as np, torch
from dataclasses import replace
from cerwu_gpu.block_problem import BlockProblem
from cerwu_gpu.coded import check
from cerwu_gpu.coding import streams
from cerwu_gpu.compiled import ans, counts, dequantize, obs, trellis
from cerwu_gpu.errors import CorruptionError
from tests.kernels import test_ans, test_obs, test_trellis

streams.STREAM_SYMBOLS, streams.STREAM_BITS = 12, 1
generator = np.random.default_rng(0)
cpu = torch.device("cpu")
refused = 0
for seed in range(60):
    states = int(generator.choice([0, 4, 8]))
    stored = test_ans.stored(generator, 21, 10, states=states, escapes=1 + (states > 0))
    count = int(generator.integers(0, 120))
    cuts = np.sort(generator.integers(0, count + 1, 20))
    lengths = torch.from_numpy(np.diff(cuts, prepend=0, append=count))
    words = torch.from_numpy(generator.integers(1, 2**32, count))
    broken = replace(stored.coded, words=words, lengths=lengths)
    check(broken)
    try:
        ans.decode_weights([broken], [stored.rule], torch.bfloat16)
    except CorruptionError:
        refused += 1
    out = torch.empty(10, 21, dtype=torch.float16).t()
    ans.decode_weights([stored.coded], [stored.rule], torch.float16, [out])
    ans.decode([stored.coded])
assert refused == 60, refused
for rows, columns in ((1, 1), (65, 9), (130, 33)):
    for exhaustive in (True, False):
        for escapes in (True, False):
            given = test_obs.problem(rows, columns, cpu, escapes=escapes, spread=40)
            given["x"][0, 0] = torch.nan
            given["x"][0, -1] = torch.inf
            obs.quantize_block(BlockProblem(**given), exhaustive=exhaustive)
    for states in (4, 8):
        given = test_trellis.problem(rows, columns, cpu, states, spread=40)
        given["x"][0, 0] = torch.nan
        test_trellis.solve(trellis, given, max(1, columns - 5))
    symbols = torch.randint(-99, 99, (rows, columns), dtype=torch.int32)
    classes = [torch.zeros(length, dtype=torch.int64) for length in (rows, columns)]
    second = dequantize.trellis_quantizers(symbols, 8)
    alphabet = {"tables": 1, "lowest": -5, "size": 11, "escapes": 2, "second": second}
    counts.symbol_counts(symbols, *classes, **alphabet)
    batch = symbols.repeat(3, 1), classes[0].repeat(3), classes[1].repeat(3, 1)
    alphabet["second"] = second.repeat(3, 1)
    counts.symbol_counts(*batch, **alphabet)
    codes = torch.zeros(1, dtype=torch.int16)
    dequantize.dequantize(symbols, codes, codes, second=second)
print("within bounds")
"""


@pytest.mark.slow
def test_no_index_leaves_its_array(tmp_path: Path) -> None:
    checks = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "1"}
    environment = {**os.environ, **checks}
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert (done.returncode, done.stdout) == (0, "within bounds\n"), done.stderr
