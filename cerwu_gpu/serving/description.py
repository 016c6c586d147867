"""config.json of a compressed directory, which may be a stranger's, and whether the tensors fit it.

`load_compressed` and transformers' own from_pretrained ask the same function before anything is
decoded: a model with random weights, or one far larger than the files, is never built.
"""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from cerwu_gpu.checkpoint.configuration import check_counts, forget_kernels, without_kernels
from cerwu_gpu.checkpoint.names import carried_names
from cerwu_gpu.container.reader import CompressedDirectory
from cerwu_gpu.errors import FormatError, ModelError, reason
from cerwu_gpu.files import dtype_name, read_json
from cerwu_gpu.hf.kinds import model_class, remote_class
from cerwu_gpu.models.module import check_names
from cerwu_gpu.spec import QUANT_METHOD

PARAMETERS_FREE = 1000
"""Number of parameters that a model may have whatever its directory stores: tied names, and the
names of an experts' stack that are stored as one."""


def described_model(
    folder: Path, trust_remote_code: bool = False
) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    """Return the configuration in config.json and the class of its model.

    Names of kernels to be fetched from the Hub and run are left out.

    Raises:
        FormatError: it is missing or malformed, names another quantization method, or asks for more
            than COUNT_LIMIT layers.
        ModelError: transformers has no such model, or it needs code that is not trusted.
    """
    content = _read(folder)
    code = remote_class(content)
    if code is not None and not trust_remote_code:
        raise ModelError(
            f"{folder}: its model is {code}, code of the directory: pass trust_remote_code=True "
            "where you trust it."
        )
    try:
        if code is not None:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
            forget_kernels(config)
            return config, get_class_from_dynamic_module(code, folder)
        config = AutoConfig.for_model(content.pop("model_type"), **content)
        kind = model_class(config, content.get("architectures"))
    except Exception as error:  # whatever transformers makes of a damaged config.json
        raise ModelError(
            f"{folder}: transformers cannot build its model ({reason(error)})."
        ) from error
    return config, kind


def check_described(directory: CompressedDirectory, trust_remote_code: bool = False) -> None:
    """Refuse a directory whose tensors, but for carried ones, are not those of the model in its
    config.json, by name and shape; the model is built without memory for its weights.

    Raises:
        FormatError, ModelError: as `described_model`, or they do not fit.
    """
    config, kind = described_model(directory.path, trust_remote_code)
    carried = carried_names(directory.path)
    described = {n: entry for n, entry in directory.described().items() if n not in carried}
    stored = {name: shape for name, (_, shape) in described.items()}
    try:
        with torch.device("meta"), few_parameters(4 * len(stored) + PARAMETERS_FREE):
            model = kind(config)
            ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    except FormatError as error:
        raise FormatError(f"{directory.path}: {error}") from None
    except Exception as error:  # whatever transformers makes of a damaged config.json
        raise ModelError(
            f"{directory.path}: transformers cannot build its model ({reason(error)})."
        ) from error
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    state = model.state_dict(keep_vars=True)
    # transformers does not tie while it loads a model, which is when from_pretrained asks.
    state |= {name: state[source] for name, source in ties.items() if {name, source} <= set(state)}
    target = {
        name: tensor
        for name, tensor in state.items()
        if name in stored or not any(re.search(pattern, name) for pattern in ignored)
    }
    check_names(directory.path, target, stored, f"the {kind.__name__} of its config.json")
    for name, (dtype, _) in described.items():
        if target[name].is_floating_point() != dtype.startswith(("float", "bfloat")):
            raise FormatError(
                f"{directory.path} has {name} as {dtype}, the {kind.__name__} of its config.json "
                f"as {dtype_name(target[name].dtype)}: get it again."
            )


@contextmanager
def few_parameters(most: int) -> Iterator[None]:
    """Stop a model, while it is built in this thread, at more than `most` parameters.

    Raises:
        FormatError: it has more.
    """
    thread, count = threading.get_ident(), 0

    def counted(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > most:
            raise FormatError(
                "the model of config.json has far more weights than the files: get them again."
            )

    handle = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def _read(folder: Path) -> dict[str, Any]:
    """Return the content of config.json without the quantization and without foreign kernels."""
    path = folder / "config.json"
    if not path.exists():
        raise FormatError(
            f"{folder} has no config.json: fill a module of its kind, load_compressed(..., into=)."
        )
    try:
        content: dict[str, Any] = read_json(path)
        method = content.pop("quantization_config")["quant_method"]
        if not isinstance(content["model_type"], str):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise FormatError(f"{folder}: config.json is missing or malformed.") from None
    if method != QUANT_METHOD:
        raise FormatError(f"{folder}: its quantization method is {method!r}, not {QUANT_METHOD!r}.")
    check_counts(content, folder)
    harmless: dict[str, Any] = without_kernels(content)
    return harmless
