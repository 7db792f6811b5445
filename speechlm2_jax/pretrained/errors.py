"""Errors that the user can fix."""

from collections.abc import Iterator
from contextlib import contextmanager

from speechlm2_jax.checkpointing import DamagedError, LayoutError
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.data.prompts import PromptError
from speechlm2_jax.data.tokenizer import TokenizerError
from speechlm2_jax.parameter_paths import PatternError
from speechlm2_jax.settings import SettingsError

USER_ERRORS = (
    SettingsError,
    ConversionError,
    TokenizerError,
    PromptError,
    PatternError,
    DamagedError,
    LayoutError,
)
"""Errors about settings, weights and data. Any other error is a bug and keeps its traceback."""


@contextmanager
def errors_name_key(key: str) -> Iterator[None]:
    """Raises a user error from inside as a SettingsError that begins with `key`."""
    try:
        yield
    except SettingsError:
        raise
    except (*USER_ERRORS, OSError) as error:
        raise SettingsError(f"{key}: {error}") from error
