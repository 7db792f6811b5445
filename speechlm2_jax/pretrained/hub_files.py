"""Downloads repositories of the Hugging Face hub into its cache; every failure is one line.

A name may pin a revision: OWNER/NAME@REVISION, where REVISION is a branch, a tag or a commit.
Without a network, or with HF_HUB_OFFLINE=1, what is in the cache is used.
"""

from collections.abc import Sequence
from pathlib import Path

from speechlm2_jax.settings import SettingsError

PAGE = "https://huggingface.co/"


def split_revision(name: str) -> tuple[str, str | None]:
    """OWNER/NAME and the revision after `@`, if there is one."""
    repository, sign, revision = name.partition("@")
    return repository, revision if sign else None


def download(name: str, *, key: str, patterns: Sequence[str], hint: str = "") -> Path:
    """The folder with the files of a repository that match `patterns`; downloads what is missing.

    Raises SettingsError naming `key`, with what to do, if it is not available. `hint` ends the line
    of a repository that does not exist.
    """
    from huggingface_hub import snapshot_download

    repository, revision = split_revision(name)
    try:
        found = snapshot_download(repository, revision=revision, allow_patterns=list(patterns))
    except Exception as error:  # the hub client raises many types; all mean "not available"
        raise SettingsError(f"{key}: {_reason(repository, revision, error, hint)}") from error
    return Path(found)


def _reason(repository: str, revision: str | None, error: Exception, hint: str) -> str:
    """What is wrong and what to do."""
    from huggingface_hub import errors

    page = f"{PAGE}{repository}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repository!r} is gated: accept its conditions at {page}, then run `hf auth login` "
            "or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repository!r} has no revision {revision!r}; its branches and tags are at {page}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repository!r} is not a local path, and there is no such repository on the hub; "
            + (hint or "if it is private, run `hf auth login`")
        )
    causes = [error, error.__cause__]
    if any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in causes):
        at = f" at revision {revision!r}" if revision else ""
        return (
            f"{repository!r} is not a local path, and it is not in the hub's cache{at}, which is "
            "all that HF_HUB_OFFLINE=1 allows; " + (hint or "unset it, or give a local path")
        )
    text = " ".join(str(error).split())[:300]
    return (
        f"{repository!r} is not a local path, and downloading it from the hub failed "
        f"({type(error).__name__}: {text}); {hint or 'give a local path'}"
    )
