"""scripts/serving.py and benchmark_resident.py: what they compare, and when they fail."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cerwu_gpu.container.reader import open_directory

ROOT = Path(__file__).resolve().parents[2]
SMALL = ROOT / "tests" / "golden" / "scalar"
with pytest.MonkeyPatch.context() as patch:
    # The scripts put the checkout in place of their own folder, the first entry.
    patch.setattr(sys, "path", [str(ROOT), *sys.path])
    serving = importlib.import_module("scripts.serving")
    patch.setattr(sys, "path", [str(ROOT), *sys.path])
    resident = importlib.import_module("scripts.benchmark_resident")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, 0),
        ({"resident_peak": 1.2}, 0),
        ({"resident_peak": 1.3}, 1),
        ({"anonymous_peak": 1.3}, 1),
        ({"tokens": [[2]] * serving.PROMPTS}, 1),
        ({"tokens": [[2], *[[1]] * (serving.PROMPTS - 1)]}, 1),
    ],
    ids=["the same", "a little more", "more", "more of its own", "other texts", "another text"],
)
def test_more_memory_or_other_tokens_are_a_failure(
    changed: dict[str, Any],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = {"load_seconds": 2.0, "tokens_per_second": 30.0, "anonymous_before": 0}
    row |= {"resident_peak": 1.0, "anonymous_peak": 1.0, "anonymous_after": 3e6}
    asked = []

    def measured(form: str, folder: Path) -> dict[str, Any]:
        asked.append(form)
        assert (form == "dense") == ((folder / "config.json").read_text().count("cerwu") == 0)
        same = {"tokens": [[1]] * serving.PROMPTS, "texts": ["a"]}
        return {"form": form, **row, **same, **({} if form == "dense" else changed)}

    monkeypatch.setattr(serving, "in_fresh_process", measured)
    monkeypatch.setattr(sys, "argv", ["serving", str(SMALL), "--json", str(tmp_path / "json")])
    assert serving.main() == expected
    assert asked == list(serving.FORMS)
    assert json.loads((tmp_path / "json").read_text())["equal"][0] == serving.PROMPTS
    assert "| decoded at load | 2.0 | " in capsys.readouterr().out


def test_the_pace_is_compared_with_the_decoder(
    compressed: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(resident, "in_fresh_process", resident.measure)
    monkeypatch.setattr(resident, "PROMPT_TOKENS", 8)
    command = ["resident", str(compressed[0]), "--tokens", "2", "--json", str(tmp_path / "json")]
    monkeypatch.setattr(sys, "argv", command)
    code = resident.main()
    row = json.loads((tmp_path / "json").read_text())["ways"][-1]
    bound = 1e6 * row["million_symbols_per_second"] / row["block_weights"]
    assert row["share_of_bound"] == pytest.approx(row["tokens_per_second"] / bound)
    assert code == int(row["share_of_bound"] < resident.BAR)
    assert "| compressed | " in capsys.readouterr().out
    entries = open_directory(compressed[0]).compressed()
    inside = [entry.weights for name, entry in entries.items() if ".layers." in name]
    assert row["block_weights"] == sum(inside)
