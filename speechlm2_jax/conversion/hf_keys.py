# pyright: basic
"""Every attribute of config.json that is not a size: what it means here, and when it may stand.

A reviewed list, decided by name and by value. Names with no effect on what the network computes may
have any value. Names that change it may have the values under which they change nothing
(`partial_rotary_factor: 1.0`). A name in no list is refused: the model might compute otherwise.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from speechlm2_jax.llm.config import DecoderConfig

Json = Mapping[str, Any]
Neutral = Callable[[Any, Json, DecoderConfig], bool]
"""(value, the whole config, what was read of it) -> whether the attribute changes nothing."""


@dataclass(frozen=True)
class Key:
    """One attribute, or all whose names begin alike."""

    reason: str
    """Why it has no effect here, or what is missing to honour it."""
    neutral: Neutral | None = None
    """The values under which it changes nothing; None: all of them."""

    def problem(self, value: object, config: Json, decoder: DecoderConfig) -> str:
        """Why a value is not supported; "" if it is. null always is."""
        if value is None or self.neutral is None or self.neutral(value, config, decoder):
            return ""
        return self.reason


def _one_of(*values: Any) -> Neutral:
    return lambda value, config, decoder: any(type(value) is not str and value == v for v in values)


def _empty(value: object, config: Json, decoder: DecoderConfig) -> bool:
    return not value


def _is_word(*words: str) -> Neutral:
    return lambda value, config, decoder: str(value).lower() in words


def _only(*words: str) -> Neutral:
    return lambda value, config, decoder: (
        isinstance(value, list | tuple) and set(map(str, value)) <= {*words}
    )


def _same_as(*names: str) -> Neutral:
    """Equal to another attribute, where that is given."""
    return lambda value, config, decoder: (
        value in [config[n] for n in names if config.get(n) is not None]
    )


def _no_model_code(value: object, config: Json, decoder: DecoderConfig) -> bool:
    return isinstance(value, Mapping) and not any(
        str(name).startswith(("AutoModel", "AutoConfig")) for name in value
    )


def _softmax_scale(value: object, config: Json, decoder: DecoderConfig) -> bool:
    """Whether scores are multiplied as they are here."""
    return isinstance(value, int | float) and math.isclose(value, decoder.scale)


def _original_length(value: object, config: Json, decoder: DecoderConfig) -> bool:
    """Whether the length before scaling is the one that the scaling itself names, or unused."""
    block = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(block, Mapping):
        return False
    kind = block.get("rope_type") or block.get("type") or "default"
    return kind in ("default", "linear") or value == block.get("original_max_position_embeddings")


def _bias_of_family(value: object, config: Json, decoder: DecoderConfig) -> bool:
    """Whether query, key and value have biases as the network has them."""
    return bool(value) is decoder.attention_bias


def _norm_of_family(value: object, config: Json, decoder: DecoderConfig) -> bool:
    """Whether queries and keys are normed as the network norms them."""
    return bool(value) is (decoder.qk_norm != "none")


def _group(reason: str, names: str, neutral: Neutral | None = None) -> dict[str, Key]:
    return dict.fromkeys(names.split(), Key(reason, neutral))


_NO, _ONE, _YES = _one_of(False, 0), _one_of(1), _one_of(True)
NO_EFFECT: Mapping[str, Key] = MappingProxyType(
    {
        **_group(
            "names the model, its makers or its tools",
            "architectures name_or_path model_name base_model base_model_name_or_path revision "
            "transformers_version _from_model_config is_llama_config finetuning_task model_card "
            "license author creator language languages tags datasets library_name pipeline_tag "
            "model_description description version date keys_to_ignore_at_inference task "
            "task_specific_params task_names training_args num_parameters peft_type peft_version",
        ),
        **_group(
            "how a library runs the model; the result is the same",
            "use_cache return_dict return_dict_in_generate output_attentions output_hidden_states "
            "output_scores output_logits output_past attn_implementation experts_implementation "
            "use_flash_attn use_flash_attention use_flash_attention_2 flash_attention flash_attn "
            "use_sdpa use_memory_efficient_attention use_xformers use_liger_kernel "
            "use_fused_rms_norm use_fused_rope use_fused_mlp use_fused_swiglu fused_mlp "
            "chunk_size_feed_forward torchscript use_bfloat16 xla_device tf_legacy_loss "
            "low_cpu_mem_usage device_map trust_remote_code torch_compile cache_implementation "
            "gradient_checkpointing use_gradient_checkpointing tensor_parallel_size "
            "tensor_parallel_degree sequence_parallel pipeline_parallel_degree fp16 bf16 seed "
            "output_router_logits",
        ),
        **_group(
            "slices products across devices; the mesh does that here",
            "pretraining_tp",
        ),
        **_group(
            "weights keep the dtype of the file; trainer.precision chooses the computation's",
            "dtype torch_dtype",
        ),
        **_group(
            "rotary positions have no table to size, and no length is refused",
            "max_position_embeddings max_sequence_length max_seq_length max_seq_len seq_length "
            "seq_len context_length max_context_length model_max_length n_positions n_ctx",
        ),
        **_group(
            "the tokenizer is read from its own files",
            "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id "
            "mask_token_id bos_token eos_token pad_token unk_token tokenizer_class tokenizer "
            "chat_template prompt_template prefix decoder_start_token_id padding_side "
            "add_bos_token add_eos_token",
        ),
        **_group(
            "sampling defaults; generation settings are arguments of generate",
            "max_length min_length max_new_tokens min_new_tokens do_sample early_stopping "
            "num_beams num_beam_groups diversity_penalty temperature top_k top_p min_p typical_p "
            "epsilon_cutoff eta_cutoff penalty_alpha guidance_scale repetition_penalty "
            "encoder_repetition_penalty length_penalty no_repeat_ngram_size "
            "encoder_no_repeat_ngram_size bad_words_ids force_words_ids num_return_sequences "
            "forced_bos_token_id forced_eos_token_id forced_decoder_ids remove_invalid_values "
            "exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
            "renormalize_logits generation_config",
        ),
        **_group(
            "labels of a classifier, which a language model does not have",
            "id2label label2id num_labels problem_type classifier_dropout classifier_activation "
            "summary_type summary_use_proj summary_activation summary_proj_to_labels "
            "summary_first_dropout score_bias",
        ),
        **_group(
            "noise or losses of the training that made the model",
            "neftune_noise_alpha label_smoothing label_smoothing_factor z_loss_weight loss_type "
            "use_label_smoothing rescale_layer_init init_method scale_attn_by_inverse_layer_idx "
            "reorder_and_upcast_attn",
        ),
        **_group(
            "an encoder's or a decoder's part in a pair of models",
            "is_decoder cross_attention_hidden_size encoder_hidden_size tie_encoder_decoder",
        ),
        **_group(
            "how intermediate_size was found, which is given",
            "ffn_dim_multiplier multiple_of mlp_ratio ffn_multiplier",
        ),
        **_group(
            "how vocab_size was found, which is given",
            "pad_vocab_size_multiple_of pad_vocab_size_multiple pad_to_multiple_of "
            "make_vocab_size_divisible_by",
        ),
        **_group(
            "read where the family has layers with a window",
            "sliding_window max_window_layers",
        ),
        **_group(
            "another attention beyond 262,144 positions, in vLLM only",
            "dual_chunk_attention_config",
        ),
    }
)
"""Attributes that change nothing of what the network computes, whatever their value."""

BY_VALUE: Mapping[str, Key] = MappingProxyType(
    {
        **_group(
            "dropout inside the LLM is not supported; write 0.0 (outputs do not change)",
            "attention_dropout attention_probs_dropout_prob attn_pdrop attn_dropout hidden_dropout "
            "hidden_dropout_prob resid_pdrop residual_dropout resid_dropout embd_pdrop "
            "embedding_dropout mlp_dropout ffn_dropout dropout dropout_rate layerdrop",
            _NO,
        ),
        **_group(
            "this family has no layers with a window",
            "use_sliding_window use_swa sliding_window_pattern",
            _NO,
        ),
        "layer_types": Key("this family has full attention only", _only("full_attention")),
        **_group(
            "attention over chunks, with sinks or both ways is not supported",
            "attention_chunk_size attn_temperature_tuning attention_sink attention_sink_bias "
            "add_swa_attention_sink_bias use_attention_sink bidirectional is_bidirectional "
            "use_bidirectional_attention use_sparse_attention sparse_attention",
            _NO,
        ),
        **_group("only causal attention is supported", "is_causal causal", _YES),
        **_group(
            "multimodal rotary positions are not supported", "use_mrope mrope_section", _empty
        ),
        **_group(
            "rotary positions on a part of each head are not supported",
            "rotary_pct rotary_percent rope_pct rotary_emb_fraction",
            _ONE,
        ),
        "rotary_dim": Key(
            "rotary positions on a part of each head are not supported",
            lambda value, config, decoder: value == decoder.head_width,
        ),
        **_group(
            "rotary positions on neighbouring numbers are not supported; the weights need another "
            "order of rows",
            "rope_interleaved rope_interleave interleaved_rope rotary_interleaved "
            "rotary_emb_interleaved",
            _NO,
        ),
        **_group(
            "stretched rotary positions are read from rope_scaling only",
            "rope_ratio rope_condense_ratio rotary_emb_scale_base rope_scaling_factor",
            _ONE,
        ),
        **_group(
            "layers without rotary positions, or with another base, are not supported",
            "no_rope_layer_interval rope_local_base_freq nope_layer_interval use_nope",
            _NO,
        ),
        "no_rope_layers": Key(
            "layers without rotary positions are not supported",
            lambda value, config, decoder: isinstance(value, list) and all(v == 1 for v in value),
        ),
        "original_max_position_embeddings": Key(
            "the rotary scaling names another length", _original_length
        ),
        **_group(
            "only rotary positions are supported",
            "position_embedding_type position_embeddings_type",
            _is_word("rope", "rotary", "rotary_emb"),
        ),
        **_group("only rotary positions are supported", "alibi use_alibi", _NO),
        **_group("only rotary positions are supported", "rotary use_rope use_rotary_emb", _YES),
        "attention_multiplier": Key(
            "scores are multiplied by 1/sqrt(head_dim) only", _softmax_scale
        ),
        "query_pre_attn_scalar": Key(
            "scores are divided by sqrt(head_dim) only",
            lambda value, config, decoder: value == decoder.head_width,
        ),
        **_group(
            "scaled embeddings, residuals or logits are not supported",
            "logits_scaling logit_scale logits_scale embedding_multiplier embedding_scale "
            "scale_emb residual_multiplier residual_scale lm_head_multiplier key_multiplier "
            "attention_out_multiplier attention_in_multiplier",
            _ONE,
        ),
        **_group(
            "capped logits are not supported",
            "final_logit_softcapping attn_logit_softcapping logits_soft_cap logit_cap "
            "logit_softcap attention_logit_cap use_logit_softcap scale_embedding "
            "scale_embeddings",
            _NO,
        ),
        **_group(
            "the family decides whether queries and keys are normed",
            "qk_norm use_qk_norm qk_layernorm use_qk_layernorm qk_layer_norm",
            _norm_of_family,
        ),
        **_group(
            "the family decides which layers have biases",
            "qkv_bias use_qkv_bias attention_qkv_bias",
            _bias_of_family,
        ),
        **_group(
            "these biases are not supported",
            "use_bias bias add_bias_linear lm_head_bias attention_out_bias o_proj_bias "
            "use_mlp_bias use_bias_in_lm_head attention_bias mlp_bias",
            _NO,
        ),
        **_group(
            "another order of norms and residuals is not supported",
            "parallel_attn parallel_residual use_parallel_residual post_norm use_post_norm "
            "use_post_attn_norm apply_residual_connection_post_layernorm rms_norm_offset "
            "use_gemma_rms_norm norm_after sandwich_norm",
            _NO,
        ),
        **_group(
            "only RMSNorm is supported",
            "norm_type normalization normalization_type",
            _is_word("rmsnorm", "rms_norm", "rms"),
        ),
        **_group("only RMSNorm is supported", "use_rmsnorm rms_norm use_rms_norm", _YES),
        **_group(
            "norms have one epsilon, rms_norm_eps",
            "layer_norm_eps layer_norm_epsilon layernorm_epsilon norm_eps norm_epsilon",
            _same_as("rms_norm_eps"),
        ),
        "hidden_activation": Key("hidden_act names another function", _same_as("hidden_act")),
        **_group(
            "embeddings are as wide as the layers only",
            "embedding_size word_embed_proj_dim embedding_dim d_model hidden_dim dim n_embd",
            _same_as("hidden_size"),
        ),
        "v_head_dim": Key(
            "values are as wide as keys only",
            lambda value, config, decoder: value == decoder.head_width,
        ),
        **_group(
            "mixtures of experts are not supported",
            "num_experts num_local_experts n_routed_experts n_shared_experts moe_intermediate_size "
            "num_experts_per_tok decoder_sparse_step",
            _NO,
        ),
        **_group(
            "layers that predict several tokens are not supported",
            "num_nextn_predict_layers mtp_num_hidden_layers num_mtp_layers n_predict "
            "use_medusa medusa_num_heads",
            _NO,
        ),
        **_group(
            "pairs of encoder and decoder are not supported",
            "is_encoder_decoder add_cross_attention",
            _NO,
        ),
        **_group(
            "layers that differ from each other are not supported",
            "pruned_heads per_layer_config layer_sharing block_configs dflash_config "
            "hidden_size_per_layer_input num_kv_shared_layers",
            _empty,
        ),
        **_group(
            "quantised weights are not supported",
            "quantization_config quantization compression_config",
            _empty,
        ),
        "auto_map": Key(
            "the model is defined by code in its own folder, which is never run; where that code "
            "computes what the library's class does, delete the key",
            _no_model_code,
        ),
    }
)
"""Attributes that change what is computed, but under some values."""

BEGINNINGS: Mapping[str, Key] = MappingProxyType(
    {
        "_": Key("private to the library that wrote the file"),
        "unsloth_": Key("what unsloth notes of itself"),
        "axolotl_": Key("what axolotl notes of itself"),
        "autotrain_": Key("what AutoTrain notes of itself"),
        "llamafactory_": Key("what LLaMA-Factory notes of itself"),
        "trl_": Key("what TRL notes of itself"),
        "wandb_": Key("where the training was logged"),
        "transformers.js": Key("for transformers in a browser"),
        "transformers_js": Key("for transformers in a browser"),
    }
)
"""The same for all names that begin alike."""


def find(name: str) -> Key | None:
    """The entry of a name, or None where it is in no list."""
    for table in (NO_EFFECT, BY_VALUE):
        if name in table:
            return table[name]
    return next((key for start, key in BEGINNINGS.items() if name.startswith(start)), None)
