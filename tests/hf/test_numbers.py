"""Models and texts with numbers that break others: named, or in the report."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cerwu_gpu.errors import CalibrationError, ConfigError, ModelError
from tests.configs import compress_flat, configured
from tests.hf.calibrated import calibrated_blocks as CalibratedBlocks
from tests.hf.calibrated import find_blocks, find_weights, output_sensitivities
from tests.hf.toys import toy, toy_tokens

FEW: dict[str, Any] = {"samples": 4, "sequence_length": 32, "batch_size": 2, "lmbda": 1e-4}


@pytest.fixture
def text(toy_text: Path) -> str:
    return toy_text.read_text(encoding="utf-8")


@pytest.fixture
def run(tmp_path: Path, toy_tokenizer: Any, text: str) -> Any:
    def compress(model: Any, **settings: Any) -> Any:
        words = settings.pop("text", text)
        config = configured(**{**FEW, **settings})
        return compress_flat(
            model, tmp_path / "out", config=config, tokenizer=toy_tokenizer, text=words,
            progress=False, overwrite=True,
        )  # fmt: skip

    return compress


def calls(model: Any) -> list[int]:
    """How often each block was really run, not only stood in for; filled while the model works."""
    counts = [0] * len(find_blocks(model))
    for index, (_, block) in enumerate(find_blocks(model)):

        def note(*_: Any, index: int = index) -> None:
            counts[index] += 1

        block.mlp.register_forward_pre_hook(note)
    return counts


@pytest.mark.parametrize(
    ("include", "head", "expected"),
    [
        (["*.layers.0.*"], False, [1, 0, 0]),
        (["*.layers.1.mlp.up_proj"], False, [1, 1, 0]),
        (["*.layers.0.*", "lm_head"], True, [1, 1, 1]),
        (["*.layers.0.*", "model.embed_tokens"], True, [1, 0, 0]),
    ],
    ids=["first", "second", "first and head", "first and embedding"],
)
def test_only_blocks_that_something_depends_on_are_run(
    include: list[str], head: bool, expected: list[int]
) -> None:
    model = toy("llama", tie_word_embeddings=False)
    layouts = find_weights(model, include, head=head).chosen
    blocks = CalibratedBlocks(model, layouts, toy_tokens(2), batch_size=2)
    seen, found = None, []
    for block in blocks:
        seen = seen or calls(model)  # capturing, which runs the first block once, is over
        found += [matrix.name for matrix in block.matrices()]
        assert block.statistics() or not block.matrices()
    assert seen == expected
    assert found == [layout.name for layout in layouts]
    assert len(blocks) == 3 + sum(not layout.name.startswith("model.layers") for layout in layouts)


def test_blocks_without_a_chosen_weight_have_no_hessian() -> None:
    model = toy("llama")
    layouts = find_weights(model, ["*.layers.1.*"]).chosen
    found = [len(block.statistics()) for block in CalibratedBlocks(model, layouts, toy_tokens())]
    assert found[0] == found[2] == 0 and found[1] > 0


def test_the_backward_pass_ends_at_the_first_chosen_weight() -> None:
    model, tokens = toy("llama"), toy_tokens(2)
    everything = output_sensitivities(model, find_weights(model).chosen, tokens)
    layouts = find_weights(model, ["*.layers.2.*"]).chosen
    seen = calls(model)
    some = output_sensitivities(model, layouts, tokens)
    assert seen == [2, 1, 2]  # captured and forward; forward; forward and backward
    assert all(torch.equal(alpha, everything[label]) for label, alpha in some.items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_weight_that_is_not_finite_is_named(run: Any, bad: float) -> None:
    model = toy("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = bad
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight holds .* NaN"):
        run(model)


@pytest.mark.parametrize("sensitivity", ["none", "row"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_an_activation_that_is_not_finite_is_named_with_its_sample(
    bad: float, sensitivity: str
) -> None:
    model, tokens = toy("llama", tie_word_embeddings=False), toy_tokens()
    tokens[tokens == 7] = 8
    tokens[3, 5] = 7
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = bad
    layouts = find_weights(model).chosen
    with pytest.raises(CalibrationError, match=r"layers\.0\.self_attn\.q_proj.*sample 3:"):
        if sensitivity == "row":
            output_sensitivities(model, layouts, tokens, batch_size=2)
        else:
            next(iter(CalibratedBlocks(model, layouts, tokens, batch_size=2))).statistics()


@pytest.mark.parametrize("sensitivity", ["none", "row"])
def test_activations_that_overflow_float16_are_named(run: Any, sensitivity: str) -> None:
    model = toy("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e3)
        model.model.layers[1].mlp.gate_proj.weight.mul_(1e3)
    with pytest.raises(
        CalibrationError,
        match=r"layers\.1\.mlp\.down_proj\.weight .* sample 0: it overflows float16",
    ):
        run(model.to(torch.float16), sensitivity=sensitivity)


def test_inputs_that_are_always_zero_are_an_event_and_strict_makes_it_an_error(run: Any) -> None:
    def model() -> Any:
        made = toy("llama")
        with torch.no_grad():
            made.model.layers[1].self_attn.v_proj.weight.zero_()
        return made

    report = run(model(), sensitivity="none", include=("*.layers.1.*",), keep_head=True)
    (event,) = report.events
    assert "layers.1.self_attn.o_proj.weight" in event and "inputs are 0" in event
    with pytest.raises(CalibrationError, match=r"o_proj.* inputs are 0 .*\(strict\)"):
        run(model(), sensitivity="none", include=("*.layers.1.*",), keep_head=True, strict=True)


def test_a_matrix_without_gradients_is_an_event(run: Any) -> None:
    model = toy("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    report = run(model, include=("*.layers.1.mlp.*",), keep_head=True)
    assert {event.split(":")[0].rsplit(".", 2)[1] for event in report.events} == {
        "gate_proj",
        "up_proj",
    }
    assert all("no gradient reached its outputs" in event for event in report.events)


@pytest.mark.parametrize("method", ["cerwu", "optq"])
def test_more_damping_is_reported_with_its_value(
    run: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One word again and again makes H singular; without damping there is no factor.
    settings = {"samples": 4, "sequence_length": 16, "damping": 0.0, "levels": 15, "method": method}
    settings |= {"text": "sea " * 400}
    settings |= {"include": ("*.layers.0.mlp.down_proj",), "keep_head": True, "sensitivity": "none"}
    report = run(toy("llama"), **settings)
    (event,) = report.events
    assert "its Hessian needed a damping of 1e-0" in event and "down_proj" in event
    with pytest.raises(CalibrationError, match=r"damping of .*\(strict\)"):
        run(toy("llama"), **settings, strict=True)


def test_a_weight_that_overflows_its_dtype_when_quantized_is_refused(run: Any) -> None:
    model = toy("llama").to(torch.bfloat16)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.finfo(torch.bfloat16).max
    settings = {"include": ("*.layers.2.mlp.down_proj",), "keep_head": True}
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.down_proj.* beyond bfloat16"):
        run(model, **settings, sensitivity="none", levels=11, method="rtn")


def test_two_tokens_are_enough(run: Any) -> None:
    report = run(toy("llama"), samples=1, sequence_length=2)
    assert all(layer.relative_loss < 1.5 for layer in report.layers)


def test_fewer_tokens_than_a_sample_are_refused(run: Any, toy_tokenizer: Any) -> None:
    words = "one two three four"
    count = len(toy_tokenizer(words)["input_ids"])
    with pytest.raises(CalibrationError, match=f"has {count} tokens.* at most {count + 1}"):
        run(toy("llama"), text=words)
    with pytest.raises(CalibrationError, match=r"give a longer text\.$"):
        run(toy("llama"), text="a")
    with pytest.raises(ConfigError, match="sequence_length"):
        run(toy("llama"), text=words, sequence_length=1)


def test_tokens_that_the_text_never_has_keep_their_rows(run: Any) -> None:
    model = toy("llama")
    before = model.get_input_embeddings().weight.detach().clone()
    run(model, text="a " * 400, lmbda=1e-9)
    after = model.get_input_embeddings().weight.detach()
    error = (after - before).square().mean(dim=1) / before.square().mean(dim=1)
    assert float(error.max()) < 0.5


def test_weights_left_alone_are_in_the_report_and_do_not_fail_strict(run: Any) -> None:
    report = run(toy("qwen2_moe"), exclude=("*.layers.1.self_attn.q_proj",), keep_head=True)
    assert report.left["model.layers.1.self_attn.q_proj.weight"] == "not chosen"
    assert report.left["model.layers.0.mlp.shared_expert_gate.weight"] == "router"
    assert report.left["model.embed_tokens.weight"] == "outside the blocks"
    assert report.to_dict()["left"] == report.left
    assert report.left.keys().isdisjoint(layer.name for layer in report.layers)
    strict = run(toy("llama"), exclude=("*.layers.1.*",), keep_head=True, strict=True)
    assert not strict.events and len(strict.left) > 2


def test_fewer_tokens_than_columns_are_an_event_with_the_damping(run: Any) -> None:
    settings = {"include": ("*.layers.0.mlp.down_proj",), "keep_head": True, "sensitivity": "none"}
    settings |= {"samples": 1, "sequence_length": 16}
    columns = toy("llama").config.intermediate_size
    few = f"16 calibration tokens for {columns} columns: its Hessian was taken with a damping of"
    name = "model.layers.0.mlp.down_proj.weight"
    assert run(toy("llama"), **settings).events == (f"{name}: {few} 1",)
    assert run(toy("llama"), **settings, damping=0.25).events == (f"{name}: {few} 0.25",)
    assert run(toy("llama"), **{**settings, "samples": 4}).events == ()
    assert run(toy("llama"), **settings, levels=11, method="rtn").events == ()
