"""The whole page: one HTML file that fetches nothing and runs nothing."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from cerwu_gpu.report_page import words
from cerwu_gpu.report_page.layer_section import layer_section
from cerwu_gpu.report_page.layers import kinds, mean_gap
from cerwu_gpu.report_page.markup import Markup, join, tag
from cerwu_gpu.report_page.sections import (
    event_section,
    settings_section,
    size_section,
    time_section,
)
from cerwu_gpu.report_page.style import STYLE

FETCH_NOTHING = "default-src 'none'; style-src 'unsafe-inline'"
"""A browser is told to refuse whatever the page might ask for."""
TITLE = ": compression report"
"""End of the page's title, after the model's name."""


def page(report: Mapping[str, Any]) -> str:
    """The HTML of report.json's content."""
    name = _model_name(report)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=FETCH_NOTHING),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", f"{name}{TITLE}"),
        tag("style", Markup(STYLE)),
    )
    finished = report["finished"].replace("T", " ").replace("+00:00", " UTC")
    body = tag(
        "body",
        tag(
            "header",
            tag("h1", name),
            tag("p", f"compressed to {report['output']}, {finished}", class_="soft"),
        ),
        tag(
            "main",
            _tiles(report),
            size_section(report),
            layer_section(report),
            tag("div", time_section(report), event_section(report), class_="two"),
            settings_section(report),
        ),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def is_page(beginning: str) -> bool:
    """Return whether the first characters of a file are those of such a page."""
    return beginning.startswith("<!DOCTYPE html>") and f"{TITLE}</title>" in beginning


def _model_name(report: Mapping[str, Any]) -> str:
    model = report["model"]
    if model is None:
        return "A model in memory"
    return PurePath(model).name if PurePath(model).is_absolute() else str(model)


def _tiles(report: Mapping[str, Any]) -> Markup:
    own, original = report["directory_bytes"], report["original_bytes"]
    layers = report["layers"]
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    every = [place for kind in kinds(layers) for place in kind.places]
    gap = mean_gap(every)
    known = sum(place.limit is not None for place in every)
    events = len(report["events"])
    tiles = [
        ("size", words.size(own), f"{words.share(own / original)} of {words.size(original)}", ""),
        (
            "bits per quantized weight",
            f"{report['bits_per_weight']:.3f}",
            f"{words.count(weights)} weights, {words.plural(len(layers), 'matrix')}",
            "",
        ),
        (
            "above the theoretical limit",
            words.NONE if gap is None else f"{gap:.2f} bit",
            f"mean over {known} of {len(every)} weight tensors",
            "",
        ),
        ("time", words.duration(sum(report["seconds"].values())), report["machine"]["device"], ""),
        (
            "events",
            "none" if not events else str(events),
            "everything went as planned" if not events else "listed below",
            "warn" if events else "",
        ),
    ]
    return tag("div", join(*(_tile(*each) for each in tiles)), class_="tiles")


def _tile(what: str, value: str, more: str, kind: str) -> Markup:
    return tag(
        "div",
        tag("span", what),
        tag("b", value),
        tag("span", more),
        class_=f"tile {kind}".strip(),
    )
