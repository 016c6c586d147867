"""scripts/trellis_codes.py measures the machines of the format."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

from cerwu_gpu.spec import TRELLIS_NEXT, TRELLIS_REGISTER

with pytest.MonkeyPatch.context() as patch:
    # The script puts the checkout in place of its own folder, the first entry.
    patch.setattr(sys, "path", [str(Path(__file__).resolve().parents[2]), *sys.path])
    trellis_codes = importlib.import_module("scripts.trellis_codes")

IN_USE = {n: (2 * f + 1, 2 * e) for n, (f, e) in TRELLIS_REGISTER.items()}


def test_the_registers_in_use_are_among_the_codes():
    for states, code in IN_USE.items():
        assert code in trellis_codes.codes(states.bit_length() - 1)
        if states > 8:
            assert trellis_codes.follow(code).tolist() == [list(x) for x in TRELLIS_NEXT[states]]


def test_more_states_come_nearer_to_the_limit():
    x = np.random.default_rng(0).standard_normal(40_000)
    gaps = [trellis_codes.gap(x, IN_USE[states], 0.6, 0.2) for states in (4, 8, 16, 32)]
    assert gaps == sorted(gaps, reverse=True)
    assert 0 < gaps[3] < gaps[0] - 0.03
    worse = trellis_codes.gap(x, trellis_codes.UNGERBOECK[5], 0.6, 0.2)
    assert gaps[3] < worse < gaps[2]


def test_the_table_has_every_finalist(capsys):
    assert trellis_codes.main(["--bits", "2", "--samples", "4000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["states", "h0", "h1"]
    assert ["4", "5", "2"] in [line.split()[:3] for line in lines]
