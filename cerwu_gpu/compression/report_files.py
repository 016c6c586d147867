"""The reports that every compression writes: report.json, and report.html drawn from it."""

import json
import os
import platform
import shlex
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import cerwu_gpu
from cerwu_gpu.compression.resume import LIBRARIES
from cerwu_gpu.config import CompressionConfig, settings
from cerwu_gpu.container.breakdown import breakdown
from cerwu_gpu.errors import OutputError
from cerwu_gpu.files import read_json, resolved, write_text, written
from cerwu_gpu.report import Report, finite
from cerwu_gpu.report_page.page import is_page, page

JSON_FILE, HTML_FILE = "report.json", "report.html"
REPORT_KEYS = {"model", "output", "finished", "layers", "settings", "machine"}
"""Keys by which our report.json is recognised."""
PAGE_START = 4096
"""Number of characters in which our report.html is recognised."""


def report_paths(output: Path, folder: Path | None) -> tuple[Path, Path]:
    """Return the paths of report.json and report.html: in `folder`, or beside the output.

    Raises:
        OutputError: `folder` is a file.
    """
    if folder is None:
        data, html = (output.parent / f"{output.name}.{name}" for name in (JSON_FILE, HTML_FILE))
        return data, html
    place = resolved(folder)
    if place.exists() and not place.is_dir():
        raise OutputError(f"{place} is a file: choose a directory for the report.")
    return place / JSON_FILE, place / HTML_FILE


def check_reports(paths: tuple[Path, Path]) -> None:
    """Refuse paths of report.json and report.html that something else occupies.

    Raises:
        OutputError: there is a directory, or a file that is no report of ours.
    """
    for path, is_ours in zip(paths, (_is_report, _is_page), strict=True):
        if path.is_dir():
            raise OutputError(f"{path} is a directory: choose another place for the report.")
        if os.path.lexists(path) and not (path.is_file() and is_ours(path)):
            raise OutputError(
                f"{path} is no report of cerwu_gpu and would be replaced by one: move it away, or "
                "choose another place for the report."
            )


def _is_report(path: Path) -> bool:
    """Return whether a file is a report.json that `write_report` wrote."""
    try:
        content = read_json(path)
        return content.keys() >= REPORT_KEYS and "cerwu_gpu" in content["machine"]
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _is_page(path: Path) -> bool:
    """Return whether a file is a report.html that `write_report` wrote."""
    try:
        with path.open(encoding="utf-8") as file:
            return is_page(file.read(PAGE_START))
    except (OSError, ValueError):
        return False


def write_report(
    paths: tuple[Path, Path],
    report: Report,
    config: CompressionConfig,
    device: torch.device,
    *,
    model: str | None,
    output: Path,
    given: Path,
    options: dict[str, bool],
) -> None:
    """Write both files for the published directory `output`, each whole or not at all.

    Args:
        model: hub name or path as it was given; None where only Python can repeat the run (a
            model, text or batches in memory).
        given: the output as it was given.
        options: flags such as --card, name -> value.

    Raises:
        OutputError: the disk refuses, or something else is there by now; the compressed directory
            is complete all the same.
    """
    check_reports(paths)
    content = finite(
        {
            "model": model,
            "output": str(given),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            **report.to_dict(),
            "bytes": breakdown(output),
            "settings": settings(config),
            "changed": sorted(_changed(config)),
            "command": None if model is None else _command(model, given, config, device, options),
            "python": _python(config),
            "machine": _machine(device),
        }
    )
    texts = (json.dumps(content, indent=2, allow_nan=False) + "\n", page(content))
    for path, text in zip(paths, texts, strict=True):
        with written(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)


def _changed(config: CompressionConfig) -> dict[str, Any]:
    """Return the settings that differ from the defaults."""
    default = settings(CompressionConfig())
    return {name: value for name, value in settings(config).items() if value != default[name]}


def _command(
    model: str,
    output: Path,
    config: CompressionConfig,
    device: torch.device,
    options: dict[str, bool],
) -> str:
    """Return the command line that repeats the run."""
    words = ["cerwu-gpu", "compress", model, "-o", str(output)]
    for name, value in _changed(config).items():
        if value is None:
            continue  # settings of texts do not apply beside images
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option)
        elif name == "grid":
            words.append(f"{option}={','.join(map(repr, value))}")  # it may begin with a minus
        elif isinstance(value, tuple):
            words += [word for pattern in value for word in (option, pattern)]
        else:
            words += [option, str(value)]
    words += ["--device", str(device)]
    words += [f"--{name.replace('_', '-')}" for name, given in options.items() if given]
    return shlex.join(words)


def _python(config: CompressionConfig) -> str:
    changed = {name: value for name, value in _changed(config).items() if value is not None}
    given = ", ".join(f"{name}={value!r}" for name, value in changed.items())
    return f"from_settings({given})"


def _machine(device: torch.device) -> dict[str, str]:
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "cerwu_gpu": cerwu_gpu.__version__,
        **{name: version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "system": platform.system(),
        "device": f"{device} ({kind})",
    }
