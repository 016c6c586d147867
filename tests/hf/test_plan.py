"""Plans are made from config.json alone; their traffic is checked in ranks/test_ranks.py."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import DeepseekV3Config

from cerwu_gpu.config import CompressionConfig, from_settings
from cerwu_gpu.hf.causal_lm import CausalLM
from cerwu_gpu.hf.models import LoadedModel
from cerwu_gpu.hf.plan import outline, plan
from cerwu_gpu.hf.streaming import WeightsOnDisk
from tests.configs import compress_flat, configured
from tests.conftest import TEXT
from tests.hf.calibrated import calibrated_blocks, find_weights
from tests.hf.toys import FAMILIES, toy, toy_tokens

Command = Callable[..., Any]


@pytest.mark.parametrize("family", ("llama", "gpt2", "mixtral", "qwen2_moe", "gpt_oss", "gemma2"))
def test_inputs_are_shared_as_calibration_finds(family: str, tmp_path: Path) -> None:
    assert family in FAMILIES
    model = toy(family)
    model.config.save_pretrained(tmp_path)
    layouts = find_weights(model, head=True).chosen
    known = outline(tmp_path, CompressionConfig())
    blocks = list(calibrated_blocks(model, layouts, toy_tokens()))
    assert len(known.blocks) == len(blocks)
    for table, block in zip(known.blocks, blocks, strict=True):
        rows: dict[str, int] = {}
        for matrix in block.matrices():
            rows[matrix.input] = rows.get(matrix.input, 0) + len(matrix.weight)
        assert {key: m for key, (m, _) in table.items()} == rows


@pytest.mark.parametrize("sensitivity", ["row", "none"])
def test_a_plan_knows_the_bytes_read(
    sensitivity: str, toy_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy("llama", num_hidden_layers=3).save_pretrained(tmp_path / "model")
    few = {"samples": 6, "sequence_length": 24, "batch_size": 2, "lmbda": 1e-5}
    config = configured(sensitivity=sensitivity, **few)
    read = WeightsOnDisk._read
    sizes: list[int] = []

    def counting(*given: Any) -> dict[str, Tensor]:
        values = read(*given)
        sizes.extend(x.numel() * x.element_size() for x in values.values())
        return values

    monkeypatch.setattr(WeightsOnDisk, "_read", counting)
    compress_flat(
        tmp_path / "model",
        tmp_path / "small",
        config=config,
        text=TEXT * 8,
        tokenizer=toy_tokenizer,
        device="cpu",
        progress=False,
    )
    known = outline(tmp_path / "model", from_settings(calibration="wikitext2"))
    named = replace(config, calibration=replace(config.text, source="wikitext2"))
    predicted = plan(known, named, ranks=1, bits=3.0)
    assert predicted.read[0] - known.outer_bytes == pytest.approx(sum(sizes), rel=0.02)


def test_one_process_sends_nothing_and_more_need_less_memory(tmp_path: Path) -> None:
    toy("llama").config.save_pretrained(tmp_path)
    config = CompressionConfig()
    known = outline(tmp_path, config)
    one, eight = (plan(known, config, ranks=count, bits=3.0) for count in (1, 8))
    assert one.sent == one.received == [0]
    assert sum(eight.sent) == pytest.approx(sum(eight.received), abs=8)
    assert eight.memory["activations"] < one.memory["activations"]
    assert one.file_bytes == eight.file_bytes


def test_a_model_that_writes_its_text_is_whole_in_every_process(tmp_path: Path) -> None:
    toy("llama").config.save_pretrained(tmp_path)
    named = from_settings(calibration="wikitext2")
    known = outline(tmp_path, named)
    whole, streamed = (
        plan(known, config, ranks=2, bits=3.0) for config in (CompressionConfig(), named)
    )
    assert whole.memory["all blocks"] == sum(known.block_bytes)
    assert "all blocks" not in streamed.memory
    assert set(whole.read) == {known.outer_bytes + sum(known.block_bytes)}
    assert max(streamed.read) > max(whole.read)


def test_the_command_prints_the_plan(command: Command, tmp_path: Path) -> None:
    model = toy("llama")
    model.config.save_pretrained(tmp_path)
    layouts = CausalLM(LoadedModel(model, None, None), CompressionConfig(), device=model.device)
    weights = sum(layout.shape[0] * layout.shape[1] for layout in layouts.layouts.values())
    options = ("--gpus", "4", "--nodes", "2", "--gpu-memory", "80GB", "--bits", "2.5")
    code, out, _ = command("plan", tmp_path, *options)
    assert code == 0
    assert f"{weights:,}" in out
    assert "file at 2.5 bits" in out
    assert "fits" in out
    assert "not measured" in out
    code, out, _ = command("plan", tmp_path, *options, "--json")
    assert json.loads(out)["ranks"] == 8
    assert json.loads(out)["fits"] is True
    assert set(json.loads(out)["seconds"].values()) == {None}


def test_a_plan_that_does_not_fit_says_what_to_do(command: Command, tmp_path: Path) -> None:
    """Experts of 7,168 columns: their sums are more than a GPU holds, on any number of GPUs."""
    DeepseekV3Config(dtype="bfloat16", num_hidden_layers=4).save_pretrained(tmp_path)
    options = ("--calibration", "wikitext2", "--gpus", "8", "--gpu-memory", "80GB")
    code, out, _ = command("plan", tmp_path, *options)
    assert code == 0
    assert "does not fit" in out
    *_, sentence = out.strip().splitlines()
    assert "of 80.0 GB, most of it for sums" in sentence
    assert "--exclude" in sentence and "--device cpu" in sentence
    content = json.loads(command("plan", tmp_path, *options, "--json").out)
    assert (content["fits"], content["remedy"]) == (False, sentence)
    code, out, _ = command("plan", tmp_path, *options, "--exclude", "*experts*")
    assert code == 0
    assert "does not fit" not in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--gpus", "0"), "gpus is 0: give at least 1"),
        (("--gpu-memory", "much"), "gpu_memory is 'much'"),
        (("--effort", "fast"), "compression without data has no plan"),
        (("--distill", "3"), "a distillation (distill 0 is none) has no plan"),
        (("--images", "photos"), "calibration by images has no plan"),
        (("--max-size", "3MB"), "a search for a size or a quality has no plan"),
    ],
)
def test_wrong_input_gets_a_sentence(
    command: Command, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    toy("llama").config.save_pretrained(tmp_path)
    code, _, err = command("plan", tmp_path, *arguments)
    assert code == 2
    assert sentence in err


def test_a_directory_without_a_configuration_gets_a_sentence(
    command: Command, tmp_path: Path
) -> None:
    code, _, err = command("plan", tmp_path)
    assert code == 2
    assert "has no configuration of a causal language model" in err
