"""Loads the model whose conversations are served."""

from speechlm2_jax.serving.duplex.options import ConversationOptions
from speechlm2_jax.serving.duplex.sessions import PoolSessions
from speechlm2_jax.settings import SettingsError


def open_sessions(options: ConversationOptions) -> PoolSessions:
    """Loads a duplex model and its sessions.

    Raises SettingsError for a model that is not full duplex, and for one that cannot stream.
    """
    from speechlm2_jax import models
    from speechlm2_jax.compilation_cache import keep_compiled_programs
    from speechlm2_jax.pretrained import registry
    from speechlm2_jax.pretrained.locate import Location

    kind = registry.identify(Location().find(options.model, key="MODEL"))
    if kind is None or kind not in registry.DUPLEX_MODELS:
        what = "no duplex model" if kind is None else kind.what
        raise SettingsError(f"{options.model} is {what}; a full-duplex model is needed")
    keep_compiled_programs("auto")
    model = getattr(models, kind.classes[0]).from_pretrained(options.model, dtype=options.dtype)
    try:
        return PoolSessions(model.eval(), options)
    except ValueError as error:
        raise SettingsError(f"{options.model}: {error}") from error
