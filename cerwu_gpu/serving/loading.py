"""Load a compressed directory as a transformers model, or write it as a plain directory."""

import logging
import os
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, overload

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from cerwu_gpu.checkpoint.names import add_tensors, carried_names, remember, source_of
from cerwu_gpu.container.output import check_apart, check_output, new_directory, put_in_place
from cerwu_gpu.container.reader import CompressedDirectory, open_directory
from cerwu_gpu.device import find_device
from cerwu_gpu.errors import ConfigError, FormatError, ModelError, reason, shortage
from cerwu_gpu.files import copy_inside, local_path, read_json, resolved, written
from cerwu_gpu.hf.kinds import load_kind
from cerwu_gpu.hf.models import LoadedModel, check_readable, is_conv1d, load_tokenizer
from cerwu_gpu.models.module import fill
from cerwu_gpu.models.selection import find_blocks
from cerwu_gpu.serving.description import check_described, described_model
from cerwu_gpu.serving.resident import keep_compressed, placeholder, stored_in_blocks
from cerwu_gpu.spec import QUANT_METHOD

Resident = Literal["dense", "compressed"]
Module = TypeVar("Module", bound=nn.Module)

log = logging.getLogger("cerwu_gpu")


@overload
def load_compressed(
    path: str | Path,
    *,
    into: None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    resident: Resident = "dense",
    verify: bool = True,
    progress: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel: ...
@overload
def load_compressed(
    path: str | Path,
    *,
    into: Module,
    device: str | torch.device | None = None,
    verify: bool = True,
    progress: bool = False,
) -> Module: ...
def load_compressed(
    path: str | Path,
    *,
    into: nn.Module | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    resident: Resident = "dense",
    verify: bool = True,
    progress: bool = False,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Return a transformers model whose weights are, bit for bit, those that compression had.

    With resident="compressed" the weights of the transformer blocks stay compressed in memory, and
    a block is decoded when it runs: the logits are the same, bit for bit, but every forward pass
    decodes the whole model once, which makes generation on a CPU very slow. Such a model can run
    and generate; it cannot be saved, moved, cast or trained.

    Args:
        path: compressed directory, or the hub name of one.
        into: a module to be filled in place and returned instead, which a plain torch module needs,
            since its directory does not describe its class; it stays on its device, in its mode.
            Tensors that were only kept (`carried` in config.json) fill it where it has them.
        device: where the model goes; default: the CPU. With `into`: where weights are decoded.
        dtype: cast all floating-point weights; default: as they were compressed.
        resident: "dense", or "compressed" for the least memory.
        verify: compare every tensor with its checksum.
        progress: show a bar on stderr.
        trust_remote_code: run the code of the directory, where its model is no class of
            transformers.

    Raises:
        FormatError: the directory does not conform to docs/format.md (CorruptionError: bytes have
            changed; VersionError: made by a newer cerwu_gpu).
        ConfigError: there is no such device here, or no such `resident`.
        ModelError: the hub name cannot be resolved, or transformers cannot build the model; with
            resident="compressed" also: no weight in its blocks is compressed.
    """
    if resident not in get_args(Resident):
        raise ConfigError(f"resident is {resident!r}: use dense or compressed.")
    folder = local_snapshot(path)
    directory = open_directory(folder)
    target = find_device(device or "cpu")
    if into is not None:
        if dtype is not None or resident != "dense":
            raise ConfigError("dtype and resident are not for a module to be filled: drop them.")
        carried = carried_names(folder) if is_compressed(folder) else set()
        return fill(
            into, directory, device=target, carried=carried, verify=verify, progress=progress
        )
    check_described(directory, trust_remote_code)
    if resident == "compressed":
        return _compressed_in_memory(folder, directory, target, dtype, verify, trust_remote_code)
    carried = carried_names(folder)
    plain = directory.plain(verify=verify)
    state = {n: _cast(x.to(target), dtype) for n, x in plain if n not in carried}
    weights = directory.weights(device=target, verify=verify, progress=progress)
    state |= {name: _cast(tensor, dtype) for name, tensor in weights}
    return _built(folder, state, dtype, target, trust_remote_code)


def decompress(
    path: str | Path,
    output: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Write the model as a plain safetensors directory that any tool reads.

    Args:
        path: compressed directory, or the hub name of one.
        output: directory to write; it appears when it is complete.
        dtype: cast all floating-point weights; default: as they were compressed.
        overwrite: replace a compressed directory at `output`; nothing else is ever replaced.
        progress: show a bar on stderr.
        trust_remote_code: as for `load_compressed`.

    Raises:
        OutputError: the output is, holds or lies in `path`, or must not be replaced; otherwise as
            `load_compressed`.
    """
    output = resolved(output)
    check_apart({"the output": output}, {"the compressed model": path})
    check_output(output, overwrite=overwrite)
    folder = local_snapshot(path)
    check_apart({"the output": output}, {"the compressed model": folder})  # a hub name's snapshot
    model = load_compressed(
        folder, dtype=dtype, progress=progress, trust_remote_code=trust_remote_code
    )
    directory, carried = open_directory(folder), carried_names(folder)
    kept = {n: _cast(x, dtype) for n, x in directory.plain() if n in carried}
    others = [
        name
        for name in (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")))
        if not (folder / name).is_dir() and name != "config.json"
        if "/" in name or "safetensors" not in name
    ]
    if "generation_config.json" in others:
        # The file itself is copied, valid or not.
        model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    with new_directory(output, overwrite=overwrite) as made:
        with written(output):
            _save(model, made)
            add_tensors(made, kept)
            for name in copy_inside(others, folder, made):
                log.warning("%r is not copied: it leads out of %s, or is too large.", name, folder)
        put_in_place(made, output, overwrite=overwrite)


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Save a model; a full disk is left to `files.written`.

    Raises:
        ModelError: transformers refuses to write its configuration.
    """
    try:
        model.save_pretrained(folder)
    except Exception as error:  # a configuration that is loaded may not be valid enough to be saved
        if isinstance(error, OSError) or shortage(error) is not None:
            raise
        raise ModelError(
            f"config.json: transformers does not save it ({reason(error)})."
        ) from error


def local_snapshot(path: str | Path) -> Path:
    """Return the directory itself, or the local snapshot of a hub name."""
    folder = local_path(path)
    if os.path.isdir(folder):  # unlike Path.is_dir it takes text too long for a name
        check_readable(folder)
        return folder
    if os.path.lexists(folder) or isinstance(path, Path) or str(path).count("/") > 1:
        raise FormatError(f"{path} is no directory: give one that cerwu-gpu compress wrote.")
    try:
        return Path(snapshot_download(str(path)))
    except Exception as error:
        raise ModelError(
            f"{path} is no local directory and cannot be had from the hub ({reason(error)}): "
            "check it."
        ) from error


def _compressed_in_memory(
    folder: Path,
    directory: CompressedDirectory,
    device: torch.device,
    dtype: torch.dtype | None,
    verify: bool,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """Return the model with its blocks compressed and all else dense."""
    config, kind = described_model(folder, trust_remote_code)
    with torch.device("meta"):
        prefixes = [prefix for prefix, _ in find_blocks(kind(config), is_conv1d)]
    stored = stored_in_blocks(directory, prefixes, device, verify)
    if not stored:
        raise ModelError(f"{folder}: no weight in its blocks is compressed: load it dense.")
    plain = directory.plain(verify=verify)  # a view of the file, which may not stay as it is
    carried = carried_names(folder)
    state = {n: _cast(tensor.clone(), dtype) for n, tensor in plain if n not in carried}
    for name in directory.compressed():
        if name in stored:
            state[name] = placeholder(stored[name], dtype)
        else:
            outside = directory.stored(name, device=device, verify=verify)
            state[name] = _cast(outside.decode(), dtype)
    model = _built(folder, state, dtype, torch.device("cpu"), trust_remote_code)
    keep_compressed(model, find_blocks(model, is_conv1d), stored, dtype)
    return model


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _built(
    folder: Path,
    state: dict[str, Tensor],
    dtype: torch.dtype | None,
    device: torch.device,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """Return the model of config.json with these weights, built without a second copy of them."""
    config, kind = described_model(folder, trust_remote_code)
    try:
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
    model, keys = loaded
    if keys["missing_keys"]:
        missing = min(keys["missing_keys"])
        raise FormatError(f"{folder}: {missing} of its model is missing; get the directory again.")
    _check_loaded(model, state)
    remember(model, source_of(folder))
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = model.generation_config.from_pretrained(folder)
        except Exception as error:  # whatever transformers makes of a damaged file
            raise FormatError(
                f"{folder}: generation_config.json is malformed ({reason(error)}); get it again."
            ) from error
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _usual_dtype(state: dict[str, Tensor]) -> torch.dtype:
    """Return the floating-point dtype that most weights have."""
    sizes: dict[torch.dtype, int] = {torch.float32: 0}
    for tensor in state.values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=sizes.__getitem__)


def _check_loaded(model: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Check that every stored tensor is in the model with its shape, and give it its dtype."""
    names = dict(model.state_dict(keep_vars=True))
    for name, tensor in state.items():
        if name not in names or names[name].shape != tensor.shape:
            raise FormatError(f"{name}: the model of config.json has no such weight.")
        if names[name].dtype != tensor.dtype:  # one dtype was given for the whole model
            names[name].data = tensor.to(names[name].device)


def open_model(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a compressed directory, or anything that `load_model` takes, on `device`.

    Raises:
        FormatError: a compressed directory is damaged.
        ModelError: the source cannot be loaded.
        ConfigError: there is no such device here.
    """
    target = find_device(device)
    if not is_compressed(source):
        _, loaded = load_kind(source, trust_remote_code=trust_remote_code)
        loaded.model.to(target)  # type: ignore[arg-type]
        return loaded
    model = load_compressed(source, device=target, trust_remote_code=trust_remote_code)
    folder = local_snapshot(source)
    return LoadedModel(model, load_tokenizer(folder, trust_remote_code), folder)


def is_compressed(source: str | Path) -> bool:
    """Return whether the config.json of a directory or hub name has our quantization method."""
    path = local_path(source) / "config.json"
    try:
        file = path if os.path.exists(path.parent) else hf_hub_download(str(source), path.name)
        config = read_json(Path(file))
        method = config["quantization_config"]["quant_method"]
    except (OSError, ValueError, LookupError, TypeError):
        return False  # load_model has a better message for it
    return bool(method == QUANT_METHOD)
