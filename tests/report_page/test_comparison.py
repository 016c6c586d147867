"""The page that compares directories, and the command that writes it."""

import json
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cerwu_gpu.report_page.comparison import Compared, comparison, is_comparison
from cerwu_gpu.report_page.scatter import HEIGHT, WIDTH, scatter
from tests.report_page.reports import REPORT

EVALUATION = {
    "perplexity": 14.25,
    "original_perplexity": 12.5,
    "kl_divergence": 0.125,
    "top1_agreement": 0.75,
    "text": "wikitext2",
    "context_length": 512,
}


def report_of(size: int, words: int) -> dict[str, Any]:
    """A report of a directory of this size, whose matrices have this number of bytes of words."""
    report = deepcopy(REPORT)
    report["directory_bytes"] = size
    for layer in report["layers"]:
        layer["words_bytes"] = words
    return report


def compared(name: str, size: int, words: int, **changes: Any) -> Compared:
    return Compared(name, report_of(size, words), {**EVALUATION, **changes})


class Circles(HTMLParser):
    """Collects the attributes of circles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.circles: list[dict[str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "circle":
            self.circles.append(dict(attrs))


def test_sizes_and_qualities_stand_side_by_side() -> None:
    html = comparison(
        [compared("small", 40_000, 500), compared("large", 68_000, 900, perplexity=13.0)]
    )
    assert is_comparison(html[:4096])
    for text in ("40,000", "68,000", "14.250", "13.000", "12.500", "0.1250", "75.0 %"):
        assert text in html
    circles = Circles(html).circles
    assert [circle["class"] for circle in circles] == ["c0", "c1"] * 2  # perplexity and KL
    left, right = (float(str(circle["cx"])) for circle in circles[:2])
    assert left < right
    upper, lower = (float(str(circle["cy"])) for circle in circles[:2])
    assert upper < lower  # a smaller perplexity lies below
    assert (
        html.count('class="column"') == 2 * 7
    )  # four matrices, a tensor of experts in 2 blocks, a head


def test_a_directory_without_an_evaluation_has_dashes_and_no_point() -> None:
    html = comparison(
        [compared("small", 40_000, 500), Compared("bare", report_of(50_000, 600), None)]
    )
    assert len(Circles(html).circles) == 2
    assert "50,000" in html
    alone = comparison([Compared("bare", report_of(50_000, 600), None)])
    assert not Circles(alone).circles and "No directory has an evaluation" in alone


def test_different_texts_are_pointed_out() -> None:
    same = comparison([compared("a", 40_000, 500), compared("b", 50_000, 600)])
    assert "cannot be compared" not in same
    other = comparison([compared("a", 40_000, 500), compared("b", 50_000, 600, text="stories.txt")])
    assert "cannot be compared" in other


def test_names_are_escaped() -> None:
    html = comparison([compared("<script>alert(1)</script>", 40_000, 500)])
    assert "<script" not in html and "&lt;script&gt;" in html


@given(
    st.lists(
        st.tuples(
            st.integers(1, 10**13), st.none() | st.floats(1e-9, 1e12) | st.just(float("inf"))
        ),
        min_size=1,
        max_size=6,
    )
)
def test_points_lie_inside_the_plot(pairs: list[tuple[int, float | None]]) -> None:
    sizes, values = [size for size, _ in pairs], [value for _, value in pairs]
    plot = scatter("quality", [str(i) for i in range(len(pairs))], sizes, values)
    known = [value for value in values if value is not None and value != float("inf")]
    if plot is None:
        assert not known
        return
    assert len(plot.points) == len(known)
    for point in plot.points:
        assert 0 < point.x < WIDTH and 0 < point.y < HEIGHT
    assert len(plot.rows) <= 8 and len(plot.columns) <= 8


def write(folder: Path, name: str, report: Any, evaluation: Any = None) -> Path:
    (folder / name).mkdir()
    (folder / f"{name}.report.json").write_text(json.dumps(report), encoding="utf-8")
    if evaluation is not None:
        (folder / f"{name}.eval.json").write_text(json.dumps(evaluation), encoding="utf-8")
    return folder / name


def test_the_command_reads_what_lies_beside(tmp_path: Path, command: Any) -> None:
    small = write(tmp_path, "small", report_of(40_000, 500), EVALUATION)
    large = write(tmp_path, "large", report_of(68_000, 900))
    page = tmp_path / "page.html"
    assert command("compare", small, f"{large}/", "-o", page)[0] == 0
    html = page.read_text(encoding="utf-8")
    assert "small, large" in html and len(Circles(html).circles) == 2
    assert command("compare", small, "-o", page)[0] == 0  # its like is replaced
    assert "large" not in page.read_text(encoding="utf-8")


def test_the_command_refuses_in_one_sentence(tmp_path: Path, command: Any) -> None:
    small = write(tmp_path, "small", report_of(40_000, 500))
    (tmp_path / "bare").mkdir()
    code, _, err = command("compare", tmp_path / "bare", "-o", tmp_path / "page.html")
    assert code == 2 and "bare.report.json is missing" in err
    mine = tmp_path / "mine.html"
    mine.write_text("my page", encoding="utf-8")
    code, _, err = command("compare", small, "-o", mine)
    assert (
        code == 2 and "would be replaced" in err and mine.read_text(encoding="utf-8") == "my page"
    )
    code, _, err = command("compare", small, "-o", small / "page.html")
    assert code == 2 and not (small / "page.html").exists()
    (tmp_path / "small.eval.json").write_text("[]", encoding="utf-8")
    code, _, err = command("compare", small, "-o", tmp_path / "page.html")
    assert code == 2 and "holds no JSON object" in err
