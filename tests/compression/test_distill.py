"""Distillation: norms and biases follow the original, the integers stay, nothing gets worse."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import cerwu_gpu
from cerwu_gpu import Batches, Bits, CompressionConfig, ConfigError, Objective
from cerwu_gpu.calibration.students import floats_of
from cerwu_gpu.compression.distill import Distilled, Student, distil
from cerwu_gpu.config import Distillation, from_settings, settings
from cerwu_gpu.container.reader import open_directory
from cerwu_gpu.hf.causal_lm import CausalLM
from cerwu_gpu.hf.models import LoadedModel
from cerwu_gpu.hf.text import CalibrationTokens
from tests.configs import compress_flat, configured
from tests.conftest import TEXT
from tests.hf import toys as language
from tests.models import toys as vision

FEW: dict[str, Any] = {"samples": 12, "sequence_length": 32, "batch_size": 4, "lmbda": 3e-6}
STEPS = {"distill": 12, "distill_learning_rate": 5e-3}


def words_of(folder: Path) -> dict[str, str]:
    """Name -> checksum of the integers of each compressed weight."""
    return {name: x.words_sha256 for name, x in open_directory(folder).compressed().items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral", "gemma3"])
def test_floats_move_and_integers_stay(family: str, tmp_path: Path, toy_tokenizer: Any) -> None:
    text: dict[str, Any] = {"tokenizer": toy_tokenizer, "text": TEXT * 16, "progress": False}
    plain, tuned = language.toy(family), language.toy(family)
    compress_flat(plain, tmp_path / "plain", config=configured(**FEW), **text)
    report = compress_flat(tuned, tmp_path / "tuned", config=configured(**FEW, **STEPS), **text)
    assert report.distillation is not None
    assert report.distillation["after"] < report.distillation["before"]
    assert words_of(tmp_path / "tuned") == words_of(tmp_path / "plain")
    names = floats_of(plain, [])
    moved = [n for n in names if not torch.equal(plain.get_parameter(n), tuned.get_parameter(n))]
    assert any("norm" in name or "ln_" in name for name in moved)
    loaded = cerwu_gpu.load_compressed(tmp_path / "tuned")
    tokens = torch.arange(60).view(2, 30)
    assert torch.equal(loaded(tokens).logits, tuned(tokens).logits)
    page = json.loads((tmp_path / "tuned.report.json").read_text(encoding="utf-8"))
    assert page["distillation"] == report.distillation and page["seconds"]["distill"] > 0


@pytest.mark.parametrize("family", vision.FAMILIES)
def test_classifiers_are_distilled_too(family: str, tmp_path: Path) -> None:
    config = CompressionConfig(
        calibration=Batches(inputs=vision.images(6, 6)),
        objective=Objective(lmbda=1e-2),
        distillation=Distillation(steps=12, learning_rate=5e-3),
    )
    model = vision.toy(family)
    report = cerwu_gpu.compress(model, tmp_path / "out", config=config, progress=False)
    assert report.distillation is not None
    assert report.distillation["after"] <= report.distillation["before"]
    loaded = cerwu_gpu.load_compressed(tmp_path / "out")
    x = vision.images()[0]
    assert torch.equal(loaded(x).logits, model(x).logits)


def test_gradients_are_those_of_plain_autograd(toy_tokenizer: Any) -> None:
    """Block by block as in one graph of the whole model, beside the original one."""
    model, original = language.toy("llama"), language.toy("llama")
    config = configured(**FEW, **STEPS)
    loaded = LoadedModel(model, toy_tokenizer, None)
    adapter = CausalLM(loaded, config, device=torch.device("cpu"))
    tokens = language.toy_tokens(6, 16)
    adapter.take(CalibrationTokens(tokens[:4], tokens[4:]))
    student = adapter.student(config)
    with torch.no_grad():
        for name in adapter.layouts:  # the head and the embedding among them
            weight = model.get_parameter(name)
            weight.copy_((weight * 4).round() / 4)
    found = student.gradients(1)

    def divergence(batch: Tensor) -> Tensor:
        log_p = original(batch).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        log_q = model(batch).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    divergence(tokens[2:4]).backward()
    assert found.keys() == floats_of(model, []).keys()
    for name, gradient in found.items():
        expected = model.get_parameter(name).grad
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)
    assert student.divergence() == pytest.approx(float(divergence(tokens[4:]).detach()), rel=1e-4)


class Valley(Student):
    """One float whose training pulls it toward 1 and whose held-out data want it at `goal`."""

    batches = 3

    def __init__(self, goal: float, dtype: torch.dtype = torch.float32) -> None:
        self.value = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.floats = {"value": self.value}
        self.goal = goal
        self.seen: list[int] = []

    def gradients(self, batch: int) -> dict[str, Tensor]:
        self.seen.append(batch)
        return {"value": (self.value.detach() - 1).to(self.value.dtype)}

    def divergence(self) -> float:
        return float((self.value.detach().float() - self.goal).square())


def test_held_out_data_decide_where_it_stops() -> None:
    student = Valley(goal=0.3)
    result = distil(student, Distillation(steps=64, learning_rate=0.1))
    assert 0 < result.steps < 64 and len(student.seen) < 64
    assert abs(float(student.value.detach()) - 0.3) < 0.3
    assert result.after == pytest.approx(student.divergence()) and result.after < result.before


def test_what_is_not_better_is_not_taken() -> None:
    student = Valley(goal=-1.0)
    result = distil(student, Distillation(steps=20, learning_rate=0.1))
    assert result == Distilled(0, result.before, result.before)
    assert float(student.value.detach()) == 0.0


def test_floats_are_judged_as_the_file_stores_them() -> None:
    student = Valley(goal=1.0, dtype=torch.bfloat16)
    result = distil(student, Distillation(steps=40, learning_rate=0.1))
    assert student.value.dtype == torch.bfloat16
    assert result.after == student.divergence()


def test_the_same_seed_sees_the_batches_in_the_same_order() -> None:
    orders = []
    for seed in (0, 0, 1):
        student = Valley(goal=1.0)
        distil(student, Distillation(steps=9, learning_rate=1e-3), seed=seed)
        orders.append(student.seen)
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0][:3]) == [0, 1, 2]


@pytest.mark.slow
def test_a_target_is_met_before_and_after(tmp_path: Path, toy_tokenizer: Any) -> None:
    config = configured(**{**FEW, "bits": 4.0}, **STEPS)
    report = compress_flat(
        language.toy("llama"),
        tmp_path / "out",
        config=config,
        tokenizer=toy_tokenizer,
        text=TEXT * 16,
        progress=False,
    )
    assert report.bits_per_weight == pytest.approx(4.0, abs=0.02)
    assert report.distillation is not None and report.distillation["steps"] >= 0
    assert isinstance(config.target, Bits)


def test_settings_of_a_distillation() -> None:
    config = from_settings(distill=5, distill_batch_size=1)
    assert config.distillation == Distillation(steps=5, batch_size=1)
    assert from_settings(**settings(config)) == config
    assert settings(CompressionConfig())["distill"] is None
    for wrong in ({"distill": 0}, {"distill": 3, "distill_learning_rate": -1.0}):
        with pytest.raises(ConfigError):
            from_settings(**wrong)
    with pytest.raises(ConfigError, match="give distill, too"):
        from_settings(distill_batch_size=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.distillation.steps = 3  # type: ignore[misc, union-attr]


def test_the_command_line_distils(
    toy_directory: Path, toy_text: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    few = ("--samples", "6", "--sequence-length", "32", "--calibration", toy_text, "--quiet")
    code, out, err = command(
        "compress", toy_directory, "-o", tmp_path / "out", "--distill", "6", *few, "--json"
    )
    assert code == 0, err
    assert json.loads(out)["distillation"].keys() == {"steps", "before", "after"}
