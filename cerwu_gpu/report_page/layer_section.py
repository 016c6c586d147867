"""Bits, loss and gap to the limit, by kind of layer and block."""

from collections.abc import Mapping, Sequence
from typing import Any

from cerwu_gpu.report_page import words
from cerwu_gpu.report_page.charts import columns, decades, levels
from cerwu_gpu.report_page.layers import Kind, Place, kinds
from cerwu_gpu.report_page.markup import Markup, join, tag

NOTE = (
    "Relative loss is the squared error of a layer's outputs over their energy, on the calibration "
    "text. The limit is the fewest bits with which any code could reach the same error, weighted "
    "as the search weighed it, if the weights were independent Gaussians; everything stored counts "
    "into the gap. Point at a mark for its figures."
)


def layer_section(report: Mapping[str, Any]) -> Markup:
    found = kinds(report["layers"])
    every = [place for kind in found for place in kind.places]
    blocks = 1 + max((place.block for place in every if place.block is not None), default=0)
    gaps = [place.gap for place in every if place.gap is not None]
    bits_top = max((place.bits for place in every), default=1.0)
    low, high = decades([place.loss for place in every if place.loss is not None])
    gap_low, gap_high = min(0.0, *gaps, 0.0), max(0.01, *gaps, 0.01)
    head = tag(
        "tr",
        tag("th", f"kind of matrix, blocks 0 to {blocks - 1} from left to right", scope="col"),
        tag("th", f"bits per weight, 0 to {bits_top:.1f}", scope="col"),
        tag("th", f"relative loss, {_power(low)} to {_power(high)}, logarithmic", scope="col"),
        tag("th", f"bits above the limit, {gap_low:.1f} to {gap_high:.1f}", scope="col"),
    )
    rows = []
    for kind in found:
        spoken = [_spoken(place) for place in kind.places]

        def points(values: Sequence[float | None], own: Kind = kind, said: Any = spoken) -> Any:
            blocks_of = [place.block for place in own.places]
            return list(zip(blocks_of, values, said, strict=True))

        bits = columns(
            points([p.bits for p in kind.places]), blocks, 0.0, bits_top, f"{kind.name}: bits"
        )
        loss = levels(
            points([p.loss for p in kind.places]), blocks, low, high, f"{kind.name}: loss"
        )
        gap = columns(
            points([p.gap for p in kind.places]), blocks, gap_low, gap_high, f"{kind.name}: gap"
        )
        part = words.share(kind.bytes / report["directory_bytes"])
        rows.append(
            tag(
                "tr",
                tag(
                    "th",
                    tag("span", kind.name, class_="name"),
                    tag("small", f"{words.size(kind.bytes)}, {part} of all"),
                    scope="row",
                ),
                tag("td", tag("span", words.bits(kind.bits)), bits),
                tag("td", tag("span", _loss(kind.loss)), loss),
                tag("td", tag("span", words.bits(kind.gap)), gap, class_="gap"),
            )
        )
    return tag(
        "section",
        tag("h2", "Layer by layer"),
        tag("table", tag("thead", head), tag("tbody", *rows), class_="kinds"),
        tag("p", f"Figures above the marks are means over the blocks. {NOTE}", class_="note"),
        _all_matrices(every),
    )


def _all_matrices(places: Sequence[Place]) -> Markup:
    names = ("weight", "weights", "bytes", "bits", "limit", "gap", "relative loss")
    head = [tag("th", n, scope="col", class_="number" if i else None) for i, n in enumerate(names)]
    rows = [
        tag(
            "tr",
            tag("th", place.name, scope="row", class_="name"),
            *(
                tag("td", value, class_="number")
                for value in (
                    f"{place.weights:,}",
                    f"{place.bytes:,}",
                    f"{place.bits:.4f}",
                    words.NONE if place.limit is None else f"{place.limit:.4f}",
                    words.NONE if place.gap is None else f"{place.gap:.4f}",
                    _loss(place.loss),
                )
            ),
        )
        for place in places
    ]
    return tag(
        "details",
        tag("summary", f"All {len(places):,} as a table"),
        tag("table", tag("thead", tag("tr", join(*head))), tag("tbody", *rows)),
    )


def _spoken(place: Place) -> str:
    where = place.name if place.block is None else f"block {place.block}"
    return (
        f"{where}: {place.bits:.3f} bits, limit {words.bits(place.limit)}, loss {_loss(place.loss)}"
    )


def _loss(value: float | None) -> str:
    return words.NONE if value is None else words.share(value)


def _power(exponent: int) -> str:
    return words.share(10.0**exponent)
