"""Settings of data: NeMo's keys, with the meaning they have here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from speechlm2_jax.data.augmentation.config import AugmentationConfig
from speechlm2_jax.data.input_config import InputConfig, ManifestPaths, Paths, SharPath, TarPaths
from speechlm2_jax.data.paths import checked_path, local_file
from speechlm2_jax.data.storage.access import StorageAccess, using
from speechlm2_jax.data.storage.addresses import is_remote
from speechlm2_jax.settings import Refusal, SettingsError

L = TypeVar("L", float, np.ndarray)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The `data` block: each key holds the keys of one stream, or several under `datasets`."""

    train_ds: Mapping[str, object] | None = None
    validation_ds: Mapping[str, object] | None = None
    test_ds: Mapping[str, object] | None = None
    allowed_roots: tuple[str, ...] | None = None
    """Folders, and prefixes of addresses, that all data must lie in, whatever a manifest names;
    null: everywhere. Links and redirects are followed before the comparison."""
    allowed_schemes: tuple[str, ...] | None = None
    """`file` (paths), `http`, `https`, `s3`, `gs` and others that may be read; null: all."""

    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        "predict_ds": "use evaluate.py for inference on recordings",
    }


@dataclass(frozen=True, kw_only=True)
class LoaderConfig(AugmentationConfig):
    """Keys of one stream of batches: `train_ds`, or one set of `validation_ds.datasets`.

    Kinds of data add keys of their own, such as the budget of a batch.
    """

    BUDGET_KEYS: ClassVar[tuple[str, str]]
    """Keys of the budget of a group, and of the length that counts twice against it."""
    COUNTS_TOKENS: ClassVar[bool] = False
    """Whether lengths are tokens of input and output, else seconds."""

    # what to read
    input_cfg: str | tuple[InputConfig, ...] | None = None
    """Entries, or the path of a YAML file with them."""
    cuts_path: Paths | None = None
    manifest_filepath: ManifestPaths | None = None
    tarred_audio_filepaths: TarPaths | None = None
    """Of `manifest_filepath`: the tars with its recordings."""
    skip_missing_manifest_entries: bool = False
    """Of tars: leaves out members without a row, and rows without a member."""
    shar_path: SharPath | None = None
    reweight_temperature: float | tuple[float, ...] | None = None
    """Exponent of the weights, one for all levels of groups or one for each."""
    # how it is read
    sample_rate: int = 16000
    """All audio is resampled to it."""
    channel_selector: int | Literal["average"] | None = None
    """Channel of multi-channel audio; average (or null) is the mean."""
    stream: bool | None = None
    """Of training: tars are read from front to end, and nothing at random; null: where a tar is
    remote (docs/data.md)."""
    shuffle_buffer_size: int = 10000
    """Of streams with `shuffle`: examples of each group that wait to be shuffled (up to four times
    as many where none of them fits a step); else the order is shuffled over the whole of the
    data."""
    num_cuts_for_bins_estimate: int = 10000
    """Of streams: rows that shapes are planned by; else all are measured."""
    # in which order
    seed: int | str = 0
    """Of the order; `trng` and `randomized` are taken for 0, as hosts must agree."""
    shuffle: bool = False
    """Anew in each epoch; else in the order of the manifests. As in NeMo, the shards of SHAR come
    in another order in each pass of training all the same, and their cuts in order."""
    shard_seed: int | str = "trng"
    """Of the order of SHAR's shards; an integer gives NeMo's, `trng` and `randomized` are taken for
    `seed`, as hosts must agree."""
    # how much at once
    batch_size: int | None = None
    """Conversations per group; with a budget, at most so many."""
    use_bucketing: bool = False
    """Buckets of `num_buckets`; without it a few are chosen that leave little padding."""
    bucket_duration_bins: tuple[Any, ...] | None = None
    """Upper ends of the buckets, in the unit of lengths; a last bucket takes what is longer."""
    bucket_batch_size: tuple[int, ...] | None = None
    """Conversations of each of `bucket_duration_bins`; what is longer than all is left out."""
    num_buckets: int = 30
    """Each is a shape, so a program to compile."""
    drop_last: bool = False
    """Leaves out the batch of an epoch that is not full."""
    keep_outliers: bool = False
    """Keeps outliers in length, with a warning (docs/data.md)."""
    # how it is read ahead
    num_workers: int = 1
    """Threads that read audio ahead, in each process that does."""
    worker_processes: int = 0
    """Processes that read training data ahead, for augmentation; 0: threads of the run's own."""
    read_timeout: float | None = 300.0
    """Seconds after which a recording that does not arrive counts as unusable; null: never."""
    allowed_roots: tuple[str, ...] | None = None
    """Folders and prefixes of addresses that may be read; null: those of `data`."""
    allowed_schemes: tuple[str, ...] | None = None
    """Schemes that may be read; null: those of `data`."""
    max_error_rate: float | None = None
    """Stops the run if a larger share of the last 1000 conversations could not be used."""

    ALIASES: ClassVar[Mapping[str, str]] = {
        "tarred_random_access": "skip_missing_manifest_entries",
    }
    IGNORED: ClassVar[Mapping[str, str]] = {
        "bucket_buffer_size": "buckets are filled from the whole of the data",
        "concurrent_bucketing": "plans are made ahead of time",
        "max_open_streams": "every manifest is read once, at start-up",
        "pin_memory": "JAX has no pinned-memory option",
        "cuda_expandable_segments": "XLA manages device memory",
        "force_finite": "validation is finite and training is not",
        "force_map_dataset": "there is one kind of data set",
        "force_iterable_dataset": "there is one kind of data set",
        "metadata_only": "manifests are read without their audio",
        "slice_length": "order is shuffled over whole manifests",
        "use_lhotse": "Lhotse always reads",
        "persistent_workers": "workers last as long as the run",
        "prefetch_factor": "reading ahead follows num_workers",
    }
    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        "multi_config": "train_ds with it holds a block for each set, which has its own table; "
        "validation_ds lists sets under datasets",
        "sampler_fusion": ("it goes with train_ds.multi_config: true", "round_robin"),
        "sampler_weights": "it goes with train_ds.multi_config: true",
    }

    @property
    def storage(self) -> StorageAccess:
        """What may be read, and how long it may take."""
        return StorageAccess(
            roots=self.allowed_roots, schemes=self.allowed_schemes, limit_s=self.read_timeout
        )

    @property
    def budget(self) -> int | float | None:
        """How much a group may hold, padding included, in the unit of lengths."""
        return getattr(self, self.BUDGET_KEYS[0])

    @property
    def quadratic(self) -> float | None:
        """A length counts as length + length**2 / quadratic against the budget."""
        return getattr(self, self.BUDGET_KEYS[1])

    def cost(self, length: L) -> L:
        """What a length, or each of an array, counts against the budget."""
        return length + length**2 / self.quadratic if self.quadratic else length

    @property
    def sums_budget(self) -> bool:
        """Whether the budget holds for the sum of the lengths in a batch, as in NeMo.

        Else for as many of the longest, which in a bucket differ little. Only batches in the order
        of the data mix lengths.
        """
        return self.COUNTS_TOKENS and not (self.shuffle or self.use_bucketing)

    def __post_init__(self) -> None:
        super().__post_init__()
        with using(self.storage):  # raises for an unknown scheme
            self._check_responses()
        highest_hz = self.lowpass_frequencies_interval[1]
        if self.lowpass_enabled and 2 * highest_hz > self.sample_rate:
            raise ValueError(
                f"lowpass_frequencies_interval: {highest_hz} Hz is above half of sample_rate "
                f"({self.sample_rate}); lower it"
            )
        if self.sample_rate < 1:
            raise ValueError(f"sample_rate must be positive, got {self.sample_rate}")
        for name in ("num_workers", "worker_processes"):
            if (count := getattr(self, name)) < 0:
                raise ValueError(f"{name} must not be negative, got {count}")
        if self.max_error_rate is not None and not 0 <= self.max_error_rate <= 1:
            raise ValueError(f"max_error_rate must be from 0 to 1, got {self.max_error_rate}")
        sizes = ("shuffle_buffer_size", "num_cuts_for_bins_estimate")
        for name in ("batch_size", "read_timeout", *sizes, *self.BUDGET_KEYS):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        by_bucket = self.bucket_batch_size is not None and self.bucket_duration_bins is not None
        if self.batch_size is None and self.budget is None and not by_bucket:
            raise ValueError(
                f"no batch size: set batch_size, or {self.BUDGET_KEYS[0]}, or "
                "bucket_batch_size with bucket_duration_bins"
            )
        self._check_bins()

    def _check_responses(self) -> None:
        """A missing manifest of impulse responses is told before anything is read."""
        if self.rir_enabled and self.rir_path is not None:
            try:
                if not is_remote(path := checked_path(self.rir_path)):
                    local_file(path)
            except SettingsError as error:
                raise ValueError(f"rir_path: {error}") from error

    def _check_bins(self) -> None:
        bins, sizes = self.bucket_duration_bins, self.bucket_batch_size
        if self.num_buckets < 1:
            raise ValueError(f"num_buckets must be at least 1, got {self.num_buckets}")
        if bins is not None:
            self._check_order(bins)
        if sizes is not None and (bins is None or len(sizes) != len(bins)):
            raise ValueError("bucket_batch_size needs one entry per entry of bucket_duration_bins")
        if sizes is not None and min(sizes) < 1:
            raise ValueError(f"bucket_batch_size must be positive, got {list(sizes)}")

    def _check_order(self, bins: tuple[Any, ...]) -> None:
        if self.has_2d_bins and not self.COUNTS_TOKENS:
            raise ValueError("bucket_duration_bins: 2-D bins need a prompt; give one length each")
        if self.has_2d_bins and any(not isinstance(b, list | tuple) or len(b) != 2 for b in bins):
            raise ValueError(
                f"bucket_duration_bins: 2-D bins are [input, output] pairs, got {list(bins)}"
            )
        rising = [tuple(b) if self.has_2d_bins else (b,) for b in bins]
        if not rising or rising != sorted(set(rising)) or min(map(min, rising)) <= 0:
            raise ValueError(
                f"bucket_duration_bins must be positive and increasing, got {list(bins)}"
            )
        if self.has_2d_bins and self.bucket_batch_size is None:
            raise ValueError(
                "bucket_duration_bins: 2-D bins need bucket_batch_size, with one entry for each"
            )

    @property
    def has_2d_bins(self) -> bool:
        """Whether bins are [input, output] pairs."""
        return any(isinstance(b, list | tuple) for b in self.bucket_duration_bins or ())


@dataclass(frozen=True, kw_only=True)
class DataLoaderConfig(LoaderConfig):
    """One stream of a SALM: conversations of text and recordings, measured in tokens."""

    audio_locator_tag: str | None = None
    """The token that stands for a recording, for entries without the key."""
    text_field: str = "text"
    """Key of the response in a NeMo manifest's rows."""
    prompt_format: str | None = None
    """`auto`, or a name of NeMo's formats, as llama2 (docs/data.md); null: the model's."""
    token_equivalent_duration: float | None = None
    """Seconds of audio that count as one token where lengths are measured."""
    batch_tokens: int | None = None
    """Tokens per group: the batch size is what fits, by the longest of the bucket."""
    quadratic_factor: float | None = None
    """A length counts as length + length**2 / quadratic_factor against `batch_tokens`."""
    use_multimodal_sampling: bool = False
    """Required by the keys that are token counts, as in NeMo; lengths always count tokens."""
    measure_total_length: bool = True
    """Whether the last turn belongs to the length."""
    packed: bool = False
    """Of training: several conversations in each row, one after another. `batch_size` counts
    rows."""
    packed_tokens: int | None = None
    """LLM positions of a packed row; null: `max_tokens`, or those of a longer conversation."""
    # augmentation
    perturb_speed: bool = False
    """Adds each conversation at 0.9 and 1.1 times its speed: an epoch is three times as long."""
    concatenate_samples: bool = False
    """Joins short conversations of a batch that have one recording and the same context."""
    concatenate_gap_seconds: float = 0.1
    """Silence between joined recordings."""
    concatenate_duration_factor: float = 1.0
    """They last at most so many times the longest of the group, within the shape of the bucket."""
    db_norm: float | None = -25.0
    """Loudness of each recording before it is joined (LUFS); null: as it is."""
    cut_text_into_windows_tokens: int | None = None
    """Texts without a prompt (`txt`, `txt_jsonl`) become examples of so many tokens each."""
    # what to leave out
    min_duration: float | None = None
    """Seconds of all audio of a conversation; one without audio passes."""
    max_duration: float | None = None
    """Seconds of all audio of a conversation."""
    min_tokens: int | None = None
    """Length of a conversation, audio counted by `token_equivalent_duration`."""
    max_tokens: int | None = None
    """Length of a conversation."""
    min_tpt: float = -1.0
    """Least response tokens per prompt token."""
    max_tpt: float | tuple[float, ...] = float("inf")
    """Most response tokens per prompt token; of each bin, if bins are [input, output] pairs."""
    bucketing_2d_strict_mode: bool = True
    """Of bins that are [input, output] pairs: whether the input alone chooses among them; else the
    first bin that holds both."""

    COUNTS_TOKENS: ClassVar[bool] = True
    BUDGET_KEYS: ClassVar[tuple[str, str]] = ("batch_tokens", "quadratic_factor")
    IGNORED: ClassVar[Mapping[str, str]] = {
        **LoaderConfig.IGNORED,
        "lang_field": "the language of a transcript plays no part in the prompt",
        "concatenate_merge_supervisions": "a joined conversation always has one response",
        "pretokenize": "prompts are always tokenised before lengths are measured",
        "min_tps": "NeMo applies it to plain cuts only, never to conversations; use min_tpt",
        "max_tps": "NeMo applies it to plain cuts only, never to conversations; use max_tpt",
        "max_cer": "NeMo applies it to plain cuts only, never to conversations",
        "min_context_speaker_similarity": "NeMo applies it to plain cuts only",
        "keep": "NeMo applies it to plain cuts only",
    }
    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        **LoaderConfig.REFUSED,
        "batch_duration": "conversations are measured in tokens; set batch_tokens and "
        "use_multimodal_sampling",
        "quadratic_duration": "conversations are measured in tokens; set quadratic_factor",
    }

    def __post_init__(self) -> None:
        needs_tokens = {
            "batch_tokens": self.batch_tokens,
            "bucket_duration_bins": self.bucket_duration_bins,
            "cut_text_into_windows_tokens": self.cut_text_into_windows_tokens,
        }
        super().__post_init__()
        if self.cut_text_into_windows_tokens is not None and self.cut_text_into_windows_tokens < 1:
            raise ValueError("cut_text_into_windows_tokens must be at least 1")
        if not (self.concatenate_gap_seconds >= 0 and self.concatenate_duration_factor >= 1):
            raise ValueError(
                "concatenate_gap_seconds must not be negative, nor concatenate_duration_factor "
                f"below 1, got {self.concatenate_gap_seconds} and "
                f"{self.concatenate_duration_factor}"
            )
        for name, value in needs_tokens.items():
            if value is not None and not self.use_multimodal_sampling:
                raise ValueError(
                    f"{name} counts tokens of conversations: set use_multimodal_sampling: true "
                    "with it"
                )
        self._check_packing()
        if isinstance(self.max_tpt, tuple) and not (
            self.has_2d_bins
            and self.bucketing_2d_strict_mode
            and len(self.max_tpt) == len(self.bucket_duration_bins or ())
        ):
            raise ValueError(
                "max_tpt: a list needs 2-D bins in bucketing_2d_strict_mode, and one entry for each"
            )

    def _check_packing(self) -> None:
        tokens = self.packed_tokens
        if tokens is not None and (not self.packed or tokens < 1):
            raise ValueError("packed_tokens must be positive, and goes with packed: true")
        if tokens is not None and tokens > (self.batch_tokens or tokens):
            raise ValueError(
                f"packed_tokens: a row of {tokens} is more than batch_tokens ({self.batch_tokens})"
            )
        if self.packed and self.concatenate_samples:
            raise ValueError(
                "packed: concatenate_samples changes the lengths that rows are planned by; "
                "use one of them"
            )
        if self.packed and self.bucket_batch_size is not None:
            raise ValueError(
                "packed: bucket_batch_size counts conversations; set batch_tokens, or batch_size "
                "in rows"
            )

    @property
    def largest_tpt(self) -> float:
        """Most response tokens per prompt token of any conversation."""
        return float("inf") if isinstance(self.max_tpt, tuple) else self.max_tpt
