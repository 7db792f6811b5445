"""Every key of transformers' GenerationConfig, and what becomes of it here."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Refused(NamedTuple):
    """A key that would change the answers and is not supported."""

    reason: str
    harmless: tuple[Any, ...] = ()
    """Values that ask for nothing, beside None and False."""


HONOURED: Mapping[str, str] = {
    "max_new_tokens": "longest answer; 20 where neither it nor max_length is given",
    "max_length": "the same, with the steps of the row's own prompt (frames of audio too) counted",
    "min_new_tokens": "no end before so many tokens",
    "min_length": "no end before prompt and answer have so many steps",
    "early_stopping": "of beam search: true, false or never",
    "max_time": "seconds after which no further tokens are begun",
    "stop_strings": "texts that end an answer, of which they are part; not with beam search",
    "do_sample": "draw the next token; with num_beams > 1 draw the paths without replacement",
    "num_beams": "paths of beam search",
    "temperature": "1.0 by default; 0 with do_sample=False alone, where it is not read",
    "top_k": "50 by default, as in transformers; 0 or -1 keeps every token",
    "top_p": "1.0 by default; 0 keeps the likeliest token",
    "min_p": "share of the likeliest token's probability",
    "top_h": "share of the entropy, over the 100 likeliest tokens",
    "typical_p": "locally typical sampling",
    "epsilon_cutoff": "least probability",
    "eta_cutoff": "least probability, lower where the entropy is high",
    "repetition_penalty": "of all tokens that a row holds",
    "length_penalty": "of beam search: the power of the length that a score is divided by",
    "no_repeat_ngram_size": "no n-gram twice in a row",
    "bad_words_ids": "sequences of ids that are never completed; a lone end id is left out",
    "sequence_bias": "{ids: bias} or [[ids, bias], ...]",
    "renormalize_logits": "after all other processors",
    "forced_bos_token_id": "the first token of the answer",
    "forced_eos_token_id": "the last token of an answer of full length",
    "remove_invalid_values": "NaN becomes 0, infinities the largest numbers",
    "exponential_decay_length_penalty": "[start, factor]",
    "suppress_tokens": "never said",
    "begin_suppress_tokens": "not said first (second where forced_bos_token_id is given)",
    "num_return_sequences": "answers to each prompt, in adjacent rows; needs sampling or beams",
    "return_dict_in_generate": "gives .sequences and, of beam search, .sequences_scores",
    "output_scores": "with beam search only: sequences_scores; those of each step are not kept",
    "eos_token_id": "one id or several; the tokenizer's by default",
    "pad_token_id": "what fills rows after their end; the model's text_pad_id by default",
}

_CACHE = "memory is always cached, in arrays of a fixed size"
_COMPILED = "everything is compiled"
_ASSISTANT = "settings of an assistant model, and there is none"
IGNORED: Mapping[str, str] = {
    "bos_token_id": "prompts come complete from the prompt format",
    "decoder_start_token_id": "of encoder-decoder models",
    "use_cache": _CACHE,
    "cache_implementation": _CACHE,
    "cache_config": _CACHE,
    "max_cache_len": _CACHE,
    "low_memory": _CACHE,
    "prefill_chunk_size": "changes memory, not answers; the prompt is run at once",
    "compile_config": _COMPILED,
    "disable_compile": _COMPILED,
    "is_assistant": _ASSISTANT,
    "num_assistant_tokens": _ASSISTANT,
    "num_assistant_tokens_schedule": _ASSISTANT,
    "assistant_confidence_threshold": _ASSISTANT,
    "assistant_lookbehind": _ASSISTANT,
    "target_lookbehind": _ASSISTANT,
    "max_matching_ngram_size": _ASSISTANT,
    "transformers_version": "metadata",
}
"""Keys that change no answer."""

_SPECULATIVE = "speculative decoding is not supported; leave it out, the answers are the same"
_HUB = "transformers itself moved this way of decoding out; use num_beams or do_sample"
_ENCODER = "there is no encoder whose ids could be compared; leave it out"
_PARTS = "what the layers compute is not kept; call the model on input_embeds instead"
REFUSED: Mapping[str, Refused] = {
    "encoder_repetition_penalty": Refused(_ENCODER, (1.0,)),
    "encoder_no_repeat_ngram_size": Refused(_ENCODER, (0,)),
    "token_healing": Refused("prompts end where their format ends them; leave it out"),
    "guidance_scale": Refused("classifier-free guidance needs a second prompt; leave it out", (1,)),
    "watermarking_config": Refused("watermarks are not supported; leave it out"),
    "output_attentions": Refused(_PARTS),
    "output_hidden_states": Refused(_PARTS),
    "output_logits": Refused("scores of each step are not kept; leave it out"),
    "use_mtp": Refused(_SPECULATIVE),
    "prompt_lookup_num_tokens": Refused(_SPECULATIVE),
    "assistant_early_exit": Refused(_SPECULATIVE),
    "assistant_ensemble_weight": Refused(_SPECULATIVE),
    "speculation_type": Refused(_SPECULATIVE),
    "penalty_alpha": Refused(_HUB, (0.0,)),
    "dola_layers": Refused(_HUB),
    "num_beam_groups": Refused(_HUB, (1,)),
    "diversity_penalty": Refused(_HUB, (0.0,)),
    "constraints": Refused(_HUB),
    "force_words_ids": Refused(_HUB),
    "continuous_batching_config": Refused("evaluate.py has its own; leave it out"),
}

OWN: Mapping[str, str] = {
    "seed": "of what is drawn, 0 by default; a row's draws are its own, whatever its neighbours",
    "enable_thinking": "false opens the answer behind an empty thought (qwen3, nemotron-nano-v3)",
    "max_audio_s": "seconds heard at once, 40 by default; what is longer is answered in chunks; "
    "false: no limit",
    "should_stop": "a function asked now and then; once true, what there is comes back",
}
"""Keywords of `generate` that transformers does not have."""

ARGUMENTS: Mapping[str, str] = {
    "logits_processor": "use the keys of GenerationConfig",
    "stopping_criteria": "use should_stop, stop_strings, max_time or eos_token_id",
    "prefix_allowed_tokens_fn": "use sequence_bias, bad_words_ids or suppress_tokens",
    "streamer": "use model.stream, which yields the text as it comes",
    "assistant_model": _SPECULATIVE,
    "negative_prompt_ids": "classifier-free guidance is not supported",
    "custom_generate": "no code is loaded",
}
"""Arguments of transformers' `generate` that are refused by name."""
