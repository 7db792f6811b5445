"""SALM as a user holds it: network, tokenizer, settings and weights in one object."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from speechlm2_jax.batches import BatchShape, HostBatch, SalmBatch, SalmExample, StepLosses
from speechlm2_jax.data.prompts import PromptFormatter
from speechlm2_jax.inference import continuous_batching, generate, stages
from speechlm2_jax.inference.continuous_batching import FinishedPrompt
from speechlm2_jax.inference.request.generation_request import read_request
from speechlm2_jax.inference.text_stream import Piece, last_of
from speechlm2_jax.inference.transcribe import Transcript, transcribe_by_prompt
from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.models.base import SpeechModel
from speechlm2_jax.networks import salm as salm_network
from speechlm2_jax.networks.flops import EncodedAudio, salm_flops
from speechlm2_jax.networks.salm import Salm, SalmModes
from speechlm2_jax.perception.perception import PerceptionModes
from speechlm2_jax.pretrained import salm
from speechlm2_jax.pretrained.salm import SalmBlueprint
from speechlm2_jax.pretrained.salm_config import SalmModelConfig
from speechlm2_jax.sharding import Sharding


class SALM(SpeechModel):
    """A decoder LLM that listens: FastConformer -> modality adapter -> projection -> LLM.

    `cfg` is NeMo's `model:` block as a plain dict. Weights come from `pretrained_llm` and
    `pretrained_asr` unless `pretrained_weights` is false. Raises SettingsError, before anything is
    compiled, for a bad key, a missing file, a missing token or widths that do not fit.
    """

    CONFIG: ClassVar[type[SalmModelConfig]] = SalmModelConfig
    _blueprint: SalmBlueprint

    @classmethod
    def read_blueprint(cls, cfg: Mapping[str, Any], near: tuple[Path, ...]) -> SalmBlueprint:
        """Reads configs and tokenizer, no weights."""
        return salm.read_blueprint(cfg, near)

    @property
    def audio_locator_tag(self) -> str:
        """The text that stands for one audio clip in a prompt."""
        return self._blueprint.config.audio_locator_tag

    @property
    def audio_locator_tag_id(self) -> int:
        """Token id of the placeholder."""
        return self._blueprint.placeholder_id

    def __call__(self, input_embeds: Any, attention_mask: Any = None) -> dict[str, jax.Array]:
        """Runs the LLM over embeddings [B, T, D] with a bool mask [B, T]: {"logits": [B, T, V]}."""
        embeds = jnp.asarray(input_embeds)
        mask = jnp.ones(embeds.shape[:2], bool) if attention_mask is None else attention_mask
        logits = stages.text_logits(self._graphdef, self.variables, embeds, jnp.asarray(mask, bool))
        return {"logits": logits}

    def generate(
        self,
        prompts: Any,
        audios: Any = None,
        audio_lens: Any = None,
        generation_config: Any = None,
        enable_thinking: bool | None = None,
        *,
        draw_numbers: Sequence[int] | None = None,
        **generation_kwargs: Any,
    ) -> np.ndarray | generate.Generated:
        """Answers prompts: int32 ids [B, T], rows padded with `text_pad_id` after they stop.

        `prompts`: dialogs (lists of turns with `role`, `content` or `slots`, optionally `audio`: a
        list of paths, arrays, `(rate, array)` or dicts of datasets; `content` may be a list of text
        and audio parts), or token ids [B, L] padded on the left. `audios` [B', S] float at
        `sampling_rate` with `audio_lens` [B'] give one clip per placeholder, in order. With audio
        only new tokens come back; text-only prompts come back before them, as NeMo does.
        `generation_config`: a GenerationConfig of transformers or a dict of its keys; keywords
        override it, `seed`, `should_stop` (a function; once it gives True, what there is comes
        back) and `max_audio_s` (a longer recording is answered in overlapping chunks, whose texts
        are joined) among them: docs/generation.md has every key. With `num_return_sequences` the
        answers to a prompt lie side by side, and `return_dict_in_generate` gives a `Generated`.
        `enable_thinking=False` opens the answer behind an empty thought, for prompt formats that
        have thoughts. `draw_numbers`, one per prompt and 0, 1, ... by default, are the numbers by
        which random draws go. Raises ValueError for what is not supported.
        """
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        return generate.generate(
            self,
            self._graphdef,
            (prompts, audios, audio_lens),
            generation_config,
            {**generation_kwargs, **thinking},
            draw_numbers,
        )

    def stream(
        self,
        prompts: Any,
        audios: Any = None,
        audio_lens: Any = None,
        generation_config: Any = None,
        *,
        tokens_at_once: int = 8,
        **generation_kwargs: Any,
    ) -> Iterator[Piece]:
        """Answers prompts as `generate` does, and yields the text as it comes.

        Takes what `generate` takes, but no beam search. Each `Piece` is new text of one row; of a
        prompt in text alone only the answer comes. The first comes with the first token, further
        ones after up to `tokens_at_once` tokens: each time the host waits for the device. To stop,
        leave the loop. Joined, the ids of a row are those of `generate`, and its texts
        `tokenizer.ids_to_text` of them. Raises ValueError, at the call, for what is not supported.
        """
        return generate.stream(
            self,
            self._graphdef,
            (prompts, audios, audio_lens),
            generation_config,
            tokens_at_once,
            generation_kwargs,
        )

    def generate_each(
        self,
        prompts: Iterable[Any],
        generation_config: Any = None,
        *,
        slots: int = 64,
        draw_numbers: Iterable[int] | None = None,
        **generation_kwargs: Any,
    ) -> Iterator[list[FinishedPrompt]]:
        """Answers a stream of dialogs, `slots` at a time; what ends makes room for the next.

        `prompts`: dialogs as `generate` takes them, with their audio inside, as many as one likes:
        they are drawn as slots become free. Yields lists of `FinishedPrompt` (number of the prompt,
        ids), as they end. Greedy or drawn (by `draw_numbers`, one per prompt, 0, 1, ... by
        default), the ids are those of `generate` on all prompts. Raises
        ValueError, at the call, for beams, several answers, stop strings, and time limits; and for
        a prompt that cannot be used, with its number, once those before it are answered.
        """
        return continuous_batching.generate_each(
            *(self, self._graphdef, prompts, slots),
            generation_config,
            generation_kwargs,
            draw_numbers,
        )

    def transcribe(
        self,
        audio: Any,
        *,
        prompt: str = "Transcribe the following:",
        batch_size: int = 4,
        max_new_tokens: int = 128,
        **generation_kwargs: Any,
    ) -> list[Transcript]:
        """Transcribes recordings by asking for it; each text is a str that also has `text`.

        `audio`: a path, an array [S] at `sampling_rate`, `(rate, array)` or a dict of datasets, or
        a list of these, which are read `batch_size` at a time. `prompt` is the user's turn; ask as
        the model was trained. The recording follows it, or stands where it has the
        `audio_locator_tag`. Other keywords are those of `generate`. Raises AudioError for a
        recording that cannot be used, ValueError for what is none.
        """
        generation = {**generation_kwargs, "max_new_tokens": max_new_tokens}
        return transcribe_by_prompt(self, audio, prompt, batch_size, generation)

    def answer(self, prompts: Sequence[SalmExample], max_new_tokens: int) -> np.ndarray:
        """Answers laid-out prompts greedily: int32 ids [B, T], padded after each row's end."""
        request = read_request(self, {"max_new_tokens": max_new_tokens})
        return last_of(generate.run_generation(self, self._graphdef, prompts, request)).trimmed()

    def generation_layout(self, placement: Sharding) -> dict[str, jax.ShapeDtypeStruct]:
        """Dtype and place of every variable of a model that only answers."""
        return generate.layout(self, placement)

    def compile_generation(
        self, placement: Sharding, shape: BatchShape, max_new_tokens: int
    ) -> Any:
        """Compiles `answer` for devices that need not be here; nothing runs.

        `shape` holds the prompts of one group of `placement`. Gives what
        `jax.jit(...).lower(...).compile()` does.
        """
        return generate.compile_ahead(self, self._graphdef, placement, shape, max_new_tokens)

    @property
    def prompt_formatter(self) -> PromptFormatter:
        """Writes dialogs in the model's chat format."""
        return self._blueprint.formatter

    def losses(
        self, variables: Variables, batch: SalmBatch, *, key: jax.Array | None, train: bool
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
        arrays: SalmBatch = batch.arrays
        perception = self._blueprint.network.perception
        clips = [int(n) for n in arrays.audio_lengths.reshape(-1)]
        heard = EncodedAudio(
            encoded=np.array([f for n in clips for f in perception.encoded_counts(n)] or [0]),
            adapted=np.array([perception.frame_count(n) for n in clips] or [0]),
            subsampling_factor=perception.encoder.subsampling_factor,
        )
        return salm_flops(self.infos, trainable, arrays, heard)

    def generation_flops(self, batch: HostBatch) -> float:
        """Model FLOPs of one forward pass over `batch`, prompts and answers together."""
        return self._flops(batch, dict.fromkeys(self.infos, False))

    def count_tokens(self, batch: HostBatch) -> tuple[int, int]:
        """Counts (steps that hold data, all steps) of a batch's rows."""
        segments = batch.arrays.segments
        return int((segments > 0).sum()), int(segments.size)

    def _training_modes(self) -> SalmModes:
        return SalmModes(
            perception=PerceptionModes(
                encoder=self.is_trained("perception.encoder."),
                adapter=True,
                spec_augment=True,
                nemo_exact=self.nemo_exact,
            ),
            llm=self.is_trained("llm."),
        )
