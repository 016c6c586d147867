"""Efforts: presets that explicit settings win over, and compression without any data."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import cerwu_gpu
from cerwu_gpu import Calibration, CompressionConfig, ConfigError, load_compressed
from cerwu_gpu.config import (
    Distillation,
    ImageCalibration,
    Objective,
    Text,
    Uniform,
    from_settings,
    settings,
)
from cerwu_gpu.container.reader import open_directory
from cerwu_gpu.models.module import fill
from cerwu_gpu.quantize.layer import quantize_stack
from tests.hf.test_text_heads import toy as text_head
from tests.hf.test_whole_text import TEXT
from tests.hf.test_whole_text import toy as encoder_decoder
from tests.hf.toys import toy
from tests.models.toys import toy as toy_classifier


def data_free(**changes: Any) -> CompressionConfig:
    return from_settings(effort="fast", **changes)


def test_normal_is_the_default():
    assert from_settings(effort="normal") == from_settings() == CompressionConfig()


@pytest.mark.parametrize("effort", ["fast", "normal", "best"])
def test_an_effort_is_a_set_of_settings(effort):
    config = from_settings(effort=effort)
    assert from_settings(**settings(config)) == config


def test_settings_that_are_given_win():
    config = from_settings(effort="best", quantizer="scalar", distill=3)
    assert config.grid.quantizer == "scalar" and config.distillation.steps == 3
    assert from_settings(effort="fast", lmbda=1e-9).lmbda == 1e-9
    assert from_settings(effort="fast", calibration="a.txt").text.names == ("a.txt",)
    assert from_settings(effort="best", samples=7).text.samples == 7
    assert from_settings(effort="best", distill=None).distillation is None
    assert from_settings(effort="best", distill=0).distillation is None
    assert from_settings(distill=0) == CompressionConfig()


def test_what_an_effort_sets_gives_way_to_what_excludes_it():
    assert from_settings(effort="best", levels=16).grid == Uniform(levels=16)
    images = from_settings(effort="fast", images="photos").calibration
    assert images == ImageCalibration(source="photos")
    # lmbda is in units of the sensitivity
    config = from_settings(effort="fast", sensitivity="none")
    assert config.lmbda == Objective().lmbda


def test_an_unknown_effort_is_refused():
    with pytest.raises(ConfigError, match="effort is 'more': choose one of fast, normal, best"):
        from_settings(effort="more")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sensitivity": "row"}, "sensitivity row comes from gradients, and calibration is none"),
        ({"drift": "correct"}, "drift correct needs data"),
        ({"distill": 3}, "distill needs data"),
        ({"max_perplexity_increase": 0.1}, "max_perplexity_increase needs data"),
        ({"hessian_cache": Path("x")}, "hessian_cache needs data"),
        ({"samples": 3}, "samples is of calibration data"),
        ({"effort": "best"}, "effort best is more calibration text and a distillation, and"),
        ({"sequence_length": 64}, "sequence_length is of calibration data"),
    ],
)
def test_without_data_nothing_that_needs_it_can_be_asked_for(given, message):
    with pytest.raises(ConfigError, match=message):
        from_settings(**{"effort": "fast", "calibration": "none", **given})


def test_no_data_and_a_text_exclude_each_other():
    with pytest.raises(ConfigError, match="calibration none is beside a text"):
        Calibration(source=("none", "a.txt"))


def _refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("the model was run")


MODELS = {
    **{family: partial(toy, family) for family in ("llama", "mixtral", "gpt2")},
    **{family: partial(encoder_decoder, family, 320) for family in ("t5", "whisper")},
}


@pytest.mark.parametrize("family", MODELS)
def test_a_model_of_transformers_is_compressed_without_being_run(family, tmp_path, monkeypatch):
    model = MODELS[family]()
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    monkeypatch.setattr(type(model), "forward", _refuse)
    report = cerwu_gpu.compress(model, tmp_path / "small", config=data_free(), progress=False)
    assert report.events == ()
    monkeypatch.undo()
    loaded = load_compressed(tmp_path / "small")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
    assert any(not torch.equal(original[name], p) for name, p in loaded.named_parameters())


def test_every_matrix_is_rounded_against_the_identity(tmp_path):
    model = toy("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    weight = model.get_parameter(name).detach().clone()
    config = data_free(lmbda=1e-3)
    cerwu_gpu.compress(model, tmp_path / "small", config=config, progress=False)
    alpha = torch.ones(len(weight)) / weight.square().sum(dim=1).mean()
    (expected,) = quantize_stack([weight], torch.eye(weight.shape[1]), config, [alpha]).matrices
    assert torch.equal(model.get_parameter(name), expected.weight(torch.float32))


def test_a_model_on_disk_gives_the_same_bytes(tmp_path):
    toy("llama").save_pretrained(tmp_path / "model")
    for name, model in {"disk": tmp_path / "model", "memory": toy("llama")}.items():
        cerwu_gpu.compress(model, tmp_path / name, config=data_free(), progress=False)
    disk, memory = (open_directory(tmp_path / name) for name in ("disk", "memory"))
    for (name, a), (_, b) in zip(disk.weights(), memory.weights(), strict=True):
        assert torch.equal(a, b), name


def best_of(tokenizer: Any, **given: Any) -> CompressionConfig:
    config = from_settings(effort="best", lmbda=1e-7, limit_columns=0, **given)
    calibration = Calibration(
        source=Text(TEXT * 8), tokenizer=tokenizer, samples=4, sequence_length=32, batch_size=2
    )
    return replace(config, calibration=calibration)


@pytest.mark.parametrize("kind", ["t5", "sequences, bert"])
def test_best_does_without_a_distillation_where_there_is_none(kind, toy_tokenizer, tmp_path):
    words = len(toy_tokenizer)
    model = encoder_decoder(kind, words) if kind == "t5" else text_head(kind, words)
    output, config = tmp_path / "small", best_of(toy_tokenizer)
    report = cerwu_gpu.compress(model, output, config=config, progress=False)
    event = "cannot be distilled: nothing is tuned after the quantization"
    assert [event in one for one in report.events] == [True] and report.distillation is None
    content = json.loads((tmp_path / "small.report.json").read_text(encoding="utf-8"))
    assert content["settings"]["distill"] is None  # asked for by itself it would be refused
    for given, message in (
        ({"strict": True}, r"\(strict\): give distill 0"),
        ({"distill": 2}, "drop"),
    ):
        config = best_of(toy_tokenizer, **given)
        with pytest.raises(ConfigError, match=f"cannot be distilled.*{message}"):
            cerwu_gpu.compress(model, tmp_path / "other", config=config, progress=False)


class Nested(nn.Module):
    """A module whose own weight has a name that begins another's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.last = nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 16))
        self.last.register_parameter("weight", nn.Parameter(torch.randn(10, 16)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.last(self.first(x)), self.last.weight)


@pytest.mark.parametrize("make", [Nested, lambda: toy_classifier("resnet")])
def test_any_module_is_compressed_without_batches(make, tmp_path):
    module = make().eval()
    report = cerwu_gpu.compress(module, tmp_path / "small", config=data_free(), progress=False)
    assert report.events == () and report.bits_per_weight < 16
    other = fill(make(), open_directory(tmp_path / "small"), device=torch.device("cpu"))
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name))


def test_options_of_the_command_line_win_even_at_their_defaults(monkeypatch, command, tmp_path):
    seen: list[CompressionConfig] = []

    def note(*_: Any, config: CompressionConfig, **__: Any) -> None:
        seen.append(config)
        raise ConfigError("enough.")

    monkeypatch.setattr("cerwu_gpu.api.compress", note)
    for options in ((), ("--quantizer", "scalar", "--distill", "2")):
        command("compress", "model", "-o", tmp_path / "small", "--effort", "best", *options)
    best, changed = seen
    assert best.grid.quantizer == "trellis32" and best.distillation == Distillation()
    assert changed.grid.quantizer == "scalar" and changed.distillation == Distillation(steps=2)


def test_a_run_without_data_is_repeated_by_its_report(command, toy_directory, tmp_path):
    code, _, _ = command("compress", toy_directory, "-o", tmp_path / "a", "--effort", "fast", "-q")
    assert code == 0
    report = json.loads((tmp_path / "a.report.json").read_text(encoding="utf-8"))
    settings_of_fast = ("--calibration none", "--sensitivity relative", "--lmbda 3e-06")
    assert all(part in report["command"] for part in settings_of_fast)
