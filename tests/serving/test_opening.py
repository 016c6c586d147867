"""Models that could not be loaded are refused before the work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    XLNetConfig,
    XLNetLMHeadModel,
)

import cerwu_gpu
from cerwu_gpu import CerwuError, ModelError
from tests.configs import compress_flat, configured
from tests.hf.toys import SIZES, toy


class Own(LlamaForCausalLM):
    """A class that no directory describes."""


def tied() -> Any:
    model = toy("llama", tie_word_embeddings=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def one_storage() -> Any:
    model = toy("llama", tie_word_embeddings=False)
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach())
    return model


def shared_by_blocks() -> Any:
    model = toy("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


def pruned() -> Any:
    model = toy("llama")
    model.model.layers = model.model.layers[:2]
    return model


def widened() -> Any:
    model = toy("llama", tie_word_embeddings=False)
    model.lm_head = nn.Linear(32, 400, bias=False)
    return model


def with_norm() -> Any:
    model = toy("llama")
    model.model.extra = nn.LayerNorm(32)
    return model


def invalid_generation() -> Any:
    model = toy("llama")
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.9
    return model


def offloaded() -> Any:
    model = toy("llama")
    model.model.norm.weight = nn.Parameter(torch.empty(32, device="meta"))
    return model


def fp8() -> Any:
    model = toy("llama")
    weight = model.model.layers[0].mlp.up_proj.weight.detach().to(torch.float8_e4m3fn)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight, requires_grad=False)
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "tied by hand": (tied, "are one parameter"),
    "one storage": (one_storage, "in the same memory"),
    "shared by blocks": (shared_by_blocks, "are one parameter"),
    "fewer blocks": (pruned, "model.layers.2"),
    "a wider head": (widened, "lm_head.weight as"),
    "another norm": (with_norm, "model.extra"),
    "a class of its own": (lambda: Own(LlamaConfig(**SIZES)), "class of your own"),
    "generation settings": (invalid_generation, "generation_config"),
    "no values": (offloaded, "no values"),
    "fp8": (fp8, "float8_e4m3fn"),
    "float64": (lambda: toy("llama").double(), "float64"),
    "another task": (
        lambda: LlamaForQuestionAnswering(LlamaConfig(**SIZES)),
        "LlamaForQuestionAnswering",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_before_the_work(
    what: str, tmp_path: Path, toy_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr("cerwu_gpu.hf.causal_lm.CausalLM.calibrate", never)
    make, sentence = REFUSED[what]
    with pytest.raises(CerwuError, match=sentence):
        compress_flat(make(), tmp_path / "small", text="a b c", tokenizer=toy_tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_generation_file_is_refused_by_name(
    tmp_path: Path, toy_tokenizer: Any, toy_text: Path
) -> None:
    toy("llama").save_pretrained(tmp_path / "m")
    toy_tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text("{")
    config = configured(calibration=str(toy_text), samples=2, sequence_length=16)
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        cerwu_gpu.compress(str(tmp_path / "m"), tmp_path / "small", config=config, progress=False)
    assert not (tmp_path / "small").exists()


def test_a_model_without_a_limit_of_positions_takes_any_length() -> None:
    from cerwu_gpu.hf.models import check_tokens

    config = XLNetConfig(vocab_size=50, d_model=32, n_layer=1, n_head=4, d_inner=48)
    check_tokens(XLNetLMHeadModel(config), torch.zeros(1, 4096, dtype=torch.int64), 4096)
