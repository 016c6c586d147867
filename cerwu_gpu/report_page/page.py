"""The whole page: one HTML file that fetches nothing and runs nothing, from page.html.jinja."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from itertools import chain
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from cerwu_gpu import quantities
from cerwu_gpu.report import PURPOSES, WORDS, Stage
from cerwu_gpu.report_page.charts import HEIGHT, WIDTH, Axes, stacked
from cerwu_gpu.report_page.layers import kinds, mean_gap

TITLE = ": compression report"
"""End of the page's title, after the model's name."""
TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template")
"""Beginnings of the names of a tokenizer's files."""
FILES = {"tokenizer": "as it came", "other files": "configuration, licence, model card"}
"""Files beside the tensors -> what they are; those of a tokenizer, and all others."""
STAGE_WORDS: dict[Stage, str] = {
    "load": "load the model",
    "calibrate": "calibrate: inputs and their Hessians",
    "sensitivity": "sensitivities: one backward pass",
    "distill": "norms, biases and row scales tuned toward the original",
    "target": "search for the target",
    "quantize": "quantize",
    "code": "wait for the entropy coder",
    "write": "write the files",
    "verify": "verify: decode everything once",
    "decode": "decode",
    "evaluate": "perplexity for the model card",
}
FILTERS = (
    *(quantities.size, quantities.share, quantities.duration),
    *(quantities.count, quantities.decimals, quantities.plural),
)
"""Functions that the template uses under their names."""


def environment() -> Environment:
    """Return the environment of the templates, which escapes every value."""
    made = Environment(
        loader=PackageLoader("cerwu_gpu", "report_page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {function.__name__: function for function in FILTERS}
    return made


def page(report: Mapping[str, Any]) -> str:
    """Return the HTML of report.json's content; every value of it is escaped."""
    explained = {purpose.name: purpose.explanation for purpose in PURPOSES} | FILES
    groups = kinds(report["layers"])
    places = list(chain.from_iterable(kind.places for kind in groups))
    parts = _by_purpose(report["bytes"], explained)
    reasons = defaultdict(list)
    for tensor, reason in report["left"].items():
        reasons[reason].append(tensor)
    return (
        environment()
        .get_template("page.html.jinja")
        .render(
            report=report,
            title=TITLE,
            name=_model_name(report),
            finished=report["finished"].replace("T", " ").replace("+00:00", " UTC"),
            weights=sum(rows * columns for rows, columns in (x["shape"] for x in report["layers"])),
            seconds=sum(report["seconds"].values()),
            kinds=groups,
            places=places,
            gap=mean_gap(places),
            limits=sum(place.limit is not None for place in places),
            axes=Axes.around(groups),
            chart=(WIDTH, HEIGHT),
            parts=parts,
            beside={what: amount for what, amount in parts.items() if what != WORDS},
            explained=explained,
            colours={what: f"c{index}" for index, what in enumerate(explained)},
            stacked=stacked,
            stage_words=STAGE_WORDS,
            reasons=sorted(reasons.items()),
        )
    )


def is_page(beginning: str, title: str = TITLE) -> bool:
    """Return whether the first characters of a file are those of a page whose title ends so."""
    return beginning.startswith("<!DOCTYPE html>") and f"{title}</title>" in beginning


def _model_name(report: Mapping[str, Any]) -> str:
    model = report["model"]
    if model is None:
        return "A model in memory"
    return PurePath(model).name if PurePath(model).is_absolute() else str(model)


def _by_purpose(taken: Mapping[str, int], explained: Mapping[str, str]) -> dict[str, int]:
    """Return bytes by the names in `explained`, largest first; files are gathered as in FILES."""
    amounts: Counter[str] = Counter()
    for name, amount in taken.items():
        file = "tokenizer" if name.startswith(TOKENIZER) else "other files"
        amounts[name if name in explained else file] += amount
    return dict(amounts.most_common())
