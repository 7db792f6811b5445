"""Uploads a directory to the Hugging Face hub; every failure is one line that tells what to do."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechlm2_jax.settings import SettingsError

WHERE = "push_to_hub"
NO_TOKEN = "no Hugging Face token was found; run `hf auth login`, set HF_TOKEN, or pass token=..."
STATUS: dict[int, str] = {
    401: "the token is not valid; make a new one and run `hf auth login`",
    403: "the token may not write there; use a token with write access to that account",
    404: "there is no such account or repository; check the name",
}
"""HTTP status -> what to do."""
NETWORK = {"OSError", "TransportError", "RequestException"}
"""Classes of errors of the network, by name: the client's HTTP package changes with its version."""


class HubError(SettingsError):
    """The hub cannot be reached, or does not accept the upload."""


@dataclass(frozen=True, kw_only=True)
class Upload:
    """Where a model goes on the hub."""

    repo_id: str
    """OWNER/NAME."""
    private: bool | None = None
    """Whether a new repository is private; None is the account's default."""
    token: str | None = None
    """A token with write access; None takes the one that is logged in."""
    revision: str | None = None
    """Branch; None is main."""
    commit_message: str = "Upload model"
    create_pr: bool = False
    """Whether the upload is a pull request."""


def upload(target: Upload, write: Callable[[Path], None]) -> str:
    """Makes the repository if necessary and uploads what `write` puts into a folder.

    Returns the address of the commit. Nothing is written before the hub has accepted the token.
    Raises HubError, one line, without a network, without a token, and if the hub refuses.
    """
    import huggingface_hub

    token = target.token or huggingface_hub.get_token()
    if token is None:
        raise HubError(f"{WHERE}: {NO_TOKEN}")
    with _one_line_errors(target.repo_id):
        api = huggingface_hub.HfApi(token=token)
        created = api.create_repo(
            target.repo_id, private=target.private, repo_type="model", exist_ok=True
        )
    with tempfile.TemporaryDirectory(prefix="push_to_hub") as folder:
        write(Path(folder))
        with _one_line_errors(target.repo_id):
            commit: Any = api.upload_folder(
                repo_id=created.repo_id,
                folder_path=folder,
                revision=target.revision,
                commit_message=target.commit_message,
                create_pr=target.create_pr,
            )
    return str(commit.commit_url)


@contextmanager
def _one_line_errors(repo_id: str) -> Iterator[None]:
    """Raises as a HubError whatever the client raises, which has many types."""
    try:
        yield
    except Exception as error:
        raise HubError(f"{WHERE}: {repo_id!r}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What happened and what to do."""
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE=1 forbids the network; unset it"
    if isinstance(error, HFValidationError):
        return "expected OWNER/NAME, of letters, digits, '-', '_' and '.'"
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = " ".join(str(error).split())[:300] or "no details"
    if status in STATUS:
        return f"{STATUS[status]} (HTTP {status}: {text})"
    if status is None and NETWORK & {kind.__name__ for kind in type(error).__mro__}:
        return f"the hub cannot be reached; check the network ({type(error).__name__}: {text})"
    return f"{type(error).__name__}: {text}"
