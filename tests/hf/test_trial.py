"""Errors of a model's own code refuse the model; errors of cerwu_gpu are not laid at its door."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import XLNetConfig, XLNetLMHeadModel

import cerwu_gpu
from cerwu_gpu import Batches, CompressionConfig, Objective
from cerwu_gpu.errors import CalibrationError, ModelError
from cerwu_gpu.hf import causal_lm
from cerwu_gpu.hf.models import LoadedModel
from cerwu_gpu.hf.trial import raised_here, require_runs, sentence_of
from tests.hf.calibrated import adapter_of, find_weights
from tests.hf.toys import toy, toy_tokens


def raising(*_: Any, **__: Any) -> Any:
    raise KeyError(6)


def test_an_error_in_a_later_block_refuses_the_model_and_is_the_cause() -> None:
    model: Any = toy("llama")
    adapter = adapter_of(model, find_weights(model).chosen)
    model.model.layers[1].mlp.forward = raising
    with pytest.raises(ModelError, match=r"with gradients \(KeyError: 6\)") as caught:
        adapter.backward(toy_tokens(), 2)
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_error_of_our_own_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy("llama")
    adapter = adapter_of(model, find_weights(model).chosen)
    monkeypatch.setattr(adapter, "total_loss", lambda *_: "no tensor")  # torch raises, called by us
    with pytest.raises(AssertionError, match=r"to be a torch.Tensor"):
        adapter.backward(toy_tokens(), 2)


@pytest.mark.parametrize("family", ["mixtral", "llama"])
def test_what_cannot_run_at_all_is_refused_before_the_work(family: str, tmp_path: Path) -> None:
    model: Any = toy(family)
    model.model.norm.forward = raising
    config = CompressionConfig(calibration=Batches(inputs=[toy_tokens()]))
    with pytest.raises(ModelError, match=r"\S+ForCausalLM cannot be .*KeyError: 6") as caught:
        cerwu_gpu.compress(model, tmp_path / "out", config=config, progress=False)
    assert isinstance(caught.value.__cause__, KeyError)
    assert not (tmp_path / "out").exists()


def test_a_model_that_needs_more_than_tokens_is_refused() -> None:
    model: Any = toy("llama")
    require_runs(model)
    model.model.norm.forward = raising
    with pytest.raises(ModelError, match=r"LlamaForCausalLM cannot be run on tokens alone"):
        require_runs(model)


def test_hidden_states_whose_first_axis_is_no_sample_are_an_obstacle() -> None:
    config = XLNetConfig(vocab_size=80, d_model=16, n_layer=2, n_head=2, d_inner=24)
    model = XLNetLMHeadModel(config).eval()
    settings = CompressionConfig()
    adapter = causal_lm.CausalLM(
        LoadedModel(model, None, None), settings, device=torch.device("cpu")
    )
    obstacle = adapter.obstacle()
    assert isinstance(obstacle, CalibrationError)
    assert "first axis" in str(obstacle)


def test_the_sentence_of_an_exception_begins_with_its_kind() -> None:
    assert sentence_of(KeyError(6)) == "KeyError: 6"
    assert sentence_of(ValueError()) == "ValueError"
    assert sentence_of(CalibrationError("no text: give one.")) == "no text: give one"


def test_a_models_parts_are_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("tower_blocks", "find_blocks"):
        found = getattr(causal_lm, name)

        def counted(*given: Any, name: str = name, found: Any = found) -> Any:
            calls.append(name)
            return found(*given)

        monkeypatch.setattr(causal_lm, name, counted)
    config = CompressionConfig(
        calibration=Batches(inputs=[toy_tokens()]), objective=Objective(lmbda=1e-4)
    )
    cerwu_gpu.compress(toy("llama"), tmp_path / "out", config=config, progress=False)
    assert sorted(calls) == ["find_blocks", "tower_blocks"]


def test_an_error_of_the_models_backward_pass_is_the_models() -> None:
    x = torch.ones(2, requires_grad=True)
    y = x.exp()
    y.add_(1)  # what exp keeps for its gradient
    with pytest.raises(RuntimeError, match="inplace operation") as raised:
        calling(torch.autograd.grad, y.sum(), x)
    assert not raised_here(raised.value)


def calling(function: Any, *arguments: Any) -> Any:
    """Call a function from a frame of this package."""
    code = compile("result = function(*arguments)", "ours", "exec")
    names = {"__name__": "cerwu_gpu.ours", "function": function, "arguments": arguments}
    exec(code, names)
    return names["result"]


def test_an_error_that_torch_raises_for_our_code_is_ours() -> None:
    with pytest.raises(RuntimeError) as raised:
        calling(torch.mm, torch.ones(2, 3), torch.ones(2, 3))
    assert raised_here(raised.value)
