"""Distillation: norms, biases and row scales follow the original, the integers stay, nothing gets
worse."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import cerwu_gpu
from cerwu_gpu import Batches, Bits, CompressionConfig, ConfigError, Objective, OutputError
from cerwu_gpu.calibration import students
from cerwu_gpu.calibration.row_factors import RowFactors
from cerwu_gpu.calibration.students import floats_of
from cerwu_gpu.compression import distill
from cerwu_gpu.compression.distill import UNITS, Distilled, RowCodes, Student, distil
from cerwu_gpu.config import Distillation, from_settings, settings
from cerwu_gpu.container.reader import open_directory
from cerwu_gpu.container.state import save_state
from cerwu_gpu.container.work import work_path
from cerwu_gpu.hf.causal_lm import CausalLM, eager_experts
from cerwu_gpu.hf.models import LoadedModel
from cerwu_gpu.hf.text import CalibrationTokens
from cerwu_gpu.layout import WeightLayout
from cerwu_gpu.steps import step_values
from tests.configs import compress_flat, configured
from tests.conftest import TEXT
from tests.hf import toys as language
from tests.models import toys as vision

FEW: dict[str, Any] = {"samples": 12, "sequence_length": 32, "batch_size": 4, "lmbda": 3e-6}
STEPS = {"distill": 12, "distill_learning_rate": 5e-3}


def words_of(folder: Path) -> dict[str, str]:
    """Name -> checksum of the integers of each compressed weight."""
    return {name: x.words_sha256 for name, x in open_directory(folder).compressed().items()}


def row_codes(folder: Path) -> dict[str, Any]:
    """Name -> row scale codes of each compressed weight."""
    codes = {}
    for name, stored in ((n, open_directory(folder).stored(n)) for n in words_of(folder)):
        codes[name] = np.concatenate([matrix.rule.row_scale.numpy() for matrix in stored.matrices])
    return codes


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral", "gemma3"])
def test_floats_and_scales_move_and_integers_stay(
    family: str, tmp_path: Path, toy_tokenizer: Any
) -> None:
    text: dict[str, Any] = {"tokenizer": toy_tokenizer, "text": TEXT * 16, "progress": False}
    plain, tuned = language.toy(family), language.toy(family)
    first = compress_flat(plain, tmp_path / "plain", config=configured(**FEW), **text)
    report = compress_flat(tuned, tmp_path / "tuned", config=configured(**FEW, **STEPS), **text)
    assert report.distillation is not None
    assert report.distillation["after"] < report.distillation["before"]
    assert words_of(tmp_path / "tuned") == words_of(tmp_path / "plain")
    names = floats_of(plain, [])
    moved = [n for n in names if not torch.equal(plain.get_parameter(n), tuned.get_parameter(n))]
    assert any("norm" in name or "ln_" in name for name in moved)
    before, after = row_codes(tmp_path / "plain"), row_codes(tmp_path / "tuned")
    scaled = [name for name in before if not np.array_equal(before[name], after[name])]
    assert scaled or report.distillation["bytes"] == 0
    assert all(np.gcd.reduce(np.diff(after[name])) % UNITS[0] == 0 for name in scaled)
    growth = sum(x.side_bytes for x in report.layers) - sum(x.side_bytes for x in first.layers)
    assert report.distillation["bytes"] == growth
    stored = {
        n: sum(p.side for p in e.parts)
        for n, e in open_directory(tmp_path / "tuned").compressed().items()
    }
    assert sum(stored.values()) == sum(x.side_bytes for x in report.layers)
    assert report.bits_per_weight == pytest.approx(
        8
        * sum(x.words_bytes + x.side_bytes for x in report.layers)
        / sum(x.shape[0] * x.shape[1] for x in report.layers)
    )
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


@pytest.mark.parametrize(
    ("family", "positions"),
    [("llama", 7), ("gpt2", 15), ("mixtral", 16), ("gpt_oss", 40), ("gemma2", 14)],
)
def test_gradients_are_those_of_plain_autograd(
    family: str, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block by block as in one graph of the whole model; scales by the gradients of weights, and
    logits of a few positions at a time."""
    monkeypatch.setattr(students, "LOGITS", positions * language.VOCABULARY)
    model, original = language.toy(family), language.toy(family)
    config = configured(**FEW, **STEPS)
    adapter = CausalLM(LoadedModel(model, None, None), config, device=torch.device("cpu"))
    tokens = language.toy_tokens(6, 16)
    adapter.take(CalibrationTokens(tokens[:4], tokens[4:]))
    student = adapter.student(config)
    factors = {name: 1 + 0.1 * torch.randn(len(x)) for name, x in student.factors.items()}
    unscaled = {}
    with torch.no_grad():
        for name in adapter.layouts:  # the head and the embedding among them
            weight = model.get_parameter(name)
            weight.copy_((weight * 4).round() / 4)
            unscaled[name] = weight.clone()
            student.factors[name].copy_(factors[name])
    found, divergence = student.gradients(1), student.divergence()
    with torch.no_grad():
        for name, layout in adapter.layouts.items():
            parameter = model.get_parameter(name)
            for part, one in enumerate(factors[name].view(layout.parts, -1)):
                layout.store(parameter, part, layout.matrix(parameter, part) * one[:, None])

    def plain(batch: Tensor) -> Tensor:
        log_p = original(batch).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        log_q = model(batch).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        return functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)

    with eager_experts(model), eager_experts(original):
        plain(tokens[2:4]).backward()
        assert divergence == pytest.approx(float(plain(tokens[4:]).detach()), rel=1e-4)
    assert found.keys() == floats_of(model, []).keys() | adapter.layouts.keys()
    for name, gradient in found.items():
        expected = model.get_parameter(name).grad
        assert expected is not None
        if name in adapter.layouts:
            layout, weight = adapter.layouts[name], unscaled[name]
            expected = torch.cat(
                [
                    (layout.matrix(expected, part) * layout.matrix(weight, part)).sum(1)
                    for part in range(layout.parts)
                ]
            )
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


def test_factors_of_grouped_convolutions_and_shared_embeddings() -> None:
    """As by plain autograd on weights that are multiplied out."""
    convolution = nn.Conv2d(4, 6, 3, stride=2, groups=2)
    table, tokens = nn.Embedding(5, 3), torch.tensor([[0, 4, 4]])
    layouts = [WeightLayout("c", (6, 2, 3, 3), 2, False), WeightLayout("e", (5, 3), 1, False)]
    weights = {"c": convolution.weight, "e": table.weight}
    x, mixing = torch.randn(2, 4, 7, 7), torch.randn(2, 6, 3, 3)

    def value(convolved: Tensor, looked: Tensor, applied: Tensor) -> Tensor:
        return (convolved * mixing).sum() + (looked * applied[..., :3]).sum()

    factors = {"c": torch.rand(6).requires_grad_(), "e": torch.rand(5).requires_grad_()}
    with RowFactors(layouts, weights, factors):
        looked = table(tokens)
        ours = value(convolution(x), looked, functional.linear(looked, table.weight))
    gradients = torch.autograd.grad(ours, list(factors.values()))
    c, e = (
        factors["c"][:, None, None, None] * convolution.weight,
        factors["e"][:, None] * table.weight,
    )
    looked = e[tokens]
    convolved = functional.conv2d(x, c, convolution.bias, stride=2, groups=2)
    plain = value(convolved, looked, functional.linear(looked, e))
    expected = torch.autograd.grad(plain, list(factors.values()))
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradients, expected)


class NoRows(RowCodes):
    """A file without quantized weights."""

    codes: Mapping[str, Tensor] = {}
    weights = 0

    def size(self, codes: Mapping[str, Tensor]) -> int:
        return 0

    def store(self, codes: Mapping[str, Tensor]) -> None:
        assert codes == {}


class Valley(Student):
    """One float whose training pulls it toward 1 and whose held-out data want it at `goal`."""

    batches = 3

    def __init__(self, goal: float, dtype: torch.dtype = torch.float32) -> None:
        self.value = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.floats = {"value": self.value}
        self.factors = {}
        self.goal = goal
        self.seen: list[int] = []

    def gradients(self, batch: int) -> dict[str, Tensor]:
        self.seen.append(batch)
        return {"value": (self.value.detach() - 1).to(self.value.dtype)}

    def divergence(self) -> float:
        return float((self.value.detach().float() - self.goal).square())


def test_held_out_data_decide_where_it_stops() -> None:
    student = Valley(goal=0.3)
    result = distil(student, NoRows(), Distillation(steps=64, learning_rate=0.02))
    assert 0 < result.steps < 64 and len(student.seen) < 64
    assert abs(float(student.value.detach()) - 0.3) < 0.3
    assert result.after == pytest.approx(student.divergence()) and result.after < result.before


def test_what_is_not_better_is_not_taken() -> None:
    student = Valley(goal=-1.0)
    result = distil(student, NoRows(), Distillation(steps=20, learning_rate=0.1))
    assert result == Distilled(0, result.before, result.before, 0)
    assert float(student.value.detach()) == 0.0


def test_floats_are_judged_as_the_file_stores_them() -> None:
    student = Valley(goal=1.0, dtype=torch.bfloat16)
    result = distil(student, NoRows(), Distillation(steps=40, learning_rate=0.1))
    assert student.value.dtype == torch.bfloat16
    assert result.after == student.divergence()


def test_the_same_seed_sees_the_batches_in_the_same_order() -> None:
    orders = []
    for seed in (0, 0, 1):
        student = Valley(goal=1.0)
        distil(student, NoRows(), Distillation(steps=9, learning_rate=1e-3), seed=seed)
        orders.append(student.seen)
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0][:3]) == [0, 1, 2]


class Slope(Student):
    """Three rows whose scales want codes from which coarser resolutions lie farther away."""

    batches = 1
    floats: Mapping[str, nn.Parameter] = {}

    def __init__(self) -> None:
        self.factors = {"w": torch.ones(3)}
        self.goal = (torch.tensor([20.0, 24.0, 16.0]) - 7) * math.log(2) / 256

    def gradients(self, batch: int) -> dict[str, Tensor]:
        return {"w": self.factors["w"].log() - self.goal}

    def divergence(self) -> float:
        return 1e-3 + float((self.factors["w"].log() - self.goal).square().sum())


class ThreeRows(RowCodes):
    """Codes that take as many bytes as their resolution asks for."""

    weights = 10**9

    def __init__(self, student: Slope) -> None:
        self.codes = {"w": torch.tensor([7, 7, 7], dtype=torch.int16)}
        self.stored: Tensor | None = None
        self._student = student

    def size(self, codes: Mapping[str, Tensor]) -> int:
        moved = codes["w"].int()
        return next((256 // u for u in reversed(UNITS) if not bool((moved % u).any())), 1)

    def store(self, codes: Mapping[str, Tensor]) -> None:
        self.stored = codes["w"]
        self._student.factors["w"].copy_(step_values(codes["w"]) / step_values(self.codes["w"]))


@pytest.mark.parametrize(
    ("room", "unit"), [(None, 4), (63, 4), (31, 8), (15, 16), (7, 32), (6, None)], ids=str
)
def test_scales_get_the_finest_resolution_that_there_is_room_for(
    room: int | None, unit: int | None
) -> None:
    student = Slope()
    rows = ThreeRows(student)
    result = distil(student, rows, Distillation(steps=200, learning_rate=5e-3), room=room)
    assert rows.stored is not None
    if unit is None:
        assert result == Distilled(0, result.before, result.before, 0)
        assert torch.equal(rows.stored, rows.codes["w"])
        return
    exact = 7 + student.goal.double() * 256 / math.log(2)
    assert (rows.stored % unit == 0).all()
    assert (rows.stored - exact).abs().max() <= unit
    assert result.bytes == 256 // unit - 1
    assert result.after == student.divergence() < result.before


def test_scales_that_cost_more_than_they_gain_stay() -> None:
    student = Slope()
    rows = ThreeRows(student)
    rows.weights = 1  # a bit is worth as much as the whole divergence
    result = distil(student, rows, Distillation(steps=50, learning_rate=5e-3))
    assert result.steps == 0 and rows.stored is not None
    assert torch.equal(rows.stored, rows.codes["w"])


def test_a_killed_distillation_goes_on(
    tmp_path: Path, toy_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bytes of an undisturbed run, and no step that was journaled done again."""
    step = 7
    calls: list[int] = []
    advance = distill._Tuning.advance

    def counted(self: Any, gradients: Any) -> None:
        calls.append(self.step)
        if len(calls) == step:
            raise KeyboardInterrupt
        advance(self, gradients)

    def run(name: str) -> None:
        compress_flat(
            language.toy("llama"),
            tmp_path / name,
            config=configured(**FEW, **STEPS),
            tokenizer=toy_tokenizer,
            text=TEXT * 16,
            progress=False,
        )

    monkeypatch.setattr(distill, "SAVED_EVERY", 3)
    run("whole")
    monkeypatch.setattr(distill._Tuning, "advance", counted)
    with pytest.raises(KeyboardInterrupt):
        run("out")
    assert work_path(tmp_path / "out").is_dir()
    calls[:] = [-1] * step
    run("out")
    assert calls[step] == (step - 1) // 3 * 3
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_threads_do_not_change_the_bytes_of_a_distillation(
    tmp_path: Path, toy_tokenizer: Any
) -> None:
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            compress_flat(
                language.toy("llama", hidden_size=64, intermediate_size=96, vocab_size=4096),
                tmp_path / str(count),
                config=configured(**{**FEW, "samples": 4, **STEPS, "distill": 3}),
                tokenizer=toy_tokenizer,
                text=TEXT * 16,
                progress=False,
            )
    finally:
        torch.set_num_threads(threads)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in "12")
    assert one == two


def test_a_damaged_state_is_one_sentence(tmp_path: Path) -> None:
    state = tmp_path / "state.safetensors"
    state.write_bytes(b"nothing")
    with pytest.raises(OutputError, match="pass --restart"):
        distil(Valley(1.0), NoRows(), Distillation(steps=2), state=state)
    save_state(state, {"value.other": torch.zeros(1)}, {"step": 1})
    with pytest.raises(OutputError, match="pass --restart"):
        distil(Valley(1.0), NoRows(), Distillation(steps=2), state=state)


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
    assert 8 * sum(x.words_bytes + x.side_bytes for x in report.layers) == pytest.approx(
        report.bits_per_weight * sum(x.shape[0] * x.shape[1] for x in report.layers)
    )
    assert report.distillation is not None and report.distillation["steps"] >= 0
    assert isinstance(config.target, Bits)


def test_settings_of_a_distillation() -> None:
    config = from_settings(distill=5, distill_batch_size=1)
    assert config.distillation == Distillation(steps=5, batch_size=1)
    assert from_settings(**settings(config)) == config
    assert settings(CompressionConfig())["distill"] is None
    assert from_settings().distillation is None and Distillation().steps > 0
    for wrong in ({"distill": -1}, {"distill": 3, "distill_learning_rate": -1.0}):
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
    assert json.loads(out)["distillation"].keys() == {"steps", "before", "after", "bytes"}
