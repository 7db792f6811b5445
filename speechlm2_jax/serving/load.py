"""Loads the model that is served, and reads how it was trained."""

from dataclasses import replace
from typing import TYPE_CHECKING

from speechlm2_jax.serving.options import MAX_AUDIO_S, PROMPT, ServeOptions
from speechlm2_jax.settings import SettingsError

if TYPE_CHECKING:
    from speechlm2_jax.inference.engine import Engine
    from speechlm2_jax.inference.timestamps.aligner import Aligner

NO_ALIGNER = "none"


def as_trained(options: ServeOptions) -> ServeOptions:
    """The settings with the prompt and the longest recording of the training, if not given."""
    from speechlm2_jax.pretrained import training_settings
    from speechlm2_jax.pretrained.locate import Location
    from speechlm2_jax.settings import load

    folder = Location().local(options.model)
    config = None if folder is None else folder / "config.yaml"
    settings = load(config, complete=False) if config is not None and config.is_file() else {}
    prompt = options.prompt or training_settings.first_tag(settings, "context") or PROMPT
    longest_s = options.max_audio_s or training_settings.longest_audio_s(settings) or MAX_AUDIO_S
    return replace(options, prompt=prompt, max_audio_s=longest_s)


def load_engine(options: ServeOptions) -> "Engine":
    """Loads a SALM for serving. Raises SettingsError for a model that cannot be loaded."""
    from speechlm2_jax.compilation_cache import keep_compiled_programs
    from speechlm2_jax.models import SALM

    keep_compiled_programs("auto")
    model = SALM.from_pretrained(
        options.model,
        dtype=options.dtype,
        strategy=options.strategy,
        quantize=options.quantize,
        kv_cache_dtype=options.kv_cache_dtype,
    )
    engine = model.eval().engine()
    if options.aligner:
        engine = replace(engine, open_aligner=lambda: open_named_aligner(options.aligner))
    if engine.transcripts is not None:
        raise SettingsError(
            f"{options.model}: a SALM with an ASR decoder is not supported by serve"
        )
    return engine


def open_named_aligner(name: str) -> "Aligner | None":
    """The aligner of a name; None for NO_ALIGNER. Raises SettingsError for what is no aligner."""
    if name == NO_ALIGNER:
        return None
    from speechlm2_jax.models.aligners import open_aligner

    return open_aligner(name, key="--aligner")
