"""A sample of what tests/fuzz/fuzz.py does 50,000 times, and that it would notice what is wrong."""

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from cerwu_gpu.container import reader
from cerwu_gpu.errors import FormatError
from tests.fuzz import fuzz

GOOD = {"detected", "harmless", "wrong weights"}


@pytest.mark.parametrize("kind", ["corners", "escapes-trellis", "trellis32", "grid", "sharded"])
def test_mutations_are_detected_or_do_no_harm(kind, tmp_path):
    subject = fuzz.Subject(kind, tmp_path)
    outcomes = {number: subject.outcome(number) for number in range(40)}
    assert {n: found for n, found in outcomes.items() if found[0] not in GOOD} == {}
    assert Counter(what for what, _ in outcomes.values())["detected"] > 20


def test_every_door_detects_them(tmp_path, capfd):
    """Each door meets eight accidents and eight attacks, some of them on config.json."""
    subject = fuzz.Subject("scalar", tmp_path, doors=tuple(fuzz.DOORS))
    assert subject.doors == list(fuzz.DOORS)
    outcomes = {number: subject.outcome(number) for number in range(16 * len(fuzz.DOORS))}
    good = GOOD | {"foreign"}
    assert {n: found for n, found in outcomes.items() if found[0] not in good} == {}
    counts = Counter(what for what, _ in outcomes.values())
    assert counts["detected"] > 40 > 10 > counts["foreign"]


def test_what_transformers_refuses_by_itself_is_told_apart(tmp_path, monkeypatch):
    subject = fuzz.Subject("scalar", tmp_path, doors=("from_pretrained",))
    (subject.path / "config.json").write_text("{")
    assert subject._read(False, "from_pretrained")[0] == "foreign"
    shutil.copy(fuzz.GOLDEN / "scalar" / "config.json", subject.path)
    assert subject._read(False, "from_pretrained")[0] == "harmless"
    monkeypatch.setattr(reader.CompressedDirectory, "plain", lambda self: 1 // 0)
    assert subject._read(False, "from_pretrained")[0] == "crash"


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_the_kernel_detects_what_the_reference_detects(tmp_path, monkeypatch):
    """And says the same, or gives the same weights."""
    subject = fuzz.Subject("corners", tmp_path, small=True)
    for number in range(1, 40, 2):
        monkeypatch.setenv("CERWU_GPU_BACKEND", "torch")
        expected = subject.outcome(number)
        monkeypatch.setenv("CERWU_GPU_BACKEND", "triton")
        assert subject.outcome(number) == expected
        assert expected[0] in GOOD | {"too large"}


def test_a_crash_is_counted_as_one(tmp_path, monkeypatch):
    subject = fuzz.Subject("corners", tmp_path)

    def crash(*arguments: object, **options: object) -> None:
        raise IndexError("out of range")

    monkeypatch.setattr(reader, "unpack_matrix", crash)
    number = next(n for n in range(1, 50, 2) if subject.outcome(n)[0] == "crash")
    tally = fuzz.Tally()
    tally.add("corners", number, *subject.outcome(number))
    assert tally.bad == [f"corners {number}: crash reader: IndexError: out of range"]


def test_an_error_without_a_name_is_counted_as_one(tmp_path, monkeypatch):
    subject = fuzz.Subject("corners", tmp_path)

    def unnamed(*arguments: object, **options: object) -> None:
        raise FormatError("something is wrong.")

    monkeypatch.setattr(fuzz, "open_directory", unnamed)
    assert subject.outcome(0) == ("unnamed", "something is wrong.")


def test_accidents_that_pass_unnoticed_are_counted(tmp_path, monkeypatch):
    """Without the checksums many a changed byte is another weight."""
    subject = fuzz.Subject("plain-ends", tmp_path)
    monkeypatch.setattr(reader, "_check_digest", lambda *arguments: None)
    assert "wrong weights by accident" in {subject.outcome(n)[0] for n in range(0, 60, 2)}


@pytest.mark.slow
def test_workers_run_apart():
    script = Path(fuzz.__file__)
    command = [sys.executable, script, "--mutations", "6", "--kinds", "corners"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("accidents: tried 3, detected ")
    assert "crash 0, hang 0, unnamed 0" in done.stdout
