"""Presets of settings for users who do not want to choose them one by one (docs/quickstart.md)."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

Effort = Literal["fast", "normal", "best"]

EFFORTS: Mapping[Effort, Mapping[str, Any]] = MappingProxyType(
    {
        "fast": {
            "calibration": "none",
            "sensitivity": "relative",
            "lmbda": 3e-6,
            "limit_columns": 0,
        },
        "normal": {},
        "best": {"quantizer": "trellis32", "tokens_per_column": 16, "distill": 80},
    }
)
"""Flat settings of each effort; those left out have their defaults."""

_REPLACED_BY: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "calibration": ("images",),
        "lmbda": ("sensitivity",),
        "quantizer": ("levels", "grid"),
        "tokens_per_column": ("samples",),
    }
)
"""Setting of an effort -> other settings that leave it without meaning, or change its unit."""


def with_effort(effort: Effort | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return flat settings, completed by those of an effort.

    Args:
        effort: None is normal.
        given: flat settings, which win over those of the effort, also where they are None.
    """
    known = {name for name, value in given.items() if value is not None}
    if "images" in known and "calibration" not in known:
        known.add("samples")  # images alone are counted by themselves
    preset = {
        name: value
        for name, value in EFFORTS[effort or "normal"].items()
        if name not in given and not known & set(_REPLACED_BY.get(name, ()))
    }
    return {**given, **preset}
