"""Loaded models behave as others do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import cerwu_gpu
from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.errors import ModelError
from cerwu_gpu.hf.causal_lm import CausalLM
from cerwu_gpu.hf.models import LoadedModel
from cerwu_gpu.hf.text import CalibrationTokens
from tests.configs import compress_flat, configured
from tests.hf.toys import toy, toy_tokens

CHEAP: dict[str, Any] = {"samples": 4, "sequence_length": 16, "sensitivity": "none", "lmbda": 3e-4}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: Any, toy_text: Path) -> Path:
    path = tmp_path_factory.mktemp("loaded") / "small"
    text = toy_text.read_text(encoding="utf-8")
    compress_flat(
        toy("llama"),
        path,
        config=configured(**CHEAP),
        text=text,
        tokenizer=toy_tokenizer,
        progress=False,
    )
    return path


@pytest.fixture(scope="module")
def logits(small: Path) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = cerwu_gpu.load_compressed(small)(toy_tokens(2)).logits
    return result


def test_a_device_map_places_it(small: Path, logits: torch.Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(small, device_map="auto")
    with torch.no_grad():
        assert torch.equal(model(toy_tokens(2).to(model.device)).logits.cpu(), logits)


def test_torch_traces_it(small: Path, logits: torch.Tensor) -> None:
    compiled = torch.compile(cerwu_gpu.load_compressed(small), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(toy_tokens(2), use_cache=False).logits, logits)


def test_a_pipeline_generates(small: Path) -> None:
    ours = cerwu_gpu.load_compressed(small)
    tokenizer = AutoTokenizer.from_pretrained(small)
    texts = [
        pipeline("text-generation", model=model, tokenizer=tokenizer)(
            "The harbour", max_new_tokens=5, do_sample=False
        )[0]["generated_text"]
        for model in (str(small), ours)
    ]
    assert texts[0] == texts[1]
    assert texts[0].startswith("The harbour")


def test_it_is_tuned_by_peft_merged_and_compressed_again(
    small: Path, tmp_path: Path, toy_tokenizer: Any, toy_text: Path
) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(small), config)
    tuned(toy_tokens(2), labels=toy_tokens(2)).loss.backward()
    merged = tuned.merge_and_unload().eval()
    text = toy_text.read_text(encoding="utf-8")
    settings = configured(**CHEAP)
    compress_flat(merged, tmp_path / "again", config=settings, text=text, tokenizer=toy_tokenizer)
    with torch.no_grad():
        again = cerwu_gpu.load_compressed(tmp_path / "again")(toy_tokens(2)).logits
        assert torch.equal(again, merged(toy_tokens(2)).logits)


def test_an_overflow_of_float16_is_noticed() -> None:
    """As compressed weights that are larger than the original's might give."""
    model = toy("llama", tie_word_embeddings=False).half()
    adapter = CausalLM(
        LoadedModel(model, None, None), CompressionConfig(), device=torch.device("cpu")
    )
    tokens = toy_tokens(2)
    adapter.take(CalibrationTokens(tokens, tokens[:0]))
    adapter.finish(CompressionConfig())
    assert adapter.events == ()
    with torch.no_grad():
        model.lm_head.weight.fill_(6e4)
    adapter.finish(CompressionConfig())
    adapter.finish(CompressionConfig())
    assert [event for event in adapter.events if "float16" in event] == [adapter.events[0]]
    with pytest.raises(ModelError, match="float16"):
        strict = CausalLM(adapter.loaded, CompressionConfig(), device=torch.device("cpu"))
        strict.take(CalibrationTokens(tokens, tokens[:0]))
        strict.finish(CompressionConfig(strict=True))
