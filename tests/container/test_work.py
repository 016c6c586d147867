"""Work directories: only one that carries our marker is ever cleared."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from cerwu_gpu.container.output import REPLACED, check_output
from cerwu_gpu.container.work import MARKER, MARKER_FILE, work_directory, work_path
from cerwu_gpu.errors import ConfigError, OutputError
from tests.container.test_output import model
from tests.test_cli_wrong_input import contents


def filled(folder: Path) -> Path:
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work", encoding="utf-8")
    return folder


def look_alike(work: Path, text: str) -> None:
    filled(work)
    (work / MARKER_FILE).write_text(text, encoding="utf-8")


FOREIGN: dict[str, Callable[[Path], object]] = {
    "directory": filled,
    "file": lambda work: work.write_text("mine", encoding="utf-8"),
    "link": lambda work: work.symlink_to(filled(work.parent / "elsewhere")),
    "link-to-an-empty-one": lambda work: (
        (work.parent / "elsewhere").mkdir(),
        work.symlink_to(work.parent / "elsewhere"),
    ),
    "broken-link": lambda work: work.symlink_to("nowhere"),
    "another-lock": lambda work: (filled(work), (work / "lock").touch()),
    "another-marker": lambda work: look_alike(work, "something else\n"),
    "empty-marker": lambda work: look_alike(work, ""),
    "linked-marker": lambda work: (
        (work.parent / "marker").write_text(MARKER, encoding="utf-8"),
        filled(work),
        (work / MARKER_FILE).symlink_to(work.parent / "marker"),
    ),
}


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_ours_is_refused_and_kept(kind: str, restart: bool, tmp_path: Path) -> None:
    FOREIGN[kind](work_path(tmp_path / "out"))
    before = contents(tmp_path)
    with (
        pytest.raises(OutputError, match=r"\.out\.work.*holds something else.*move it away"),
        work_directory(tmp_path / "out", restart=restart),
    ):
        pass
    assert contents(tmp_path) == before


def test_an_empty_one_is_taken(tmp_path: Path) -> None:
    work_path(tmp_path / "out").mkdir()
    with work_directory(tmp_path / "out") as work:
        assert (work.path / MARKER_FILE).read_text(encoding="utf-8") == MARKER
    assert contents(tmp_path) == {}


def test_ours_is_cleared_with_its_links_but_not_what_they_lead_to(tmp_path: Path) -> None:
    elsewhere = filled(tmp_path / "elsewhere")
    with pytest.raises(KeyboardInterrupt), work_directory(tmp_path / "out") as work:
        work.begin({"lmbda": "1"})
        (work.path / "lmbda-1" / "block-00000").mkdir(parents=True)
        (work.path / "lmbda-1" / "link").symlink_to(elsewhere)
        (work.path / "link.partial").symlink_to(elsewhere)
        raise KeyboardInterrupt
    assert work_path(tmp_path / "out").is_dir()
    with work_directory(tmp_path / "out", restart=True):
        pass
    assert contents(tmp_path) == {"elsewhere": None, "elsewhere/thesis.tex": b"years of work"}


@pytest.mark.parametrize("way", ["again", "restart", "error", "removed by hand"])
def test_dropping_the_work_never_drops_the_old_output(way: str, tmp_path: Path) -> None:
    """A run is killed after it moved the old output aside, which nothing has replaced yet."""
    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), work_directory(output) as work:
        work.begin({"lmbda": "1"})
        (work.path / "lmbda-1" / "block-00000").mkdir(parents=True)
        before = contents(model(tmp_path / f".out.0123abcd{REPLACED}"))
        raise KeyboardInterrupt
    if way == "removed by hand":
        shutil.rmtree(work.path)
    with (
        pytest.raises(ConfigError) if way == "error" else nullcontext(),
        work_directory(output, restart=way == "restart"),
    ):
        if way == "error":
            raise ConfigError("wrong")
    with pytest.raises(OutputError, match="not empty"):
        check_output(output, overwrite=False)
    assert contents(output) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_runs_that_begin_and_end_together_never_take_each_other_for_strangers(
    tmp_path: Path,
) -> None:
    """Each of them either has the directory or is told of the other."""

    def run(_: int) -> bool:
        try:
            with work_directory(tmp_path / "out") as work:
                (work.path / "block").mkdir()
                (work.path / "block").rmdir()
                return True
        except OutputError as error:
            assert "another process" in str(error)
            return False

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(run, range(400)))
    assert any(results)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("step", ["unlink", "rename", "rmdir"])
def test_an_interrupt_of_the_last_step_leaves_nothing(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes right after the system has done its part."""
    done = getattr(Path, step)
    interrupts = iter([KeyboardInterrupt])

    def interrupted(path: Path, *arguments: Any, **options: Any) -> Any:
        result = done(path, *arguments, **options)
        for interrupt in interrupts:
            raise interrupt
        return result

    with pytest.raises(KeyboardInterrupt), work_directory(tmp_path / "out") as work:
        work.begin({"lmbda": "1"})
        monkeypatch.setattr(Path, step, interrupted)
    assert contents(tmp_path) == {}
