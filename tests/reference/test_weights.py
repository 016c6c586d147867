"""Decoding to weights gives what the quantizer promised, from nothing but what is stored."""

from dataclasses import replace

import pytest
import torch

from cerwu_gpu.container.matrix import encode_matrix, unpack_matrix
from cerwu_gpu.errors import CorruptionError
from cerwu_gpu.quantize.layer import quantize_stack
from cerwu_gpu.reference.weights import decode_weights
from tests.configs import configured

CONFIGS = {
    "scalar": configured(lmbda=1e-3),
    "trellis4": configured(quantizer="trellis4", lmbda=1e-3),
    "trellis8": configured(quantizer="trellis8", lmbda=1e-3),
    "grid": configured(grid=(-1.0, -0.2, 0.0, 0.3, 0.9), lmbda=1e-4),
}


def quantized(config):
    """A matrix with a few weights far out, where the alphabet is not bounded in escapes."""
    weight = torch.randn(24, 40)
    weight[::7, ::9] *= 1000
    x = torch.randn(200, 40)
    return quantize_stack([weight], x.T @ x / 100, config).matrices[0]


def stored(matrix):
    """What the decoder gets of it: through the bytes of a file."""
    encoded = encode_matrix(matrix, relative_loss=0.0)
    words = torch.from_numpy(encoded.words)
    read = unpack_matrix("w", encoded.part, words, encoded.side, "cpu")
    return read.coded, read.rule


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_weight_is_the_quantizer_s(name, dtype):
    matrix = quantized(CONFIGS[name])
    coded, rule = stored(matrix)
    assert (len(rule.escapes) > 0) == (name != "grid")
    first, second = decode_weights([coded, coded], [rule, rule], dtype)
    assert first.dtype == dtype
    assert torch.equal(first, matrix.weight(dtype))
    assert torch.equal(second, first)


def test_missing_values_of_escapes_are_reported_by_name():
    coded, rule = stored(quantized(CONFIGS["scalar"]))
    short = replace(rule, escapes=rule.escapes[1:])
    with pytest.raises(CorruptionError, match=r"^w: escapes are missing"):
        decode_weights([coded], [short], torch.float32)
