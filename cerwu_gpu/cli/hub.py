"""cerwu-gpu push: upload a compressed directory to the Hugging Face Hub."""

from typing import Annotated

import typer

from cerwu_gpu.cli.directories import Directory
from cerwu_gpu.cli.output import size, table


def push(
    directory: Directory,
    repository: Annotated[
        str, typer.Argument(metavar="REPOSITORY", help="Model repository, user/name.")
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Create the repository as a private one.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch to commit to; default: main.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be uploaded, and send nothing.")
    ] = False,
) -> None:
    """Check DIRECTORY and upload its files to a model repository of the Hugging Face Hub."""
    from cerwu_gpu.serving.hub import push as run

    upload = run(directory, repository, private=private, revision=revision, dry_run=dry_run)
    typer.echo(table(("file", "bytes"), [(name, f"{n:,}") for name, n in upload.files.items()]))
    total = size(sum(upload.files.values()))
    if not upload.card:
        typer.echo("\nno model card: cerwu-gpu compress --card writes one (README.md)")
    if upload.url is None:
        typer.echo(f"\n{total} would go to {repository}; nothing was sent")
    else:
        typer.echo(f"\n{total} sent: {upload.url}")
