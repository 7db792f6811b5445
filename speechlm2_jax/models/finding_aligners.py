"""The aligner that a call of `transcribe` names, or the model's own."""

from collections.abc import Callable

from speechlm2_jax.inference.timestamps.aligner import Aligner


def find_aligner(given: Aligner | str | None, own: Callable[[], Aligner | None]) -> Aligner | None:
    """`given` itself or what its name opens; `own()` if it is None. Raises SettingsError."""
    if given is None:
        return own()
    if isinstance(given, str):
        from speechlm2_jax.models.aligners import open_aligner  # it imports the ASR models

        return open_aligner(given)
    return given
