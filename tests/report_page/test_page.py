"""The page: well formed, complete, and without anything that a browser would fetch or run."""

import copy
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cerwu_gpu.report import PURPOSES, STAGES
from cerwu_gpu.report_page.layers import kind_and_block, kinds
from cerwu_gpu.report_page.page import is_page, page
from tests.report_page.reports import REPORT

FETCHING = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background"}
PIECES = ("<b>", "</p>", "<!--", "&lt;", "&", '"', "'", "x")


class Reading(HTMLParser):
    """Collects elements and text, and fails where a tag does not close the last open one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data


@pytest.fixture(scope="module")
def read() -> Reading:
    return Reading(page(REPORT))


def test_nothing_is_fetched_and_nothing_runs(read: Reading) -> None:
    for name, attributes in read.elements:
        assert name not in ("script", "link", "iframe", "img", "object", "embed", "base", "form")
        assert not FETCHING & attributes.keys()
        assert not [key for key in attributes if key.startswith("on")]
    text = page(REPORT)
    assert "http" not in text.replace("http-equiv", "")
    assert "url(" not in text
    assert "@import" not in text
    policies = [a for _, a in read.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert [p["content"] for p in policies] == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_every_drawing_has_words_for_those_who_do_not_see_it(read: Reading) -> None:
    drawings = [attributes for name, attributes in read.elements if name == "svg"]
    assert len(drawings) == 3 + 3 * 4 + len(REPORT["seconds"])
    assert all(each["role"] == "img" and each["aria-label"] for each in drawings)
    assert ("html", {"lang": "en"}) in read.elements


def test_its_figures_are_those_of_the_report(read: Reading) -> None:
    for piece in (
        "54.0 kB",  # the directory
        "27.0 % of 200.0 kB",
        "3.512",  # bits per quantized weight
        "2 min 05 s",
        "self_attn.q_proj",
        "lm_head",
        "model.layers.1.mlp.up_proj.weight: needed more damping",
        "a router: 1 tensor",
        "cerwu-gpu compress toy -o small --lmbda 1e-06",
        "CompressionConfig(lmbda=1e-06)",
        "limit_columns",
    ):
        assert piece in read.text, piece
    for what, count in REPORT["bytes"].items():
        if not what.endswith(".json"):
            assert f"{what}" in read.text
            assert f"{count:,} bytes" in read.text


def test_hostile_names_stay_text() -> None:
    report: Any = copy.deepcopy(REPORT)
    evil = '<script>alert("x")</script>'
    report["model"] = report["command"] = report["output"] = evil
    report["layers"][0]["name"] = f'model.layers.0."><img src=x onerror=y>{evil}.weight'
    report["events"], report["left"] = [evil], {evil: evil}
    report["settings"]["calibration"] = evil
    text = page(report)
    Reading(text)
    assert "<script" not in text
    assert "<img" not in text
    assert text.count("&lt;script&gt;") >= 7


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [], "bytes": {}, "seconds": {}, "bits_per_weight": 0.0},
        {"events": [], "left": {}, "model": None, "command": None},
    ],
    ids=["nothing", "from memory"],
)
def test_little_to_say_is_said(change: dict[str, Any]) -> None:
    Reading(page({**REPORT, **change}))


def test_what_was_not_computed_is_a_dash() -> None:
    report: Any = copy.deepcopy(REPORT)
    for layer in report["layers"]:
        layer["limit_bits"] = layer["relative_loss"] = None
    read = Reading(page(report))
    assert "mean over 0 of 7 weight tensors" in read.text
    assert "None" not in read.text.split("All settings")[0].replace("None: everything", "")


def test_kinds_gather_blocks_and_experts() -> None:
    found = {kind.name: kind for kind in kinds(REPORT["layers"])}
    assert list(found) == ["self_attn.q_proj", "mlp.up_proj", "mlp.experts", "lm_head"]
    assert [place.block for place in found["mlp.up_proj"].places] == [0, 1]
    (first, _) = found["mlp.experts"].places
    assert first.weights == 2 * 40 * 50
    assert first.bytes == 2 * 700 + 2 * 100
    assert first.limit == pytest.approx((3.0 + 1.0) / 2)
    assert first.gap == pytest.approx(8 * 1600 / 4000 - 2.0)


@pytest.mark.parametrize(
    ("name", "kind", "block"),
    [
        ("model.layers.7.mlp.up_proj.weight", "mlp.up_proj", 7),
        ("transformer.h.11.attn.c_attn.weight", "attn.c_attn", 11),
        ("layer2.3.conv1.weight", "layer2.*.conv1", 3),
        ("0.weight", "*", 0),
        ("lm_head.weight", "lm_head", None),
        ("model.layers.0.mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj", 0),
    ],
)
def test_the_kind_is_the_name_without_the_block(name: str, kind: str, block: int | None) -> None:
    assert kind_and_block(name) == (kind, block)


@settings(max_examples=50, deadline=None)
@given(*2 * [st.text() | st.lists(st.sampled_from(PIECES)).map("".join)])
def test_any_text_comes_through(text: str, name: str) -> None:
    report: Any = copy.deepcopy(REPORT)
    report["layers"][0]["name"], report["events"] = f"k{name}.weight", [f"<{text}>"]
    read = Reading(page(report))
    # Parsers read a carriage return as a line feed; we need no more than that.
    assert f"<{text}>".replace("\r", "\n") in read.text.replace("\r", "\n")
    labels = [str(attributes.get("aria-label")) for _, attributes in read.elements]
    kind, _ = kind_and_block(f"k{name}.weight")
    assert f"{kind}: bits".replace("\r", "\n") in [x.replace("\r", "\n") for x in labels]


def test_purposes_and_stages_are_explained() -> None:
    report: Any = copy.deepcopy(REPORT)
    report["bytes"] = {purpose.name: 1000 + i for i, purpose in enumerate(PURPOSES)}
    report["seconds"] = {stage: 1.0 for stage in STAGES}
    read = Reading(page(report))
    for purpose in PURPOSES:
        assert purpose.explanation in read.text
    assert "wait for the entropy coder" in read.text
    assert "perplexity for the model card" in read.text


BEFORE_TEMPLATES = (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/><meta name="color-scheme" '
    'content="light dark"/><title>toy: compression report</title><style>'
)


@pytest.mark.parametrize("model", ["toy", "<b>&'\"", None, "org/" + 90 * "x"])
def test_a_page_is_known_by_its_beginning(model: str | None) -> None:
    text = page({**REPORT, "model": model})
    assert is_page(text[:4096])
    assert is_page(BEFORE_TEMPLATES)
    assert not is_page(text[1:4096])
    assert not is_page("<!DOCTYPE html>\n<title>another: compression reports</title>")
