"""Plans are made from config.json alone; their traffic is checked in ranks/test_ranks.py."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cerwu_gpu.config import CompressionConfig, from_settings
from cerwu_gpu.hf.causal_lm import CausalLM
from cerwu_gpu.hf.models import LoadedModel
from cerwu_gpu.hf.plan import outline, plan
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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--gpus", "0"), "gpus is 0: give at least 1"),
        (("--gpu-memory", "much"), "gpu_memory is 'much'"),
        (("--effort", "fast"), "compression without data has no plan"),
        (("--distill", "3"), "a distillation has no plan"),
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
