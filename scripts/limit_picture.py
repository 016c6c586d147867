"""The picture of scripts/limit.py: bits above the limit against bits, one panel a layer."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from scripts.limit_points import Result

COLUMNS = 4
COLOURS = {
    "scalar": "tab:orange",
    "trellis4": "tab:blue",
    "trellis8": "tab:green",
    "trellis16": "tab:red",
    "trellis32": "tab:purple",
}
OTHERS = {"paper": ("0.3", "--"), "reference": ("0.55", ":")}
"""Colour and dashes of the other methods."""


def draw(
    results: Sequence[Result],
    lines: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    path: Path,
) -> None:
    """Write the picture.

    Args:
        results: every layer, quantizer and rate.
        lines: by layer and other method, (bits, bits above the limit).
        path: a file name whose ending matplotlib knows.
    """
    names = list(dict.fromkeys(r.layer for r in results))
    columns = min(COLUMNS, len(names))
    rows = math.ceil(len(names) / columns)
    figure, axes = pyplot.subplots(
        rows,
        columns,
        figsize=(3.2 * columns, 2.7 * rows + 0.7),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    for name, axis in zip(names, axes.flat, strict=False):
        of_layer = [r for r in results if r.layer == name]
        for other, line in lines[name].items():
            colour, dashes = OTHERS[other]
            axis.plot(*zip(*line, strict=True), dashes, color=colour, label=other, linewidth=1.5)
        for quantizer in dict.fromkeys(r.quantizer for r in of_layer):
            points = [(r.point.bits, r.gap) for r in of_layer if r.quantizer == quantizer]
            colour = COLOURS[quantizer]
            axis.plot(*zip(*points, strict=True), "o-", color=colour, label=quantizer, markersize=4)
        axis.set_title(name.removeprefix("model.layers."), fontsize=10)
        axis.grid(alpha=0.3)
    bits = [r.point.bits for r in results]
    least, most = max(0.0, min(bits) - 0.5), max(bits) + 0.5
    shown = [
        gap
        for by_method in lines.values()
        for line in by_method.values()
        for at, gap in line
        if least <= at <= most
    ] + [r.gap for r in results]
    axes[0, 0].set_xlim(least, most)
    axes[0, 0].set_ylim(min(0.0, *shown), 1.05 * max(shown))
    figure.supxlabel("stored bits per weight", fontsize=11)
    figure.supylabel("bits above the limit at equal loss", fontsize=11)
    handles = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    labels = [label for label in (*COLOURS, *OTHERS) if label in handles]
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="outside upper center",
        ncols=len(labels),
        frameon=False,
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
