"""What goes wrong with storage."""

from speechlm2_jax.settings import SettingsError


class StorageError(SettingsError):
    """A file that cannot be read; `cause` is a key of `audio_errors.CAUSES`, for counting."""

    def __init__(self, message: str, *, cause: str) -> None:
        super().__init__(message)
        self.cause = cause


class TemporaryError(StorageError):
    """A fault that may pass: what failed is tried again."""
