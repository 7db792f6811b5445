"""The configurations that NeMo's dataloader was recorded with, by what is equal here."""

UNSHUFFLED = [
    "bs4",
    "bs3_qwen",
    "bs4_max_duration",
    "conv_jsonl_finite",
    "conv_jsonl_finite_context_tag",
    "nemo_manifest",
    "nemo_manifest_tags_override_context",
    "conv_tarred",
    "share_gpt",
    "share_gpt_webdataset",
    "nemo_tarred",
]
"""Equal batch by batch: ids, order, lengths, token ids, masks, audio."""
ENDLESS = ["conv_jsonl_infinite_iterable", "shar", "shar_infinite"]
"""Equal in training: NeMo's order of shards, and batches across the end of a pass."""
SHUFFLED = [
    "bs4_shuffle",
    "bs4_shuffle_small_buffer",
    "bs5_shuffle_seed7_droplast",
    "conv_jsonl_shuffle",
    "conv_tarred_shuffle",
]
"""Another order of the same conversations, in as many batches of the same sizes."""
MIXED = ["mux_weights", "mux_noweights", "mux_group_temperature"]
"""The same conversations, or the same shares."""
BUDGETS = [
    "mm_tokens",
    "mm_tokens_shuffle",
    "mm_tokens_input_only",
    "mm_tokens_quadratic",
    "mm_tokens_and_bs",
    "mm_bucketing_estimated_bins",
]
"""The same conversations, each batch within NeMo's budget; in order, in no more batches."""
IN_ORDER = ["mm_tokens", "mm_tokens_input_only", "mm_tokens_quadratic", "mm_tokens_and_bs"]
BINS = [
    "mm_bucketing_bins",
    "mm_bucketing_bins_shuffle",
    "mm_bucketing_smallbuf_shuffle",
    "mm_bucketing_concurrent",
    "mm_bucket_batch_size_1d",
    "mm_bucket_batch_size_1d_shuffle",
]
"""The same conversations, those of one bin together, in batches of at least NeMo's size."""
SECONDS = [
    "cuts_batch_duration",
    "cuts_batch_duration_shuffle",
    "cuts_batch_duration_bucketing",
    "cuts_batch_duration_bucketing_bins",
    "cuts_batch_duration_bucketing_bins_quadratic",
    "cuts_bucket_batch_size",
    "cuts_max_duration_linspace_bins",
]
"""Plain cuts, which only duplex models read here: the same ones, each batch within the budget."""
NEMO_IS_WRONG = {
    "conv_jsonl_finite_system_tag_llama2(expected odd)": "the system prompt comes twice",
    "system_prompt_tag_llama2(bug)": "the system prompt comes twice",
    "conv_batch_duration_bucketing(expected error)": "it crashes; batch_duration is refused here",
}
PAIRS = ["mm_bucket_2d_strict", "mm_bucket_2d_lenient", "mm_bucket_2d_max_tpt"]
"""Bins of [input, output]: the same conversations, those of one bin together, in NeMo's sizes."""
FUSED = ["cuts_multi_config_round_robin", "cuts_multi_config_zip"]
"""Batches of several sets: the same in order; shuffled, of the same sizes."""
FILTERED = ["mm_tokens_min_max_tokens", "mm_tokens_max_tpt", "bs4_max_duration"]
