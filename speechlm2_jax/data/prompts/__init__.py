"""Prompt formats: from the turns of a dialog to token ids and a loss mask."""

from speechlm2_jax.data.prompts.formats import AUTO, FORMATS, OUTPUT_ROLE, PromptFormat
from speechlm2_jax.data.prompts.formatter import PromptFormatter
from speechlm2_jax.data.prompts.prompt import Prompt, PromptError, PromptLengths, Turn

__all__ = [
    "AUTO",
    "FORMATS",
    "OUTPUT_ROLE",
    "Prompt",
    "PromptError",
    "PromptFormat",
    "PromptFormatter",
    "PromptLengths",
    "Turn",
]
