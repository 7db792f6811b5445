"""StableLM and StableLM 2: LayerNorm, a quarter of each head rotated."""

from speechlm2_jax.llm.families.attributes import Attributes
from speechlm2_jax.llm.families.errors import ConfigError
from speechlm2_jax.llm.families.family import Family, Fields, common


def read(a: Attributes) -> Fields:
    """Reads config.json of a StableLmForCausalLM."""
    if a.flag("qk_layernorm"):
        raise ConfigError("qk_layernorm=True (StableLM 2 12B), a norm per head, is not supported")
    return common(a, eps="layer_norm_eps", default_eps=1e-5) | {
        "rope": a.rope(part=0.25),
        "block": "parallel" if a.flag("use_parallel_residual") else "pre",
        "norm": "layer",
        "norm_bias": True,
        "attention_bias": a.flag("use_qkv_bias"),
    }


FAMILY = Family(model_type="stablelm", architecture="StableLmForCausalLM", read=read)
