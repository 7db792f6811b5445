"""The prompt formats, as data: what each role's turn looks like, by NeMo's names.

In a template `|name|` is a field that the turn fills. `|bos|` at its start and `|eos|` at its end
stand for the tokenizer's own tokens, which have no text. Turns of `OUTPUT_ROLE` are the responses
that the model learns. A `preamble` has no fields and opens every dialog.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from speechlm2_jax.data.prompts.canary import CANARY, CANARY2, Field, target_language
from speechlm2_jax.data.prompts.thinking import (
    OUTPUT_ROLE,
    NanoThinking,
    Qwen3Thinking,
    Thinking,
)


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """One format: a template for each role, and what frames the dialog."""

    turns: Mapping[str, str]
    tokens: tuple[str, ...] = ()
    """Tokens that the tokenizer must have, or the model would read the markup as plain text."""
    plain_markup: tuple[str, ...] = ()
    """Markup that is plain text for every tokenizer, so that none is refused for it."""
    inference_prefix: str | None = None
    """The generation prompt: opens the response when the last turn is not the model's."""
    insert_bos: bool = False
    """Whether the dialog starts with the tokenizer's begin token."""
    insert_eos: bool = False
    """Whether a dialog that the model ends is closed by the tokenizer's end token."""
    fields: Mapping[str, Field] = field(default_factory=dict)
    """Fields whose values are written in another form, as `en` is `<|en|>`."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Older names of fields."""
    thinking: Thinking | None = None
    """How responses open with a thought. Only the last response of such a dialog has a loss."""


AUTO = "auto"
"""The format that the tokenizer's own chat template is (`template_encoder`)."""
_LLAMA3_TURN = "<|start_header_id|>{}<|end_header_id|>\n\n|message|<|eot_id|>"
_CHATML_TURN = "<|im_start|>{}\n|message|<|im_end|>\n"
_EXAMPLE = PromptFormat(
    turns={"user": "User: |message|\n", OUTPUT_ROLE: "Assistant: |message|\n"},
    plain_markup=("User:", "Assistant:"),
)

FORMATS: Mapping[str, PromptFormat] = {
    "plain": PromptFormat(turns={"user": "|message|", OUTPUT_ROLE: "|message|"}),
    "llama2": PromptFormat(
        turns={
            "system_and_user": "|bos|[INST] <<SYS>>\n|system|\n<</SYS>>\n\n|message| [/INST]",
            "user": "|bos|[INST] |message| [/INST]",
            OUTPUT_ROLE: "|message| |eos|",
        },
        plain_markup=("[INST]", "[/INST]"),
    ),
    "llama3": PromptFormat(
        turns={
            "preamble": "<|begin_of_text|>",
            **{role: _LLAMA3_TURN.format(role) for role in ("system", "user", OUTPUT_ROLE)},
        },
        tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        inference_prefix="<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "qwen": PromptFormat(
        turns={role: _CHATML_TURN.format(role) for role in ("user", OUTPUT_ROLE)},
        tokens=("<|im_start|>", "<|im_end|>"),
        inference_prefix="<|im_start|>assistant\n",
    ),
    "chatml": PromptFormat(
        turns={role: _CHATML_TURN.format(role) for role in ("system", "user", OUTPUT_ROLE)},
        tokens=("<|im_start|>", "<|im_end|>"),
        inference_prefix="<|im_start|>assistant\n",
    ),
    "qwen3": PromptFormat(
        turns={role: _CHATML_TURN.format(role) for role in ("system", "user", OUTPUT_ROLE)},
        tokens=("<|im_start|>", "<|im_end|>"),
        inference_prefix="<|im_start|>assistant\n",
        thinking=Qwen3Thinking(),
    ),
    "nemotron-nano-v3": PromptFormat(
        turns={role: _CHATML_TURN.format(role) for role in ("system", "user", OUTPUT_ROLE)},
        tokens=("<|im_start|>", "<|im_end|>"),
        inference_prefix="<|im_start|>assistant\n",
        thinking=NanoThinking(),
    ),
    "gemma": PromptFormat(
        turns={
            "user": "<start_of_turn>user\n|message|<end_of_turn>\n<start_of_turn>model\n",
            OUTPUT_ROLE: "|message|<end_of_turn>\n",
        },
        tokens=("<start_of_turn>", "<end_of_turn>"),
        insert_bos=True,
        insert_eos=True,
    ),
    "mistral": PromptFormat(
        turns={
            "preamble": "<s>",
            "user": "[INST] |message| [/INST] ",
            OUTPUT_ROLE: "|message|</s>",
        },
        tokens=("<s>", "</s>"),
        plain_markup=("[INST]", "[/INST]"),
    ),
    "nemotron-h": PromptFormat(
        turns={
            "system": "<SPECIAL_10>System\n|message|",
            "user": "\n<SPECIAL_11>User\n|message|",
            OUTPUT_ROLE: "\n<SPECIAL_11>Assistant\n|message|",
        },
        tokens=("<SPECIAL_10>", "<SPECIAL_11>"),
        inference_prefix="\n<SPECIAL_11>Assistant\n",
    ),
    "phi2_qa": PromptFormat(
        turns={"user": "Instruct: |message|\nOutput: ", OUTPUT_ROLE: "|message|"},
        plain_markup=("Instruct:", "Output:"),
    ),
    "phi2_chat": PromptFormat(
        turns={"user": "Human: |message|\nAI: ", OUTPUT_ROLE: "|message|"},
        plain_markup=("Human:", "AI:"),
    ),
    "phi2_code": PromptFormat(turns={"user": "|message|\n", OUTPUT_ROLE: "|message|"}),
    "t5nmt": PromptFormat(
        turns={"user": "|target_lang| |message|", OUTPUT_ROLE: "|message|"},
        fields={"target_lang": target_language},
    ),
    "canary": PromptFormat(
        turns={
            "user": "<|startoftranscript|>|source_lang||task||target_lang||pnc|",
            OUTPUT_ROLE: "|text|<|endoftext|>",
        },
        tokens=("<|startoftranscript|>", "<|endoftext|>"),
        fields=CANARY,
        renamed={"taskname": "task"},
    ),
    "canary2": PromptFormat(
        turns={
            "user": "<|startofcontext|>|decodercontext|<|startoftranscript|>|emotion||source_lang|"
            "|target_lang||pnc||itn||timestamp||diarize|",
            "user_partial": "<|startofcontext|>|decodercontext|<|startoftranscript|>",
            "user_prefix": "|prefix|",
            OUTPUT_ROLE: "|text|<|endoftext|>",
        },
        tokens=("<|startofcontext|>", "<|startoftranscript|>", "<|endoftext|>"),
        fields=CANARY2,
    ),
    "example_prompt_format": _EXAMPLE,
    "example": _EXAMPLE,
}
