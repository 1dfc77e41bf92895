"""The Hugging Face hub as an output: hf://owner/name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from lorax_ft.interop.bucket import repo_id
from lorax_ft.interop.model_card import CARD, hub_id, is_generated
from lorax_ft.program import command

LOGIN = "run `hf auth login` or set HF_TOKEN"


def prepare_repo(path: str | Path) -> None:
    """Make the repository if there is none; call it before work that would be lost otherwise.

    A new repository is private. An existing one stays as it is.

    Raises:
      OSError: there is no token, it may not write there, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi

    with _hub_errors(path):
        api = HfApi()
        # Without a token, create_repo would fail with a less clear error.
        api.whoami()
        api.create_repo(repo_id(path), private=True, exist_ok=True)


def push_folder(folder: Path, path: str | Path, *, replaces: Sequence[str] = ()) -> str:
    """Upload the files of a local folder to a repository, which is made if there is none.

    A card there that a person wrote is kept, unless the folder's own is a person's as well.

    Args:
      folder: the folder.
      path: hf://owner/name.
      replaces: patterns of old files to delete, besides those whose names the folder has.

    Returns:
      The address of the repository.

    Raises:
      OSError: as `prepare_repo`, or the upload fails.
    """
    from huggingface_hub import HfApi

    prepare_repo(path)
    name = repo_id(path)
    # A name in `replaces` may be that of a folder, such as additional_chat_templates.
    within = [f"{pattern}/*" for pattern in replaces]
    with _hub_errors(path):
        api = HfApi()
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Upload with lorax_ft",
            ignore_patterns=_kept_card(folder, name),
            delete_patterns=[*replaces, *within] or None,
        )
    return f"{api.endpoint}/{name}"


def missing_base(source: str) -> str | None:
    """A warning for an adapter on the hub whose base is on this machine only; None if it is not."""
    if hub_id(source):
        return None
    return (
        f"The adapter's base is {source}, which others do not have: name the base by its hub id, "
        f"or upload the merged model ({command('merge')} --output hf://owner/name)."
    )


def _kept_card(folder: Path, name: str) -> list[str]:
    """The card's name if that of the repository is to stay."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    ours = folder / CARD
    if not ours.is_file() or not is_generated(ours.read_bytes()):
        return []
    try:
        theirs = Path(hf_hub_download(name, CARD))
    except EntryNotFoundError:
        return []
    return [] if is_generated(theirs.read_bytes()) else [CARD]


@contextlib.contextmanager
def _hub_errors(path: str | Path) -> Iterator[None]:
    """Raise the errors of the hub's client as one that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise OSError(f"{path}: there is no token for the hub; {LOGIN}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise OSError(f"{path}: the hub does not accept the token; {LOGIN}") from error
        if status == 403:
            raise OSError(
                f"{path}: the token may not write there; {LOGIN}, with a token that may"
            ) from error
        raise OSError(f"{path} cannot be written: {_reason(error)}") from error
    except Exception as error:  # the client passes on errors of the connection
        raise OSError(f"{path} cannot be written: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What the hub answered, or the type and the message of the first error."""
    answer = getattr(error, "server_message", None)
    if answer:
        return str(answer)
    # "Error while uploading" says little.
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
