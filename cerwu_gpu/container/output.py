"""Output directories: checks that nothing else is overwritten, and the renames.

Every command that writes a directory asks the functions of this file, so that one place decides
what is never written over: anything that is read, and anything that cerwu_gpu did not write.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from secrets import token_hex

from cerwu_gpu.container.header import holds_manifest
from cerwu_gpu.errors import OutputError
from cerwu_gpu.files import flush_to_disk, local_path, read_json, written
from cerwu_gpu.spec import INDEX_FILE, QUANT_METHOD, SINGLE_FILE

PARTIAL, REPLACED = ".partial", ".cerwu_gpu-replaced"
"""Suffixes of an unfinished directory, and of one that is being replaced."""
SHARD_FILES = (SINGLE_FILE, "model-*-of-*.safetensors")
"""Names of the files that hold tensors; each has a manifest (docs/format.md)."""
COMPANION_FILES = (
    INDEX_FILE,
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "README.md",
    *("LICENSE*", "LICENCE*", "NOTICE*"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("spiece.model", "sentencepiece.model", "sentencepiece.bpe.model", "spm.model"),
    *("spm_char.model", "source.spm", "target.spm", "target_vocab.json", "vocab-src.json"),
    *("vocab-tgt.json", "dict.txt", "bpe.codes", "byte_maps.json", "emoji.json"),
    *("entity_vocab.json", "normalizer.json", "prophetnet.tokenizer", "word_shape.json"),
    "word_pronunciation.json",
    "additional_chat_templates/*.jinja",
)
"""Names of the other files of a compressed directory: what `compress` copies from the source, and
what the tokenizers of transformers save."""

log = logging.getLogger("cerwu_gpu")


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that would destroy something; put back one that a killed run moved aside.

    Only a compressed directory that holds nothing else is ever replaced, and only on request.

    Raises:
        OutputError: `output` is a file, is or holds the current directory, or is a non-empty
            directory that is no compressed model or comes without `overwrite`.
    """
    restore(output)
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file: choose a directory for the output.")
    if not output.is_dir():
        return
    if Path.cwd().is_relative_to(output.resolve()):
        raise OutputError(f"{output} is or holds the current directory: choose another output.")
    if not any(output.iterdir()):
        return
    _check_ours(output, output)
    if not overwrite:
        raise OutputError(f"{output} exists and is not empty: choose another or pass --overwrite.")


def _check_ours(folder: Path, output: Path) -> None:
    """Refuse a non-empty directory that is to be replaced, `output` by name, and must not be.

    Raises:
        OutputError: it is not just a compressed model.
    """
    reason = foreign_content(folder)
    if reason is not None:
        raise OutputError(
            f"{output} is not empty and {reason}: choose another output; --overwrite replaces "
            "nothing but compressed models."
        )


def foreign_content(folder: Path) -> str | None:
    """Return why a non-empty directory is not just a compressed model; None where it is.

    A compressed model has a manifest in each of its shards, or at least a config.json with our
    method (shards that a broken download has cut off cannot be read any more), and no file or
    folder that neither `compress` nor a tokenizer writes.
    """
    ours = False
    companions = (*COMPANION_FILES, *map(escape, _carried(folder / "config.json")))
    for path in _files(folder, folder, companions):
        name = path.relative_to(folder).as_posix()
        is_shard = _matches(name, SHARD_FILES)
        if not path.is_file() or not (is_shard or _matches(name, companions)):
            return f"holds {name!r}, which is no part of a compressed model"
        has_manifest = holds_manifest(path) if is_shard else None
        if has_manifest is False:
            return f"holds {name!r}, which has no cerwu manifest"
        ours = ours or bool(has_manifest) or (name == "config.json" and _is_configured(path))
    return None if ours else "is no compressed model"


def is_usual(name: str) -> bool:
    """Return whether a file of this name, a relative path, needs no mention in config.json."""
    return _matches(name, COMPANION_FILES)


def _files(folder: Path, root: Path, companions: tuple[str, ...]) -> Iterator[Path]:
    """Yield what a directory holds; of a folder that may be part of a model, its content."""
    for path in sorted(folder.iterdir()):
        name = f"{path.relative_to(root).as_posix()}/"
        partly = path.is_dir() and not path.is_symlink() and any(path.iterdir())
        if partly and any(pattern.startswith((name, escape(name))) for pattern in companions):
            yield from _files(path, root, companions)
        else:
            yield path


def _carried(path: Path) -> list[str]:
    """Return the names of further files of the source that a config.json lists."""
    names = _quantization(path).get("files", ())
    return [x for x in names if isinstance(x, str)] if isinstance(names, list) else []


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a relative path fits one of the patterns, folder by folder."""
    return any(
        name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns
    )


def _is_configured(path: Path) -> bool:
    """Return whether a config.json names our quantization method."""
    return _quantization(path).get("quant_method") == QUANT_METHOD


def _quantization(path: Path) -> Mapping[str, object]:
    """Return the quantization_config of a config.json; empty where there is none."""
    try:
        content = read_json(path)["quantization_config"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return content if isinstance(content, dict) else {}


def check_apart(outputs: Mapping[str, Path], read: Mapping[str, str | Path | None]) -> None:
    """Refuse outputs that are, hold or lie in something that is read.

    Symbolic links are resolved, also those in a directory that is read: what they lead to is read
    as well. Two names of one directory (mounts, file systems that ignore case) count as one.

    Args:
        outputs: what it is ("the output") -> the place; it need not exist.
        read: what it is ("the model") -> the place, or None. A string that names nothing on the
            disk is the name of something elsewhere (a Hub name) and passes; a Path counts even
            where nothing is there yet.

    Raises:
        OutputError: the first such pair.
    """
    for purpose, output in outputs.items():
        target = Path(os.path.realpath(output))
        for what, name in read.items():
            for source, inside_counts in _places(name):
                inside = inside_counts and _lies_in(target, source)
                around = _lies_in(source, target)
                if inside and around:
                    conflict = f"{purpose} {target} is {what}"
                elif inside:
                    conflict = f"{purpose} {target} lies in {what} {source}"
                elif around:
                    conflict = f"{what} {source} lies in {purpose} {target}"
                else:
                    continue
                raise OutputError(
                    f"{conflict}: choose another output, or another place for {what}."
                )


def _places(name: str | Path | None) -> Iterator[tuple[Path, bool]]:
    """Yield where something that is read lies, and whether an output must not lie inside of it.

    The last are the places that links directly in it lead to, below which nothing is read.
    """
    if name is None:
        return
    source = local_path(name)
    if isinstance(name, str) and not os.path.lexists(source):
        return
    yield Path(os.path.realpath(source.parent), source.name), True  # the link, if it is one
    yield Path(os.path.realpath(source)), True
    for path in source.iterdir() if source.is_dir() else ():
        if path.is_symlink():
            yield Path(os.path.realpath(path)), False


def _lies_in(inner: Path, outer: Path) -> bool:
    """Return whether `inner` is `outer` or lies below it; both resolved."""
    if inner.is_relative_to(outer):
        return True
    try:
        there = outer.stat()
    except OSError:
        return False
    for place in (inner, *inner.parents):
        try:
            if os.path.samestat(place.stat(), there):
                return True
        except OSError:
            continue
    return False


@contextmanager
def new_directory(output: Path, *, overwrite: bool, inside: Path | None = None) -> Iterator[Path]:
    """Make a hidden directory to be filled, beside `output` or `inside` one of the same disk.

    It is removed at the end, if it is still there.

    Raises:
        OutputError: `output` must not be replaced, or the place cannot be written.
    """
    check_output(output, overwrite=overwrite)
    place = inside or output.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix=f".{output.name}.", suffix=PARTIAL, dir=place)
    except OSError as error:
        raise OutputError(f"cannot write beside {output}: {error.strerror}.") from error
    try:
        Path(made).chmod(0o755)
        yield Path(made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def put_in_place(made: Path, output: Path, *, overwrite: bool) -> None:
    """Flush a filled directory to the disk and give it its name, by one rename.

    A directory that it replaces is moved aside right before, looked at once more, and takes the
    name of `made` afterwards, under which `new_directory` removes it.

    Raises:
        OutputError: `output` must not be replaced, or the disk refuses.
    """
    with written(output):
        for file in made.rglob("*"):
            flush_to_disk(file)
        flush_to_disk(made)
        check_output(output, overwrite=overwrite)
        aside = output.with_name(f".{output.name}.{token_hex(4)}{REPLACED}")
        try:
            if output.is_dir() and any(output.iterdir()):  # the rename takes an empty one as it is
                output.rename(aside)
                _check_ours(aside, output)
            os.replace(made, output)
        except BaseException:
            if aside.exists() and not output.exists():
                aside.rename(output)
            raise
        with suppress(FileNotFoundError):
            aside.rename(made)
        flush_to_disk(output.parent)


def restore(output: Path) -> None:
    """Put back a directory that a run, killed between its two renames, left aside.

    Where `output` exists and is not empty the directory stays aside: nothing has replaced it.

    Raises:
        OutputError: the system refuses it.
    """
    with written(output):
        if output.is_symlink() or output.is_file() or (output.is_dir() and any(output.iterdir())):
            return
        pattern = f".{escape(output.name)}.????????{REPLACED}"
        asides = [path for path in output.parent.glob(pattern) if not path.is_symlink()]
        if asides:
            max(asides, key=lambda path: path.stat().st_ctime_ns).rename(output)
            log.warning("%s is back in its place: a killed run had moved it aside.", output)
