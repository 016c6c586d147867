"""What scripts/plot.py draws: one function a picture, from rows of sweeps to a file."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from cerwu_gpu.config import GRADIENT_BASED
from cerwu_gpu.sweep.fronts import TARGETS, by_label, front_rows, standings, target_words
from cerwu_gpu.sweep.table import Row

Networks = Mapping[str, Sequence[Row]]
Colour = tuple[float, float, float]

COLOURS = {
    "waterfilled scalar": "tab:orange",
    "waterfilled trellis4": "tab:blue",
    "waterfilled trellis8": "tab:green",
    "waterfilled trellis16": "tab:olive",
    "waterfilled trellis32": "darkgreen",
    "cerwu (paper)": "black",
    "cerwu-gamma0": "tab:purple",
    "optq": "tab:brown",
    "rtn": "0.55",
    "nncodec": "tab:red",
    "nncodec dependent": "tab:pink",
}
"""Colours by the beginning of a label; variants, after a comma, are paler, with other styles."""
STYLES = ("-", "--", ":", "-.")
PALER = 0.7
COLUMNS = 2
WORST = 4.0
"""Maximum perplexity in the pictures, as a multiple of the original's."""
FEWEST_SHARE = 0.4
"""Minimum accuracy in the pictures, as a share of the original's."""
ENLARGED = {"perplexity": (0.98, 1.3), "accuracy": (0.9, 1.01)}
"""Range of quality in the inset, in multiples of the original's."""
INSET = {"perplexity": (0.5, 0.46, 0.47, 0.5), "accuracy": (0.5, 0.06, 0.47, 0.5)}
"""Left, bottom, width and height of the inset, in shares of the panel, clear of the lines."""
MEGABYTE = 1e6


def draw_rate(networks: Networks, path: Path) -> None:
    """Draw quality against bits per weight, one panel per network, with an inset at low bits."""
    styles = styles_of(networks)
    columns = min(COLUMNS, len(networks))
    figure, panels = _figure(math.ceil(len(networks) / columns), columns, 6.4, 4.6)
    for axes, (name, rows) in zip(panels, networks.items(), strict=False):
        _fronts(axes, rows, styles, bits)
        _frame(axes, rows, bits)
        axes.set_title(name, fontsize=12)
        axes.set_xlabel("bits per weight")
        axes.set_ylabel(rows[0].measure)
        _key(axes, rows, styles)
        _inset(axes, rows, styles)
    _save(figure, path)


def draw_minimum(networks: Networks, path: Path) -> None:
    """Draw the minimum bits, a row of panels per network and a panel per target."""
    targets = max(len(TARGETS[rows[0].measure]) for rows in networks.values())
    methods = max(len(by_label(rows)) for rows in networks.values())
    figure, panels = _figure(len(networks), targets, 4.2, 0.34 * methods + 1.1)
    for number, (name, rows) in enumerate(networks.items()):
        row = panels[number * targets : (number + 1) * targets]
        for axes in row:
            axes.set_visible(False)
        for axes, target in zip(row, TARGETS[rows[0].measure], strict=False):
            axes.set_visible(True)
            _bars(axes, rows, target)
            axes.set_title(f"{name}\n{target_words(target, rows[0].measure)}", fontsize=10)
            axes.set_xlabel("bits per weight")
    _save(figure, path)


def draw_time(networks: Networks, path: Path) -> None:
    """Draw seconds to compress, in the first run and in later ones, against the network's bytes."""
    styles = styles_of(networks)
    figure, panels = _figure(1, 2, 5.2, 4.4, share=True)
    names = [
        f"{name}\n{rows[0].original_bytes / MEGABYTE:.3g} MB" for name, rows in networks.items()
    ]
    sizes = [rows[0].original_bytes / MEGABYTE for rows in networks.values()]
    titles = ("first run, with calibration", "later runs, Hessians kept")
    for axes, title, part in zip(panels, titles, (first_seconds, later_seconds), strict=True):
        ends = []
        for label, (colour, dashes) in styles.items():
            line = sorted(
                (rows[0].original_bytes / MEGABYTE, part(rows, label))
                for rows in networks.values()
                if label in by_label(rows)
            )
            axes.plot(*zip(*line, strict=True), dashes, color=colour, marker="o", markersize=4)
            ends.append((label, *line[-1]))
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(min(sizes) / 1.5, max(sizes) * 1.2)
        axes.set_title(title, fontsize=12)
        axes.set_xlabel("the network and its size")
        axes.set_xticks(sizes, names, fontsize=9)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.25)
        if axes is panels[-1]:
            _label_ends(axes, ends, styles)
    panels[0].set_ylabel("seconds to compress")
    _save(figure, path)


def draw_language(networks: Networks, path: Path) -> None:
    """Draw perplexity against bytes of the directory, and against bits per weight."""
    styles = styles_of(networks)
    figure, panels = _figure(len(networks), 2, 6.0, 4.6)
    for number, (name, rows) in enumerate(networks.items()):
        left, right = panels[2 * number : 2 * number + 2]
        for axes, cost in ((left, megabytes), (right, bits)):
            _fronts(axes, rows, styles, cost)
            _frame(axes, rows, cost)
        left.set_title(f"{name}, original {rows[0].original_bytes / MEGABYTE:,.1f} MB", fontsize=12)
        left.set_xlabel("whole directory, MB")
        left.set_ylabel("perplexity")
        right.set_xlabel("bits per quantized weight")
        _key(right, rows, styles)
    _save(figure, path)


def bits(row: Row) -> float:
    return row.bits_per_weight


def megabytes(row: Row) -> float:
    return row.directory_bytes / MEGABYTE


def later_seconds(rows: Sequence[Row], label: str) -> float:
    """Return the mean seconds to quantize, code and write one point of this kind."""
    stages = ("quantize", "code", "write")
    return mean(sum(row.seconds[stage] for stage in stages) for row in by_label(rows)[label])


def first_seconds(rows: Sequence[Row], label: str) -> float:
    """Return `later_seconds` and those of this kind's calibration and sensitivities."""
    point = by_label(rows)[label][0]
    stages = [] if point.qp is not None else ["calibrate"]
    if point.sensitivity in GRADIENT_BASED:
        stages.append("sensitivity")
    # Work for all points is in the row of the point that came first.
    prepared = sum(max(row.seconds[stage] for row in rows) for stage in stages)
    return prepared + later_seconds(rows, label)


def styles_of(networks: Networks) -> dict[str, tuple[Colour, str]]:
    """Return colour and line style by label, in the order of COLOURS."""
    labels = dict.fromkeys(row.label for rows in networks.values() for row in rows)
    order = list(COLOURS)

    def place(label: str) -> tuple[int, str]:
        kind = label.partition(",")[0]
        return (order.index(kind) if kind in COLOURS else len(order), label)

    variants = sorted({label.partition(",")[2] for label in labels})  # no variant first
    styles = {}
    for label in sorted(labels, key=place):
        kind, _, variant = label.partition(",")
        number = variants.index(variant)
        colour = paler(COLOURS.get(kind, "tab:cyan"), PALER * number / len(variants))
        styles[label] = (colour, STYLES[number % len(STYLES)])
    return styles


def paler(colour: str, share: float) -> Colour:
    """Return a colour mixed with a share of white."""
    red, green, blue = (share + (1 - share) * part for part in to_rgb(colour))
    return red, green, blue


def _figure(
    rows: int, columns: int, width: float, height: float, *, share: bool = False
) -> tuple[Figure, list[Axes]]:
    figure, panels = pyplot.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows),
        squeeze=False,
        sharey=share,
        layout="constrained",
    )
    return figure, list(panels.flat)


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        if not axes.has_data():
            axes.axis("off")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _fronts(
    axes: Axes,
    rows: Sequence[Row],
    styles: Mapping[str, tuple[Colour, str]],
    cost: Callable[[Row], float],
) -> None:
    """Draw the front of every kind as a line, and its other points faintly."""
    field = "bits_per_weight" if cost is bits else "directory_bytes"
    for label, group in by_label(rows).items():
        colour, dashes = styles[label]
        front = front_rows(group, field)
        line = [(cost(row), row.quality) for row in front]
        if line:
            axes.plot(
                *zip(*line, strict=True), dashes, color=colour, marker="o", markersize=3.5, lw=1.6
            )
        beaten = [(cost(row), row.quality) for row in group if row not in front]
        if beaten:
            axes.plot(*zip(*beaten, strict=True), "o", color=colour, markersize=2.5, alpha=0.3)
    axes.axhline(rows[0].original_quality, color="0.4", linewidth=1, linestyle=(0, (4, 3)))


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the range of quality in a picture."""
    original = rows[0].original_quality
    qualities = [row.quality for row in rows if math.isfinite(row.quality)]
    if rows[0].measure == "perplexity":
        return 0.97 * min(original, *qualities), min(WORST * original, 1.1 * max(qualities))
    low = max(FEWEST_SHARE * original, 0.95 * min(qualities))
    return low, 1.02 * max(original, *qualities)


def _frame(axes: Axes, rows: Sequence[Row], cost: Callable[[Row], float]) -> None:
    low, high = _limits(rows)
    shown = [cost(row) for row in rows if low <= row.quality <= high]
    if shown:
        room = 0.04 * (max(shown) - min(shown))
        axes.set_xlim(min(shown) - room, max(shown) + room)
    _scale(axes, rows, low, high)
    axes.grid(alpha=0.25)
    axes.annotate(
        "original",
        xy=(0.01, rows[0].original_quality),
        xycoords=axes.get_yaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        color="0.4",
        fontsize=8.5,
    )


def _scale(axes: Axes, rows: Sequence[Row], low: float, high: float) -> None:
    """Set the vertical axis, logarithmic with plain numbers for perplexities."""
    if rows[0].measure == "perplexity":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.set_ylim(low, high)


def _inset(axes: Axes, rows: Sequence[Row], styles: Mapping[str, tuple[Colour, str]]) -> None:
    """Draw the part where the best kinds leave the original's quality."""
    measure, original = rows[0].measure, rows[0].original_quality
    low, high = (share * original for share in ENLARGED[measure])
    shown = [row for row in rows if low <= row.quality <= high]
    if len(shown) < 2:
        return
    inset = axes.inset_axes(INSET[measure])
    _fronts(inset, rows, styles, bits)
    least = min(map(bits, shown))
    inset.set_xlim(least - 0.1, least + 0.5 * (max(map(bits, shown)) - least) + 0.1)
    _scale(inset, rows, low, high)
    if measure == "perplexity":
        inset.set_yscale("linear")
        inset.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        inset.set_ylim(low, high)
    inset.yaxis.set_major_locator(MaxNLocator(4))
    inset.tick_params(labelsize=8)
    inset.grid(alpha=0.25)
    axes.indicate_inset_zoom(inset, edgecolor="0.6")


def _key(axes: Axes, rows: Sequence[Row], styles: Mapping[str, tuple[Colour, str]]) -> None:
    """Write the names in their lines' colours beside the panel, by rising bits."""
    target = TARGETS[rows[0].measure][1]
    bits_of = {x.label: x.bits for x in standings(rows) if x.target == target}
    order = sorted(bits_of, key=lambda label: (bits_of[label] is None, bits_of[label] or 0.0))
    lines = [
        axes.plot([], [], styles[label][1], color=styles[label][0], marker="o", markersize=3.5)[0]
        for label in order
    ]
    axes.legend(
        lines,
        order,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        labelcolor="linecolor",
        handlelength=1.4,
        frameon=False,
        fontsize=9.5,
        title=f"best at {target_words(target, rows[0].measure)} first",
        title_fontsize=8,
        alignment="left",
    )


def _label_ends(
    axes: Axes,
    ends: Sequence[tuple[str, float, float]],
    styles: Mapping[str, tuple[Colour, str]],
) -> None:
    """Write the names into the right margin, as near to their lines' ends as there is room."""
    to_share = axes.transData.transform, axes.transAxes.inverted().transform
    heights = {label: float(to_share[1](to_share[0]((x, y)))[1]) for label, x, y in ends}
    order = sorted(ends, key=lambda end: heights[end[0]])
    gap = 0.055
    places = spread([min(max(heights[label], 0.0), 1.0) for label, _, _ in order], gap)
    for (label, x, y), place in zip(order, places, strict=True):
        axes.annotate(
            label,
            xy=(x, y),
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=styles[label][0],
            fontsize=9.5,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": styles[label][0], "lw": 0.5, "alpha": 0.6},
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Return ascending places, moved apart so that neighbours differ by at least `gap`."""
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _start(groups[-1], gap) < _end(groups[-2], gap) + gap:
            last = groups.pop()
            groups[-1] += last
    return [_start(group, gap) + gap * k for group in groups for k in range(len(group))]


def _start(group: Sequence[float], gap: float) -> float:
    return mean(group) - gap * (len(group) - 1) / 2


def _end(group: Sequence[float], gap: float) -> float:
    return mean(group) + gap * (len(group) - 1) / 2


def _bars(axes: Axes, rows: Sequence[Row], target: float) -> None:
    """Draw a bar per kind, the best one on top."""
    styles = styles_of({"": rows})
    ranking = [standing for standing in standings(rows) if standing.target == target]
    ranking.sort(key=lambda standing: (standing.bits is None, standing.bits or 0.0), reverse=True)
    widest = max((standing.bits or 0.0 for standing in ranking), default=0.0) or 1.0
    for place, standing in enumerate(ranking):
        width, reached = standing.bits or 0.0, standing.bits is not None
        axes.barh(place, width, color=styles[standing.label][0], alpha=0.85, height=0.7)
        words = f"{'≤ ' * standing.open}{width:.2f}" if reached else "not reached"
        colour = "black" if reached else "0.5"
        axes.text(width + 0.015 * widest, place, words, va="center", fontsize=9, color=colour)
    axes.set_yticks(range(len(ranking)), [standing.label for standing in ranking])
    axes.set_xlim(0, 1.18 * widest)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
