"""Open whatever holds a model, compressed or not, to use it."""

import json
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoTokenizer

from cerwu_gpu.device import find_device
from cerwu_gpu.errors import ModelError, reason
from cerwu_gpu.hf.kinds import load_kind
from cerwu_gpu.hf.loading import load_compressed
from cerwu_gpu.hf.models import LoadedModel
from cerwu_gpu.spec import QUANT_METHOD


def open_model(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """A compressed directory, or anything that `load_model` takes, on `device`.

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
    model = load_compressed(source, device=target)
    path = Path(source).expanduser()
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path if path.is_dir() else source, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise ModelError(
            f"the tokenizer in {source} cannot be read ({reason(error)}): put one beside the model."
        ) from error
    return LoadedModel(model, tokenizer, None)


def is_compressed(source: str | Path) -> bool:
    """Whether the config.json of a directory, or of a hub name, says that cerwu_gpu wrote it."""
    path = Path(source).expanduser()
    try:
        file = (
            path / "config.json" if path.exists() else hf_hub_download(str(source), "config.json")
        )
        config = json.loads(Path(file).read_text(encoding="utf-8"))
        method = config["quantization_config"]["quant_method"]
    except (OSError, ValueError, LookupError, TypeError):
        return False  # what is wrong with it, load_model says better
    return bool(method == QUANT_METHOD)
