"""The table of docs/scaling.md is what its script prints."""

from pathlib import Path

from scripts.scaling_table import CONFIGS, RANKS, lines

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_of_the_document_is_that_of_the_script() -> None:
    table = list(lines())
    assert len(table) == 2 + len(CONFIGS) * len(RANKS)
    assert "\n".join(table) in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
