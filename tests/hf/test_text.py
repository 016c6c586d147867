"""Text for calibration, and its windows."""

import re
from copy import deepcopy
from itertools import combinations, pairwise

import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from cerwu_gpu.errors import CalibrationError, ModelError
from cerwu_gpu.hf.text import demo_text, load_text, token_windows

WORDS = " ".join(f"boat {number} and gull {7 * number};" for number in range(200))


def ids_of(tokenizer):
    return torch.tensor(tokenizer(WORDS)["input_ids"])


def place_of(window, ids):
    """Beginnings of windows of a text."""
    return int((ids.unfold(0, len(window), 1) == window).all(dim=1).nonzero()[0])


def test_windows_are_disjoint_pieces_of_the_text_in_its_order(toy_tokenizer):
    ids = ids_of(toy_tokenizer)
    windows, _, events = token_windows(WORDS, toy_tokenizer, 7, 20, seed=3)
    assert events == ()
    assert windows.shape == (7, 20)
    assert windows.dtype == torch.int64
    assert windows[:, 0].tolist() == [toy_tokenizer.bos_token_id] * 7
    places = [place_of(window[1:], ids) for window in windows]
    assert all(b - a >= 19 for a, b in pairwise(places))


def test_the_seed_decides_the_windows(toy_tokenizer):
    draws = [token_windows(WORDS, toy_tokenizer, 7, 20, seed)[0] for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_fewer_windows_than_asked_are_used_and_said(toy_tokenizer):
    ids = ids_of(toy_tokenizer)
    windows, _, events = token_windows(WORDS, toy_tokenizer, 10**6, 50, seed=0)
    assert torch.equal(windows[:, 1:].flatten(), ids[: len(ids) // 49 * 49])
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
    places = [place_of(window[1:], ids) for window in windows]
    assert all(abs(a - b) >= 19 for a, b in combinations(places, 2))
    assert len(token_windows(WORDS, toy_tokenizer, len(ids) // 19 - 1, 20, 3, 5).held_out) == 1


def with_special(tokenizer, **settings):
    """A copy of the tokenizer with other special tokens."""
    changed = deepcopy(tokenizer)
    for name, token in settings.items():
        setattr(changed, name, token)
    return changed


def test_without_a_first_token_windows_are_the_text_alone(toy_tokenizer):
    plain = with_special(toy_tokenizer, bos_token=None)
    windows = token_windows(WORDS, plain, 3, 20, seed=3).tokens
    ids = ids_of(plain)
    assert [place_of(window, ids) % 20 for window in windows] == [0, 0, 0]


def test_a_first_token_that_the_model_does_not_have_is_left_out(toy_tokenizer):
    first = toy_tokenizer.bos_token_id
    windows = token_windows(WORDS, toy_tokenizer, 3, 20, seed=3, vocabulary=first).tokens
    assert not bool((windows == first).any())
    assert bool((token_windows(WORDS, toy_tokenizer, 3, 20, seed=3).tokens[:, 0] == first).all())


def test_a_token_that_the_tokenizer_adds_itself_is_there_once(toy_tokenizer):
    adding = with_special(toy_tokenizer, bos_token=None)
    first = toy_tokenizer.bos_token_id
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", first), ("</s>", toy_tokenizer.eos_token_id)]
    )
    windows = token_windows(WORDS, adding, 5, 20, seed=3).tokens
    assert torch.equal(windows, token_windows(WORDS, toy_tokenizer, 5, 20, seed=3).tokens)
    assert int((windows == first).sum()) == 5


def test_exactly_enough_windows_need_no_event(toy_tokenizer):
    available = len(ids_of(toy_tokenizer)) // 49
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
    assert f"at most {count + 1}" in str(error.value)


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
