"""Each family of LLMs equals transformers: logits, loss, gradients, generation, names, meshes."""

import json
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.decoder import decoder_table, layers_table
from speechlm2_jax.conversion.hf_config import decoder_config
from speechlm2_jax.conversion.readers.source import memory_source
from speechlm2_jax.conversion.salm import salm_table
from speechlm2_jax.generation.salm import DecodingConfig, generate_tokens
from speechlm2_jax.layers.lora import LoraConfig, merge_lora
from speechlm2_jax.layers.module import Variables, abstract, describe, merge, split
from speechlm2_jax.llm.decoder import Decoder
from speechlm2_jax.llm.families import FAMILIES
from speechlm2_jax.networks.salm import SalmConfig
from speechlm2_jax.sharding import make_sharding, use
from tests.parity.tiny_families import MODELS, config_of, tiny_model
from tests.perception.small_perception import perception_config

ATOL = 1e-4
GRADIENT_RTOL = 1e-4
LENGTHS = (23, 14)
NEW_TOKENS = 24


def stored(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """What save_pretrained writes: tied tensors once."""
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    skipped = tied if model.config.tie_word_embeddings else set()
    return {k: v.numpy() for k, v in model.state_dict().items() if k not in skipped}


@cache
def load(name: str, **changes: Any) -> tuple[Any, Variables, Any]:
    model = tiny_model(name, **changes)
    config = decoder_config(json.loads(json.dumps(config_of(model))))
    network = abstract(lambda rngs: Decoder(config, rngs=rngs))
    table = decoder_table(config)
    variables = mapping.load(memory_source(stored(model)), table, describe(network))
    return split(network)[0], jax.tree.map(jnp.asarray, variables), table


def rows() -> tuple[np.ndarray, np.ndarray]:
    """Token ids of two rows of unequal lengths, padded on the right, and where they are real."""
    ids = np.random.default_rng(0).integers(3, 60, (2, max(LENGTHS)))
    mask = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    return np.where(mask, ids, 0), mask


@partial(jax.jit, static_argnames="graphdef")
def losses(graphdef: Any, variables: Variables, ids: Any, mask: Any) -> Any:
    """The summed cross-entropy with its gradients, and the logits."""

    def loss(variables: Variables) -> tuple[jax.Array, jax.Array]:
        decoder: Decoder = merge(graphdef, variables)
        hidden = decoder(
            decoder.embed(ids),
            positions=jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape),
            segments=jnp.ones(ids.shape, jnp.int32),
            attention_mask=mask,
        )
        logits = decoder.logits(hidden)
        scores = jax.nn.log_softmax(logits[:, :-1])
        picked = jnp.take_along_axis(scores, ids[:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(picked * mask[:, 1:]), logits

    trained = {k: v for k, v in variables.items() if not k.endswith(("xielu.beta", "xielu.eps"))}
    rest = {k: v for k, v in variables.items() if k not in trained}
    (value, logits), gradients = jax.value_and_grad(lambda v: loss(v | rest), has_aux=True)(trained)
    return value, logits, gradients | jax.tree.map(jnp.zeros_like, rest)


def torch_losses(model: torch.nn.Module, ids: np.ndarray, mask: np.ndarray) -> Any:
    """The same by transformers, each row alone, so that padding plays no part."""
    model.zero_grad()
    total, logits = torch.zeros(()), []
    for row, length in zip(ids, mask.sum(1), strict=True):
        forget_lengths(model)
        real = torch.from_numpy(row[None, :length])
        scores = model(real).logits
        logits.append(scores[0].detach().numpy())
        total = total + torch.nn.functional.cross_entropy(
            scores[0, :-1], real[0, 1:], reduction="sum"
        )
    total.backward()
    return total.item(), logits, {n: p.grad.numpy() for n, p in model.named_parameters()}


def forget_lengths(model: torch.nn.Module) -> None:
    """transformers' dynamic scaling remembers the longest row that it has seen."""
    rotary = getattr(model.model, "rotary_emb", None)
    if getattr(rotary, "rope_type", None) == "dynamic":
        rotary.max_seq_len_cached = rotary.original_max_seq_len
        rotary.inv_freq = rotary.original_inv_freq


@pytest.mark.parametrize("name", MODELS)
def test_logits_loss_and_all_gradients_equal_transformers(name: str) -> None:
    ids, mask = rows()
    graphdef, variables, table = load(name)
    value, logits, gradients = losses(graphdef, variables, jnp.asarray(ids), jnp.asarray(mask))
    expected, scores, theirs = torch_losses(tiny_model(name), ids, mask)
    for ours, row in zip(np.asarray(logits), scores, strict=True):
        np.testing.assert_allclose(ours[: len(row)], row, atol=ATOL, rtol=0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    own = mapping.export(gradients, table)
    assert set(own) >= set(theirs)
    for path, gradient in theirs.items():
        size = max(np.abs(gradient).max(), 1e-3)
        np.testing.assert_allclose(
            own[path] / size, gradient / size, atol=GRADIENT_RTOL, err_msg=path
        )


SCALED = ["gemma", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma2", "granite"))]


@pytest.mark.parametrize("name", SCALED)
def test_audio_is_scaled_only_where_transformers_scales_it(name: str) -> None:
    graphdef, variables, _ = load(name)
    decoder: Decoder = merge(graphdef, variables)
    embeds = np.random.default_rng(0).normal(size=(1, 9, decoder.config.width)).astype(np.float32)
    hidden = decoder(
        jnp.asarray(embeds),
        positions=jnp.arange(9)[None],
        segments=jnp.ones((1, 9), jnp.int32),
        attention_mask=jnp.ones((1, 9), bool),
    )
    with torch.no_grad():
        expected = tiny_model(name)(inputs_embeds=torch.from_numpy(embeds)).logits.numpy()
    np.testing.assert_allclose(decoder.logits(hidden), expected, atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_export_is_the_inverse_of_loading(name: str) -> None:
    _, variables, table = load(name)
    given, written = stored(tiny_model(name)), mapping.export(variables, table)
    assert set(written) == set(given)
    for path, value in given.items():
        np.testing.assert_array_equal(written[path], value)


@pytest.mark.parametrize("name", MODELS)
def test_freeze_patterns_see_the_names_of_transformers(name: str) -> None:
    graphdef, variables, table = load(name)
    infos = describe(merge(graphdef, variables))
    names = {n.name for n in mapping.names(table, infos) if not n.is_alias and not n.is_buffer}
    tied = {"lm_head.weight"} if tiny_model(name).config.tie_word_embeddings else set()
    assert names == {n for n, _ in tiny_model(name).named_parameters()} - tied


@pytest.mark.parametrize("name", MODELS)
def test_a_speech_model_names_every_variable_of_its_llm(name: str) -> None:
    graphdef, variables, _ = load(name)
    network = merge(graphdef, variables)
    width = network.config.width
    perception = replace(perception_config(), output_dim=width)
    salm = SalmConfig(llm=network.config, perception=perception)
    own = (rule for rule in salm_table(salm).rules if rule.target.startswith("llm."))
    infos = {f"llm.{path}": info for path, info in describe(network).items()}
    written = mapping.names(mapping.Table(tuple(own)), infos)
    names = {n.name.removeprefix("llm.") for n in written if not n.is_buffer}
    theirs = {n for n, _ in tiny_model(name).named_parameters()}
    assert names - {"lm_head.weight"} == {
        n.replace("model.embed_tokens", "embed_tokens") for n in theirs - {"lm_head.weight"}
    }


@pytest.mark.slow  # a second model of each family
@pytest.mark.parametrize("name", MODELS)
def test_tied_and_untied_heads_equal_transformers(name: str) -> None:
    other = not tiny_model(name).config.tie_word_embeddings
    model = tiny_model(name, tie_word_embeddings=other)
    graphdef, variables, _ = load(name, tie_word_embeddings=other)
    assert ("head.weight" in variables) is not other
    ids, mask = rows()
    _, logits, _ = losses(graphdef, variables, jnp.asarray(ids), jnp.asarray(mask))
    _, scores, _ = torch_losses(model, ids, mask)
    for ours, row in zip(np.asarray(logits), scores, strict=True):
        np.testing.assert_allclose(ours[: len(row)], row, atol=ATOL, rtol=0)


@pytest.mark.slow  # a second program for each family
@pytest.mark.parametrize("name", MODELS)
def test_lora_on_all_linear_layers_is_its_merged_weights(name: str) -> None:
    graphdef, variables, _ = load(name)
    config = merge(graphdef, variables).config
    lora = LoraConfig(r=2, lora_alpha=3, target_modules="all-linear")
    network = abstract(lambda rngs: Decoder(config, rngs=rngs, lora=lora))
    infos = describe(network)
    draw = np.random.default_rng(1)
    adapters = {
        path: jnp.asarray(draw.normal(scale=0.3, size=info.shape), jnp.float32)
        for path, info in infos.items()
        if path.endswith(("lora_a", "lora_b"))
    }
    assert sum(path.endswith("lora_a") for path in adapters) >= 4
    ids, mask = map(jnp.asarray, rows())
    with_lora = losses(split(network)[0], variables | adapters, ids, mask)
    merged = losses(graphdef, merge_lora(variables | adapters, lora), ids, mask)
    np.testing.assert_allclose(with_lora[1], merged[1], atol=ATOL)
    names = mapping.export(variables | adapters, decoder_layers(config, lora))
    assert any(n.endswith(".lora_A.default.weight") for n in names)


def decoder_layers(config: Any, lora: LoraConfig) -> Any:
    """The table of a decoder with adapters: its ends as without, its layers as PEFT names them."""
    plain = {rule.target: rule for rule in decoder_table(config).rules}
    adapted = {rule.target: rule for rule in layers_table(config, lora).rules}
    return mapping.Table(tuple((plain | adapted).values()))


@pytest.mark.slow  # eight devices for each family
@pytest.mark.parametrize("name", MODELS)
def test_a_mesh_of_eight_devices_equals_one(name: str) -> None:
    ids, mask = rows()
    ids, mask = (jnp.asarray(np.tile(x, (2, 1))) for x in (ids, mask))
    graphdef, variables, _ = load(name)
    value, logits, gradients = losses(graphdef, variables, ids, mask)
    with use(make_sharding(data=2, fsdp=2, tensor=2)):
        # another function, so that JAX compiles it for the mesh
        sharded = jax.jit(lambda v: losses.__wrapped__(graphdef, v, ids, mask))(variables)
    np.testing.assert_allclose(sharded[0], value, rtol=1e-5)
    np.testing.assert_allclose(sharded[1], logits, atol=ATOL)
    for path, gradient in gradients.items():
        size = max(np.abs(gradient).max(), 1e-3)
        np.testing.assert_allclose(
            sharded[2][path] / size, gradient / size, atol=GRADIENT_RTOL, err_msg=path
        )


def test_every_family_has_a_model() -> None:
    assert {name.split("-")[0] for name in MODELS} == set(FAMILIES)


@partial(jax.jit, static_argnames=("graphdef", "config"))
def generate(
    graphdef: Any, variables: Variables, ids: Any, lengths: Any, mask: Any, config: DecodingConfig
) -> Any:
    decoder: Decoder = merge(graphdef, variables)
    return generate_tokens(
        decoder, decoder.embed(ids), lengths=lengths, attention_mask=mask, config=config
    )


@pytest.mark.slow  # a generation of each family; those of test_llm.py are quick
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_past_every_window_equal_transformers(name: str) -> None:
    ids, mask = rows()
    graphdef, variables, _ = load(name)
    decoding = DecodingConfig(max_new_tokens=NEW_TOKENS, stop_ids=(), pad_id=0)
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    tokens = generate(graphdef, variables, jnp.asarray(ids), lengths, jnp.asarray(mask), decoding)
    for row, length, own in zip(ids, LENGTHS, np.asarray(tokens), strict=True):
        np.testing.assert_array_equal(own, greedy(tiny_model(name), row[:length]))


def greedy(model: torch.nn.Module, prompt: np.ndarray) -> list[int]:
    """The response of transformers to one prompt alone, with its cache."""
    forget_lengths(model)
    tokens = torch.from_numpy(prompt[None])
    with torch.no_grad():
        generated = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
    return generated[0, len(prompt) :].tolist()
