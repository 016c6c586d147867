"""A page that compares compressed directories: sizes, qualities, and bits and losses by layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from cerwu_gpu.report_page.charts import HEIGHT, WIDTH, Axes
from cerwu_gpu.report_page.layers import Kind, kinds
from cerwu_gpu.report_page.page import environment, is_page
from cerwu_gpu.report_page.scatter import BOTTOM, LEFT, RIGHT, TOP, scatter
from cerwu_gpu.report_page.scatter import HEIGHT as PLOT_HEIGHT
from cerwu_gpu.report_page.scatter import WIDTH as PLOT_WIDTH

TITLE = ": comparison of compressed models"
"""End of the page's title, after the models' names."""
QUALITIES = {
    "perplexity": "perplexity",
    "kl_divergence": "KL divergence, nats,",
    "accuracy": "accuracy",
}
"""Numbers of an evaluation that are drawn over the size -> their words."""


@dataclass(frozen=True)
class Compared:
    """One compressed directory.

    Attributes:
        name: of the directory.
        report: content of its report.json.
        evaluation: content of its eval.json (`cerwu-gpu eval --json`); None: it has none.
    """

    name: str
    report: Mapping[str, Any]
    evaluation: Mapping[str, Any] | None

    def number(self, name: str) -> float | None:
        """Return a number of the evaluation; None where it was not measured."""
        value = None if self.evaluation is None else self.evaluation.get(name)
        return None if value is None else float(value)


def comparison(directories: Sequence[Compared]) -> str:
    """Return the HTML of the comparison; every value of it is escaped."""
    names = [one.name for one in directories]
    sizes = [int(one.report["directory_bytes"]) for one in directories]
    groups = [{kind.name: kind for kind in kinds(one.report["layers"])} for one in directories]
    rows: dict[str, list[Kind | None]] = {
        name: [group.get(name) for group in groups] for name in chain.from_iterable(groups)
    }
    plots = [
        scatter(words, names, sizes, [one.number(quality) for one in directories])
        for quality, words in QUALITIES.items()
    ]
    return (
        environment()
        .get_template("comparison.html.jinja")
        .render(
            title=TITLE,
            directories=directories,
            rows=rows,
            axes=Axes.around(chain.from_iterable(group.values() for group in groups)),
            chart=(WIDTH, HEIGHT),
            frame=(LEFT, PLOT_WIDTH - RIGHT, TOP, PLOT_HEIGHT - BOTTOM),
            plot_size=(PLOT_WIDTH, PLOT_HEIGHT),
            plots=[plot for plot in plots if plot is not None],
            texts=sorted(set(chain.from_iterable(_text(one) for one in directories))),
        )
    )


def _text(one: Compared) -> list[str]:
    """Return what the evaluation was measured on, if there was a text."""
    evaluation = one.evaluation or {}
    if evaluation.get("text") is None:
        return []
    return [f"{evaluation['text']}, windows of {evaluation.get('context_length')} tokens"]


def is_comparison(beginning: str) -> bool:
    """Return whether the first characters of a file are those of such a page."""
    return is_page(beginning, TITLE)
