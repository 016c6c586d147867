"""The state of unfinished work that is computed step by step: tensors and numbers in one file."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cerwu_gpu.errors import OutputError
from cerwu_gpu.files import atomic, written

_KEY = "state"


def save_state(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, float]) -> None:
    """Write a state, whole or not at all, over the last one.

    Raises:
        OutputError: the disk refuses it.
    """
    content = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    with written(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as temporary:
            save_file(content, temporary, metadata={_KEY: json.dumps(dict(values))})


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, float]] | None:
    """Return the tensors and numbers of a state; None where there is none.

    Raises:
        OutputError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads(file.metadata()[_KEY])
            return {name: file.get_tensor(name) for name in file.keys()}, values  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise OutputError(
            f"{path} is damaged ({error}): pass --restart (restart=True) to begin from the start."
        ) from None
