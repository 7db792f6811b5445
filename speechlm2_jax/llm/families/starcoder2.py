"""StarCoder2: LayerNorm, biases everywhere, no gate."""

from speechlm2_jax.llm.config import LayerKind
from speechlm2_jax.llm.families.attributes import Attributes
from speechlm2_jax.llm.families.family import Family, Fields, common


def read(a: Attributes) -> Fields:
    """Reads config.json of a Starcoder2ForCausalLM."""
    bias = a.flag("use_bias", default=True)
    return common(
        a,
        eps="norm_epsilon",
        default_eps=1e-5,
        activation="gelu_pytorch_tanh",
        tied=True,
        init_std=0.018042,
    ) | {
        "rope": a.rope(),
        "pattern": (LayerKind(window=a.optional_size("sliding_window")),),
        "norm": "layer",
        "norm_bias": True,
        "gated": False,
        "attention_bias": bias,
        "output_bias": bias,
        "mlp_bias": bias,
    }


FAMILY = Family(
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    read=read,
    names={"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
)
