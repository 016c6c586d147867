"""Outputs replace compressed models only, and stay apart from all that is read."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cerwu_gpu import files
from cerwu_gpu.container.output import (
    REPLACED,
    check_apart,
    check_output,
    foreign_content,
    new_directory,
    put_in_place,
)
from cerwu_gpu.container.writer import DirectoryWriter
from cerwu_gpu.errors import OutputError
from cerwu_gpu.files import flush_to_disk, write_text
from tests.test_cli_wrong_input import contents


def model(folder: Path, value: float = 0.0, shards: int = 1) -> Path:
    """Write a compressed directory that holds plain tensors only."""
    with DirectoryWriter(folder, generator="test", shard_bytes=16) as writer:
        for number in range(shards):
            writer.add_plain(f"norm{number}", torch.full((4,), value))
        writer.complete()
        writer.publish()
    return folder


def configured(folder: Path, method: str = "cerwu") -> None:
    content = {"quantization_config": {"quant_method": method}}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


OURS: dict[str, Callable[[Path], object]] = {
    "module": lambda folder: None,
    "language-model": configured,
    "companions": lambda folder: [
        (folder / name).write_text("{}", encoding="utf-8")
        for name in ("README.md", "LICENSE.txt", "tokenizer.json", "vocab.txt", "merges.txt")
    ],
    "damaged": lambda folder: (configured(folder), cut(folder / "model.safetensors")),
    "no-shard": lambda folder: (configured(folder), (folder / "model.safetensors").unlink()),
    "chat-templates": lambda folder: (
        (folder / "additional_chat_templates").mkdir(),
        (folder / "additional_chat_templates" / "tools.jinja").touch(),
    ),
}
"""Changes after which a directory still is a compressed model and nothing else."""


@pytest.mark.parametrize("kind", OURS)
def test_a_compressed_model_is_replaced_on_request(kind: str, tmp_path: Path) -> None:
    output = model(tmp_path / "out")
    OURS[kind](output)
    with pytest.raises(OutputError, match=r"not empty: choose another or pass --overwrite"):
        check_output(output, overwrite=False)
    with new_directory(output, overwrite=True) as made:
        (made / "new").write_text("new", encoding="utf-8")
        put_in_place(made, output, overwrite=True)
    assert contents(tmp_path) == {"out": None, "out/new": b"new"}


def test_a_model_in_several_files_is_replaced_on_request(tmp_path: Path) -> None:
    output = model(tmp_path / "out", shards=3)
    assert len(list(output.glob("model-*-of-00003.safetensors"))) == 3
    check_output(output, overwrite=True)


def test_an_empty_directory_may_be_the_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    check_output(tmp_path / "out", overwrite=False)


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "notes": (lambda folder: (folder / "notes.txt").touch(), "'notes.txt'"),
    "folder": (lambda folder: (folder / "photos").mkdir(), "'photos'"),
    "repository": (lambda folder: (folder / ".git").mkdir(), "'.git'"),
    "hidden": (lambda folder: (folder / ".env").touch(), "'.env'"),
    "adapter": (
        lambda folder: save_file({"a": torch.ones(2)}, folder / "adapter_model.safetensors"),
        "'adapter_model.safetensors'",
    ),
    "dense-weights": (
        lambda folder: (
            configured(folder),
            save_file({"a": torch.ones(2)}, folder / "model.safetensors"),
        ),
        "'model.safetensors', which has no cerwu manifest",
    ),
    "dense-shard": (
        lambda folder: save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors"),
        "'model-00001-of-00002.safetensors', which has no cerwu manifest",
    ),
    "folder-in-templates": (
        lambda folder: (folder / "additional_chat_templates" / "mine").mkdir(parents=True),
        "'additional_chat_templates/mine'",
    ),
    "folder-with-a-known-name": (lambda folder: (folder / "LICENSES").mkdir(), "'LICENSES'"),
    "broken-link": (lambda folder: (folder / "vocab.json").symlink_to("nowhere"), "'vocab.json'"),
    "another-method": (
        lambda folder: ((folder / "model.safetensors").unlink(), configured(folder, "gptq")),
        "is no compressed model",
    ),
    "unreadable-alone": (
        lambda folder: cut(folder / "model.safetensors"),
        "is no compressed model",
    ),
    "tokenizer-alone": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "tokenizer.json").touch(),
        ),
        "is no compressed model",
    ),
}
"""Changes after which a directory is never replaced, and the words of the refusal."""


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", FOREIGN)
def test_anything_else_is_never_replaced(kind: str, overwrite: bool, tmp_path: Path) -> None:
    output = model(tmp_path / "out")
    change, part = FOREIGN[kind]
    change(output)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="not empty") as refusal:
        check_output(output, overwrite=overwrite)
    assert part in str(refusal.value)
    with (
        pytest.raises(OutputError, match="not empty"),
        DirectoryWriter(output, generator="test", overwrite=overwrite),
    ):
        pass
    assert contents(tmp_path) == before


def test_what_came_into_the_output_while_a_run_worked_stays(tmp_path: Path) -> None:
    output = model(tmp_path / "out")
    with (
        pytest.raises(OutputError, match=r"notes\.txt"),
        new_directory(output, overwrite=True) as made,
    ):
        (output / "notes.txt").write_text("mine", encoding="utf-8")
        before = contents(output)
        put_in_place(made, output, overwrite=True)
    assert contents(output) == before


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_failure_between_the_two_renames_puts_the_old_one_back(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = model(tmp_path / "out")
    before = contents(tmp_path)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("cerwu_gpu.files.os.replace", fail)
    with (
        pytest.raises((OutputError, KeyboardInterrupt)),
        new_directory(output, overwrite=True) as made,
    ):
        put_in_place(made, output, overwrite=True)
    assert contents(tmp_path) == before


def moved_aside(output: Path, value: float = 0.0) -> Path:
    """Make the directory that a run leaves when it is killed between the two renames."""
    return model(output.with_name(f".{output.name}.0123abcd{REPLACED}"), value)


def test_what_a_run_killed_between_the_two_renames_moved_aside_goes_back(tmp_path: Path) -> None:
    """Before anything else is done, and so before anything is read or computed."""
    aside = moved_aside(tmp_path / "out[1]")
    before = contents(aside)
    with pytest.raises(OutputError, match="not empty"):
        check_output(tmp_path / "out[1]", overwrite=False)
    assert contents(tmp_path / "out[1]") == before
    assert not aside.exists()


def test_an_empty_directory_does_not_hide_what_was_moved_aside(tmp_path: Path) -> None:
    """Scripts begin by making their output directory."""
    output = tmp_path / "out"
    before = contents(moved_aside(output))
    output.mkdir()
    with pytest.raises(OutputError, match="not empty"):
        check_output(output, overwrite=False)
    assert contents(output) == before


def test_the_last_of_several_goes_back(tmp_path: Path) -> None:
    for name, value in (("ffffffff", 1.0), ("00000000", 2.0), ("88888888", 3.0)):
        aside = model(tmp_path / name, value)
        aside.rename(tmp_path / f".out.{name}{REPLACED}")
    latest = contents(tmp_path / f".out.88888888{REPLACED}")
    with pytest.raises(OutputError, match="not empty"):
        check_output(tmp_path / "out", overwrite=False)
    assert contents(tmp_path / "out") == latest


def test_what_was_moved_aside_is_kept_where_something_else_has_its_place(tmp_path: Path) -> None:
    output = tmp_path / "out"
    model(output, value=1.0)
    before = contents(moved_aside(output))
    with new_directory(output, overwrite=True) as made:
        (made / "new").touch()
        put_in_place(made, output, overwrite=True)
    assert contents(tmp_path / f".out.0123abcd{REPLACED}") == before


def test_a_replaced_directory_never_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it could not be removed."""
    output = model(tmp_path / "out")
    monkeypatch.setattr("cerwu_gpu.container.output.shutil.rmtree", lambda *_, **__: None)
    with new_directory(output, overwrite=True) as made:
        put_in_place(made, output, overwrite=True)
    monkeypatch.undo()
    output.rmdir()
    check_output(output, overwrite=False)
    assert not output.exists()


BACKUPS = (".out.20240101.old", ".out.backup", f".outer.0123abcd{REPLACED}", f"out.0123{REPLACED}")


def test_a_backup_beside_the_output_is_not_touched(tmp_path: Path) -> None:
    for name in BACKUPS:
        model(tmp_path / name)
    (tmp_path / f".out.0123abcd{REPLACED}").symlink_to(tmp_path / BACKUPS[0])
    before = contents(tmp_path)
    with new_directory(tmp_path / "out", overwrite=True):
        pass
    assert contents(tmp_path) == before


@pytest.mark.parametrize("empty", [True, False])
def test_what_arrives_in_the_last_moment_stays(
    empty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last check and before the rename."""
    output = tmp_path / "out"
    output.mkdir() if empty else model(output)
    rename, replace = Path.rename, os.replace

    def late(move: Callable[..., object]) -> Callable[..., object]:
        def moved(*places: Path) -> object:
            if output.is_dir():
                (output / "notes.txt").write_text("mine", encoding="utf-8")
            return move(*places)

        return moved

    with (
        pytest.raises(OutputError, match="not empty"),
        new_directory(output, overwrite=True) as made,
    ):
        monkeypatch.setattr(Path, "rename", late(rename))
        monkeypatch.setattr("cerwu_gpu.files.os.replace", late(replace))
        put_in_place(made, output, overwrite=True)
    assert (output / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


NAMES = st.lists(st.sampled_from("ab"), min_size=1, max_size=4)


@given(written=NAMES, read=NAMES, exists=st.booleans())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_places_must_not_contain_each_other(
    written: list[str], read: list[str], exists: bool, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    output, source = tmp_path.joinpath(*written), tmp_path.joinpath(*read)
    if exists:
        source.mkdir(parents=True)
    shorter = min(len(written), len(read))
    if written[:shorter] == read[:shorter]:
        with pytest.raises(OutputError, match=r"the result .* the source|the source .* the result"):
            check_apart({"the result": output}, {"the source": source})
    else:
        check_apart({"the result": output}, {"the source": source})


def test_links_are_resolved_on_both_sides(tmp_path: Path) -> None:
    """In the output's path, in the source's path, and in the source."""
    real = tmp_path / "real"
    (real / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to(real)
    for output in (tmp_path / "link" / "model" / "out", tmp_path / "link"):
        with pytest.raises(OutputError, match="lies in"):
            check_apart({"the output": output}, {"the model": real / "model"})
    with pytest.raises(OutputError, match="is the model"):
        check_apart({"the output": real / "model"}, {"the model": tmp_path / "link" / "model"})
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (blobs / "1f").touch()
    (real / "model" / "model.safetensors").symlink_to(blobs / "1f")
    with pytest.raises(OutputError, match=r"the model .*1f lies in the output .*blobs"):
        check_apart({"the output": blobs}, {"the model": real / "model"})
    with pytest.raises(OutputError, match=r"the model .*link lies in the output"):
        (tmp_path / "around").mkdir()
        (tmp_path / "around" / "link").symlink_to(real / "model")
        check_apart({"the output": tmp_path / "around"}, {"the model": tmp_path / "around/link"})


def test_below_what_a_linked_directory_holds_nothing_is_read(tmp_path: Path) -> None:
    """A model with a link `runs` to a large disk does not claim the whole disk."""
    (tmp_path / "disk" / "runs").mkdir(parents=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "runs").symlink_to(tmp_path / "disk")
    (tmp_path / "model" / "loop").symlink_to(tmp_path / "model" / "loop")
    check_apart({"the output": tmp_path / "disk" / "runs"}, {"the model": tmp_path / "model"})
    for output in (tmp_path / "disk", tmp_path):
        with pytest.raises(OutputError, match="lies in the output"):
            check_apart({"the output": output}, {"the model": tmp_path / "model"})


def test_names_of_something_elsewhere_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    read = {"the model": "owner/name", "the text": "wikitext2", "the cache": None, "x": "~nobody/y"}
    check_apart({"the output": tmp_path / "owner" / "name"}, read)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(OutputError, match="is the model"):
        check_apart({"the output": tmp_path / "owner" / "name"}, read)


def test_a_text_appears_whole_and_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "private").write_text("mine", encoding="utf-8")
    (tmp_path / "report.json").symlink_to(tmp_path / "private")
    write_text(tmp_path / "report.json", "{}")
    assert contents(tmp_path) == {"private": b"mine", "report.json": b"{}"}


def test_a_text_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cerwu_gpu.files.os.fsync", full)
    with pytest.raises(OutputError, match=r"report\.json .*free some space"):
        write_text(tmp_path / "report.json", "{}")
    assert contents(tmp_path) == {}


def test_a_directory_is_not_flushed_where_the_system_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(files.os, "fsync", flushed.append)
    flush_to_disk(tmp_path)
    assert flushed == []
    (tmp_path / "file").touch()
    flush_to_disk(tmp_path / "file")
    assert len(flushed) == 1


def test_a_temporary_file_of_a_killed_run_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process numbers come again, in containers after every start."""

    def killed(*_: object) -> None:
        raise SystemExit

    for _ in range(3):
        monkeypatch.setattr("cerwu_gpu.files.os.replace", killed)
        monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(SystemExit):
            write_text(tmp_path / "report.json", "{}")
        monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 3
    write_text(tmp_path / "report.json", "{}")


def test_what_a_run_writes_is_known(compressed: tuple[Path, object]) -> None:
    assert foreign_content(compressed[0]) is None
