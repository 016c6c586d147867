r"""NNCodec (Fraunhofer HHI, the PyPI package `nncodec`): its quantizer and its coder, round trip.

The weights are rounded to multiples of one step for all of them, by itself or under an 8-state
trellis (dependent quantization), and coded with DeepCABAC. No Hessian plays a part. The step is

    step = (4 + qp mod 4) 2^(floor(qp / 4) - 2),        so qp - 4 halves it.

Only the core of the package (`nncodec.nnc_core`) is imported: it needs numpy and nothing else,
while the package as a whole asks for numpy < 2, torchvision, OpenCV and more.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cerwu_gpu.errors import ConfigError

QP_DENSITY = 2
"""Steps per octave as a power of 2; NNCodec's default."""
QP_RANGE = (-128, 127)
"""Values of qp that its bitstream can hold at this density."""
UNARY_FLAGS = 10
"""Greater-than flags beyond the first before the exponential Golomb code; NNCodec's default."""


def nncodec_step(qp: int) -> float:
    """Return the step of `qp`; under dependent quantization each quantizer has twice it."""
    return float((4 + qp % 4) * 2.0 ** (qp // 4 - 2))


@torch.no_grad()
def pass_through_nncodec(parameters: Mapping[str, Tensor], *, qp: int, dependent: bool) -> int:
    """Replace parameters by their values after NNCodec; return the bytes of its bitstream.

    Arguments and errors are those of `nncodec_roundtrip`; any floating dtype will do.
    """
    weights = {name: p.detach().float().cpu().numpy() for name, p in parameters.items()}
    decoded, coded_bytes = nncodec_roundtrip(weights, qp=qp, dependent=dependent)
    for name, parameter in parameters.items():
        parameter.copy_(torch.from_numpy(decoded[name]))
    return coded_bytes


def nncodec_roundtrip(
    weights: Mapping[str, NDArray[np.float32]], *, qp: int, dependent: bool
) -> tuple[dict[str, NDArray[np.float32]], int]:
    """Code the weights with NNCodec and decode them again.

    Args:
        weights: float32 arrays of two or more dimensions by name, all finite.
        qp: the step, see above: larger is coarser.
        dependent: dependent quantization (8 states, its Viterbi search) instead of rounding.

    Returns:
        The decoded weights, shaped as they came, and the bytes of the whole bitstream.

    Raises:
        ConfigError: nncodec is not installed, qp is outside its range, or an array is not one of
            those above.
    """
    core = _core()
    least, most = QP_RANGE
    if not least <= qp <= most:
        raise ConfigError(f"qp is {qp}: give an integer from {least} to {most}.")
    arrays = {}
    for name, weight in weights.items():
        if weight.dtype != np.float32 or weight.ndim < 2 or not np.isfinite(weight).all():
            raise ConfigError(
                f"{name} is not a matrix of finite float32 numbers: convert it, or leave it out."
            )
        arrays[name] = np.ascontiguousarray(weight)
    if not arrays:
        raise ConfigError("there is no weight to code: give at least one.")
    stream = _encode(core, arrays, qp, dependent)
    decoded = _decode(core, stream)
    return {name: decoded[name].reshape(weights[name].shape) for name in weights}, len(stream)


def _core() -> Any:
    try:
        from nncodec import nnc_core
    except ImportError as error:
        raise ConfigError(
            "nncodec is not installed: pip install --no-deps nncodec "
            "(it is built from source and needs a C++ compiler)."
        ) from error
    return nnc_core


def _encode(
    core: Any, arrays: dict[str, NDArray[np.float32]], qp: int, dependent: bool
) -> bytearray:
    """Encode as nncodec.nnc.compress does, with its defaults."""
    model = core.nnr_model.NNRModel(arrays).model_info
    data = core.approximator.init_approx_data(arrays, model, qp_density=QP_DENSITY, scan_order=0)
    settings = core.approximator.ApproxInfo(
        data,
        model,
        "uniform",
        0,  # no codebook
        qp,
        False,  # the same qp for every weight
        not dependent,
        UNARY_FLAGS,
        0,  # no scaling of its own rate term
    ).approx_info
    syntax = {
        "cabac_unary_length_minus1": UNARY_FLAGS,
        "param_opt_flag": True,
        "partial_data_counter": 0,
        "general_profile_idc": 1,
        "node_id_present_flag": 1,
        "device_id": 0,
        "mps_parent_signalling_enabled_flag": 0,
        "parent_node_id_present_flag": 0,
        "temporal_context_modeling_flag": 0,
        "row_skip_enabled_flag": 0,
        "pre_signalling": 0,
    }
    integers = core.approximator.approx(settings, model, data, syntax)
    stream, _ = core.coder.encode(syntax, model, integers)
    return bytearray(stream)


def _decode(core: Any, stream: bytearray) -> dict[str, NDArray[np.float32]]:
    """Decode as nncodec.nnc.decompress does, with its defaults."""
    model: dict[str, Any] = {
        name: {}
        for name in (
            "parameter_type",
            "parameter_dimensions",
            "parameter_index",
            "block_identifier",
        )
    }
    performance = ("sparsification", "pruning", "unification")
    model |= {
        "topology_storage_format": None,
        "topology_compression_format": None,
        "performance_maps": {"mps": {}, "lps": {}},
        "performance_map_flags": {
            f"{level}_{kind}_flag": {} for level in ("mps", "lps") for kind in performance
        }
        | {f"{level}_decomposition_performance_map_flag": {} for level in ("mps", "lps")},
    }
    decoded = core.coder.decode(stream, model, hls_stats={}, oob_dict={})
    core.approximator.rec(decoded)
    weights: dict[str, NDArray[np.float32]] = decoded["parameters"]
    return weights
