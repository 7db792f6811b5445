"""Tests that repeat another's way through the code, at a price: slow tests, each with its reason.

They run with `pytest -m slow`. What is slow by itself carries the mark where it is written.
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase

import pytest

DUPLEX = "the same with a speech decoder beside it is quick"
MESH = "other meshes are quick, among them all kinds of axes"
CODEC = "the other codecs are quick, and so are this one's layers"
VARIANT = "other cases of the same test are quick"
FAMILY = "each of its parts is that of a family whose test is quick"
FORWARD = "runs that differ in what they train alone are quick"
KINDRED = "the property is tested quickly on a smaller model"

SLOW: Mapping[str, str] = {
    "parity/test_codec.py::test_encoding_a_batch_equals_nemo*nano12_tiny-garbage?": CODEC,
    "parity/test_codec.py::test_encoding_and_decoding_equal_nemo*?nano12_tiny?": CODEC,
    "layers/test_block_attention.py::test_blocks_equal_plain*?None?": VARIANT,
    "perception/test_streaming.py::test_a_stream_equals_one_pass*?chunks?": VARIANT,
    "parity/test_llm_families.py::*?gemma3_text?": FAMILY,
    "parity/test_perception.py::test_each_block*?enc_offline_xscale?": VARIANT,
    "layers/test_splash_attention.py::*?64-None?": VARIANT,
    "serving/test_page.py::*": "starts a browser beside a server; the server's own tests are quick",
    "inference/test_recordings_to_text.py::test_a_model_gives_words_with_times*": KINDRED,
    "inference/test_word_times.py::test_a_long_recording_is_encoded_in_windows*": KINDRED,
    "models/test_asr_model.py::test_transcripts_equal_nemo*?rnnt_2layer-None*": VARIANT,
    "benchmarks/test_benchmarks.py::test_responses_have_exactly*": KINDRED,
    "benchmarks/test_parts_alone.py::test_perception_is_timed*": KINDRED,
    "cases/test_convert_kinds.py::test_a_duplex_model_in_bfloat16_loads*": KINDRED,
    "inference/test_continuous_batching.py::test_responses_are_those*?drawn1?": VARIANT,
    "layers/test_attention_choice.py::*?None?": VARIANT,
    "layers/test_module.py::test_quick_compilation_changes_no_bit*": (
        "compiles twice what nothing else needs; the options change with the version of jax alone"
    ),
    "layers/test_splash_attention.py::*?128-None?": VARIANT,
    "models/test_duplex_model.py::test_a_control_code_in_frame_0*": DUPLEX,
    "models/test_duplex_model.py::test_a_row_uses_every_position*": KINDRED,
    "models/test_duplex_model.py::test_audio_shorter_than_a_frame*": KINDRED,
    "models/test_duplex_model.py::test_neighbours_padding_and_groups*": KINDRED,
    "models/test_duplex_model.py::test_the_edges_of_nemos_batch*": KINDRED,
    "multidevice/test_salm_meshes.py::*llama_adapter-context=4 fsdp=2?": MESH,
    "multidevice/test_salm_meshes.py::*llama_adapter-fsdp=2 tensor=2 sequence context=2?": MESH,
    "networks/test_salm_invariants.py::*?qwen3_lora?": VARIANT,
    "parity/test_codec.py::test_*cod*lfr22_tiny*": CODEC,
    "parity/test_codec.py::test_a_stream*nano12_tiny*": VARIANT,
    "parity/test_codec.py::test_a_row_of_any_length*lfr22_tiny*": CODEC,
    "parity/test_duplex.py::test_a_conversation_alone_gives_the_same*": KINDRED,
    "parity/test_duplex.py::test_channels*?duplex_s2s?": DUPLEX,
    "parity/test_duplex.py::test_codes_of_the_agent_equal_nemos?duplex_s2s?": DUPLEX,
    "parity/test_duplex.py::test_five_steps*?duplex_s2s?": DUPLEX,
    "parity/test_duplex.py::test_gradients_equal_nemos?duplex_s2s?": DUPLEX,
    "parity/test_duplex.py::test_losses*?duplex_s2s-*": DUPLEX,
    "parity/test_duplex.py::test_logits*?duplex_s2s?": DUPLEX,
    "parity/test_duplex.py::test_perception*?duplex_s2s?": DUPLEX,
    "parity/test_duplex.py::test_the_weight_of_the_users_channel*": KINDRED,
    "parity/test_generation.py::test_one_new_token*": KINDRED,
    "parity/test_salm.py::test_every_generation_equals_nemo?qwen3_lora-*": VARIANT,
    "parity/test_salm.py::test_five_adamw_steps*?llama_full?": VARIANT,
    "parity/test_salm.py::test_training_loss*?llama_full?": VARIANT,
    "parity/test_salm.py::test_training_loss*?qwen3_tied_full?": VARIANT,
    "parity/test_speech_decoder.py::*?causal_k1_plain*": VARIANT,
    "parity/test_speech_decoder.py::*?causal_k5*": VARIANT,
    "parity/test_transducers.py::*?rnnt_2layer*": VARIANT,
    "perception/test_fastconformer.py::test_frames_and_gradients_are_the_same_on_a_mesh*": MESH,
    "perception/test_fastconformer.py::test_padding_and_neighbours*?True-changes1?": VARIANT,
    "perception/test_streaming.py::*?one frame, looking ahead everywhere?": VARIANT,
    "speech_decoder/test_decoder_mesh.py::test_loss_and_gradients*": (
        "multidevice/test_duplex_meshes.py puts the whole model on a mesh quickly"
    ),
    "test_duplex_library.py::*": "strings together pieces that are tested alone",
    "test_library.py::test_a_stopped_run_resumes_bit_for_bit": (
        "training/test_resume.py stops and resumes a smaller model in every way"
    ),
    "training/test_fit.py::test_a_trace_ends_with_the_run*": VARIANT,
    "training/test_processes.py::test_two_processes_are_one_run*": (
        "three processes of train.py, 50 s of a core; what each does alone is tested quickly"
    ),
    "training/test_resume.py::test_a_signal_saves*?SIGTERM*": VARIANT,
    "parity/test_llm.py::*mistral*": FAMILY,
    "parity/test_llm.py::*qwen2*": FAMILY,
    "parity/test_llm.py::*nemotron*": FAMILY,
    "parity/test_llm_families.py::*transformers?starcoder2?": FAMILY,
    "parity/test_llm_families.py::*transformers?exaone4?": FAMILY,
    "parity/test_llm_families.py::*transformers?ministral?": FAMILY,
    "parity/test_llm_families.py::*transformers?hunyuan_v1_dense?": FAMILY,
    "parity/test_llm_families.py::*transformers?seed_oss?": FAMILY,
    "parity/test_llm_families.py::*transformers?apertus?": FAMILY,
    "parity/test_llm_families.py::*transformers?smollm3?": FAMILY,
    "parity/test_llm_families.py::*transformers?qwen2?": FAMILY,
    "parity/test_llm_families.py::*transformers?olmo2?": FAMILY,
    "codec/test_convolutions.py::test_blocks_of_positions*channels0?": VARIANT,
    "codec/test_convolutions.py::test_blocks_of_positions*channels1?": VARIANT,
    "codec/test_convolutions.py::test_blocks_of_positions*channels2?": VARIANT,
    "parity/test_speech_decoder.py::*same_dim*": VARIANT,
    "parity/test_perception.py::*enc_ss1_adapter*": VARIANT,
    "parity/test_perception.py::*multi_lookahead*": VARIANT,
    "parity/test_perception.py::*f80_NA*": VARIANT,
    "parity/test_perception.py::*f64_exact_pad*": VARIANT,
    "parity/test_perception.py::*conformer_adapter?": VARIANT,
    "parity/test_perception.py::*long_audio*?0.35?": VARIANT,
    "parity/test_duplex.py::test_offline_inference_equals_nemo?duplex_s2s?": DUPLEX,
    "training/test_resume.py::test_a_flipped_bit*?6?": VARIANT,
    "training/test_resume.py::test_stop_at_step*?3?": VARIANT,
    "test_checkpointing.py::test_the_best_and_the_latest*kept1-4?": VARIANT,
    "test_checkpointing.py::test_the_best_and_the_latest*kept2-2?": VARIANT,
    "parity/test_duplex.py::test_perception_equals_nemo?duplex_s2s_speech_decoder_cfg?": KINDRED,
    "models/test_duplex_model.py::test_drawn_speech_depends*?duplex_s2s_speech_decoder?": KINDRED,
    "speech_decoder/test_decoder.py::test_padding_and_neighbours_change_no_score": KINDRED,
    "parity/test_codec.py::test_resampling*lfr22_tiny*": CODEC,
    "parity/test_codec.py::test_encoding_a_batch*nano12_tiny-batch?": CODEC,
    "parity/test_codec.py::test_decoding_a_batch*nano12_tiny?": CODEC,
    "layers/test_block_attention.py::*?20?": VARIANT,
    "parity/test_speech_decoder.py::test_attention_weights*noncausal_k3?": VARIANT,
    "perception/test_audio_perception.py::test_bucket_order_and_empty_clips*?whole?": KINDRED,
    "networks/test_salm_invariants.py::test_packed_conversations*": KINDRED,
    "networks/test_salm_invariants.py::test_grouping*": KINDRED,
    "multidevice/test_salm_meshes.py::*qwen3_lora-fsdp=2 tensor=2 sequence context=2?": MESH,
    "multidevice/test_inference_meshes.py::test_decoding_moves_no_weight*": (
        "tokens on the same mesh are quick; what is moved changes with sharding.py and linear.py"
    ),
    "parity/test_salm.py::test_five_adamw_steps*?qwen3_tied_full?": VARIANT,
    "speech_decoder/test_decoder.py::test_neither_padding_nor_remat*": KINDRED,
    "models/test_ctc_model.py::test_every_parameter_gets_a_gradient": KINDRED,
    "parity/test_duplex.py::test_channels_of_the_other_batch*": VARIANT,
    "layers/test_quantized.py::test_a_window_attends*": KINDRED,
    "layers/test_quantized.py::test_slots_and_drafts*": KINDRED,
    "parity/test_llm_families.py::*transformers?olmo3?": FAMILY,
    "parity/test_llm_families.py::*transformers?cohere2?": FAMILY,
    "parity/test_llm_families.py::*transformers?nemotron?": FAMILY,
    "parity/test_llm_families.py::*transformers?llama-yarn?": FAMILY,
    "parity/test_llm.py::*?llama*": (
        "parity/test_salm.py compares a SALM on a Llama quickly: logits, gradients, generations"
    ),
    "parity/test_duplex.py::test_losses_equal_nemos*cfg-rest?": VARIANT,
    "parity/test_salm.py::test_inputs_and_logits*_full?": FORWARD,
    "parity/test_salm.py::test_validation_loss*_full?": FORWARD,
    "parity/test_salm.py::test_public_forward*?qwen3_lora?": VARIANT,
    "parity/test_speech_decoder.py::test_steps_with*?xattn_k3-(4, 6, 3)?": VARIANT,
    "parity/test_perception.py::test_encoder*?enc_offline_nobias?": (
        "perception/test_fastconformer.py compares an encoder without biases quickly"
    ),
}
"""Pattern over `path below tests/::name[case]` -> why it is not run every time."""
WHOLE = 2000
"""So many tests are the whole suite: every pattern must then name one."""


def mark_slow(items: list[pytest.Item]) -> None:
    """Marks the tests of `SLOW`. Raises UsageError for a pattern that names no test."""
    unused = set(SLOW)
    for item in items:
        name = item.nodeid.removeprefix("tests/")
        for pattern in _matching(name):
            item.add_marker(pytest.mark.slow)
            unused.discard(pattern)
    if unused and len(items) >= WHOLE:
        raise pytest.UsageError(f"tests/slow_variants.py: no test is named {sorted(unused)}")


def _matching(name: str) -> Iterator[str]:
    return (pattern for pattern in SLOW if fnmatchcase(name, pattern))
