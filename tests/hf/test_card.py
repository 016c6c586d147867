"""The model card of a compressed directory."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import cerwu_gpu
from cerwu_gpu.config import Text
from cerwu_gpu.container.reader import inventory
from cerwu_gpu.hf.card import Quality, card_of
from cerwu_gpu.hf.causal_lm import CausalLM
from cerwu_gpu.hf.evaluation import mean_loss, perplexity_of
from cerwu_gpu.hf.models import load_model
from cerwu_gpu.hf.text import token_windows
from tests.configs import compress_flat, configured
from tests.conftest import TEXT
from tests.hf.toys import toy

CHEAP: dict[str, Any] = {"samples": 2, "sequence_length": 16, "sensitivity": "none"}
APACHE = "Apache License\n   Version 2.0, January 2004\n"
MIT = "Permission is hereby granted, free of charge ...\nTHE SOFTWARE IS PROVIDED AS IS"


def source(folder: Path, readme: str | None = None, licence: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    if readme is not None:
        (folder / "README.md").write_text(readme, encoding="utf-8")
    if licence is not None:
        (folder / "LICENSE.txt").write_text(licence, encoding="utf-8")
    return folder


def compress(model: Path, output: Path, text: str, **options: Any) -> ModelCard:
    config = configured(**CHEAP)
    report = compress_flat(model, output, config=config, text=text, progress=False, **options)
    assert report.directory_bytes == inventory(output).total_bytes
    return ModelCard.load(output / "README.md")


def test_the_figures_are_those_of_the_directory(
    toy_directory: Path, tmp_path: Path, command: Any, toy_text: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(toy_directory, model)
    source(model, "---\nlicense: mit\nlanguage: en\n---\nA model.", APACHE)
    output = tmp_path / "small"
    arguments = ["--calibration", toy_text, "--samples", "2", "--sequence-length", "16"]
    assert command("compress", model, "-o", output, "--card", "--quiet", *arguments).code == 0
    card = ModelCard.load(output / "README.md")
    assert (card.data.license, card.data.language) == ("mit", "en")  # the card's word counts
    assert card.data.library_name == "transformers"
    assert "cerwu" in card.data.tags
    assert card.data.base_model is None
    assert str(tmp_path) not in card.content
    tensors = inventory(output).tensors
    quantized = [tensor for tensor in tensors if tensor.quantizer]
    bits = 8 * sum(x.bytes for x in quantized) / sum(x.weights for x in quantized)
    assert f"{bits:.4f}" in card.content
    assert f"{sum(tensor.bytes for tensor in tensors):,}" in card.content
    assert "licence of the original: mit" in card.content


def test_what_the_card_tells_to_do_works(toy_directory: Path, tmp_path: Path) -> None:
    card = compress(toy_directory, tmp_path / "small", TEXT, card=True)
    code = card.content.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace('"..."', repr(str(tmp_path / "small"))), names)
    assert names["model"].num_parameters() > 0
    assert names["tokenizer"]("The day")["input_ids"]


def test_the_perplexities_are_those_of_text_that_did_not_calibrate(
    toy_directory: Path, tmp_path: Path, toy_text: Path
) -> None:
    sizes: dict[str, Any] = {"samples": 2, "sequence_length": 16}
    config = configured(**CHEAP, calibration=str(toy_text), bits=3.0)
    output = tmp_path / "small"
    plain = compress_flat(toy_directory, tmp_path / "plain", config=config, progress=False)
    report = compress_flat(toy_directory, output, config=config, card=True, progress=False)
    assert report.bits_per_weight == plain.bits_per_weight  # a card changes no weight
    loaded = load_model(toy_directory)
    text = toy_text.read_text(encoding="utf-8")
    held_out = token_windows(text, loaded.tokenizer, seed=0, held_out=512, **sizes).held_out
    expected = [
        perplexity_of(mean_loss(model, held_out))
        for model in (loaded.model, cerwu_gpu.load_compressed(output))
    ]
    row = next(line for line in card_lines(output) if line.startswith("| perplexity"))
    what, *values = (cell.strip() for cell in row.strip("| \n").split("|"))
    assert what == (
        f"perplexity on {held_out[:, 1:].numel():,} tokens of the calibration text "
        "that did not calibrate it"
    )
    assert [float(value) for value in values] == pytest.approx(expected, abs=0.011)
    assert expected[0] != pytest.approx(expected[1], abs=0.05)


def test_without_text_left_it_tells_no_perplexity_and_the_report_says_so(
    toy_directory: Path, tmp_path: Path
) -> None:
    config = configured(**{**CHEAP, "samples": 10_000})
    report = compress_flat(
        toy_directory, tmp_path / "small", config=config, text=TEXT, card=True, progress=False
    )
    assert any("the card has no perplexity" in event for event in report.events)
    assert not any("perplexity" in line for line in card_lines(tmp_path / "small"))


def test_an_increase_that_was_asked_for_is_judged_by_the_text_that_it_holds_out(
    toy_directory: Path, tmp_path: Path
) -> None:
    config = configured(**{**CHEAP, "samples": 10_000}, max_perplexity_increase=0.5)
    config = replace(config, calibration=replace(config.text, source=Text(TEXT)))
    adapter = CausalLM(load_model(toy_directory), config, device=torch.device("cpu"))
    adapter.calibrate(config, judged=True)
    assert len(adapter.data.held_out) > 0
    assert not any("the card has no perplexity" in event for event in adapter.events)


def card_lines(folder: Path) -> list[str]:
    return (folder / "README.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(
    ("calibration", "name"),
    [
        ("wikitext2", "of Salesforce/wikitext:wikitext-2-raw-v1 that"),
        ("owner/texts", "of owner/texts that"),
        ("self", "of text sampled from the original that"),
        (__file__, "of the calibration text that"),
        (None, "of the calibration text that"),
    ],
)
def test_a_text_is_named_as_its_readers_know_it(
    calibration: str | None, name: str, compressed: tuple[Path, Any], tmp_path: Path
) -> None:
    shutil.copytree(compressed[0], tmp_path / "small")
    names = None if calibration is None else (calibration,)
    card = card_of("someone/model", None, 1, names)
    card.write(tmp_path / "small", Quality(35.2094, float("inf"), 8176))
    text = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    assert f"| perplexity on 8,176 tokens {name} did not calibrate it | 35.21 | inf |" in text


def test_without_being_asked_there_is_none(compressed: tuple[Path, Any]) -> None:
    assert not (compressed[0] / "README.md").exists()


@pytest.mark.parametrize(
    ("readme", "licence", "expected"),
    [
        ("---\nlicense: other\nlicense_name: own\n---\n", APACHE, ("other", "own")),
        (None, APACHE, ("apache-2.0", None)),
        ("No metadata.", MIT, ("mit", None)),
        ("---\n: [\n---\n", MIT, ("mit", None)),
        (None, "Ask the author.", ("other", "see-file")),
        (None, None, (None, None)),
    ],
    ids=["card", "apache", "no-metadata", "broken-metadata", "unknown", "nothing"],
)
def test_the_licence_is_carried_over(
    tmp_path: Path, readme: str | None, licence: str | None, expected: tuple[Any, Any]
) -> None:
    card = card_of("someone/model", source(tmp_path / "model", readme, licence), 1)
    assert (card.source.get("license"), card.source.get("license_name")) == expected


def test_the_base_model_is_a_hub_name_or_none(tmp_path: Path) -> None:
    assert card_of("someone/model", None, 1).base_model == "someone/model"
    assert card_of(tmp_path, None, 1).base_model is None
    assert card_of("model.gguf", None, 1).base_model is None
    model = toy("llama")
    assert card_of(model, None, 1).base_model is None
    model.config.name_or_path = "someone/model"
    assert card_of(model, None, 1).base_model == "someone/model"


def test_the_metadata_names_the_base_model(compressed: tuple[Path, Any], tmp_path: Path) -> None:
    shutil.copytree(compressed[0], tmp_path / "small")
    card_of("someone/model", None, 1).write(tmp_path / "small")
    data = ModelCard.load(tmp_path / "small" / "README.md").data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("someone/model", "quantized")
