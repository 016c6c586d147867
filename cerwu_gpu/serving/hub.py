"""Upload of a compressed directory to the Hugging Face Hub."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi

from cerwu_gpu.container.reader import verify
from cerwu_gpu.errors import ModelError, reason
from cerwu_gpu.files import local_path
from cerwu_gpu.hf.card import CARD_FILE


@dataclass(frozen=True)
class Upload:
    """Files of an upload to a repository.

    Attributes:
        files: bytes of each file by its path in the repository.
        card: whether a model card is among them.
        url: of the commit; None: nothing was sent.
    """

    files: dict[str, int]
    card: bool
    url: str | None


def push(
    path: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
) -> Upload:
    """Check a compressed directory and upload its files to a model repository of the Hub.

    The repository is created where it does not exist; files of other names in it stay.

    Args:
        path: compressed directory.
        repository: name of the repository, user/name.
        private: create the repository for its owner's eyes only.
        revision: branch to commit to; default: main.
        dry_run: check, and send nothing.

    Raises:
        FormatError: the directory does not conform to docs/format.md.
        ModelError: the Hub refuses, or cannot be reached.
    """
    folder = local_path(path)
    verify(folder)
    files = {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    }
    if dry_run:
        return Upload(files, CARD_FILE in files, None)
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Upload a model compressed with cerwu_gpu",
            revision=revision,
            allow_patterns=list(files),
        )
    except Exception as error:  # whatever the Hub and the network raise
        raise ModelError(
            f"{folder} cannot be sent to {repository} ({reason(error)}): log in with `hf auth "
            "login`, or check the name and the network."
        ) from error
    return Upload(files, CARD_FILE in files, commit.commit_url)
