"""The error of a command that names no model where none was trained; before anything is loaded."""

from speechlm2_jax.evaluation.run_folders import run_folders
from speechlm2_jax.pretrained.near_paths import RUNS
from speechlm2_jax.settings import SettingsError

PUBLIC_MODELS = ("nvidia/canary-qwen-2.5b", "nvidia/parakeet-ctc-0.6b")
"""Models on the hub that the error names."""


def check_there_are_runs() -> None:
    """Raises `no_model` if there is no run of any kind below ./runs."""
    if next(run_folders(), None) is None:
        raise no_model()


def no_model() -> SettingsError:
    """The error, with the names of public models."""
    return SettingsError(
        f"there is no trained model below {RUNS}/ that transcribes; train one with `speechlm2-jax "
        f"train --config salm`, or name one: --model PATH, or a public one such as "
        f"{', '.join(PUBLIC_MODELS)}"
    )
