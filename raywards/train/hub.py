"""An export to the Hugging Face hub: what goes wrong there is a `HubError`, and costs no run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raywards.errors import HubError


def open_repo(name: str, *, token: str | None, private: bool | None, revision: str | None) -> str:
    """Make the repository and its branch unless they are there; returns the repository's full id.

    Called before training too: a missing token is told before hours of work, not after.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        repo: str = api.create_repo(name, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo, branch=revision, exist_ok=True)
    # The hub's client raises errors of its HTTP library, of the system and of its own.
    except Exception as error:
        raise HubError(
            f"The repository {name!r} cannot be written to: {_first_line(error)}\n"
            "Log in with `hf auth login`, or set HF_TOKEN or hub_token to a token that may write."
        ) from error
    return repo


def upload(
    folder: Path,
    repo: str,
    *,
    message: str,
    token: str | None,
    revision: str | None,
    blocking: bool,
) -> Any:
    """Upload a folder; returns the commit, or a `Future` of it where not `blocking`."""
    from huggingface_hub import HfApi

    try:
        api = HfApi(token=token)
        what: dict[str, Any] = {"repo_id": repo, "folder_path": str(folder)}
        what |= {"commit_message": message, "revision": revision}
        return (
            api.upload_folder(**what) if blocking else api.run_as_future(api.upload_folder, **what)
        )
    except Exception as error:
        raise HubError(
            f"The export was not uploaded to {repo!r}: {_first_line(error)}\n"
            f"It is whole in {folder}. Upload it later with trainer.push_to_hub(), or with\n"
            f"  hf upload {repo} {folder}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
