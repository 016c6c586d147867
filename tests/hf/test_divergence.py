"""Models that predict no next or masked token, measured by their distance from their original."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from cerwu_gpu.errors import ConfigError, ModelError
from cerwu_gpu.hf.divergence import Divergence, divergence
from cerwu_gpu.hf.models import LoadedModel
from tests.conftest import TEXT
from tests.hf.test_text_heads import toy as text_head
from tests.hf.test_whole_text import toy as encoder_decoder

NAMES = (
    *("sequences, bert", "sequences, llama", "tokens, roberta"),
    *("embeddings, bert", "embeddings, t5", "t5", "bart"),
)
LENGTH = 16


def toy(name: str, words: int) -> Any:
    return encoder_decoder(name, words) if name in ("t5", "bart") else text_head(name, words)


def pair(name: str, tokenizer: Any) -> tuple[LoadedModel, LoadedModel]:
    """A model whose weights are changed a little, and the original."""
    original, model = (toy(name, len(tokenizer)) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return LoadedModel(model, tokenizer, None), LoadedModel(original, tokenizer, None)


def measured(name: str, tokenizer: Any, **changes: Any) -> Divergence:
    model, original = pair(name, tokenizer)
    given = {"context_length": LENGTH, "max_windows": 5, "batch_size": 2, **changes}
    return divergence(model, original, TEXT * 2, **given)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_mean_over_windows_one_by_one(name: str, toy_tokenizer: Any) -> None:
    model, original = pair(name, toy_tokenizer)
    ids = toy_tokenizer(TEXT * 2, add_special_tokens=False).input_ids
    windows = [[0, *ids[i : i + LENGTH - 1]] for i in range(0, 5 * (LENGTH - 1), LENGTH - 1)]
    kl, agreed, cosines, losses, count = [], [], [], [], 0
    for window in windows:
        tokens = torch.tensor([window])
        given: dict[str, Any] = {"input_ids": tokens}
        if name in ("t5", "bart"):
            first = torch.tensor([[model.model.config.decoder_start_token_id]])
            half = LENGTH // 2
            decoded = torch.cat([first, tokens[:, half:]], dim=1)
            given = {"input_ids": tokens[:, :half], "decoder_input_ids": decoded}
        with torch.no_grad():
            after, before = (one.model(**given)[0].double() for one in (model, original))
        after, before = (x.reshape(-1, x.shape[-1]) for x in (after, before))
        if name in ("t5", "bart"):
            after, before = after[:-1], before[:-1]
            losses.append(functional.cross_entropy(after, tokens[0, half:]))
        p, q = before.softmax(-1), after.softmax(-1)
        kl.append((p * (p.log() - q.log())).sum(-1))
        agreed.append((p.argmax(-1) == q.argmax(-1)).double())
        cosines.append((after * before).sum(-1) / after.norm(dim=-1) / before.norm(dim=-1))
        count += len(after)
    result = measured(name, toy_tokenizer)
    assert result.predictions == count
    if name.startswith("embeddings"):
        assert result.cosine == pytest.approx(float(torch.cat(cosines).mean()), rel=1e-5)
        assert 0 < result.cosine < 1 and result.kl_divergence is None
    else:
        assert result.kl_divergence == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
        assert result.top1_agreement == pytest.approx(float(torch.cat(agreed).mean()))
        assert result.cosine is None
    if losses:
        assert result.perplexity == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
        assert result.original_perplexity != result.perplexity
    else:
        assert result.perplexity is None


def test_labels_that_exclude_nothing_and_numbers(toy_tokenizer: Any) -> None:
    model, original = pair("sequences, bert", toy_tokenizer)
    for one in (model, original):
        one.model.config.problem_type = "multi_label_classification"
    both = divergence(model, original, TEXT, context_length=LENGTH, max_windows=2)
    tokens = torch.tensor(toy_tokenizer(TEXT, add_special_tokens=False).input_ids)
    windows = torch.stack([tokens[: LENGTH - 1], tokens[LENGTH - 1 : 2 * LENGTH - 2]])
    windows = functional.pad(windows, (1, 0))
    with torch.no_grad():
        q, p = (one.model(windows).logits.double().sigmoid() for one in (model, original))
    expected = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    assert both.predictions == 6
    assert both.kl_divergence == pytest.approx(float(expected.mean()), rel=1e-4)
    for one in (model, original):
        one.model.config.problem_type = "regression"
    number = divergence(model, original, TEXT, context_length=LENGTH, max_windows=2)
    with torch.no_grad():
        squares = (model.model(windows).logits - original.model(windows).logits).square()
    assert number.rms_difference == pytest.approx(float(squares.mean().sqrt()), rel=1e-4)
    assert number.kl_divergence is None


def test_a_model_is_not_away_from_itself(toy_tokenizer: Any) -> None:
    for name, field, value in (
        ("tokens, roberta", "kl_divergence", 0),
        ("embeddings, bert", "cosine", 1),
    ):
        _, original = pair(name, toy_tokenizer)
        result = divergence(original, original, TEXT, context_length=LENGTH, max_windows=3)
        assert getattr(result, field) == pytest.approx(value, abs=1e-6)


def test_the_command_line_measures_it(
    toy_tokenizer: Any, tmp_path: Path, command: Callable[..., Any]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    expected = {
        "sequences, bert": "top1_agreement",
        "embeddings, bert": "cosine",
        "t5": "perplexity",
    }
    for name, field in expected.items():
        places = []
        for which, loaded in zip(("model", "original"), pair(name, toy_tokenizer), strict=True):
            place = tmp_path / name.replace(", ", "-") / which
            loaded.model.save_pretrained(place)
            toy_tokenizer.save_pretrained(place)
            places.append(place)
        words = ("--text", text, "--context-length", LENGTH, "--max-windows", 4, "--quiet")
        code, out, err = command("eval", places[0], "--against", places[1], *words, "--json")
        assert code == 0, err
        assert field in json.loads(out)
        code, out, err = command("eval", places[0], "--against", places[1], *words)
        assert code == 0 and "predictions" in out
        code, out, err = command("eval", places[0], *words)
        assert code == (0 if name == "t5" else 2)
        assert name == "t5" or "has no perplexity: give its original" in err
        code, _, err = command("eval", places[0], *words, "--stride", "4")
        assert code == 2 and "stride is of models" in err


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_windows": 0}, "max_windows is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"context_length": 1}, "context_length is 1"),
    ],
)
def test_wrong_numbers_are_one_sentence(
    changes: dict[str, int], sentence: str, toy_tokenizer: Any
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        measured("sequences, bert", toy_tokenizer, **changes)


def test_other_models_and_sound_are_refused(toy_tokenizer: Any) -> None:
    bert, t5 = (pair(name, toy_tokenizer)[0] for name in ("sequences, bert", "t5"))
    with pytest.raises(ModelError, match="the original is T5"):
        divergence(bert, t5, TEXT)
    whisper = LoadedModel(encoder_decoder("whisper", len(toy_tokenizer)), toy_tokenizer, None)
    with pytest.raises(ModelError, match="takes input_features, no text"):
        divergence(whisper, whisper, TEXT)
