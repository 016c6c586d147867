"""Calibration tokens of one source and of several, and text that the model writes itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cerwu_gpu.config import (
    Calibration,
    CompressionConfig,
    ConfigError,
    Source,
    Text,
    from_settings,
    settings,
)
from cerwu_gpu.errors import CalibrationError
from cerwu_gpu.hf.sources import (
    Windows,
    alternating,
    apportioned,
    calibration_tokens,
    usual_samples,
    with_sources,
)
from cerwu_gpu.hf.text import token_windows
from tests.hf.toys import toy

BOATS = " ".join(f"boat {number} and gull {7 * number};" for number in range(200))
ROPES = " ".join(f"rope {number} sings, sail {3 * number} is set." for number in range(200))
FEW = Windows(samples=8, sequence_length=16, seed=1, batch_size=2, held_out=4)


def sample(model, tokenizer, **changes):
    settings = {"samples": 5, "sequence_length": 12, "seed": 3, "batch_size": 2} | changes
    return calibration_tokens([Source("self", 1.0)], model, tokenizer, Windows(**settings))


def test_text_sampled_from_the_model_begins_with_bos_and_depends_on_the_seed(toy_tokenizer):
    model = toy("llama")
    tokens, unseen, events = sample(model, toy_tokenizer)
    assert (len(unseen), events) == (0, ())
    assert tokens.shape == (5, 12)
    assert tokens.dtype == torch.int64
    assert tokens[:, 0].tolist() == [toy_tokenizer.bos_token_id] * 5
    assert not bool((tokens == toy_tokenizer.eos_token_id).any())
    assert len({tuple(row) for row in tokens.tolist()}) == 5
    assert torch.equal(sample(model, toy_tokenizer)[0], tokens)
    assert not torch.equal(sample(model, toy_tokenizer, seed=4)[0], tokens)
    judged = sample(model, toy_tokenizer, held_out=3)
    assert torch.equal(judged.tokens, tokens)
    assert judged.held_out.shape == (3, 12)
    assert not {tuple(row) for row in judged.held_out.tolist()} & {
        tuple(row) for row in tokens.tolist()
    }


def test_sampling_needs_no_tokenizer_and_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert sample(toy("llama"), None)[0].shape == (5, 12)
    assert torch.equal(torch.rand(3), expected)


def test_sampling_follows_the_models_distribution_not_its_chat_settings(toy_tokenizer):
    model = toy("llama")
    model.generation_config.temperature = 0.01
    model.generation_config.top_k = 1
    assert torch.equal(sample(model, toy_tokenizer)[0], sample(toy("llama"), toy_tokenizer)[0])


def test_a_model_that_names_no_first_token_cannot_be_sampled():
    model = toy("llama", bos_token_id=None, eos_token_id=None)
    with pytest.raises(CalibrationError, match="no token to begin"):
        sample(model, None)


def test_one_text_gives_its_windows_as_they_are(toy_tokenizer):
    sources = Calibration(source=Text(BOATS)).sources
    data = calibration_tokens(sources, toy("llama"), toy_tokenizer, FEW)
    alone = token_windows(BOATS, toy_tokenizer, 8, 16, 1, 4)
    assert torch.equal(data.tokens, alone.tokens)
    assert torch.equal(data.held_out, alone.held_out)


def test_two_texts_give_their_shares_and_alternate(toy_tokenizer, tmp_path):
    path = tmp_path / "ropes.txt"
    path.write_text(ROPES, encoding="utf-8")
    source = (Text(BOATS, share=0.25), f"{path}:0.75")
    sources = Calibration(source=source).sources
    data = calibration_tokens(sources, toy("llama"), toy_tokenizer, FEW)
    boats = token_windows(BOATS, toy_tokenizer, 2, 16, 1, 1)
    ropes = token_windows(ROPES, toy_tokenizer, 6, 16, 1, 3)
    first = [any(torch.equal(row, boat) for boat in boats.tokens) for row in data.tokens]
    assert first == [False, True, False, False, False, True, False, False]
    assert torch.equal(data.tokens[~torch.tensor(first)], ropes.tokens)
    assert data.held_out.shape == (4, 16)
    assert {tuple(x) for x in data.held_out.tolist()} == {
        tuple(x) for part in (boats, ropes) for x in part.held_out.tolist()
    }


def test_text_of_the_model_can_be_one_source_of_several(toy_tokenizer):
    sources = Calibration(source=("self:0.5", Text(BOATS, share=0.5))).sources
    data = calibration_tokens(sources, toy("llama"), toy_tokenizer, FEW)
    alone = Windows(samples=4, sequence_length=16, seed=1, batch_size=2)
    written = calibration_tokens([Source("self", 1.0)], toy("llama"), toy_tokenizer, alone)
    assert torch.equal(data.tokens[::2], written.tokens)
    assert torch.equal(data.tokens[1::2], token_windows(BOATS, toy_tokenizer, 4, 16, 1).tokens)


def test_a_source_with_too_little_text_is_named_in_an_event(toy_tokenizer, tmp_path):
    path = tmp_path / "ropes.txt"
    path.write_text("the ropes sing " * 4, encoding="utf-8")
    sources = Calibration(source=(Text(BOATS), str(path))).sources
    data = calibration_tokens(sources, toy("llama"), toy_tokenizer, FEW)
    assert len(data.tokens) < 8
    (event,) = data.events
    assert event.startswith(f"{path}: the calibration text has ")


@given(
    count=st.integers(0, 300),
    shares=st.lists(st.floats(0.01, 1), min_size=1, max_size=6),
)
def test_counts_follow_the_shares(count, shares):
    counts = apportioned(count, shares)
    assert sum(counts) == count
    if count >= len(shares):
        assert min(counts) >= 1
    exact = [count * share / sum(shares) for share in shares]
    assert all(abs(a - b) <= len(shares) for a, b in zip(counts, exact, strict=True))


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_any_first_part_has_about_the_shares(lengths):
    parts = [torch.full((n, 1), i) for i, n in enumerate(lengths)]
    rows = alternating(parts).flatten()
    for end in range(1, len(rows) + 1):
        for index, length in enumerate(lengths):
            seen = int((rows[:end] == index).sum())
            assert abs(seen - length * end / len(rows)) <= len(lengths)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (("a:0.2", "b:0.3"), "shares that sum to 0.5"),
        (("a:0.5", "b"), "a share for some texts only"),
        (("a:0.5", "a:0.5"), "names 'a' twice"),
        ((), "calibration is empty"),
        (("a", 3), "calibration is 3"),
        ("a:0.5", "shares that sum to 0.5"),
    ],
)
def test_sources_that_make_no_sense_are_refused(source, message):
    with pytest.raises(ConfigError, match=message):
        Calibration(source=source)


def test_each_text_needs_a_sample():
    with pytest.raises(ConfigError, match="samples is 1: give at least 2, one for each of 2 texts"):
        Calibration(source=("a", "b"), samples=1)


def test_names_with_shares_make_the_round_trip_through_flat_settings():
    config = from_settings(calibration=("owner/texts:small", "C:\\texts:0.txt"))
    assert [share for _, share in config.text.sources] == [0.5, 0.5]
    assert config.text.names == ("owner/texts:small", "C:\\texts:0.txt")
    thirds = from_settings(calibration=("a:0.33", "b:0.33", "self:0.33"))
    assert thirds.text.names == ("a", "b", "self")
    assert from_settings(**settings(thirds)) == thirds
    assert from_settings(calibration=("a.txt",)) == from_settings(calibration="a.txt")


def test_a_wide_matrix_asks_for_more_text():
    usual = Calibration()
    assert usual_samples(64, usual) == usual_samples(1536, usual) == 65_536 // 512
    assert usual_samples(100_000, usual) == -(-800_000 // 512)
    assert usual_samples(100_000, Calibration(tokens_per_column=16)) == -(-1_600_000 // 512)


def test_usual_texts_are_named_where_none_is_given():
    usual = (Source("wikitext2", 0.5), Source("self", 0.5))
    told = with_sources(CompressionConfig(), usual)
    assert told.text.names == ("wikitext2", "self")
    assert told.text.sources == usual
    assert with_sources(CompressionConfig(), usual[:1]).text.source == "wikitext2"
    mine = CompressionConfig(calibration=Calibration(source="my.txt"))
    assert with_sources(mine, usual) == mine


def test_one_sample_comes_from_the_first_of_two_usual_texts(toy_tokenizer):
    sources = Calibration(source=(Text(BOATS), "self")).sources
    one = Windows(samples=1, sequence_length=16, seed=1, batch_size=2)
    data = calibration_tokens(sources, toy("llama"), toy_tokenizer, one)
    assert torch.equal(data.tokens, token_windows(BOATS, toy_tokenizer, 1, 16, 1).tokens)
