"""A language model in a sweep: the numbers are those of files, and calibration is done once."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import cerwu_gpu
from cerwu_gpu import CompressionConfig, ConfigError
from cerwu_gpu.api import text_subject
from cerwu_gpu.baselines import nncodec
from cerwu_gpu.config import Distillation
from cerwu_gpu.sweep.model import ModelSubject
from cerwu_gpu.sweep.points import Axes, Point, grid_points
from tests.configs import compress_flat, configured
from tests.hf.toys import toy

BASE = configured(samples=4, sequence_length=32)


@pytest.fixture
def base(toy_text: Path) -> CompressionConfig:
    return replace(BASE, calibration=replace(BASE.text, source=str(toy_text)))


@pytest.fixture
def make(toy_directory: Path, toy_text: Path, base: CompressionConfig, tmp_path: Path) -> Any:
    """The toy model as a subject; its Hessians in tmp_path."""

    def made(model: Path = toy_directory, **options: Any) -> ModelSubject:
        settings: dict[str, Any] = {"context_length": 64, "max_windows": 3, "device": "cpu"}
        text = toy_text.read_text(encoding="utf-8")
        return text_subject(
            model, options.pop("base", base), text, tmp_path / "hessians", **settings, **options
        )

    return made


def one(base: CompressionConfig, system: Any, **axes: Any) -> Point:
    (point,) = grid_points(Axes(systems=(system,), **axes), base)
    return point


@pytest.mark.parametrize(
    ("system", "keep_head"),
    [("waterfilled", False), ("waterfilled", True), ("cerwu", False), ("rtn", True)],
    ids=["waterfilled", "waterfilled, head kept", "cerwu", "rtn, head kept"],
)
def test_a_point_is_what_compress_writes(
    system: str,
    keep_head: bool,
    make: Callable[..., ModelSubject],
    base: CompressionConfig,
    toy_directory: Path,
    toy_text: Path,
    tmp_path: Path,
) -> None:
    """After another point has changed the weights in place, and with Hessians of all weights."""
    axes = {"lmbdas": (1e-7,), "levels": (15,), "uniform_lmbdas": (1e-4,)}
    subject = make()
    subject.run(one(base, "rtn", levels=(3,)), tmp_path / "before")
    point = one(base, system, keep_heads=(keep_head,), **axes)
    outcome = subject.run(point, tmp_path / "point")

    report = compress_flat(
        toy_directory, tmp_path / "alone", config=point.config, device="cpu", progress=False
    )
    alone, ours = tmp_path / "alone", tmp_path / "point"
    assert (ours / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()
    assert outcome.bits_per_weight == report.bits_per_weight
    assert outcome.directory_bytes == report.directory_bytes
    assert outcome.original_bytes == report.original_bytes
    expected = cerwu_gpu.perplexity(
        cerwu_gpu.load_compressed(alone),
        AutoTokenizer.from_pretrained(toy_directory),
        toy_text.read_text(encoding="utf-8"),
        context_length=64,
        max_windows=3,
    )
    assert outcome.quality == expected


def test_a_distilled_point_is_what_compress_writes(
    make: Callable[..., ModelSubject],
    base: CompressionConfig,
    toy_directory: Path,
    tmp_path: Path,
) -> None:
    """With text held out for it, whose absence or presence is no other subject."""
    subject = make(base=replace(base, distillation=Distillation(steps=4)))
    assert subject.identity() == make().identity()
    point = one(base, "waterfilled", lmbdas=(1e-5,), distillations=(4,))
    subject.run(one(base, "waterfilled", lmbdas=(1e-5,)), tmp_path / "before")
    outcome = subject.run(point, tmp_path / "point")
    compress_flat(
        toy_directory, tmp_path / "alone", config=point.config, device="cpu", progress=False
    )
    alone, ours, before = (
        (tmp_path / name / "model.safetensors").read_bytes()
        for name in ("alone", "point", "before")
    )
    assert ours == alone != before
    assert outcome.seconds["distill"] > 0


def test_calibration_and_sensitivities_are_done_once(
    make: Callable[..., ModelSubject],
    base: CompressionConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from cerwu_gpu.calibration import cache
    from cerwu_gpu.hf import causal_lm

    calls: list[str] = []
    for module, name in ((cache, "CachingBlocks"), (causal_lm, "blockwise_sensitivities")):
        original = getattr(module, name)

        def counted(*args: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            calls.append(name)
            return original(*args, **options)

        monkeypatch.setattr(module, name, counted)
    subject = make()
    points = grid_points(
        Axes(systems=("waterfilled", "rtn"), lmbdas=(1e-7,), levels=(7,), keep_heads=(False, True)),
        base,
    )
    for number, point in enumerate(points):
        subject.run(point, tmp_path / str(number))
    make().run(points[0], tmp_path / "next_time")
    assert sorted(calls) == ["CachingBlocks", "blockwise_sensitivities"]


def test_the_original_is_measured_with_its_own_weights(
    make: Callable[..., ModelSubject], base: CompressionConfig, tmp_path: Path
) -> None:
    subject = make()
    before = subject.original()
    outcome = subject.run(one(base, "rtn", levels=(3,)), tmp_path / "point")
    assert subject.original() == before != outcome.quality


def test_nncodec_points_are_measured_with_the_weights_that_it_decodes(
    make: Callable[..., ModelSubject],
    base: CompressionConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NNCodec's place taken by rounding, so that the test runs without the package."""
    seen: dict[str, Any] = {}

    def rounded(weights: Any, *, qp: int, dependent: bool) -> Any:
        seen.update(names=set(weights), qp=qp, dependent=dependent)
        return {name: weight.round(1) for name, weight in weights.items()}, 1000

    monkeypatch.setattr(nncodec, "nncodec_roundtrip", rounded)
    subject = make()
    original = subject.original()
    coarse = subject.run(one(base, "nncodec-dependent", qps=(-20,)), tmp_path / "point")
    names = {name for name in seen["names"] if "layers" in name}
    assert seen["qp"] == -20 and seen["dependent"] and len(names) == 14
    weights = sum(subject._adapter._originals[name].numel() for name in seen["names"])
    assert coarse.bits_per_weight == 8 * 1000 / weights
    assert coarse.quality != original == subject.original()
    rtn = subject.run(one(base, "rtn", levels=(15,)), tmp_path / "rtn")
    coded = rtn.bits_per_weight * weights / 8
    assert coarse.directory_bytes - 1000 == pytest.approx(rtn.directory_bytes - coded, rel=0.7)


def test_nncodec_itself(
    make: Callable[..., ModelSubject], base: CompressionConfig, tmp_path: Path
) -> None:
    pytest.importorskip("nncodec")
    subject = make()
    fine, coarse = (
        subject.run(one(base, "nncodec", qps=(qp,)), tmp_path / f"{qp}") for qp in (-40, -16)
    )
    assert fine.bits_per_weight > coarse.bits_per_weight
    assert fine.quality == pytest.approx(subject.original(), rel=1e-3)


def test_what_identifies_a_subject(
    make: Callable[..., ModelSubject], base: CompressionConfig, toy_directory: Path, tmp_path: Path
) -> None:
    def changed(**options: Any) -> set[str]:
        other = make(**options).identity()
        return {name for name in known if other[name] != known[name]}

    known = make().identity()
    assert changed() == set()
    assert changed(base=replace(base, calibration=replace(base.text, samples=3))) == {
        "the calibration text"
    }
    assert changed(base=replace(base, include=("*.layers.0.*",))) == {"weights"}
    model = cerwu_gpu.hf.models.load_model(toy_directory)
    with torch.no_grad():
        next(model.model.parameters())[0, 0] += 1e-3
    model.model.save_pretrained(tmp_path / "other")
    assert model.tokenizer is not None
    model.tokenizer.save_pretrained(tmp_path / "other")
    assert changed(model=tmp_path / "other") == {"the model"}


@pytest.mark.parametrize("drift", ["sequential", "correct"])
def test_hessians_of_one_setting_only_are_refused(
    drift: str, make: Callable[..., ModelSubject], base: CompressionConfig
) -> None:
    with pytest.raises(ConfigError, match=drift):
        make(base=replace(base, drift=drift))


def test_the_shape_of_pythia(
    make: Callable[..., ModelSubject],
    base: CompressionConfig,
    toy_tokenizer: Any,
    tmp_path: Path,
) -> None:
    """GPT-NeoX with an untied head: fused q, k and v, biases, an embedding of its own."""
    toy("gpt_neox").save_pretrained(tmp_path / "pythia")
    toy_tokenizer.save_pretrained(tmp_path / "pythia")
    subject = make(model=tmp_path / "pythia")
    original = subject.original()
    fine, coarse = (
        subject.run(one(base, "waterfilled", lmbdas=(lmbda,)), tmp_path / f"{lmbda}")
        for lmbda in (1e-11, 1e-6)
    )
    assert subject.name == "pythia"
    assert fine.bits_per_weight > coarse.bits_per_weight + 1
    assert abs(fine.quality - original) < abs(coarse.quality - original)
