"""NNCodec's round trip: its own quantizer, its own bytes."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest

from cerwu_gpu.baselines.nncodec import nncodec_roundtrip, nncodec_step
from cerwu_gpu.errors import ConfigError

LAYER = "model.layers.14.self_attn.q_proj"


@pytest.fixture
def installed() -> None:
    pytest.importorskip("nncodec", reason="nncodec is not installed")


def weights() -> dict[str, np.ndarray]:
    """A matrix, a transposed view, a convolution, and what degenerates."""
    generator = np.random.default_rng(0)
    return {
        "matrix": generator.standard_normal((40, 30)).astype(np.float32),
        "transposed": generator.standard_normal((20, 50)).astype(np.float32).T,
        "convolution": generator.standard_normal((8, 4, 3, 3)).astype(np.float32),
        "row": generator.standard_normal((1, 5)).astype(np.float32),
        "column": generator.standard_normal((5, 1)).astype(np.float32),
        "zeros": np.zeros((6, 6), dtype=np.float32),
    }


def test_steps_are_octaves_in_four_parts() -> None:
    assert [nncodec_step(qp) for qp in (0, 1, 2, 3, 4)] == [1.0, 1.25, 1.5, 1.75, 2.0]
    assert nncodec_step(-9) == 7 / 32


@pytest.mark.parametrize("qp", [-20, -7, 3])
def test_uniform_quantization_is_rounding(installed: None, qp: int) -> None:
    given = weights()
    decoded, _ = nncodec_roundtrip(given, qp=qp, dependent=False)
    assert list(decoded) == list(given)
    step = nncodec_step(qp)
    for name, weight in given.items():
        assert decoded[name].dtype == np.float32
        assert decoded[name].shape == weight.shape
        assert np.abs(decoded[name] - weight).max() <= step / 2 * (1 + 1e-5)
        np.testing.assert_allclose(decoded[name] / step, np.rint(decoded[name] / step), atol=1e-4)


def test_dependent_quantization_trades_better(installed: None) -> None:
    weight = np.random.default_rng(1).standard_normal((200, 200)).astype(np.float32)

    def excess(qp: int, dependent: bool) -> float:
        """Bits per weight above what a Gaussian of variance 1 needs for this error."""
        decoded, size = nncodec_roundtrip({"w": weight}, qp=qp, dependent=dependent)
        error = float(np.square(decoded["w"] - weight).mean())
        return 8 * size / weight.size + np.log2(error) / 2

    for qp in (-10, -8):
        assert excess(qp, False) == pytest.approx(0.254, abs=0.05)  # scalar, not quite ideal
        assert excess(qp, True) < excess(qp, False) - 0.08


def test_finer_steps_take_more_bytes(installed: None) -> None:
    given = weights()
    sizes = [nncodec_roundtrip(given, qp=qp, dependent=True)[1] for qp in (-24, -16, -8, 0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 1.5 * sizes[2]


def test_weights_stay_as_they_were(installed: None) -> None:
    given = weights()
    before = {name: weight.copy() for name, weight in given.items()}
    nncodec_roundtrip(given, qp=-8, dependent=True)
    for name, weight in given.items():
        np.testing.assert_array_equal(weight, before[name])


@pytest.mark.parametrize(
    ("given", "qp", "message"),
    [
        ({"w": np.ones((2, 2))}, -8, "w is not a matrix of finite float32"),
        ({"w": np.ones(4, dtype=np.float32)}, -8, "w is not a matrix of finite float32"),
        ({"w": np.full((2, 2), np.nan, dtype=np.float32)}, -8, "w is not a matrix of finite"),
        ({}, -8, "no weight"),
        ({"w": np.ones((2, 2), dtype=np.float32)}, 128, "qp is 128"),
    ],
)
def test_what_it_cannot_code_is_refused(
    installed: None, given: dict[str, np.ndarray], qp: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        nncodec_roundtrip(given, qp=qp, dependent=False)


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "nncodec"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nncodec", None)
    with pytest.raises(ConfigError, match="pip install --no-deps nncodec"):
        nncodec_roundtrip({"w": np.ones((2, 2), dtype=np.float32)}, qp=-8, dependent=False)


def test_gives_what_was_measured_on_a_real_layer(installed: None, data: Path) -> None:
    arrays = np.load(data / "layers" / f"{LAYER}.npz")
    weight, hessian = arrays["W"], arrays["H"].astype(np.float64)

    def loss(difference: np.ndarray) -> float:
        return float(np.sum((difference.astype(np.float64) @ hessian) * difference))

    with (data / "reference.csv").open() as lines:
        runs = [run for run in csv.DictReader(lines) if run["layer"] == LAYER]
    runs = [run for run in runs if run["method"].startswith("nncodec")]
    assert len(runs) == 10
    for run in runs:
        dependent = run["method"] == "nncodec-dq"
        decoded, size = nncodec_roundtrip({"w": weight}, qp=int(run["qp"]), dependent=dependent)
        bits = 8 * size / weight.size
        assert bits == pytest.approx(float(run["bits_per_weight"]), rel=2e-3)
        relative = loss(weight - decoded["w"]) / loss(weight)
        assert relative == pytest.approx(float(run["relative_loss"]), rel=1e-3)
