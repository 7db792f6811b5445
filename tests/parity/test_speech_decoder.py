"""The speech decoder equals NeMo 3.0.0; the tensors are in tests/data/speech_decoder."""

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.readers import memory_source
from speechlm2_jax.conversion.speech_decoder import speech_decoder_table, transformer_table
from speechlm2_jax.layers.module import abstract, describe, merge, split
from speechlm2_jax.settings import build
from speechlm2_jax.speech_decoder import attention
from speechlm2_jax.speech_decoder.attention import SpeechAttentionInputs
from speechlm2_jax.speech_decoder.config import SpeechDecoderConfig
from speechlm2_jax.speech_decoder.decoder import SpeechDecoder
from speechlm2_jax.speech_decoder.transformer import Transformer
from tests.parity.sampled import assert_recorded, recorded_names
from tests.parity.shared_weights import speech_decoder_tensors

DATA = Path(__file__).parents[1] / "data" / "speech_decoder"
ATOL = 1e-5  # small models in fp32; the goldens' own caches differ from their whole by 3e-6
GRADIENT_RTOL = 1e-4
TRANSFORMERS = json.loads((DATA / "transformer.json").read_text())
MODULES = json.loads((DATA / "module.json").read_text())


def below(values: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def assert_close(actual: Any, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, atol=ATOL, rtol=0)


@cache
def transformer(name: str):
    """(graphdef, variables, golden, inputs) of a transformer golden."""
    golden = speech_decoder_tensors(f"transformer_{name}")
    config = build(SpeechDecoderConfig, TRANSFORMERS[name]["config"], "speech_decoder")
    module = abstract(lambda rngs: Transformer(config, rngs=rngs))
    source = memory_source(below(golden, "sd/"))
    variables = mapping.load(source, transformer_table(config), describe(module))
    inputs = {"mask": jnp.asarray(golden["mask"], bool)}
    if "cond" in golden:
        inputs["memory"] = jnp.asarray(golden["cond"])
        inputs["memory_mask"] = jnp.asarray(golden["cond_mask"], bool)
    return split(module)[0], jax.tree.map(jnp.asarray, variables), golden, inputs


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_each_layer_of_the_transformer_equals_nemo(name):
    graphdef, variables, golden, inputs = transformer(name)

    @jax.jit
    def run(variables, x, inputs):
        network = merge(graphdef, variables)
        whole = {k: v for k, v in inputs.items() if k != "mask"}
        layers = network.layer_outputs(x, **inputs)
        # NeMo's `max_layer_idx` stops after a layer and goes on to the final norm
        stopped = layers if network.norm is None else network.norm(layers)
        return stopped, network(x, **inputs), network(x, **whole)

    layers, output, unmasked = run(variables, golden["x"], inputs)
    for i, layer in enumerate(layers):
        assert_close(layer, golden[f"layer{i}"])
    assert_close(output, golden["output"])
    assert_close(unmasked, golden["output_nomask"])


@pytest.mark.parametrize("parts", [(1,) * 13, (5, *(1,) * 8), (4, 6, 3)], ids=str)
@pytest.mark.parametrize("name", [n for n in TRANSFORMERS if n != "noncausal_k3"])
def test_steps_with_a_state_equal_nemo(name, parts):
    graphdef, variables, golden, inputs = transformer(name)
    network = merge(graphdef, variables)
    memory = {k: v for k, v in inputs.items() if k != "mask"}
    extend = jax.jit(network.extend)
    state, start, outputs = network.new_state(3, 14, jnp.float32), 0, []
    for steps in parts:
        out, state = extend(golden["x"][:, start : start + steps], state, **memory)
        outputs.append(out)
        start += steps
    assert_close(jnp.concatenate(outputs, axis=1), golden["kv_cache_stepwise"])


def test_gradients_of_the_transformer_equal_nemo():
    graphdef, variables, golden, inputs = transformer("causal_k3_pos_normout")
    table = transformer_table(merge(graphdef, variables).config)
    cotangent = golden["grad/cotangent"]

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def gradients(variables, x):
        return jnp.sum(merge(graphdef, variables)(x, **inputs) * cotangent)

    ours, of_x = gradients(variables, golden["x"])
    given = {**mapping.export(ours, table), "x": of_x, "cotangent": cotangent}
    assert set(given) == {n.removeprefix("grad/") for n in recorded_names(golden, "grad/")}
    for name, x in given.items():
        atol = GRADIENT_RTOL * np.abs(np.asarray(x)).max()
        assert_recorded(x, golden, f"grad/{name}", atol=atol, rtol=0)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_attention_weights_of_the_first_layer_equal_nemo(name, monkeypatch):
    graphdef, variables, golden, inputs = transformer(name)
    network = merge(graphdef, variables)
    expected, mask = golden["attn_prob_layer0"], golden["mask"].astype(bool)
    weights = np.zeros_like(expected)
    steps = len(expected[0, 0])

    def with_unit_values(mix):
        """Values that are unit vectors make the mixture the weights themselves."""

        def record(q, k, v, *args, **kwargs):
            for first in range(0, steps, v.shape[-1]):
                unit = jnp.eye(steps, v.shape[-1], -first)[None, :, None]
                mixed = mix(q, k, jnp.broadcast_to(unit, v.shape), *args, **kwargs)
                columns = min(v.shape[-1], steps - first)
                weights[..., first : first + columns] = mixed.swapaxes(1, 2)[..., :columns]
            return mix(q, k, v, *args, **kwargs)

        return record

    for function in ("attend", "_attend_in_blocks"):
        monkeypatch.setattr(attention, function, with_unit_values(getattr(attention, function)))
    layers, state = nnx.split(network.layers)
    layer = nnx.merge(layers, jax.tree.map(lambda x: x[0], state))
    x = network._with_positions(jnp.asarray(golden["x"]), 0)
    x = jnp.where(mask[..., None], x, 0.0)
    place = SpeechAttentionInputs(is_real=inputs["mask"], attention_mask=inputs["mask"])
    layer.attention(layer.attention_norm(x), place)
    # what padding looks at has no influence: its outputs are zeros
    assert_close(weights * mask[:, None, :, None], expected)


@cache
def decoder(name: str, **changes: Any):
    """(graphdef, variables, golden, hidden, codes) of a speech decoder golden."""
    golden = speech_decoder_tensors(f"module_{name}")
    block = MODULES[name]
    config = build(SpeechDecoderConfig, {**block["config"], **changes}, "speech_decoder")
    module = abstract(
        lambda rngs: SpeechDecoder(
            config,
            input_width=block["dims"]["latent_dim"],
            codebooks=block["dims"]["num_codebooks"],
            codes_per_codebook=block["dims"]["tokens_per_codebook"],
            rngs=rngs,
        )
    )
    is_projected = block["dims"]["latent_dim"] != config.d_model
    table = speech_decoder_table(config, is_projected=is_projected)
    variables = mapping.load(memory_source(below(golden, "sd/")), table, describe(module))
    hidden = jnp.asarray(golden["hidden_TBH"].swapaxes(0, 1))
    codes = jnp.asarray(golden["audio_tokens_BTK"], jnp.int32)
    return split(module)[0], jax.tree.map(jnp.asarray, variables), golden, hidden, codes


def by_codebook(logits: np.ndarray) -> np.ndarray:
    """NeMo's [B, T, K x V] as [B, T, K, V]."""
    return logits.reshape(*logits.shape[:2], 3, -1)


@pytest.mark.parametrize("name", MODULES)
def test_scores_of_the_speech_decoder_equal_nemo(name):
    graphdef, variables, golden, hidden, codes = decoder(name)
    network = merge(graphdef, variables)
    mask = jnp.asarray(golden["mask"], bool)
    if name == "no_prev_audio":
        codes = None
    else:
        assert_close(network.embed(codes), golden["embedded_audio_tokens"])
    score = jax.jit(network)
    assert_close(score(hidden, codes, mask=mask), by_codebook(golden["logits_eval"]))
    assert_close(score(hidden, codes), by_codebook(golden["logits_eval_mask_none"]))


@pytest.mark.parametrize("name", ["input_proj", "same_dim", "cfg"])
@pytest.mark.parametrize("parts", [(1,) * 11, (5, 3, 3)], ids=str)
def test_scores_step_by_step_equal_nemo(name, parts):
    graphdef, variables, golden, hidden, codes = decoder(name)
    network = merge(graphdef, variables)
    step = jax.jit(network.step)
    state, start, scores = network.new_state(2, 12, jnp.float32), 0, []
    for steps in parts:
        part = slice(start, start + steps)
        logits, state = step(state, hidden[:, part], codes[:, part])
        scores.append(logits)
        start += steps
    expected = by_codebook(golden["logits_stepwise_cache"])
    assert_close(jnp.concatenate(scores, axis=1), expected)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(1e-9, "logits_train_conditional"), (1.0, "logits_train_unconditional")],
)
def test_training_with_guidance_sees_the_hidden_states_or_not_as_in_nemo(rate, expected):
    graphdef, variables, golden, hidden, codes = decoder("cfg", cfg_unconditional_prob=rate)
    rngs = jax.random.split(jax.random.key(0), 2)
    mask = jnp.asarray(golden["mask"], bool)
    logits = merge(graphdef, variables)(hidden, codes, mask=mask, train=True, rngs=rngs)
    assert_close(logits, by_codebook(golden[expected]))
