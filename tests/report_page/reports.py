"""The content of a report.json, small enough to check by hand."""

from typing import Any

from cerwu_gpu import LayerReport, Report
from cerwu_gpu.config import settings
from tests.configs import configured


def layer(name: str, part: int = 0, limit: float = 3.0) -> LayerReport:
    return LayerReport(
        name=name,
        part=part,
        shape=(40, 50),
        bits_per_weight=3.2,
        relative_loss=0.02,
        words_bytes=700,
        side_bytes=100,
        limit_bits=limit,
    )


NAMES = [
    f"model.layers.{block}.{kind}.weight"
    for block in (0, 1)
    for kind in ("self_attn.q_proj", "mlp.up_proj")
]
EXPERTS = [f"model.layers.{block}.mlp.experts" for block in (0, 1)]
REPORT: dict[str, Any] = {
    "model": "toy",
    "output": "small",
    "finished": "2026-01-02T03:04:05+00:00",
    **Report(
        layers=(
            *(layer(name) for name in NAMES),
            *(layer(name, part, 3.0 - 2 * part) for name in EXPERTS for part in (0, 1)),
            layer("lm_head.weight"),
        ),
        lmbda=1e-6,
        bits_per_weight=3.512,
        directory_bytes=54_000,
        original_bytes=200_000,
        seconds={"load": 1.5, "quantize": 120.0, "verify": 3.5},
        events=("model.layers.1.mlp.up_proj.weight: needed more damping",),
        left={"model.layers.0.mlp.router.weight": "a router"},
    ).to_dict(),
    "bytes": {
        "words": 40_000,
        "tokenizer.json": 9_000,
        "tables": 2_500,
        "headers": 1_500,
        "classes": 600,
        "config.json": 400,
    },
    "settings": settings(configured(lmbda=1e-6)),
    "changed": ["lmbda"],
    "command": "cerwu-gpu compress toy -o small --lmbda 1e-06",
    "python": "CompressionConfig(lmbda=1e-06)",
    "machine": {"cerwu_gpu": "0.1.0", "python": "3.11.0", "device": "cpu (x86_64)"},
}
"""Two blocks with a mixture of two experts, and a head."""
