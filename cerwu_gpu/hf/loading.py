"""From a compressed directory to a working transformers model, or to a plain one on disk."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel

from cerwu_gpu.container.reader import CompressedDirectory, open_directory
from cerwu_gpu.container.writer import check_output, new_directory, put_in_place
from cerwu_gpu.errors import FormatError, ModelError
from cerwu_gpu.hf.device import find_device
from cerwu_gpu.hf.reason import reason
from cerwu_gpu.spec import QUANT_METHOD


def load_compressed(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    progress: bool = False,
) -> PreTrainedModel:
    """A ready transformers model whose weights are, bit for bit, those that compression had.

    Args:
        path: compressed directory, or the hub name of one.
        device: where the model goes; default: the CPU.
        dtype: cast all floating-point weights; default: as they were compressed.
        verify: compare every tensor with its checksum.
        progress: show a bar on stderr.

    Raises:
        FormatError: the directory is not what docs/format.md says (CorruptionError: bytes have
            changed; VersionError: made by a newer cerwu_gpu).
        ConfigError: there is no such device here.
        ModelError: the hub name cannot be resolved, or transformers cannot build the model.
    """
    folder = _local(path)
    directory = open_directory(folder)
    target = find_device(device or "cpu")
    state = _state(directory, target, dtype, verify, progress)
    return _built(folder, state, dtype, target)


def decompress(
    path: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Write the model as a plain safetensors directory that any tool reads.

    Raises:
        OutputError: the output exists and is not empty; otherwise as `load_compressed`.
    """
    output = Path(output).expanduser().resolve()
    check_output(output, overwrite=overwrite)
    folder = _local(path)
    model = load_compressed(folder, dtype=dtype, progress=progress)
    with new_directory(output, overwrite=overwrite) as made:
        model.save_pretrained(made)
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.name != "config.json" and "safetensors" not in file.name:
                shutil.copyfile(file, made / file.name)
        put_in_place(made, output, overwrite=overwrite)


def _local(path: str | Path) -> Path:
    """The directory itself, or the local snapshot of a hub name."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or isinstance(path, Path) or str(path).count("/") > 1:
        raise FormatError(f"{path} is no directory: give one that cerwu-gpu compress wrote.")
    try:
        return Path(snapshot_download(str(path)))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{path} is no local directory and cannot be had from the hub ({reason}): check it."
        ) from error


def _state(
    directory: CompressedDirectory,
    device: torch.device,
    dtype: torch.dtype | None,
    verify: bool,
    progress: bool,
) -> dict[str, Tensor]:
    state = {}
    for name, tensor in directory.plain(verify=verify):
        state[name] = _cast(tensor.to(device), dtype)
    for name, tensor in directory.weights(device=device, verify=verify, progress=progress):
        state[name] = _cast(tensor, dtype)
    return state


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _built(
    folder: Path, state: dict[str, Tensor], dtype: torch.dtype | None, device: torch.device
) -> PreTrainedModel:
    """The model of config.json with these weights, built without a second copy of them."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        method = content.pop("quantization_config")["quant_method"]
        model_type = content.pop("model_type")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise FormatError(f"{folder}: config.json is missing or malformed.") from None
    if method != QUANT_METHOD:
        raise FormatError(f"{folder}: its quantization method is {method!r}, not {QUANT_METHOD!r}.")
    try:
        config = AutoConfig.for_model(model_type, **content)
        kind: type[PreTrainedModel] = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # type: ignore[assignment]
        loaded: tuple[PreTrainedModel, dict[str, Any]] = kind.from_pretrained(  # type: ignore[assignment]
            None,
            config=config,
            state_dict=state,
            dtype=dtype or _usual_dtype(state),
            # Without a map transformers would take weights that are on a GPU back to the CPU.
            device_map=None if device.type == "cpu" else {"": device},
            output_loading_info=True,
        )
    except Exception as error:  # whatever transformers makes of a damaged config.json
        raise ModelError(
            f"{folder}: transformers cannot build its model ({reason(error)})."
        ) from error
    model, found = loaded
    if found["missing_keys"]:
        missing = min(found["missing_keys"])
        raise FormatError(f"{folder}: {missing} of its model is missing; get the directory again.")
    _check_loaded(model, state)
    if (folder / "generation_config.json").is_file():
        model.generation_config = model.generation_config.from_pretrained(folder)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _usual_dtype(state: dict[str, Tensor]) -> torch.dtype:
    """The floating-point dtype that most weights have."""
    sizes: dict[torch.dtype, int] = {torch.float32: 0}
    for tensor in state.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=sizes.__getitem__)


def _check_loaded(model: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Every stored tensor has its place in the model, unchanged in shape and dtype."""
    names = dict(model.state_dict(keep_vars=True))
    for name, tensor in state.items():
        if name not in names or names[name].shape != tensor.shape:
            raise FormatError(f"{name}: the model of config.json has no such weight.")
        if names[name].dtype != tensor.dtype:  # one dtype was given for the whole model
            names[name].data = tensor.to(names[name].device)
