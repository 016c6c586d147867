"""What a sweep found, in words: every point, the fewest bits for each quality, the time it took."""

from collections.abc import Sequence
from statistics import mean
from typing import Any

from cerwu_gpu.cli.output import number, table
from cerwu_gpu.sweep.fronts import by_label, front_rows, standings, target_words
from cerwu_gpu.sweep.table import Row


def points_table(rows: Sequence[Row]) -> str:
    """Every point of one subject; a star marks those on the front of their kind."""
    fronts = {row.point for own in by_label(rows).values() for row in front_rows(own)}
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
    """The fewest bits per weight for each share of the original quality, best first."""
    header = ("fewest bits at", "method", "interpolated", "best point", "its bytes")
    found = sorted(
        standings(rows), key=lambda each: (each.target, each.bits is None, each.bits or 0.0)
    )
    lines = [
        (
            target_words(each.target, rows[0].measure),
            each.label,
            each.words,
            "-" if each.row is None else f"{each.row.bits_per_weight:.4f}",
            "-" if each.row is None else f"{each.row.directory_bytes:,}",
        )
        for each in found
    ]
    return table(header, lines)


def times(rows: Sequence[Row]) -> dict[str, float | None]:
    """Seconds of preparation, which is done once; of the first point, and of the later points of
    its kind on average (None: there is none), in all and without their evaluation."""
    first, *later = by_label(rows)[rows[0].label]
    return {
        "preparation": sum(row.preparation_seconds for row in rows),
        "first_point": first.total_seconds,
        "later_points": mean(row.total_seconds for row in later) if later else None,
        "first_compression": first.compression_seconds,
        "later_compressions": mean(row.compression_seconds for row in later) if later else None,
    }


def time_words(rows: Sequence[Row]) -> str:
    """The same in a sentence."""
    found = times(rows)

    def compared(name: str, first: float | None, later: float | None) -> str:
        if not first or later is None:
            return f"{name} {first:.1f} s"
        return f"{name} {first:.1f} s, later ones {later:.1f} s ({later / first:.0%})"

    whole = compared("first point in all", found["first_point"], found["later_points"])
    part = compared("its compression", found["first_compression"], found["later_compressions"])
    return (
        f"calibration and sensitivities {found['preparation']:.1f} s, once; "
        f"{rows[0].label}: {whole}; {part}."
    )


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Points, fronts (keys of points, by method), fewest bits and times, ready for JSON."""
    return {
        "subject": rows[0].subject,
        "measure": rows[0].measure,
        "original_quality": rows[0].original_quality,
        "original_bytes": rows[0].original_bytes,
        "points": [row.record() for row in rows],
        "fronts": {
            label: [row.point for row in front_rows(own)] for label, own in by_label(rows).items()
        },
        "minimum": [
            {
                "label": each.label,
                "target": each.target,
                "bits": each.bits,
                "at_most": each.open,
                "best_point": None if each.row is None else each.row.point,
            }
            for each in standings(rows)
        ],
        "seconds": times(rows),
    }
