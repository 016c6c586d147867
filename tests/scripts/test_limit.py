"""scripts/limit.py: the search for asked bits, hulls, what is counted, and its command line."""

import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cerwu_gpu.config import Objective, Quantizer
from cerwu_gpu.container.matrix import encode_matrix
from cerwu_gpu.quantize.layer import quantize_stack, relative_loss
from cerwu_gpu.quantize.limit import limit_bits
from cerwu_gpu.quantize.objective import quadratic_error
from tests.configs import configured

ROOT = Path(__file__).resolve().parents[2]
with pytest.MonkeyPatch.context() as patch:
    # The script puts the checkout in place of its own folder, the first entry.
    patch.setattr(sys, "path", [str(ROOT), *sys.path])
    limit = importlib.import_module("scripts.limit")
    points = importlib.import_module("scripts.limit_points")


def save(path: Path, m: int = 256, n: int = 64, seed: int = 0, **changes: np.ndarray) -> Path:
    """A layer with correlated inputs and rows of different spread."""
    noise = np.random.default_rng(seed)
    mix = noise.normal(size=(n, n)) * np.exp(noise.normal(size=n))
    inputs = mix @ noise.normal(size=(n, 8 * n))
    weight = noise.normal(size=(m, n)) * np.exp(0.5 * noise.normal(size=(m, 1)))
    arrays = {"W": weight, "H": inputs @ inputs.T / (4 * n)}
    arrays = {key: array.astype(np.float32) for key, array in arrays.items()} | changes
    np.savez(path, **{key: array for key, array in arrays.items() if array.size})
    return path


def point(lmbda: float, bits: float) -> "points.Point":
    return points.Point(lmbda, bits, 0.1, 0, {})


PAIRS = st.lists(st.tuples(st.floats(0.1, 8.0), st.floats(1e-6, 1.0)), min_size=1, max_size=12)


@given(pairs=PAIRS)
@settings(max_examples=200, deadline=None)
def test_no_point_is_below_its_hull(pairs: list[tuple[float, float]]) -> None:
    hull = points.Hull.of(pairs)
    vertices = {(bits, math.log(loss)) for bits, loss in pairs}
    assert set(hull.points) <= vertices
    for (bits, upper), (more, lower) in pairwise(hull.points):
        assert bits < more and upper > lower
    for bits, loss in pairs:
        at_equal_loss = hull.bits(loss)
        assert at_equal_loss is None or at_equal_loss <= bits + 1e-6


@given(pairs=PAIRS)
@settings(max_examples=200, deadline=None)
def test_a_hull_is_convex(pairs: list[tuple[float, float]]) -> None:
    hull = points.Hull.of(pairs).points
    for (a, x), (b, y), (c, z) in zip(hull, hull[1:], hull[2:], strict=False):
        assert (y - x) * (c - b) <= (z - y) * (b - a)


def test_bits_on_a_hull_are_linear_in_the_logarithm_of_the_loss() -> None:
    hull = points.Hull.of([(1.0, 1e-1), (3.0, 1e-3), (2.5, 1e-1), (4.0, 1e-3)])
    assert hull.bits(1e-2) == pytest.approx(2.0)
    assert hull.bits(1e-1) == pytest.approx(1.0)
    assert hull.bits(2e-1) is None
    assert hull.bits(1e-4) is None


@given(
    asked=st.floats(0.5, 6.0),
    rate=st.floats(0.15, 0.5),
    bend=st.floats(0.0, 0.5),
    shift=st.floats(-30.0, 10.0),
)
@settings(max_examples=200, deadline=None)
def test_asked_bits_are_found_in_six_evaluations(
    asked: float, rate: float, bend: float, shift: float
) -> None:
    """Curves like those of layers: straight at high rates, flatter where little is left."""

    def bits(lmbda: float) -> float:
        octaves = -rate * (math.log2(lmbda) - shift)
        return math.log1p(math.exp(3 * octaves)) / 3 + bend * math.tanh(octaves - 2) + bend

    assume(abs(bits(2.0**shift) - asked) < 5)
    known: list[points.Point] = []
    found = points.approach(
        lambda lmbda: point(lmbda, bits(lmbda)), asked, known, 2.0**shift, lambda _: -0.4
    )
    assert abs(found.bits - asked) <= points.TOLERANCE
    assert len(known) <= 6


def test_what_is_known_is_used_again() -> None:
    known = [point(1.0, 2.004), point(4.0, 1.0)]
    asked: list[float] = []

    def evaluate(lmbda: float) -> "points.Point":
        asked.append(lmbda)
        return point(lmbda, 2.004 - 0.502 * math.log2(lmbda))

    assert points.approach(evaluate, 2.0, known, 1e-3, lambda _: -0.5) is known[0]
    assert asked == []
    assert points.approach(evaluate, 1.5, known, 1e-3, lambda _: -0.5).lmbda == asked[0]
    assert asked == [pytest.approx(2.0, rel=0.02)]


def test_bits_that_no_lmbda_gives_are_approached() -> None:
    known: list[points.Point] = []
    found = points.approach(
        lambda lmbda: point(lmbda, 3.0 if lmbda < 1 else 1.5), 2.0, known, 0.1, lambda _: -0.5
    )
    assert found.bits == 1.5
    assert len(known) == points.EVALUATIONS


@pytest.mark.parametrize("quantizer", ["scalar", "trellis4", "trellis8", "trellis32"])
def test_everything_that_is_stored_is_counted(tmp_path: Path, quantizer: str) -> None:
    layer = limit.read_layer(save(tmp_path / "layer.npz"))
    config = configured(quantizer=quantizer, lmbda=layer.lmbda(2.0))
    measured = points.measure(layer, config)
    stack = quantize_stack([layer.weight], layer.hessian, config)
    coded = encode_matrix(stack.matrices[0], stack.relative_losses[0])
    assert measured.words_bytes == coded.words.nbytes
    assert sum(measured.side_bytes.values()) == len(coded.side)
    assert measured.bits == 8 * (coded.words.nbytes + len(coded.side)) / (256 * 64)
    difference = layer.weight - stack.matrices[0].weight(torch.float32)
    error = float(quadratic_error(difference, layer.hessian).sum())
    assert measured.relative_loss == pytest.approx(error / layer.energy)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, Path]:
    """Everything at once: the JSON, the picture's path where matplotlib is there."""
    folder = tmp_path_factory.mktemp("layers")
    save(folder / "first.npz")
    save(folder / "second.npz", m=192, n=96, seed=1)
    table = folder / "measured.csv"
    table.write_text(
        "layer,method,nbins,lmbda,bits_per_weight,relative_loss\n"
        "first,cerwu,16,1e-4,1.0,0.9\nfirst,cerwu,16,1e-6,9.0,1e-7\nfirst,optq,16,,0.1,1e-9\n"
    )
    output = folder / "new" / "limit.json"
    picture = folder / "new" / "limit.png" if find_spec("matplotlib") else None
    options = ["--bits", "3", "2", "--quantizer", "scalar", "trellis4", "--baseline"]
    options += ["--reference", str(table), "--json", str(output)]
    options += ["--picture", str(picture)] if picture else []
    with pytest.MonkeyPatch.context() as patched:
        printed: list[str] = []
        patched.setattr("builtins.print", lambda text: printed.append(text))
        assert limit.main([str(folder), *options]) == 0
    return json.loads(output.read_text()), "\n".join(printed), folder


def test_every_layer_quantizer_and_rate_is_reported(outcome: tuple[dict, str, Path]) -> None:
    document, printed, _ = outcome
    cases = [(r["layer"], r["quantizer"], r["asked"]) for r in document["results"]]
    assert cases == [
        (layer, quantizer, bits)
        for layer in ("first", "second")
        for quantizer in ("scalar", "trellis4")
        for bits in (2.0, 3.0)
    ]
    for result in document["results"]:
        near = abs(result["bits"] - result["asked"]) <= points.TOLERANCE
        assert near or f"{result['bits']:.4f} bits is as near" in printed
        assert f"{result['gap']:.4f}" in printed
        size = result["words_bytes"] + sum(result["side_bytes"].values())
        assert result["bits"] == pytest.approx(
            8 * size / (256 * 64 if "first" in result["layer"] else 192 * 96)
        )
    assert document["settings"] == {
        "bits": [3.0, 2.0],
        "quantizer": ["scalar", "trellis4"],
        "passes": Objective.passes,
        "damping": Objective.damping,
        "damping_by": Objective.damping_by,
    }
    assert {"cerwu_gpu", "torch", "numpy", "python", "constriction"} <= set(document["versions"])
    assert document["cpu"] and document["date"] and document["threads"] >= 1


def test_the_gap_is_what_is_above_the_limit(outcome: tuple[dict, str, Path]) -> None:
    document, _, folder = outcome
    for result in document["results"]:
        arrays = np.load(folder / f"{result['layer']}.npz")
        weight, hessian = torch.from_numpy(arrays["W"]), torch.from_numpy(arrays["H"])
        energy = float(quadratic_error(weight, hessian).sum())
        assert relative_loss(weight, torch.zeros_like(weight), hessian) == pytest.approx(1)
        bound = limit_bits(weight, hessian, result["relative_loss"] * energy)
        assert result["limit"] == pytest.approx(bound)
        assert result["gap"] == pytest.approx(result["bits"] - bound)
        assert result["gap"] > 0
    for quantizer, figures in document["summary"].items():
        gaps = [r["gap"] for r in document["results"] if r["quantizer"] == quantizer]
        assert figures["mean_gap"] == pytest.approx(sum(gaps) / len(gaps))
        assert figures["worst_gap"] == max(gaps)


def test_others_are_compared_at_equal_loss(outcome: tuple[dict, str, Path]) -> None:
    document, printed, _ = outcome
    for result in document["results"]:
        measured = document["baseline"][result["layer"]]
        assert {p["levels"] for p in measured} == set(points.LEVELS)
        hull = points.Hull.of((p["bits"], p["relative_loss"]) for p in measured)
        others = result["bits_of_others"]
        assert others["paper"] == hull.bits(result["relative_loss"])
        if result["layer"] == "second":
            assert "reference" not in others
        else:
            share = math.log(0.9 / result["relative_loss"]) / math.log(0.9 / 1e-7)
            assert others["reference"] == pytest.approx(1 + 8 * share)
    assert "/ paper" in printed and "/ reference" in printed


def test_losses_that_do_not_overlap_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "layer.npz")
    table = tmp_path / "measured.csv"
    table.write_text(
        "layer,method,bits_per_weight,relative_loss\nlayer,cerwu,1,0.9\nlayer,cerwu,2,0.8\n"
    )
    options = ["--bits", "2", "--quantizer", "scalar", "--reference", str(table)]
    assert limit.main([str(tmp_path), *options]) == 0
    assert "layer: no loss of reference overlaps that of scalar 2\n" in capsys.readouterr().out


def test_the_picture_is_drawn(outcome: tuple[dict, str, Path]) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    picture = outcome[2] / "new" / "limit.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def without(key: str) -> Callable[[Path], None]:
    return lambda folder: void(save(folder / "layer.npz", **{key: np.empty(0)}))


def changed(key: str, array: np.ndarray) -> Callable[[Path], None]:
    return lambda folder: void(save(folder / "layer.npz", **{key: array}))


def void(_: object) -> None:
    """Nothing of what was made is wanted."""


WRONG_LAYERS = {
    "empty folder": (lambda folder: None, "holds no *.npz files"),
    "no W": (without("W"), "holds no W"),
    "no H": (without("H"), "holds no H"),
    "W is a vector": (changed("W", np.ones(64, np.float32)), "[m, n]"),
    "W has no rows left": (changed("W", np.ones((1, 63), np.float32)), "[m, n]"),
    "H is not square": (changed("H", np.ones((64, 63), np.float32)), "[n, n]"),
    "W holds integers": (changed("W", np.ones((4, 64), np.int32)), "int32"),
    "W holds nan": (changed("W", np.full((4, 64), np.nan)), "not finite"),
    "H holds inf": (changed("H", np.full((64, 64), np.inf)), "not finite"),
    "W is zero": (changed("W", np.zeros((4, 64))), "no effect"),
    "W is an object": (changed("W", np.array([None])), "cannot be read"),
    "not a zip file": (lambda folder: void((folder / "a.npz").write_text("x")), "cannot be read"),
}


def assert_refused(capsys: pytest.CaptureFixture[str], part: str) -> None:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("limit: ") and lines[0].endswith(".")
    assert part in lines[0]


@pytest.mark.parametrize(("make", "part"), list(WRONG_LAYERS.values()), ids=list(WRONG_LAYERS))
def test_a_wrong_layer_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path], None],
    part: str,
) -> None:
    make(tmp_path)
    assert limit.main([str(tmp_path), "--bits", "2"]) == 2
    assert_refused(capsys, part)


def test_a_wrong_layer_is_refused_before_the_others_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "first.npz")
    save(tmp_path / "second.npz", H=np.ones((64, 63), np.float32))
    monkeypatch.delattr(limit, "solve")
    assert limit.main([str(tmp_path), "--bits", "2"]) == 2
    assert_refused(capsys, "second.npz")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--bits", "0"), "--bits"),
        (("--bits", "nan"), "--bits"),
        (("--bits", "2", "-1"), "--bits"),
        (("--bits", "2", "--passes", "0"), "passes"),
        (("--bits", "2", "--damping", "-1"), "damping"),
        (("--bits", "2", "--reference", "no-such.csv"), "no-such.csv"),
    ],
    ids=" ".join,
)
def test_a_wrong_setting_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], part: str
) -> None:
    save(tmp_path / "layer.npz")
    assert limit.main([str(tmp_path), *options]) == 2
    assert_refused(capsys, part)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("layer,bits_per_weight,relative_loss\na,1,0.1\n", "no column method"),
        ("layer,method,relative_loss\na,cerwu,0.1\n", "no column bits_per_weight"),
        ("layer,method,bits_per_weight,relative_loss\na,cerwu,one,0.1\n", "cannot be read"),
        ("layer,method,bits_per_weight,relative_loss\na,cerwu,1,0\n", "above 0"),
    ],
    ids=["method", "bits", "words", "no loss"],
)
def test_a_wrong_reference_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, part: str
) -> None:
    save(tmp_path / "layer.npz")
    table = tmp_path / "measured.csv"
    table.write_text(text)
    assert limit.main([str(tmp_path), "--bits", "2", "--reference", str(table)]) == 2
    assert_refused(capsys, part)


def test_a_picture_without_matplotlib_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "layer.npz")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    picture = tmp_path / "limit.png"
    assert limit.main([str(tmp_path), "--bits", "2", "--picture", str(picture)]) == 2
    assert_refused(capsys, "matplotlib")


def test_the_command_works_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "limit.py"), str(tmp_path), "--bits", "2"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.strip() == (
        f"limit: {tmp_path} holds no *.npz files: name a folder that does."
    )


def test_every_quantizer_has_a_colour() -> None:
    pytest.importorskip("matplotlib")
    from scripts.limit_picture import COLOURS

    assert set(COLOURS) == set(get_args(Quantizer))
