"""Vision-language models: text blocks calibrated by text, and towers that no text reaches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    LlavaConfig,
    PreTrainedModel,
    Qwen2VLConfig,
    SiglipVisionConfig,
)

import cerwu_gpu
from cerwu_gpu import CompressionConfig, ModelError, Objective
from cerwu_gpu.hf.kinds import IMAGES_AND_TEXT, kind_of
from cerwu_gpu.hf.models import ENCODER_DECODERS, WITHOUT_TOKENS
from tests.configs import check_resumed, toy_calibration
from tests.conftest import TEXT

TEXTS: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
IMAGES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def gemma3(words: int) -> Any:
    text = Gemma3TextConfig(**TEXTS, vocab_size=words, sliding_window=8)
    vision = SiglipVisionConfig(**IMAGES)
    return Gemma3Config(
        text_config=text.to_dict(), vision_config=vision.to_dict(), mm_tokens_per_image=4
    )


def llava(words: int) -> Any:
    text, vision = LlamaConfig(**TEXTS, vocab_size=words), CLIPVisionConfig(**IMAGES)
    return LlavaConfig(text_config=text, vision_config=vision, image_token_index=4)


def qwen2_vl(words: int) -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**TEXTS, "vocab_size": words, "rope_parameters": rope}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    return Qwen2VLConfig(text_config=text, vision_config={**vision, "patch_size": 4})


TOYS: dict[str, Callable[[int], Any]] = {"gemma3": gemma3, "llava": llava, "qwen2_vl": qwen2_vl}


def toy(name: str, words: int) -> PreTrainedModel:
    """A model of this family, float32, in eval mode; the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: Any = AutoModelForImageTextToText.from_config(TOYS[name](words))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    result: PreTrainedModel = model.eval()
    return result


def config(tokenizer: Any, **settings: Any) -> CompressionConfig:
    return CompressionConfig(
        calibration=toy_calibration(tokenizer), objective=Objective(lmbda=1e-6), **settings
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(5, 35)[None], use_cache=False).logits
    return result


@pytest.mark.parametrize("name", TOYS)
def test_it_comes_back_through_every_door(name: str, toy_tokenizer: Any, tmp_path: Path) -> None:
    model, source, out = toy(name, len(toy_tokenizer)), tmp_path / "source", tmp_path / "out"
    model.save_pretrained(source)
    toy_tokenizer.save_pretrained(source)
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 8)
    settings = cerwu_gpu.from_settings(
        calibration=str(text), samples=6, sequence_length=32, lmbda=1e-6
    )
    report = cerwu_gpu.compress(source, out, config=settings, card=True, progress=False)
    loaded = cerwu_gpu.load_compressed(out)
    cerwu_gpu.decompress(out, tmp_path / "dense")
    weights = loaded.state_dict()
    for path in (out, tmp_path / "dense"):
        other = AutoModelForImageTextToText.from_pretrained(path)
        assert type(other) is type(model)
        assert torch.equal(logits(other), logits(loaded))
        assert all(torch.equal(x, weights[key]) for key, x in other.state_dict().items())
    resident = cerwu_gpu.load_compressed(out, resident="compressed")
    assert torch.equal(logits(resident), logits(loaded))
    names = {layer.name for layer in report.layers}
    assert any("q_proj" in name and "language_model" in name for name in names)
    tower = {name for name in names if "vision" in name or "visual" in name}
    assert len(tower) >= 8  # four or more of each of its two blocks
    (event,) = [event for event in report.events if "no text reaches" in event]
    assert f"and {len(tower) - 1} others" in event
    original, changed = model.state_dict(), loaded.state_dict()
    for weight in tower:
        difference = (original[weight] - changed[weight]).norm() / original[weight].norm()
        assert 0 < float(difference) < 0.5


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_its_text_blocks_are_those_without_the_tower(
    name: str, toy_tokenizer: Any, tmp_path: Path
) -> None:
    """The tower changes nothing of what text calibrates."""
    both, alone = toy(name, len(toy_tokenizer)), toy(name, len(toy_tokenizer))
    report = cerwu_gpu.compress(
        both, tmp_path / "both", config=config(toy_tokenizer), progress=False
    )
    tower = tuple(layer.name for layer in report.layers if "vis" in layer.name)
    given = config(toy_tokenizer, exclude=tower)
    cerwu_gpu.compress(alone, tmp_path / "alone", config=given, progress=False)
    values = alone.state_dict()
    for key, value in both.state_dict().items():
        assert torch.equal(value, values[key]) is (key not in tower)


def test_strict_refuses_towers_that_no_text_reaches(toy_tokenizer: Any, tmp_path: Path) -> None:
    model = toy("llava", len(toy_tokenizer))
    kind = kind_of(model)
    assert kind is not None and kind.tag == "image-text-to-text"
    with pytest.raises(ModelError, match=r"no text reaches .*\(strict\): exclude them"):
        cerwu_gpu.compress(
            model, tmp_path / "out", config=config(toy_tokenizer, strict=True), progress=False
        )


def test_an_interrupted_run_is_continued(toy_tokenizer: Any, tmp_path: Path) -> None:
    def run(out: Path) -> None:
        model = toy("llava", len(toy_tokenizer))
        cerwu_gpu.compress(model, out, config=config(toy_tokenizer), progress=False)

    check_resumed(run, tmp_path)


def test_classes_of_images_and_text_have_a_perplexity_but_for_encoder_decoders() -> None:
    assert "Llama4ForConditionalGeneration" not in WITHOUT_TOKENS
    assert not set(IMAGES_AND_TEXT.values()) & (WITHOUT_TOKENS | ENCODER_DECODERS)
