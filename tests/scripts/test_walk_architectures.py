"""The walk over architectures, on a sample of them."""

from pathlib import Path

import pytest

from scripts.walk_architectures import walk


@pytest.mark.parametrize(
    ("family", "result"),
    [
        ("laguna", "works"),  # from_pretrained took three of its names for others
        ("falcon_mamba", "works"),  # a state-space model
        ("bart", "works"),  # an encoder-decoder's decoder
        ("ctrl", "refused"),  # it changes a weight in place
        ("dory", "refused"),  # its blocks exchange more than hidden states
    ],
)
def test_families_work_or_are_refused(family: str, result: str, tmp_path: Path) -> None:
    (verdict,) = walk([family])
    assert verdict.result == result, verdict
