"""Files that were written once: every later version of the program reads the same bits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cerwu_gpu import load_compressed
from cerwu_gpu.container.reader import CompressedDirectory, decode_stored, open_directory
from cerwu_gpu.files import checksum, dtype_name
from tests.conftest import GPU

HERE = Path(__file__).parent
WEIGHTS = json.loads((HERE / "weights.json").read_text())
KINDS = sorted(WEIGHTS)
STEPS = 100
"""Weights of one directory that Triton's interpreter has the time for."""


def described(tensor: torch.Tensor) -> dict[str, object]:
    return {
        "dtype": dtype_name(tensor.dtype),
        "shape": list(tensor.shape),
        "sha256": checksum(tensor),
    }


def quick(directory: CompressedDirectory) -> set[str]:
    """Names of compressed weights: on a GPU all of them, else the smallest ones."""
    sizes = {name: entry.weights for name, entry in directory.compressed().items()}
    left, names = STEPS, set()
    for name in sorted(sizes, key=sizes.__getitem__):
        left -= sizes[name]
        if GPU or left >= 0:
            names.add(name)
    return names


def test_no_directory_is_left_out():
    made = [path.name for path in HERE.iterdir() if (path / "config.json").exists()]
    assert sorted(made) == KINDS


@pytest.mark.parametrize("form", ["numba", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_has_the_bits_that_it_had(kind, form, monkeypatch):
    monkeypatch.setenv("CERWU_GPU_BACKEND", form)
    directory = open_directory(HERE / kind)
    read = {**dict(directory.weights()), **dict(directory.plain())}
    assert {name: described(tensor) for name, tensor in read.items()} == WEIGHTS[kind]


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_gives_the_same_bits(kind, device, monkeypatch):
    monkeypatch.setenv("CERWU_GPU_BACKEND", "triton")
    directory = open_directory(HERE / kind)
    names = quick(directory)
    assert names or kind == "streams"  # whose matrices are too large without a GPU
    read = dict(decode_stored([directory.stored(name, device=device) for name in names]))
    assert {name: described(tensor) for name, tensor in read.items()} == {
        name: WEIGHTS[kind][name] for name in names
    }


@pytest.mark.parametrize("kind", ["tied", "sharded", "moe-transposed", "transposed"])
def test_models_load_with_these_weights(kind):
    state = load_compressed(HERE / kind).state_dict()
    for name, wanted in WEIGHTS[kind].items():
        assert described(state[name]) == wanted
    if kind == "tied":
        assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()


def test_the_command_line_verifies_one():
    command = [sys.executable, "-m", "cerwu_gpu", "verify", HERE / "scalar"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{HERE / 'scalar'}: whole")
