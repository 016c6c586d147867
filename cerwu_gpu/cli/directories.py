"""cerwu-gpu info, verify and decompress: inspect, check and unpack compressed directories."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cerwu_gpu.cli import options
from cerwu_gpu.cli.output import number, print_json, size, table
from cerwu_gpu.errors import printable
from cerwu_gpu.files import local_path

if TYPE_CHECKING:
    from cerwu_gpu.container.reader import Inventory

Directory = Annotated[
    Path,
    typer.Argument(
        metavar="DIRECTORY", help="Compressed model directory written by cerwu-gpu compress."
    ),
]


def info(
    directory: Directory,
    json: Annotated[bool, typer.Option("--json", help="Print the inventory as JSON only.")] = False,
) -> None:
    """List the tensors and files of DIRECTORY with their sizes, which add up to the total."""
    from cerwu_gpu.container.reader import inventory

    content = inventory(directory)
    if json:
        print_json(asdict(content))
        return
    header = ("name", "shape", "kind", "bits", "relative loss", "share", "bytes")
    typer.echo(table(header, list(_rows(content))))
    quantized = [entry for entry in content.tensors if entry.quantizer is not None]
    weights = sum(entry.weights for entry in quantized)
    typer.echo(f"\nformat version {content.format_version}, {size(content.total_bytes)} in all")
    if weights:
        bits = 8 * sum(entry.bytes for entry in quantized) / weights
        typer.echo(f"{len(quantized)} tensors quantized, {bits:.4f} bits per weight")


def _rows(content: "Inventory") -> Iterator[tuple[str, ...]]:
    def share(count: int) -> tuple[str, str]:
        return f"{count / content.total_bytes:.2%}", f"{count:,}"

    for entry in content.tensors:
        yield (
            entry.name,
            "x".join(map(str, entry.shape)),
            entry.quantizer or entry.dtype,
            f"{entry.bits_per_weight:.3f}",
            number(entry.relative_loss, 3),
            *share(entry.bytes),
        )
    for file in content.files:
        yield (file.name, "-", "file", "-", "-", *share(file.bytes))
    yield ("total", "", "", "", "", *share(content.total_bytes))


def verify(directory: Directory) -> None:
    """Verify all checksums of DIRECTORY and decode all streams."""
    from cerwu_gpu.container.reader import verify as check

    check(directory)
    name = printable(str(directory))
    typer.echo(f"{name}: whole; every checksum and every stream is as it was written")


def decompress(
    directory: Directory,
    output: options.Output,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="Data type of the weights; default: the original one."),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace an existing compressed model; other models are never replaced.",
        ),
    ] = False,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Convert DIRECTORY to an uncompressed safetensors model, for tools without cerwu_gpu."""
    import torch

    from cerwu_gpu.compression.run import directory_bytes
    from cerwu_gpu.serving.loading import decompress as run

    run(
        directory,
        output,
        dtype=None if dtype is None else getattr(torch, dtype),
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    typer.echo(f"{printable(str(output))}: {size(directory_bytes(local_path(output)))}")
