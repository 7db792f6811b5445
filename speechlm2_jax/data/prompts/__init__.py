"""Prompt formats: from the turns of a dialog to token ids and a loss mask."""

from speechlm2_jax.data.prompts.formats import FORMATS, OUTPUT_ROLE, PromptFormat
from speechlm2_jax.data.prompts.formatter import Prompt, PromptError, PromptFormatter, Turn

__all__ = [
    "FORMATS",
    "OUTPUT_ROLE",
    "Prompt",
    "PromptError",
    "PromptFormat",
    "PromptFormatter",
    "Turn",
]
