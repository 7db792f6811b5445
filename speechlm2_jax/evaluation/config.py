"""Arguments of evaluate.py: those of NeMo's salm_eval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from speechlm2_jax.evaluation.metrics.task_metrics import check_metrics
from speechlm2_jax.evaluation.metrics.wer import check_normalizer
from speechlm2_jax.inference.long_form.chunks import DEFAULT_MAX_AUDIO_S
from speechlm2_jax.settings import Refusal, SettingsError

if TYPE_CHECKING:
    from speechlm2_jax.inference.request.generation_request import Vocabulary

_ONE_RESPONSE = "an evaluation takes one whole response to each recording; leave it out"
_OWN_KEYS = {
    "max_new_tokens": "set max_new_tokens instead",
    "max_length": "set max_new_tokens instead",
    "eos_token_id": "set extra_eos_tokens instead",
    "pad_token_id": "the model decides it; leave it out",
    "num_return_sequences": _ONE_RESPONSE,
    "return_dict_in_generate": _ONE_RESPONSE,
    "should_stop": _ONE_RESPONSE,
    "max_audio_s": "set max_audio_s instead",
    "assistant_model": "set draft instead",
    "drafts": "set draft instead",
    "enable_thinking": "the prompt format decides it; leave it out",
}
"""Keys of a GenerationConfig that `generation` refuses, and what to do instead."""
_NO_SPEECH = "only a duplex model generates speech; remove it"
_NO_SUCH_AXIS = "set strategy or tp_size instead: whole layers, experts and sequences stay together"
CHANGE_NO_RESPONSE = frozenset(
    (
        *("pretrained_name", "batch_size", "continuous_batching", "device", "devices", "verbose"),
        *("strategy", "tp_size", "num_nodes"),
        *("use_normalizer", "encoder_wer", "output_manifest", "report", "report_rows", "metrics"),
        *("controls", "seeds"),
        "audio_folder",
    )
)
"""Keys that may change when an evaluation is resumed. The model is identified by its weights, not
by its name."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What to evaluate, on which inputs, and where to write the results."""

    pretrained_name: str
    """Run directory, saved model, NeMo or Hugging Face directory, or hub name."""
    inputs: str | tuple[str, ...]
    """NeMo manifest, conversations, Lhotse cuts, SHAR directory, audio file, folder of audio files,
    or a YAML file of entries as in `input_cfg`; or a list of these."""
    batch_size: int = 64
    """Recordings processed at once by each data-parallel device."""
    continuous_batching: bool = True
    """Replace a finished sequence by the next recording. Beam search always uses plain batches."""
    max_new_tokens: int = 128
    max_audio_s: float | None = DEFAULT_MAX_AUDIO_S
    """Longer recordings are split into overlapping chunks; null: no limit."""
    output_manifest: str | None = "generations.jsonl"
    verbose: bool = True
    """Print each reference and hypothesis, and the word errors of each batch."""
    use_normalizer: str | bool | None = "english"
    metrics: tuple[str, ...] = ("wer",)
    """Metrics of the responses, with 95 % intervals: wer, cer, bleu, chrf, intent (JSON commands),
    mcq (a letter), instruction (form and content), perplexity (of the references)."""
    device: str = "auto"
    """auto, cpu, gpu (cuda) or tpu; with an index, as in gpu:1, that device alone."""
    devices: int = -1
    """Number of devices, of each process if there are several; -1: all."""
    strategy: object = None
    """How they share the work, as `trainer.strategy`; null: each has a copy of the weights where
    one fits, else as few as can hold it share a copy (`tensor_parallel_size`)."""
    tp_size: int = 1
    """NeMo's key: devices that share one copy of the weights."""
    num_nodes: int = 1
    """Above 1 on Cloud TPU hosts, where several processes are found only if they are expected."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quantize: Literal["int8", "fp8"] | None = None
    """Hold the LLM's weights in 8 bits, with a scale for each output channel."""
    kv_cache_dtype: Literal["int8", "fp8"] | None = None
    """Hold the KV cache in 8 bits, with a scale for each token and head."""
    generation: dict[str, object] = field(default_factory=dict)
    """Keys of transformers' GenerationConfig: `num_beams`, `repetition_penalty`, ..."""
    extra_eos_tokens: tuple[str, ...] | None = None
    """End tokens besides the model's own."""
    system_prompt: str | None = None
    user_prompt: str | None = None
    """Text of the user turn; the audio follows it, unless it contains the audio locator tag. For
    conversations, as NeMo's tag `context`: a turn before the first recording."""
    swap_audio: bool = False
    """Give every utterance the audio of another, to show that the model uses the audio."""
    controls: bool = False
    """Also generate with swapped audio and with silence, and score these responses beside the
    model's: what it gets right there it guesses without the audio."""
    seeds: tuple[str, ...] = ()
    """Evaluations of the same training with other seeds, on the same inputs: run folders or output
    manifests. Table and page then have mean and spread."""
    noise: str | None = None
    """Mix noise into every recording: a recording of noise, or `white`."""
    snr_db: float = 12.0
    """With `noise`: how many decibels its power is below that of the recording."""
    use_asr_decoder: bool | None = None
    """Open a SALMWithAsrDecoder, or a SALM; null: what a local directory is, SALM from the hub."""
    draft: str | None = None
    """Speculative decoding with transcripts of an ASR model: `encoder` (the CTC head of the run's
    pretrained encoder), a `.nemo` file, or a run directory of a CTC model; or with a draft LLM: a
    smaller SALM, or the directory of an LLM with the same tokenizer."""
    encoder_wer: bool = False
    """Also score the CTC head of the run's pretrained encoder."""
    report: str | None = None
    """HTML report to write."""
    report_rows: int = 300
    """Number of utterances, worst first, whose audio and spectrogram the report embeds."""

    REFUSED_TORCH: ClassVar[Mapping[str, Refusal]] = {
        "use_nemo_automodel": "NeMo Automodel is a torch library; remove it",
        "report_mtp_acceptance": "multi-token prediction heads are not supported; remove it",
        "ep_size": (_NO_SUCH_AXIS, 1),
        "pp_size": (_NO_SUCH_AXIS, 1),
        "cp_size": (_NO_SUCH_AXIS, 1),
    }
    """Keys of newer NeMo that every kind of model refuses."""
    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        **REFUSED_TORCH,
        **dict.fromkeys(("audio_folder", "scoring_asr", "input_roles", "output_roles"), _NO_SPEECH),
    }

    def __post_init__(self) -> None:
        """Checks ranges. Raises ValueError."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if self.max_audio_s is not None and self.max_audio_s < 1:
            raise ValueError(f"max_audio_s={self.max_audio_s:g} must be at least 1, or null")
        check_metrics(self.metrics)
        if self.generation:
            check_generation(self.generation, self.max_new_tokens)
        if self.draft is not None:
            self._check_draft()
        if self.controls and self.swap_audio:
            raise ValueError("controls: have swapped audio themselves; leave swap_audio out")
        check_common(self.batch_size, self.report_rows, self.use_normalizer)

    @property
    def is_speculative(self) -> bool:
        """Whether draft tokens are used."""
        lookup = self.generation.get("prompt_lookup_num_tokens")
        return self.draft is not None or lookup is not None

    def _check_draft(self) -> None:
        if int(str(self.generation.get("num_beams") or 1)) > 1:
            raise SettingsError("draft: beam search has no drafts; leave it or num_beams out")
        if self.generation.get("prompt_lookup_num_tokens") is not None:
            raise SettingsError(
                "draft: generation.prompt_lookup_num_tokens is a source of drafts too; give one"
            )


def check_generation(
    keys: Mapping[str, object], max_new_tokens: int, model: "Vocabulary | None" = None
) -> None:
    """Raises SettingsError for keys that `generate` refuses, of `model` or else of any model."""
    from speechlm2_jax.inference.request.generation_request import ANY_VOCABULARY, read_request

    for key, hint in _OWN_KEYS.items():
        if keys.get(key) is not None:
            raise SettingsError(f"generation.{key}: {hint}")
    try:
        read_request(model or ANY_VOCABULARY, {**keys, "max_new_tokens": max_new_tokens})
    except ValueError as error:
        joint = "." if str(error).startswith(tuple(keys)) else ": "
        raise SettingsError(f"generation{joint}{error}") from error


def check_common(batch_size: int, report_rows: int, use_normalizer: str | bool | None) -> None:
    """Checks the arguments that all kinds of model share. Raises ValueError."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    if report_rows < 0:
        raise ValueError(f"report_rows={report_rows} must be at least 0")
    check_normalizer(use_normalizer)


def output_file(key: str, name: str | None, inputs: Sequence[str]) -> Path | None:
    """The output file of argument `key`, or None.

    Raises SettingsError for a folder, for what is no regular file, and for one of the inputs.
    """
    if name is None:
        return None
    path = Path(name)
    if path.is_dir():
        raise SettingsError(f"{key}: {name} is a folder; name a file")
    if path.exists() and not path.is_file():
        raise SettingsError(f"{key}: {name} is no regular file; name a file, or null for none")
    if path.is_file() and any(path.samefile(p) for p in map(Path, inputs) if p.is_file()):
        raise SettingsError(f"{key}: {name} is an input itself; name another file")
    return path
