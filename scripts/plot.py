"""Pictures of sweeps: python scripts/plot.py SWEEP.jsonl [SWEEP.jsonl ...] -o FOLDER.

Writes, for all the networks in the tables together,

- rate.png: quality against bits per weight, one panel a network, its low bits enlarged,
- minimum.png: the fewest bits that keep a share of the original quality, as bars,
- time.png: seconds of the first run and of later ones, against the size of the network,
- language.png: perplexity against bytes of the directory and against bits, where there are
  language models.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

# Instead of this folder, whose evaluate.py would shadow Hugging Face's package evaluate.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from cerwu_gpu.errors import CerwuError, ConfigError
from cerwu_gpu.sweep.table import Row, read_table

PICTURES = ("rate", "minimum", "time", "language")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="plot", description="Draw the tables of sweeps.")
    add = parser.add_argument
    add("tables", type=Path, nargs="+", metavar="SWEEP.jsonl", help="tables that sweeps wrote")
    add("--output", "-o", type=Path, required=True, metavar="FOLDER", help="for the pictures")
    add("--pictures", nargs="+", choices=PICTURES, default=PICTURES, help="default: all")
    add("--methods", nargs="+", metavar="LABEL", help="only these, as tables name them")
    add("--prefix", default="", help="what the names of the files begin with")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script and return the exit code: 0, or 2 after one sentence about wrong input."""
    arguments = parse(argv)
    try:
        for path in draw(arguments):
            print(path)
    except CerwuError as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"plot: {error.filename}: {error.strerror}.", file=sys.stderr)
        return 2
    return 0


def draw(arguments: argparse.Namespace) -> list[Path]:
    """Read the tables, draw the pictures, and print their paths.

    Raises:
        CerwuError: a table cannot be used, or matplotlib is missing.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("pictures need matplotlib: pip install 'cerwu_gpu[plots]'.")
    networks = read(arguments.tables, arguments.methods)
    from scripts import plot_pictures as pictures

    arguments.output.mkdir(parents=True, exist_ok=True)
    written = []
    for name in arguments.pictures:
        chosen = networks
        if name == "language":
            chosen = {k: rows for k, rows in networks.items() if rows[0].measure == "perplexity"}
        if chosen:
            path = arguments.output / f"{arguments.prefix}{name}.png"
            getattr(pictures, f"draw_{name}")(chosen, path)
            written.append(path)
    return written


def read(tables: Sequence[Path], methods: Sequence[str] | None) -> dict[str, list[Row]]:
    """Read the rows of all tables by network.

    Raises:
        CerwuError: a table is damaged or empty, two differ in what they measure one network by, or
            a method is in none of them.
    """
    networks: dict[str, list[Row]] = {}
    for path in tables:
        rows = read_table(path)
        if not rows:
            raise ConfigError(f"{path} has no finished point: run its sweep first.")
        for row in rows:
            networks.setdefault(row.subject, []).append(row)
    for name, rows in networks.items():
        if len({row.fingerprint for row in rows}) > 1:
            raise ConfigError(f"tables of {name} differ in weights or data: draw them one by one.")
    if methods is None:
        return networks
    known = dict.fromkeys(row.label for rows in networks.values() for row in rows)
    for method in methods:
        if method not in known:
            raise ConfigError(f"method {method!r} is in no table: choose from {', '.join(known)}.")
    chosen = {k: [row for row in rows if row.label in methods] for k, rows in networks.items()}
    return {name: rows for name, rows in chosen.items() if rows}


if __name__ == "__main__":
    sys.exit(main())
