"""SALM, the user-facing class: network, tokenizer, settings and weights."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from speechlm2_jax import sharding
from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.batches import BatchShape, HostBatch, SalmBatch, SalmExample, StepLosses
from speechlm2_jax.data.prompts import PromptFormatter
from speechlm2_jax.inference import ahead_of_time, continuous_batching, generate, meshes, stages
from speechlm2_jax.inference.audio_inputs import Recordings
from speechlm2_jax.inference.continuous_batching import FinishedPrompt
from speechlm2_jax.inference.draft_models import DraftModel, decoder_graphdef
from speechlm2_jax.inference.engine import Engine
from speechlm2_jax.inference.generate import PromptInputs
from speechlm2_jax.inference.long_form.chunks import DEFAULT_MAX_AUDIO_S
from speechlm2_jax.inference.prompts import Dialog, Prompts
from speechlm2_jax.inference.recordings_to_text import check_timestamps
from speechlm2_jax.inference.request.generation_request import (
    GenerationConfigLike,
    GenerationRequest,
    read_request,
)
from speechlm2_jax.inference.text_stream import Piece, last_output
from speechlm2_jax.inference.timed_text import Transcript
from speechlm2_jax.inference.timestamps.aligner import Aligner
from speechlm2_jax.inference.transcribe import PromptOptions, transcribe_by_prompt
from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.models.aligners import usual_aligner
from speechlm2_jax.models.base import SpeechModel
from speechlm2_jax.models.finding_aligners import find_aligner
from speechlm2_jax.networks import salm as salm_network
from speechlm2_jax.networks.flops import EncodedAudio, salm_flops
from speechlm2_jax.networks.salm import Salm, SalmModes
from speechlm2_jax.pretrained import salm
from speechlm2_jax.pretrained.salm import SalmBlueprint
from speechlm2_jax.pretrained.salm_config import SalmModelConfig
from speechlm2_jax.sharding import Sharding


class SALM(SpeechModel):
    """A decoder LLM with audio input: FastConformer -> modality adapter -> projection -> LLM.

    `cfg` is NeMo's `model:` block as a plain dict. Weights come from `pretrained_llm` and
    `pretrained_asr` unless `pretrained_weights` is false. Raises SettingsError, before anything is
    compiled, for a bad key, a missing file, a missing token or widths that do not fit.
    """

    CONFIG: ClassVar[type[SalmModelConfig]] = SalmModelConfig
    _blueprint: SalmBlueprint

    @classmethod
    def read_blueprint(cls, cfg: Mapping[str, object], near: tuple[Path, ...]) -> SalmBlueprint:
        """Reads configs and tokenizer, no weights."""
        return salm.read_blueprint(cfg, near)

    @property
    def audio_locator_tag(self) -> str:
        """The placeholder text of one audio clip in a prompt."""
        return self._blueprint.config.audio_locator_tag

    @property
    def audio_locator_tag_id(self) -> int:
        """Token id of the placeholder."""
        return self._blueprint.placeholder_id

    def __call__(
        self, input_embeds: ArrayLike, attention_mask: ArrayLike | None = None
    ) -> dict[str, jax.Array]:
        """Runs the LLM over embeddings [B, T, D] with a bool mask [B, T]: {"logits": [B, T, V]}."""
        embeds = jnp.asarray(input_embeds)
        mask = jnp.ones(embeds.shape[:2], bool) if attention_mask is None else attention_mask
        variables = self._inference_variables()
        logits = stages.text_logits(self._graphdef, variables, embeds, jnp.asarray(mask, bool))
        return {"logits": logits}

    def generate(
        self,
        prompts: Prompts,
        audios: ArrayLike | None = None,
        audio_lens: ArrayLike | None = None,
        generation_config: GenerationConfigLike = None,
        enable_thinking: bool | None = None,
        *,
        draw_numbers: Sequence[int] | None = None,
        **generation_kwargs: Any,
    ) -> np.ndarray | generate.Generated:
        """Generates responses: int32 ids [B, T], padded with `text_pad_id` after each one's end.

        With audio, only new tokens are returned; a prompt of text alone is returned before them, as
        in NeMo. With `num_return_sequences` the sequences of one prompt are adjacent, and
        `return_dict_in_generate` gives a `Generated`.

        - `prompts`: dialogs, or token ids [B, L] padded on the left. A dialog is a list of turns
          with `role`, `content` (text, or a list of text and audio parts) or `slots`, and
          optionally `audio`: paths, arrays, `(rate, array)` or dicts of datasets.
        - `audios` [B', S], float at `sampling_rate`, with `audio_lens` [B']: one clip per
          placeholder, in order.
        - `generation_config`: a transformers GenerationConfig or a dict of its keys. Keywords
          override it; docs/generation.md lists every key, also `seed`, `should_stop`, `drafts` and
          `assistant_model` (speculative decoding: the same tokens in fewer passes) and
          `max_audio_s` (longer audio is split into overlapping chunks, whose texts are joined).
        - `enable_thinking=False` starts the response after an empty thought, where the prompt
          format has thoughts.
        - `draw_numbers`: the number that seeds each prompt's random draws, 0, 1, ... by default.

        Raises ValueError for what is not supported.
        """
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        request = self._request(generation_config, {**generation_kwargs, **thinking})
        inputs = PromptInputs(prompts, audios, audio_lens)
        return generate.generate(self._engine(), inputs, request, draw_numbers)

    def stream(
        self,
        prompts: Prompts,
        audios: ArrayLike | None = None,
        audio_lens: ArrayLike | None = None,
        generation_config: GenerationConfigLike = None,
        *,
        tokens_at_once: int = 8,
        **generation_kwargs: Any,
    ) -> Iterator[Piece]:
        """Generates as `generate` does, and yields the text as it comes.

        Takes what `generate` takes, except beam search. Each `Piece` is new text of one sequence,
        without the prompt. The first piece comes with the first token, later ones after up to
        `tokens_at_once` tokens; the host waits for the device each time. To stop, leave the loop.
        The joined ids of a sequence are those of `generate`, and its joined texts are
        `tokenizer.ids_to_text` of them. Raises ValueError, at the call, for what is not supported.
        """
        request = self._request(generation_config, generation_kwargs)
        inputs = PromptInputs(prompts, audios, audio_lens)
        return generate.stream(self._engine(), inputs, request, tokens_at_once)

    def generate_each(
        self,
        prompts: Iterable[Dialog],
        generation_config: GenerationConfigLike = None,
        *,
        slots: int = 64,
        draw_numbers: Iterable[int] | None = None,
        **generation_kwargs: Any,
    ) -> Iterator[list[FinishedPrompt]]:
        """Continuous batching: generates for a stream of dialogs, `slots` of them at a time.

        `prompts`: any number of dialogs as `generate` takes them, with their audio inside. They are
        read as slots become free. Yields lists of `FinishedPrompt` (number of the prompt, ids) as
        they end. The ids are those of `generate` on all prompts, greedy or sampled (`draw_numbers`
        seed the random draws of each prompt; 0, 1, ... by default). With speculative decoding each
        `FinishedPrompt` also counts its draft tokens (`drafted`, `accepted`).

        Raises ValueError, at the call, for beam search, several sequences per prompt, stop strings
        and time limits. An invalid prompt raises ValueError, with its number, after the
        responses to all prompts before it.
        """
        request = self._request(generation_config, generation_kwargs)
        return continuous_batching.generate_each(
            self._engine(), prompts, request, slots, draw_numbers
        )

    def transcribe(
        self,
        audio: Recordings,
        *,
        prompt: str = "Transcribe the following:",
        batch_size: int = 4,
        max_new_tokens: int = 128,
        timestamps: str | bool | None = None,
        max_audio_s: float | None = DEFAULT_MAX_AUDIO_S,
        aligner: Aligner | str | None = None,
        **generation_kwargs: Any,
    ) -> list[Transcript]:
        """Transcribes recordings of any length with a prompt; each text is a str.

        `audio`: a path, an array [S] at `sampling_rate`, `(rate, array)` or a dict of datasets, or
        a list of these, which are read `batch_size` at a time. `prompt` is the user's turn; use the
        prompt of training. The recording replaces the `audio_locator_tag` in it, or follows it.
        Longer audio than `max_audio_s` seconds is cut at pauses; parts without speech have no text.

        With `timestamps` "segment" a text also has `segments` with times in seconds, with "word"
        their `words` too. `aligner` finds them: an ASR model's name or path, or `aligner()` by
        default. Other keywords are those of `generate`. Raises AudioError for an unusable
        recording, ValueError for any other value.
        """
        options = PromptOptions(
            prompt=prompt,
            batch_size=batch_size,
            timestamps=check_timestamps(timestamps),
            max_audio_s=max_audio_s,
            generation={**generation_kwargs, "max_new_tokens": max_new_tokens},
            find_aligner=lambda: find_aligner(aligner, self.aligner),
        )
        return transcribe_by_prompt(self, audio, options)

    def aligner(self) -> Aligner | None:
        """What finds the times of words, opened at the first call.

        The CTC head that its encoder was trained with, if its `pretrained_asr` is on this machine
        and has one; else `timestamps.DEFAULT_ALIGNER`. None, after a warning, if neither is here.
        """
        return self._usual_aligner

    @cached_property
    def _usual_aligner(self) -> Aligner | None:
        named = {**self._blueprint.cfg, **(self._blueprint.named or {})}
        origin = self._blueprint.origin
        near = (*self._blueprint.near, *([] if origin is None else [origin]))
        return usual_aligner(named.get("pretrained_asr"), near)

    def as_draft_model(self) -> DraftModel:
        """The model as the source of draft tokens of another (`assistant_model`)."""
        variables, prefix = self._decoding_variables(), "llm."
        network = self._blueprint.network
        return DraftModel(
            graphdef=decoder_graphdef(network.llm, network.lora, self._quantization),
            variables={
                path.removeprefix(prefix): value
                for path, value in variables.items()
                if path.startswith(prefix)
            },
            tokenizer=self.tokenizer,
            dtype=self.compute_dtype.name,
            engine=self._engine(),
        )

    def _request(self, config: GenerationConfigLike, asked: Mapping[str, Any]) -> GenerationRequest:
        """Reads the options of a call; opens the draft LLM that `assistant_model` names."""
        assistant = asked.get("assistant_model")
        if isinstance(assistant, str | Path):
            from speechlm2_jax.models.draft_llm import open_assistant

            opened = open_assistant(assistant, self.compute_dtype.name)
            asked = {**asked, "assistant_model": opened}
        return read_request(self, config, asked)

    def answer(self, prompts: Sequence[SalmExample], max_new_tokens: int) -> np.ndarray:
        """Generates greedily for tokenized prompts: int32 ids [B, T], padded after each end."""
        request = read_request(self, {"max_new_tokens": max_new_tokens})
        return last_output(generate.run_generation(self._engine(), prompts, request)).trimmed()

    def generation_layout(self, placement: Sharding) -> dict[str, jax.ShapeDtypeStruct]:
        """Dtype and sharding of every variable for inference."""
        return meshes.variable_layout(self.infos, self.compute_dtype, placement)

    def compile_generation(
        self, placement: Sharding, shape: BatchShape, max_new_tokens: int
    ) -> Any:
        """Compiles greedy generation for devices that need not exist on this machine; nothing runs.

        `shape` is that of one data-parallel shard's prompts. Returns what
        `jax.jit(...).lower(...).compile()` does.
        """
        engine = self._engine_on(self.generation_layout(placement), placement)
        return ahead_of_time.compile_ahead(engine, shape, max_new_tokens)

    def engine(self) -> Engine:
        """The model for inference, as `serving` runs it."""
        return self._engine()

    def _engine(self) -> Engine:
        """The model for inference, on the devices of its weights."""
        mesh = sharding.mesh_of(self.variables)
        placement = None if mesh is None else sharding.for_inference(mesh)
        return replace(
            self._engine_on(self._inference_variables(), placement),
            decoding_variables=self._decoding_variables(),
            open_aligner=self.aligner,
        )

    def _engine_on(
        self,
        variables: Variables | Mapping[str, jax.ShapeDtypeStruct],
        placement: Sharding | None,
    ) -> Engine:
        return Engine(
            graphdef=self._graphdef,
            variables=variables,
            decoding_variables=variables,
            placement=placement,
            tokenizer=self.tokenizer,
            prompt_formatter=self.prompt_formatter,
            frame_count=self.frame_count,
            sampling_rate=self.sampling_rate,
            audio_locator_tag=self.audio_locator_tag,
            audio_locator_tag_id=self.audio_locator_tag_id,
            text_bos_id=self.text_bos_id,
            text_eos_id=self.text_eos_id,
            text_pad_id=self.text_pad_id,
            end_ids=self.end_ids,
            generation_defaults=self.generation_defaults,
            text_vocab_size=self.text_vocab_size,
            nemo_exact=self.nemo_exact,
        )

    @property
    def averages_tokens(self) -> bool:
        """Whether validation takes means over tokens with `nemo_exact` too, as SALMAutomodel."""
        return self._blueprint.config.use_nemo_automodel

    @property
    def loss_is_of_tokens(self) -> bool:
        """Whether the exponential of the mean loss is a perplexity."""
        return True

    @property
    def end_ids(self) -> tuple[int, ...]:
        """All tokens that end a response by default: the tokenizer's and the LLM's."""
        return self._blueprint.end_ids

    @property
    def generation_defaults(self) -> Mapping[str, Any]:
        """The LLM's generation_config.json, which `generate` takes what a call leaves open from."""
        return self._blueprint.generation_defaults

    @property
    def prompt_formatter(self) -> PromptFormatter:
        """Formats dialogs in the model's chat format."""
        return self._blueprint.formatter

    def losses(
        self,
        variables: Variables,
        batch: SalmBatch[jax.Array],
        *,
        key: jax.Array | None,
        train: bool,
    ) -> StepLosses:
        """Sums of next-token cross-entropy and accuracy; pure and traceable."""
        if self.nemo_exact:
            batch = batch.without_id(self.text_pad_id)
        network: Salm = merge(self._graphdef, variables)
        modes = self._training_modes() if train else SalmModes()
        return salm_network.losses(network, batch, modes, key if train else None)

    def flops(self, batch: HostBatch) -> float:
        """Model FLOPs of one training step on `batch`."""
        return self._flops(batch, self.trainable)

    def _flops(self, batch: HostBatch, trainable: Mapping[str, bool | np.ndarray]) -> float:
        arrays: SalmBatch[np.ndarray] = batch.arrays
        perception = self._blueprint.network.perception
        clips = [int(n) for n in arrays.audio_lengths.reshape(-1)]
        audio = EncodedAudio(
            encoded=np.array([f for n in clips for f in perception.encoded_counts(n)] or [0]),
            adapted=np.array([perception.frame_count(n) for n in clips] or [0]),
            subsampling_factor=perception.encoder.subsampling_factor,
        )
        return salm_flops(self.infos, trainable, arrays, audio)

    def generation_flops(self, batch: HostBatch) -> float:
        """Model FLOPs of one forward pass over `batch`, prompts and responses together."""
        return self._flops(batch, dict.fromkeys(self.infos, False))

    def count_tokens(self, batch: HostBatch) -> tuple[int, int]:
        """Counts a batch's (tokens without padding, tokens with padding)."""
        segments = batch.arrays.segments
        return int((segments > 0).sum()), int(segments.size)

    def _training_modes(self) -> SalmModes:
        return SalmModes(
            perception=self._perception_modes(),
            llm=self.is_trained("llm."),
        )
