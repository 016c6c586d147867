"""The grid of a sweep: which points it has, and what tells them apart."""

from dataclasses import replace
from typing import Any

import pytest

from cerwu_gpu.config import Bits, Calibration, CompressionConfig, from_settings, settings
from cerwu_gpu.errors import ConfigError
from cerwu_gpu.sweep import points as module
from cerwu_gpu.sweep.points import Axes, check_available, grid_points

BASE = CompressionConfig()


def test_each_system_takes_the_axes_that_it_knows() -> None:
    axes = Axes(
        systems=(
            "waterfilled",
            "cerwu",
            "cerwu-gamma0",
            "optq",
            "rtn",
            "nncodec",
            "nncodec-dependent",
        ),
        quantizers=("scalar", "trellis8"),
        lmbdas=(1e-9, 1e-8, 1e-7),
        levels=(16, 31),
        uniform_lmbdas=(1e-5, 1e-4),
        qps=(-30, -20),
    )
    points = grid_points(axes, BASE)
    count = {system: sum(p.system == system for p in points) for system in axes.systems}
    assert count == {
        "waterfilled": 2 * 3,
        "cerwu": 2 * 2,
        "cerwu-gamma0": 2 * 2,
        "optq": 2,
        "rtn": 2,
        "nncodec": 2,
        "nncodec-dependent": 2,
    }
    for point in points:
        settings, uniform = point.settings(), point.system in module.UNIFORM
        assert (settings["levels"] is not None) == uniform
        assert (settings["lmbda"] is not None) == (point.system in ("waterfilled", *module.RATED))
        assert (settings["qp"] is not None) == point.system.startswith("nncodec")
        if uniform:
            assert point.config.objective.sensitivity == "none"
            assert settings["quantizer"] == "scalar"
    assert {p.settings()["scale"] for p in points if p.system == "cerwu"} == {"per-tensor"}
    assert {p.settings()["scale"] for p in points if p.system == "rtn"} == {"per-row"}
    assert [p.dependent for p in points[-4:]] == [False, False, True, True]


def test_labels_name_the_kind_and_what_is_unusual_about_it() -> None:
    axes = Axes(
        systems=("waterfilled", "cerwu", "rtn"),
        lmbdas=(1e-9,),
        sensitivities=("row", "layer"),
        levels=(16,),
        uniform_lmbdas=(1e-5,),
        rate_models=("histogram", "gaussian"),
        scales=("per-tensor", "per-row"),
        keep_heads=(False, True),
    )
    assert [point.label for point in grid_points(replace(axes, distillations=(0, 9)), BASE)][
        :2
    ] == [
        "waterfilled scalar",
        "waterfilled scalar, distilled 9",
    ]
    labels = [point.label for point in grid_points(axes, BASE)]
    assert labels[:8] == [
        "waterfilled scalar",
        "waterfilled scalar, sensitivity layer",
        "cerwu (paper)",
        "cerwu (paper), per-row",
        "cerwu (paper), gaussian rate",
        "cerwu (paper), per-row, gaussian rate",
        "rtn, per-tensor",
        "rtn",
    ]
    assert labels[8:] == [f"{label}, head kept" for label in labels[:8]]


def test_keys_tell_settings_apart_and_nothing_else() -> None:
    point = grid_points(Axes(systems=("waterfilled",), lmbdas=(1e-9,)), BASE)[0]
    text = replace(
        point,
        config=replace(point.config, calibration=Calibration(source="elsewhere.txt", samples=3)),
    )
    assert text.key == point.key  # the text is part of the subject, not of the point
    values = settings(point.config)
    changes: dict[str, Any] = {
        "lmbda": 2e-9,
        "passes": 3,
        "damping": 0.01,
        "damping_by": "mean",
        "quantizer": "trellis4",
        "sensitivity": "layer",
        "block_size": 64,
        "keep_head": True,
        "drift": "correct",
        "distill": 5,
    }
    others = [
        replace(point, config=from_settings(**{**values, name: value}))
        for name, value in changes.items()
    ]
    assert len({point.key, *(other.key for other in others)}) == 1 + len(changes)


def test_a_value_given_twice_is_one_point() -> None:
    axes = Axes(systems=("rtn", "rtn"), levels=(16, 16))
    assert len(grid_points(axes, BASE)) == 1


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"systems": ()}, "systems"),
        ({"lmbdas": ()}, "lmbdas"),
        ({"levels": ()}, "levels"),
        ({"systems": ("gptq",)}, "gptq"),
    ],
    ids=str,
)
def test_wrong_axes_are_refused(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        Axes(**settings)


@pytest.mark.parametrize(
    ("settings", "part"),
    [({"levels": (1,)}, "levels"), ({"lmbdas": (-1.0,)}, "lmbda"), ({"lmbdas": (0.0,)}, "lmbda")],
    ids=str,
)
def test_wrong_values_are_refused(settings: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        grid_points(Axes(**settings), BASE)


def test_a_sweep_has_no_target() -> None:
    with pytest.raises(ConfigError, match="drop bits"):
        grid_points(Axes(), replace(BASE, target=Bits(2.0)))


def test_a_missing_nncodec_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        check_available(grid_points(Axes(systems=("nncodec",)), BASE))
    check_available(grid_points(Axes(systems=("rtn",)), BASE))
