"""scripts/fidelity.py on a small folder whose contents were made by the definitions in tests/."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.reference.straight_line import paper

ROOT = Path(__file__).resolve().parents[2]
with pytest.MonkeyPatch.context() as patch:
    # The script puts the checkout in place of its own folder, the first entry.
    patch.setattr(sys, "path", [str(ROOT), *sys.path])
    fidelity = importlib.import_module("scripts.fidelity")

LAYER = "layer"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One run under a frozen rate model, one of another method, one of NNCodec."""
    noise = np.random.default_rng(0)
    weight = noise.standard_normal((12, 10)).astype(np.float32)
    inputs = noise.standard_normal((10, 40)) + noise.standard_normal((1, 40))
    hessian = (inputs @ inputs.T / 20).astype(np.float32)
    for part in ("golden", "layers"):
        (tmp_path / part).mkdir()
    np.savez(tmp_path / "golden" / "case.npz", W=weight, H=hessian)
    np.savez(tmp_path / "layers" / f"{LAYER}.npz", W=weight, H=hessian)
    symbols, step = paper(
        weight, hessian, method="cerwu", levels=16, lmbda=0.01, rate_model="histogram"
    )
    symbols[0, 0] += 1  # one of 120 differs
    np.savez(tmp_path / "golden" / "run.npz", q=symbols, step=step)
    run = {
        "case": "case",
        "file": "run.npz",
        "method": "cerwu",
        "rate_model": "shannon",
        "nbins": 16,
        "lmbda": 0.01,
        "step": step,
    }
    (tmp_path / "golden" / "index.json").write_text(json.dumps([run]))
    (tmp_path / "reference.csv").write_text(
        "layer,method,nbins,lmbda,qp,rate_model,scan,bits_per_weight,relative_loss\n"
        f"{LAYER},cerwu,16,0.01,,deepcabac,row,3.0,0.01\n"
        f"{LAYER},cerwu,16,0.01,,shannon,row,3.0,0.01\n"
        f"{LAYER},nncodec-urq,,0,-8,deepcabac,row,4.0,0.01\n"
        f"other,cerwu,16,0.01,,deepcabac,row,3.0,0.01\n"
    )
    return tmp_path


def test_tells_what_agrees_and_how_far_the_rest_is(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = folder / "found.json"
    assert fidelity.main([str(folder), "--layer", LAYER, "--json", str(found)]) == 0
    told, left_out = capsys.readouterr()
    assert "99.167%" in told
    results = json.loads(found.read_text())
    assert results["golden"][0]["agreement"] == pytest.approx(119 / 120)
    assert results["golden"][0]["loss_ratio"] < 1
    for name in ("adaptive", "nncodec"):
        if name not in results:
            assert f"{name}: left out" in left_out
            continue
        (row,) = results[name]
        expected = {"adaptive": 3.0, "nncodec": 4.0}[name]
        assert row["bits_ratio"] == pytest.approx(row["bits"] / expected)


def test_a_folder_without_data_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fidelity.main([str(tmp_path)]) == 2
    assert "index.json" in capsys.readouterr().err
