"""Kernel or reference, per operation: the only place that asks where the tensors are."""

from cerwu_gpu.reference.ans import decode
from cerwu_gpu.reference.obs import quantize_block
from cerwu_gpu.reference.trellis import quantize_block_trellis

__all__ = ["decode", "quantize_block", "quantize_block_trellis"]
