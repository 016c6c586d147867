"""Encoders with a masked-language-model head, through every door."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    ModernBertConfig,
    PreTrainedModel,
    RobertaConfig,
)

import cerwu_gpu
from cerwu_gpu import (
    Bits,
    Calibration,
    CompressionConfig,
    ModelError,
    Objective,
    Text,
)
from cerwu_gpu.config import Distillation
from cerwu_gpu.hf import evaluation
from cerwu_gpu.hf.encoder import MASKED_PERCENT, MaskedLM, _is_masked
from cerwu_gpu.hf.kinds import kind_of
from cerwu_gpu.hf.models import LoadedModel
from cerwu_gpu.hf.text import tokenized
from tests.configs import toy_calibration
from tests.conftest import TEXT, trained_tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "cls_token_id": 0,
    "sep_token_id": 1,
}
CONFIGS: dict[str, Callable[[int], Any]] = {
    "bert": lambda words: BertConfig(**SIZES, vocab_size=words),
    "roberta": lambda words: RobertaConfig(**SIZES, vocab_size=words, pad_token_id=1),
    "modernbert": lambda words: ModernBertConfig(
        **SIZES,
        vocab_size=words,
        pad_token_id=1,
        local_attention=8,
        global_attn_every_n_layers=3,
    ),
}
each_family = pytest.mark.parametrize("family", CONFIGS)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The toys' tokenizer, with a mask token."""
    tokenizer = trained_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    return tokenizer


def toy(family: str, tokenizer: Any) -> PreTrainedModel:
    """An encoder of this family, float32, in eval mode; the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForMaskedLM.from_config(CONFIGS[family](len(tokenizer)))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def config(tokenizer: Any, **settings: Any) -> CompressionConfig:
    settings.setdefault("objective", Objective(lmbda=1e-7))
    return CompressionConfig(calibration=toy_calibration(tokenizer), **settings)


@each_family
def test_it_comes_back_through_every_door(family: str, tokenizer: Any, tmp_path: Path) -> None:
    model = toy(family, tokenizer)
    original = toy(family, tokenizer)
    report = cerwu_gpu.compress(
        model, tmp_path / "out", config=config(tokenizer), card=True, progress=False
    )
    tokens = torch.arange(5, 65).view(2, 30)
    logits = model(tokens).logits
    for loaded in (
        cerwu_gpu.load_compressed(tmp_path / "out"),
        cerwu_gpu.load_compressed(tmp_path / "out", resident="compressed"),
        AutoModelForMaskedLM.from_pretrained(tmp_path / "out"),
    ):
        assert type(loaded) is type(model)
        assert torch.equal(loaded(tokens).logits, logits)
    assert not torch.equal(original(tokens).logits, logits)
    assert any("embeddings" in layer.name or "decoder" in layer.name for layer in report.layers)
    assert report.events == () or all("perplexity" in event for event in report.events)
    cerwu_gpu.decompress(tmp_path / "out", tmp_path / "dense")
    dense = AutoModelForMaskedLM.from_pretrained(tmp_path / "dense")
    assert torch.equal(dense(tokens).logits, logits)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: fill-mask" in card and "AutoModelForMaskedLM" in card


@each_family
def test_its_perplexity_masks_every_token_once(
    family: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many runs as tokens, one token is masked at a time."""
    model, length = toy(family, tokenizer), 12
    monkeypatch.setattr(evaluation, "MASKED_SHARE", length)
    ids = tokenized(TEXT, tokenizer)[: 2 * length].view(2, length)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in ids:
            for place in range(1, length):  # as everywhere, a window's first token does not count
                masked = row.clone()
                masked[place] = tokenizer.mask_token_id
                logits = model(masked[None]).logits[0, place]
                total += float(functional.cross_entropy(logits, row[place]))
                count += 1
    ours = cerwu_gpu.perplexity(model, tokenizer, TEXT, context_length=length, max_windows=2)
    assert ours == pytest.approx(math.exp(total / count), rel=1e-5)
    compared = cerwu_gpu.compare(
        model, model, tokenizer, TEXT, context_length=length, max_windows=2
    )
    assert (compared.kl_divergence, compared.top1_agreement) == (0.0, 1.0)
    assert compared.perplexity == pytest.approx(ours)


def test_sensitivities_are_those_of_the_masked_tokens(tokenizer: Any) -> None:
    model, tokens = toy("bert", tokenizer), torch.arange(5, 101).view(3, 32)
    adapter = MaskedLM(
        LoadedModel(model, tokenizer, None), config(tokenizer), device=torch.device("cpu")
    )
    found = adapter.backward(tokens, 2)
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, arguments: Any, output: torch.Tensor) -> None:
            output.retain_grad()
            outputs[name] = output

        return hook

    names = [name for name in adapter.layouts if "encoder" in name]
    for name in names:
        model.get_submodule(name.removesuffix(".weight")).register_forward_hook(keep(name))
    masked = _is_masked(tokens)
    logits = model(tokens.masked_fill(masked, tokenizer.mask_token_id)).logits
    functional.cross_entropy(logits[masked], tokens[masked], reduction="sum").backward()
    scale = tokens.numel() / int(masked.sum())
    for name in names:
        gradient = outputs[name].grad
        assert gradient is not None
        expected = gradient.flatten(0, 1).double().square().mean(dim=0) * scale
        alpha = found.squared_gradients[name, 0].double()
        # Batches of 2 and 1 sequences have shares of their own.
        torch.testing.assert_close(alpha, expected, rtol=0.3, atol=0.3 * float(expected.mean()))


def test_about_a_share_of_the_tokens_is_masked_and_at_least_one() -> None:
    tokens = torch.randint(320, (200, 64))
    share = float(_is_masked(tokens).float().mean())
    assert abs(share - MASKED_PERCENT / 100) < 0.02
    assert bool(_is_masked(torch.randint(320, (50, 2))).any(dim=1).all())


@each_family
def test_it_is_distilled_on_its_masked_tokens(family: str, tokenizer: Any, tmp_path: Path) -> None:
    """The norm behind the embeddings, which comes before the blocks, among the rest."""
    model, plain = toy(family, tokenizer), toy(family, tokenizer)
    objective = Objective(lmbda=1e-5)
    cerwu_gpu.compress(
        plain, tmp_path / "plain", config=config(tokenizer, objective=objective), progress=False
    )
    tuned = config(
        tokenizer,
        objective=objective,
        distillation=Distillation(steps=10, learning_rate=5e-3),
    )
    report = cerwu_gpu.compress(model, tmp_path / "out", config=tuned, progress=False)
    assert report.distillation is not None
    assert report.distillation["after"] < report.distillation["before"]
    name = next(n for n, _ in model.named_parameters() if "embeddings" in n and "orm.weight" in n)
    assert not torch.equal(model.get_parameter(name), plain.get_parameter(name))
    tokens = torch.arange(5, 65).view(2, 30)
    loaded = cerwu_gpu.load_compressed(tmp_path / "out")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_wanted_rate_is_met(tokenizer: Any, tmp_path: Path) -> None:
    report = cerwu_gpu.compress(
        toy("bert", tokenizer),
        tmp_path / "bits",
        config=config(tokenizer, target=Bits(4.0)),
        progress=False,
    )
    assert report.bits_per_weight == pytest.approx(4.0, abs=0.02)


def test_a_tokenizer_without_a_mask_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    plain = trained_tokenizer()
    with pytest.raises(ModelError, match="its tokenizer has no mask token"):
        cerwu_gpu.compress(
            toy("bert", tokenizer), tmp_path / "out", config=config(plain), progress=False
        )
    assert not (tmp_path / "out").exists()


def test_sequences_beyond_robertas_positions_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    data = Calibration(source=Text(TEXT * 8), tokenizer=tokenizer, samples=2, sequence_length=79)
    with pytest.raises(ModelError, match="beyond the model's 78 positions"):
        cerwu_gpu.compress(
            toy("roberta", tokenizer),
            tmp_path / "out",
            config=CompressionConfig(calibration=data),
            progress=False,
        )


def test_a_directory_is_recognised_by_its_architecture(
    tokenizer: Any, tmp_path: Path, toy_text: Path, command: Callable[..., Any]
) -> None:
    model = toy("modernbert", tokenizer)
    kind = kind_of(model)
    assert kind is not None and kind.adapter is MaskedLM
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    few = ("--calibration", toy_text, "--samples", "4", "--sequence-length", "32", "--quiet")
    out = tmp_path / "small"
    assert command("compress", tmp_path / "model", "-o", out, "--lmbda", "1e-7", *few).code == 0
    text = ("--text", toy_text, "--context-length", "32", "--max-windows", "4", "--json")
    code, printed, _ = command("eval", out, "--against", tmp_path / "model", *text, "--quiet")
    assert code == 0 and '"kl_divergence"' in printed
