"""Every key of transformers' GenerationConfig: honoured, ignored or refused."""

from collections.abc import Mapping
from typing import NamedTuple


class Refused(NamedTuple):
    """A key that would change the output and is not supported."""

    reason: str
    harmless: tuple[object, ...] = ()
    """Values that have no effect, beside None and False."""


HONOURED: Mapping[str, str] = {
    "max_new_tokens": "most new tokens; 20 where neither it nor max_length is given",
    "max_length": "most tokens including the sequence's own prompt (audio frames count too)",
    "min_new_tokens": "no end token before so many new tokens",
    "min_length": "no end token before prompt and response have so many positions",
    "early_stopping": "beam search: true, false or never",
    "max_time": "seconds after which generation stops",
    "stop_strings": "texts that end a response, included in it; not with beam search",
    "do_sample": "sample the next token; with num_beams > 1 sample beams without replacement",
    "num_beams": "number of beams",
    "temperature": "1.0 by default; 0 is accepted with do_sample=False, where it is not read",
    "top_k": "50 by default, as in transformers; 0 or -1 keeps every token",
    "top_p": "1.0 by default; 0 keeps the most likely token",
    "min_p": "least probability, as a share of the most likely token's",
    "top_h": "share of the entropy, over the 100 most likely tokens",
    "typical_p": "locally typical sampling",
    "epsilon_cutoff": "least probability",
    "eta_cutoff": "least probability, lower where the entropy is high",
    "repetition_penalty": "on all tokens of a sequence",
    "length_penalty": "beam search: a score is divided by length ^ length_penalty",
    "no_repeat_ngram_size": "no n-gram occurs twice in a sequence",
    "bad_words_ids": "sequences of ids that are never completed; a lone end token is ignored",
    "sequence_bias": "{ids: bias} or [[ids, bias], ...]",
    "renormalize_logits": "after all other logits processors",
    "forced_bos_token_id": "the first token of the response",
    "forced_eos_token_id": "the last token of a response of full length",
    "remove_invalid_values": "NaN becomes 0, infinities the largest numbers",
    "exponential_decay_length_penalty": "[start, factor]",
    "suppress_tokens": "tokens that are never generated",
    "begin_suppress_tokens": "tokens that are never first (or second, with forced_bos_token_id)",
    "num_return_sequences": "sequences per prompt, adjacent in the output; needs sampling or beams",
    "return_dict_in_generate": "returns .sequences and, for beam search, .sequences_scores",
    "output_scores": "with beam search only: sequences_scores; scores of each token are not kept",
    "eos_token_id": "one id or several; by default the tokenizer's, and those that the LLM names",
    "pad_token_id": "padding after the end of a sequence; the model's text_pad_id by default",
    "prompt_lookup_num_tokens": "speculative decoding: most tokens copied from prompt or response",
    "max_matching_ngram_size": "longest n-gram that prompt lookup looks up; 2 by default",
    "num_assistant_tokens": "most draft tokens per pass of assistant_model or drafts; 20, or 4",
}

_CACHE = "the KV cache is always used, in arrays of a fixed size"
_COMPILED = "everything is compiled"
_ASSISTANT = "changes speed, not the output; a pass has a fixed number of draft tokens"
IGNORED: Mapping[str, str] = {
    "bos_token_id": "the prompt format writes complete prompts",
    "decoder_start_token_id": "for encoder-decoder models",
    "use_cache": _CACHE,
    "cache_implementation": _CACHE,
    "cache_config": _CACHE,
    "max_cache_len": _CACHE,
    "low_memory": _CACHE,
    "prefill_chunk_size": "changes memory use, not the output; the prompt runs at once",
    "compile_config": _COMPILED,
    "disable_compile": _COMPILED,
    "is_assistant": _ASSISTANT,
    "num_assistant_tokens_schedule": _ASSISTANT,
    "assistant_confidence_threshold": _ASSISTANT,
    "assistant_lookbehind": _ASSISTANT,
    "target_lookbehind": _ASSISTANT,
    "transformers_version": "metadata",
}
"""Keys that do not change the output."""

_SPECULATIVE = "drafts by the LLM itself are not supported; leave it out, the output is the same"
_HUB = "transformers removed this decoding method; use num_beams or do_sample"
_ENCODER = "there is no encoder input to compare with; leave it out"
_LAYERS = "outputs of layers are not kept; call the model on input_embeds instead"
REFUSED: Mapping[str, Refused] = {
    "encoder_repetition_penalty": Refused(_ENCODER, (1.0,)),
    "encoder_no_repeat_ngram_size": Refused(_ENCODER, (0,)),
    "token_healing": Refused("the prompt format decides where prompts end; leave it out"),
    "guidance_scale": Refused("classifier-free guidance is not supported; leave it out", (1,)),
    "watermarking_config": Refused("watermarks are not supported; leave it out"),
    "output_attentions": Refused(_LAYERS),
    "output_hidden_states": Refused(_LAYERS),
    "output_logits": Refused("logits of each token are not kept; leave it out"),
    "use_mtp": Refused(_SPECULATIVE),
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
    "seed": "seed of sampling, 0 by default; draws do not depend on other prompts of the batch",
    "enable_thinking": "false starts the response after an empty thought (qwen3, nemotron-nano-v3)",
    "max_audio_s": "audio longer than this many seconds (40) is split into chunks; false: no limit",
    "assistant_model": "an ASRModel or CTCModel, whose transcripts are the drafts; or a draft LLM",
    "drafts": "a text for each prompt, which is its draft",
    "token_logprobs": "true, with return_dict_in_generate: .token_logprobs; no beams, no drafts",
    "should_stop": "a function called every 16 tokens; when it returns true, generation stops",
}
"""Keywords of `generate` that transformers does not have."""

ARGUMENTS: Mapping[str, str] = {
    "logits_processor": "use the keys of GenerationConfig",
    "stopping_criteria": "use should_stop, stop_strings, max_time or eos_token_id",
    "prefix_allowed_tokens_fn": "use sequence_bias, bad_words_ids or suppress_tokens",
    "streamer": "use model.stream, which yields the text as it comes",
    "negative_prompt_ids": "classifier-free guidance is not supported",
    "custom_generate": "no code is loaded",
}
"""Arguments of transformers' `generate` that are refused by name."""
