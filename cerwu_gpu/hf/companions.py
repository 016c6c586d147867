"""Files of a compressed directory besides weights: configuration, tokenizer, code, licences."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cerwu_gpu.checkpoint.configuration import without_kernels
from cerwu_gpu.checkpoint.names import checkpoint_files
from cerwu_gpu.container.files import format_version
from cerwu_gpu.container.output import is_usual
from cerwu_gpu.errors import ModelError, OutputError, reason
from cerwu_gpu.files import copy_inside, dtype_name, may_be_copied, read_json, written
from cerwu_gpu.hf.models import TOKENIZER_FILES, LoadedModel
from cerwu_gpu.spec import INDEX_FILE, QUANT_METHOD

TEXTS = (
    *("*.json", "*.jinja", "*.txt", "*.py", "*.yaml", "*.yml"),
    *("*.model", "*.tiktoken", "*.vocab", "*.bpe", "*.codes", "*.spm", "*.tokenizer"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*"),
)
"""Names of the files in a model directory that are copied: settings, vocabularies, code, terms."""
TEMPLATES = "additional_chat_templates/*.jinja"
TOKENIZER_PARTS = (
    *TOKENIZER_FILES,
    *("added_tokens.json", "merges.txt", "special_tokens_map.json"),
    *("chat_template.jinja", "chat_template.json", TEMPLATES),
)
"""Names of the files that another tokenizer writes anew."""
WRITTEN = ("config.json", "*.index.json")
"""Names of files that the result has of its own."""
LEFT = {
    "the card of the original: --card writes one of the result": ("README.md",),
    "the weights in another format": (
        *("pytorch_model*.bin", "tf_model*.h5", "flax_model*.msgpack", "rust_model.ot"),
        *("*.onnx", "*.gguf"),
    ),
    "of the training": (
        *("trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt"),
        *("rng_state*.pth", "*_results.json"),
    ),
}
"""Reason to leave files that nobody misses -> their names."""
ELSEWHERE = "it leads out of the model's directory, or is too large"
"""Reason to leave a file that may not be copied (files.may_be_copied)."""
_BLANKS = re.compile(rb'("(?:[^"\\]|\\.)*+")|[ \t\r\n]++')


@dataclass(frozen=True)
class Companions:
    """Fate of the files in a model directory besides its weights.

    Attributes:
        carried: relative paths of those that are copied.
        left: relative path of those that are not -> reason.
        events: sentences about those that somebody may miss.
    """

    carried: tuple[str, ...] = ()
    left: dict[str, str] | None = None
    events: tuple[str, ...] = ()


def companions(source: Path | None, *, replaced: bool = False) -> Companions:
    """Return what becomes of the files in a model directory.

    Args:
        source: the directory; None: there is none.
        replaced: leave the tokenizer's files, since another tokenizer writes its own.
    """
    if source is None:
        return Companions()
    weights = {file.name for file in checkpoint_files(source)}
    folders = ("additional_chat_templates", *_modules(source))
    carried, left, events = [], {}, []
    for name in _listed(source, folders):
        if name in weights or _fits(name, WRITTEN) or (replaced and _fits(name, TOKENIZER_PARTS)):
            continue
        why = next((why for why, names in LEFT.items() if _fits(name, names)), None)
        if why is not None:
            left[name] = why
        elif not (name.endswith("/") or may_be_copied(source / name, source)):
            left[name] = ELSEWHERE
            events.append(f"{name} is not copied: {ELSEWHERE}")
        elif PurePosixPath(name).parts[0] in folders or _fits(name, TEXTS):
            carried.append(name)
        else:
            left[name] = "no file that transformers or a tokenizer is known to read"
            events.append(f"{name} of the source is not carried: {left[name]}")
    return Companions(tuple(carried), left, tuple(events))


def _modules(source: Path) -> list[str]:
    """Return the folders that the modules.json of sentence-transformers names."""
    try:
        modules = read_json(source / "modules.json")
        paths = [PurePosixPath(module["path"]) for module in modules]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [path.parts[0] for path in paths if path.parts and ".." not in path.parts]


def _listed(source: Path, folders: Iterable[str]) -> Iterator[str]:
    """Yield the files of a directory, hidden ones aside; of a folder that is not in `folders`, its
    name alone."""
    for path in sorted(source.iterdir()):
        if path.name.startswith((".", "__pycache__")):
            continue
        if path.is_dir() and path.name in folders:
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            yield from (file.relative_to(source).as_posix() for file in inside)
        else:
            yield f"{path.name}/" if path.is_dir() else path.name


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(
        name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns
    )


def not_carried(loaded: LoadedModel, *, strict: bool) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return what of the source is not in the result, name -> reason, and sentences about what
    somebody may miss.

    Raises:
        ModelError: there is such a sentence, and `strict`.
    """
    files = companions(loaded.files, replaced=loaded.replaced)
    events = (*loaded.names.events, *files.events)
    if events and strict:
        raise ModelError(f"{events[0]} (strict): take it out of the source.")
    return {**loaded.names.left, **(files.left or {})}, events


def write_companions(loaded: LoadedModel, folder: Path) -> tuple[str, ...]:
    """Write all files of a compressed directory besides its weights, JSON without blanks; return an
    event for each of the source's that is not copied.

    Raises:
        OutputError: the disk refuses one.
        ModelError: the generation settings are invalid.
    """
    files = companions(loaded.files, replaced=loaded.replaced).carried
    unusual = [name for name in files if not is_usual(name)]
    write_config(loaded, folder, unusual)
    events: tuple[str, ...] = ()
    if loaded.files is not None:
        events = copy_files(loaded.files, folder, files)
    else:
        _save_generation(loaded.model, folder)
    if loaded.tokenizer is not None and (loaded.files is None or loaded.replaced):
        _save_tokenizer(loaded.tokenizer, folder)
    with written(folder):
        for file in folder.rglob("*.json"):
            if file.name != INDEX_FILE:  # the writer's own
                file.write_bytes(compact(file.read_bytes()))
    return events


def write_config(loaded: LoadedModel, folder: Path, files: Iterable[str] = ()) -> None:
    """Write config.json with the quantization method, the format's version in the files that are in
    the folder already, and no local paths.

    Args:
        files: relative paths of files in the directory that an output may replace as well.

    Raises:
        OutputError: the disk refuses it.
    """
    model = loaded.model
    content: dict[str, Any] = without_kernels(_without_paths(model.config.to_dict()))
    quantization = {"quant_method": QUANT_METHOD, "format": format_version(folder)}
    if files := list(files):
        quantization["files"] = files
    content["quantization_config"] = quantization | loaded.names.described()
    content["architectures"] = [type(model).__name__]
    content["dtype"] = dtype_name(model.dtype)  # it may have been cast
    text = json.dumps(content, indent=2, sort_keys=True, default=str)
    with written(folder):
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def copy_files(source: Path, folder: Path, names: Iterable[str]) -> tuple[str, ...]:
    """Copy files of a source directory, given by their relative paths; return an event for each
    that is left out because it leads elsewhere (files.lies_inside) or is too large.

    Raises:
        OutputError: the disk refuses one.
    """
    with written(folder):
        left = copy_inside(names, source, folder)
    return tuple(f"{name} is not copied: {ELSEWHERE}" for name in left)


def compact(content: bytes) -> bytes:
    """Return JSON without the blanks between its tokens; as it is, if it is none."""
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return content
    return _BLANKS.sub(rb"\1", content)


def _save_generation(model: PreTrainedModel, folder: Path) -> None:
    generation = getattr(model, "generation_config", None)  # image classifiers have none
    if generation is None:
        return
    try:
        generation.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # whatever transformers finds wrong
        raise ModelError(
            f"the generation_config of {type(model).__name__} is invalid ({_said(error)}): "
            "correct it, or set model.generation_config = None."
        ) from error


def _said(error: BaseException) -> str:
    """Return the last line of an exception that lists faults, else what it says."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip().startswith("-")]
    return lines[0].rstrip(".") if lines else reason(error)


def _without_paths(content: Any) -> Any:
    """Return a configuration without the places that it and its parts were loaded from."""
    if isinstance(content, dict):
        return {k: _without_paths(x) for k, x in content.items() if k != "_name_or_path"}
    return [_without_paths(x) for x in content] if isinstance(content, list) else content


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # a full disk reaches us from Rust as a plain Exception
        raise OutputError(
            f"the tokenizer cannot be written to {folder} ({reason(error)}): "
            "free some space and start again."
        ) from error


def described(model: PreTrainedModel) -> dict[str, Any]:
    """Return the configuration, without what changes from one machine to the next."""
    config: dict[str, Any] = model.config.to_dict()
    for volatile in ("_name_or_path", "transformers_version"):
        config.pop(volatile, None)
    return config
