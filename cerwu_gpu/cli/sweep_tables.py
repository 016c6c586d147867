"""Tables of a sweep: all points, minimum bits at each quality, times."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from cerwu_gpu.cli.output import number, table
from cerwu_gpu.sweep.fronts import by_label, front_rows, standings, target_words
from cerwu_gpu.sweep.table import Row


def points_table(rows: Sequence[Row]) -> str:
    """Return the table of all points of one subject; a star marks those on their kind's front."""
    fronts = {row.point for group in by_label(rows).values() for row in front_rows(group)}
    header = (
        "method",
        "levels",
        "lmbda",
        "qp",
        "bits",
        "bytes",
        rows[0].measure,
        "seconds",
        "front",
    )
    lines = [
        (
            row.label,
            number(row.levels),
            number(row.lmbda, 3),
            "-" if row.qp is None else str(row.qp),
            f"{row.bits_per_weight:.4f}",
            f"{row.directory_bytes:,}",
            f"{row.quality:.4f}",
            f"{row.total_seconds:.1f}",
            "*" if row.point in fronts else "",
        )
        for row in rows
    ]
    before = (f"{rows[0].original_bytes:,}", f"{rows[0].original_quality:.4f}")
    return table(header, [*lines, ("original", "-", "-", "-", "-", *before, "-", "")])


def minimum_table(rows: Sequence[Row]) -> str:
    """Return the table of minimum bits per weight at each share of the original quality."""
    header = ("fewest bits at", "method", "interpolated", "best point", "its bytes")
    ordered = sorted(
        standings(rows),
        key=lambda standing: (standing.target, standing.bits is None, standing.bits or 0.0),
    )
    lines = [
        (
            target_words(standing.target, rows[0].measure),
            standing.label,
            standing.words,
            "-" if standing.row is None else f"{standing.row.bits_per_weight:.4f}",
            "-" if standing.row is None else f"{standing.row.directory_bytes:,}",
        )
        for standing in ordered
    ]
    return table(header, lines)


def times(rows: Sequence[Row]) -> dict[str, float | None]:
    """Return seconds of preparation (of all processes together), of the first point, and of the
    later points of its kind on average (None: there is none), in total and without evaluation."""
    first, *later = by_label(rows)[rows[0].label]
    return {
        "preparation": sum(row.preparation_seconds for row in rows),
        "first_point": first.total_seconds,
        "later_points": mean(row.total_seconds for row in later) if later else None,
        "first_compression": first.compression_seconds,
        "later_compressions": mean(row.compression_seconds for row in later) if later else None,
    }


def time_words(rows: Sequence[Row]) -> str:
    """Return the times in a sentence."""
    seconds = times(rows)

    def compared(name: str, first: float | None, later: float | None) -> str:
        if not first or later is None:
            return f"{name} {first:.1f} s"
        return f"{name} {first:.1f} s, later ones {later:.1f} s ({later / first:.0%})"

    whole = compared("first point in all", seconds["first_point"], seconds["later_points"])
    part = compared("its compression", seconds["first_compression"], seconds["later_compressions"])
    return (
        f"calibration and sensitivities {seconds['preparation']:.1f} s in all; "
        f"{rows[0].label}: {whole}; {part}."
    )


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Return points, fronts (keys of points, by method), minimum bits and times for JSON."""
    return {
        "subject": rows[0].subject,
        "measure": rows[0].measure,
        "original_quality": rows[0].original_quality,
        "original_bytes": rows[0].original_bytes,
        "points": [row.record() for row in rows],
        "fronts": {
            label: [row.point for row in front_rows(group)]
            for label, group in by_label(rows).items()
        },
        "minimum": [
            {
                "label": standing.label,
                "target": standing.target,
                "bits": standing.bits,
                "at_most": standing.open,
                "best_point": None if standing.row is None else standing.row.point,
            }
            for standing in standings(rows)
        ],
        "seconds": times(rows),
    }
