"""Text for calibration, its windows, and text that the model writes itself."""

import re
from itertools import combinations, pairwise

import pytest
import torch
from datasets import Dataset

from cerwu_gpu.errors import CalibrationError, ModelError
from cerwu_gpu.hf.text import calibration_tokens, demo_text, load_text, token_windows
from tests.hf.toys import toy

WORDS = " ".join(f"boat {number} and gull {7 * number};" for number in range(200))


def ids_of(tokenizer):
    return torch.tensor(tokenizer(WORDS)["input_ids"])


def test_windows_are_disjoint_pieces_of_the_text_in_its_order(toy_tokenizer):
    ids = ids_of(toy_tokenizer)
    windows, _, events = token_windows(WORDS, toy_tokenizer, 7, 20, seed=3)
    assert events == ()
    assert windows.shape == (7, 20)
    assert windows.dtype == torch.int64
    places = [int((ids.unfold(0, 20, 1) == window).all(dim=1).nonzero()[0]) for window in windows]
    assert all(b - a >= 20 for a, b in pairwise(places))


def test_the_seed_decides_the_windows(toy_tokenizer):
    draws = [token_windows(WORDS, toy_tokenizer, 7, 20, seed)[0] for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_fewer_windows_than_asked_are_used_and_said(toy_tokenizer):
    ids = ids_of(toy_tokenizer)
    windows, _, events = token_windows(WORDS, toy_tokenizer, 10**6, 50, seed=0)
    assert torch.equal(windows.flatten(), ids[: len(ids) // 50 * 50])
    assert len(events) == 1
    assert f"{len(ids)} tokens: {len(windows)} samples of 50 tokens" in events[0]
    assert "instead of 1000000" in events[0]


def test_unseen_windows_change_nothing_and_overlap_nothing(toy_tokenizer):
    alone = token_windows(WORDS, toy_tokenizer, 7, 20, seed=3)
    chosen = token_windows(WORDS, toy_tokenizer, 7, 20, seed=3, held_out=5)
    assert torch.equal(chosen.tokens, alone.tokens)
    assert chosen.held_out.shape == (5, 20)
    ids = ids_of(toy_tokenizer)
    windows = [*chosen.tokens, *chosen.held_out]
    places = [int((ids.unfold(0, 20, 1) == window).all(dim=1).nonzero()[0]) for window in windows]
    assert all(abs(a - b) >= 20 for a, b in combinations(places, 2))
    assert len(token_windows(WORDS, toy_tokenizer, len(ids) // 20 - 1, 20, 3, 5).held_out) == 1


def test_exactly_enough_windows_need_no_event(toy_tokenizer):
    available = len(ids_of(toy_tokenizer)) // 50
    windows, _, events = token_windows(WORDS, toy_tokenizer, available, 50, seed=0)
    assert (len(windows), events) == (available, ())


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_an_empty_text_is_refused(text, toy_tokenizer):
    with pytest.raises(CalibrationError, match="text is empty"):
        token_windows(text, toy_tokenizer, 1, 8, seed=0)


def test_a_text_that_is_too_short_says_how_long_it_is_and_what_to_do(toy_tokenizer):
    count = len(toy_tokenizer("the ropes sing")["input_ids"])
    with pytest.raises(CalibrationError) as error:
        token_windows("the ropes sing", toy_tokenizer, 1, 64, seed=0)
    assert f"has {count} tokens, fewer than one sequence of 64" in str(error.value)
    assert f"at most {count}" in str(error.value)


def test_a_text_needs_a_tokenizer():
    with pytest.raises(ModelError, match="no tokenizer"):
        token_windows("some words", None, 1, 8, seed=0)


def test_a_file_is_read_as_it_is(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Möwen\n\nund Boote\n", encoding="utf-8")
    assert (
        load_text(str(path)) == load_text(str(path), part="evaluation") == path.read_text("utf-8")
    )


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CalibrationError, match="cannot be read as UTF-8"):
        load_text(str(path))


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "/no/where.txt", "wikitext3"])
def test_a_name_that_stands_for_nothing_is_refused(name):
    with pytest.raises(CalibrationError, match=f"{name} is no text file, no hub dataset"):
        load_text(name)


def test_a_dataset_that_cannot_be_loaded_is_refused_in_one_line():
    with pytest.raises(CalibrationError, match="dataset nobody/nothing cannot be loaded") as error:
        load_text("nobody/nothing")
    assert "\n" not in str(error.value)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub, which no test may depend on; it notes what is asked of it."""
    asked = []

    def load_dataset(*arguments, split):
        asked.append((*arguments, split))
        columns = {"text": ["first", "", "second"]} if "bare" not in arguments else {"words": ["x"]}
        return Dataset.from_dict(columns)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("name", "part", "asked"),
    [
        ("wikitext2", "calibration", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")),
        ("wikitext2", "evaluation", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
        ("owner/texts:small", "calibration", ("owner/texts", "small", "train")),
        ("owner/texts", "evaluation", ("owner/texts", None, "test")),
    ],
)
def test_dataset_names_configurations_and_splits(hub, name, part, asked):
    assert load_text(name, part=part) == "first\n\n\n\nsecond"
    assert hub == [asked]


def test_a_dataset_without_text_is_refused(hub):
    with pytest.raises(CalibrationError, match="no column text but words"):
        load_text("owner/texts:bare")


def sample(model, tokenizer, **changes):
    settings = {"samples": 5, "sequence_length": 12, "seed": 3, "batch_size": 2} | changes
    return calibration_tokens("self", model, tokenizer, **settings)


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


def test_a_given_text_wins_over_the_name(toy_tokenizer):
    settings = {"samples": 3, "sequence_length": 16, "seed": 1, "batch_size": 2}
    tokens, _, _ = calibration_tokens("self", toy("llama"), toy_tokenizer, text=WORDS, **settings)
    assert torch.equal(tokens, token_windows(WORDS, toy_tokenizer, 3, 16, 1)[0])


def test_the_demos_texts_share_no_paragraph_and_are_long_enough():
    calibration, evaluation = demo_text()
    parts = [
        {paragraph.strip() for paragraph in text.split("\n\n")}
        for text in (calibration, evaluation)
    ]
    assert parts[0].isdisjoint(parts[1])
    assert len(calibration) > 200_000
    assert len(evaluation) > 30_000
    assert demo_text() == (calibration, evaluation)
    for text in (calibration, evaluation):
        assert not re.search(r"^([*=\-])\1{3,}$", text, re.MULTILINE)  # underlines of titles
        assert "\n\n\n" not in text
