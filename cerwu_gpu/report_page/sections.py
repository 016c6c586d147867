"""The parts of the page: sizes, times, events, and how to do it again."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from cerwu_gpu.report_page import words
from cerwu_gpu.report_page.charts import stacked_bar
from cerwu_gpu.report_page.markup import Markup, join, tag

WORDS = "words"
EXPLAINED = {
    WORDS: "the entropy-coded integers of all quantized weights",
    "tables": "frequencies of the integers, by class",
    "classes": "which table a row and a column use",
    "steps and scales": "what an integer is worth, by column and row",
    "stream lengths": "where each decoder starts",
    "escaped integers": "those beyond the tables",
    "grid values": "the levels of a given grid",
    "plain tensors": "norms, biases and what was left alone",
    "headers": "names, shapes and checksums",
    "tokenizer": "as it came",
    "other files": "configuration, licence, model card",
}
TOKENIZER = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template")
STAGES = {
    "load": "load the model",
    "calibrate": "calibrate: inputs and their Hessians",
    "sensitivity": "sensitivities: one backward pass",
    "target": "search for the target",
    "evaluate": "perplexity for the model card",
    "quantize": "quantize",
    "code": "wait for the entropy coder",
    "write": "write the files",
    "verify": "verify: decode everything once",
}


def size_section(report: Mapping[str, Any]) -> Markup:
    """What the bytes are for, to the scale of the original and enlarged."""
    parts = _purposes(report["bytes"])
    total, original = report["directory_bytes"], report["original_bytes"]
    colours = {purpose: f"c{index}" for index, purpose in enumerate(EXPLAINED)}

    def bar(purposes: Mapping[str, int], full: float, label: str) -> Markup:
        said = [
            (colours[what], amount, f"{what}: {words.size(amount)}, {words.share(amount / total)}")
            for what, amount in purposes.items()
        ]
        return stacked_bar(said, full, label)

    rest = {what: amount for what, amount in parts.items() if what != WORDS}
    beside = sum(rest.values())
    bars = tag(
        "div",
        tag("span", f"original, {words.size(original)}"),
        bar({}, max(original, total), "The original"),
        tag("span", f"compressed, {words.size(total)}"),
        bar(parts, max(original, total), "The compressed directory to the same scale"),
        tag("span", f"all but the words, {words.size(beside)}"),
        bar(rest, beside, "What is not coded symbols, enlarged"),
        class_="bars",
    )
    rows = [
        tag(
            "tr",
            tag("th", tag("span", class_=f"swatch {colours[what]}"), what, scope="row"),
            tag("td", EXPLAINED[what], class_="soft"),
            tag("td", f"{amount:,} bytes", class_="number"),
            tag("td", words.share(amount / total), class_="number"),
        )
        for what, amount in parts.items()
    ]
    sum_row = tag(
        "tr",
        tag("th", "the whole directory", scope="row", class_="changed"),
        tag("td"),
        tag("td", f"{total:,} bytes", class_="number changed"),
        tag("td", words.share(1.0), class_="number changed"),
    )
    table = tag("table", tag("tbody", *rows, sum_row))
    return tag("section", tag("h2", "What takes the bytes"), bars, table)


def _purposes(taken: Mapping[str, int]) -> dict[str, int]:
    """Bytes by the names of EXPLAINED; files are the tokenizer's or others'."""
    found: defaultdict[str, int] = defaultdict(int)
    for name, amount in taken.items():
        file = "tokenizer" if name.startswith(TOKENIZER) else "other files"
        found[name if name in EXPLAINED else file] += amount
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def time_section(report: Mapping[str, Any]) -> Markup:
    """A bar for each stage."""
    seconds: Mapping[str, float] = report["seconds"]
    total = sum(seconds.values())
    longest = max(seconds.values(), default=0.0)
    rows = [
        tag(
            "tr",
            tag("th", STAGES.get(stage, stage), scope="row"),
            tag("td", stacked_bar([("c0", value, stage)], longest, stage), style="width: 32%"),
            tag("td", words.duration(value), class_="number"),
            tag("td", words.share(value / total if total else 0.0), class_="number"),
        )
        for stage, value in seconds.items()
    ]
    return tag(
        "section",
        tag("h2", "Where the time went"),
        tag("table", tag("tbody", *rows), class_="time"),
    )


def event_section(report: Mapping[str, Any]) -> Markup:
    """What did not go as planned, and what is stored as it was."""
    events, reasons = report["events"], defaultdict(list)
    for name, reason in report["left"].items():
        reasons[reason].append(name)
    said = (
        tag("ul", *(tag("li", event) for event in events))
        if events
        else tag("p", "None: everything went as planned.")
    )
    left = [
        tag(
            "details",
            tag("summary", f"{reason}: {words.plural(len(names), 'tensor')}"),
            tag("ul", *(tag("li", name, class_="name") for name in names)),
        )
        for reason, names in sorted(reasons.items())
    ]
    nothing = tag("p", "Nothing but what has one axis: norms and biases.")
    return tag(
        "section",
        tag("h2", "Events"),
        said,
        tag("h2", "Left as it was"),
        join(*left) if left else nothing,
    )


def settings_section(report: Mapping[str, Any]) -> Markup:
    """The command, the settings and the machine."""
    changed = set(report["changed"])
    again = [tag("p", "The model or its text was handed over in Python. The settings were:")]
    if report["command"] is not None:
        again = [
            tag("p", "On the command line:"),
            tag("pre", report["command"]),
            tag("p", "In Python, with the same arguments besides:"),
        ]
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row", class_="name changed" if name in changed else "name"),
            tag("td", _said(value), class_="name changed" if name in changed else "name"),
        )
        for name, value in report["settings"].items()
    ]
    machine = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    found = ""
    if report["lmbda"] != report["settings"]["lmbda"]:
        found = f" The search for the target found lmbda = {report['lmbda']:.6g}."
    return tag(
        "section",
        tag("h2", "Do it again"),
        *again,
        tag("pre", report["python"]),
        tag("p", f"{machine}.{found}", class_="soft"),
        tag(
            "details",
            tag("summary", "All settings; those that are not the default in bold"),
            tag("table", tag("tbody", *rows)),
        ),
    )


def _said(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
