"""The walk over architectures, on a sample of them; with CERWU_GPU_WALK=1 (half an hour) on all."""

import json
import os
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from scripts.walk_architectures import walk

VERDICTS = json.loads(
    (Path(__file__).parents[2] / "scripts" / "results" / "architectures.json").read_text()
)
SAMPLE = (
    "laguna",  # from_pretrained took three of its names for others
    "falcon_mamba",  # a state-space model
    "jamba",  # states, attention, experts
    "llama4_text",  # all experts in one product
    "bart",  # an encoder-decoder's decoder
    "dory",  # its blocks exchange more than hidden states: it runs whole
    "xlnet",  # its hidden states are [sequence, batch, width]
    "zaya",  # zeros go through a projection beside the inputs that others share
    "blt",  # its parts work on bytes and on patches of them
    "gemma4_assistant",  # refused: it needs states of another model
    "musicgen",  # refused: its class is for no task of ours
)


def check(family: str) -> None:
    (verdict,) = walk([family])
    assert [verdict.result, verdict.why] == VERDICTS[family]


@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_has_its_verdict(family: str) -> None:
    check(family)


@pytest.mark.skipif("CERWU_GPU_WALK" not in os.environ, reason="CERWU_GPU_WALK=1 asks for it")
@pytest.mark.parametrize("family", sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - {*SAMPLE}))
def test_every_family_has_its_verdict(family: str) -> None:
    check(family)


def test_no_family_ends_in_another_librarys_exception() -> None:
    assert VERDICTS.keys() == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert {result for result, _ in VERDICTS.values()} == {"works", "refused"}
    assert sum(result == "works" for result, _ in VERDICTS.values()) >= 188
