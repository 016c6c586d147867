"""Fields of a configuration by which a stranger's config.json could do harm: sizes, and code."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from cerwu_gpu.errors import FormatError

COUNT_LIMIT, LABELS_LIMIT = 10_000, 1_000_000
"""Maximum numbers of layers, blocks or experts, and of labels, that a configuration may ask for."""
_COUNTS = {
    re.compile(r"(^|_)(layers?|blocks?|depths?|experts)$"): COUNT_LIMIT,
    re.compile(r"(^|_)labels$"): LABELS_LIMIT,
}
_IMPLEMENTATION = re.compile(r"^_?(attn|experts)_implementation(_internal)?$")

log = logging.getLogger("cerwu_gpu")


def check_counts(content: Any, folder: str | Path, name: str = "") -> None:
    """Refuse a configuration with more layers, blocks, experts or labels than any model has.

    Args:
        content: of config.json, or a part of it.
        name: of the field that holds `content`.

    Raises:
        FormatError: it has one.
    """
    if isinstance(content, Mapping):
        for key, value in content.items():
            check_counts(value, folder, str(key))
    elif isinstance(content, list | tuple):
        for value in content:
            check_counts(value, folder, name)
    elif isinstance(content, int | float):
        for pattern, most in _COUNTS.items():
            if content > most and pattern.search(name):
                raise FormatError(
                    f"{folder}: {name} of config.json is {content}: at most {most} are possible."
                )


def without_kernels(content: Any) -> Any:
    """Return a configuration without the names of implementations of attention and experts: one
    with a slash is code that transformers would fetch from the Hub and run."""
    if isinstance(content, dict):
        return {
            k: without_kernels(x) for k, x in content.items() if not _IMPLEMENTATION.match(str(k))
        }
    return [without_kernels(x) for x in content] if isinstance(content, list) else content


def forget_kernels(config: PretrainedConfig) -> None:
    """Remove the kernels of the Hub from a configuration that transformers has read, with a
    warning."""
    for name in ("_attn_implementation", "_experts_implementation"):
        for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
            value = getattr(part, name, None)
            if isinstance(value, str) and "/" in value:
                setattr(part, name, None)
                log.warning(
                    "%r is code on the Hub and is not fetched for a compressed model: call "
                    "set_attn_implementation of the loaded model where you trust it.",
                    value,
                )
