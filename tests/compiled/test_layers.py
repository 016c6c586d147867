"""Real layers, quantized whole in the compiled forms and by the definitions."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cerwu_gpu.config import CompressionConfig
from cerwu_gpu.quantize.layer import QuantizedStack, quantize_stack
from tests.configs import configured

TIES = 1e-5
"""Largest share of weights at which a row may leave the definition's path; where it has, the
errors that later columns take up are others, and so may be their symbols."""


def quantized(form: str, layer: Path, config: CompressionConfig) -> QuantizedStack:
    stored = np.load(layer)
    weight, hessian = torch.from_numpy(stored["W"][:256]), torch.from_numpy(stored["H"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CERWU_GPU_BACKEND", form)
        return quantize_stack([weight.float()], hessian.float(), config)


@pytest.mark.parametrize("quantizer", ["scalar", "trellis4", "trellis8"])
@pytest.mark.parametrize("name", ["14.self_attn.q_proj", "29.mlp.down_proj"])
def test_symbols_are_the_definition_s_but_for_ties(name: str, quantizer: str, data: Path) -> None:
    layer = data / "layers" / f"model.layers.{name}.npz"
    config = configured(lmbda=2e-4, quantizer=quantizer)  # type: ignore[arg-type]
    ours, theirs = (quantized(form, layer, config) for form in ("numba", "torch"))
    assert 1e-4 < ours.relative_losses[0] < 0.5
    assert ours.relative_losses[0] == pytest.approx(theirs.relative_losses[0], rel=1e-3)
    differ = ours.matrices[0].symbols != theirs.matrices[0].symbols
    assert int(differ.any(dim=1).sum()) <= TIES * differ.numel() + 1
