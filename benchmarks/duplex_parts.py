"""The parts of a full-duplex model of a named shape, on disk, for both sides of a comparison.

    python -m benchmarks.duplex_parts FOLDER --preset small

writes `model.json` (NeMo's `model:` block, random weights), the LLM's config with a tokenizer of
one word per token, the codec's `.nemo`, and in `model/` the weights with which both sides start;
`--no-weights` leaves these out: then each side draws its own. NeMo 3.0.0 reads all of it.
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(__file__)

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import timing
from speechlm2_jax.compilation_cache import keep_compiled_programs
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.codec import ASKED_BY_NEMO, codec_table
from speechlm2_jax.conversion.writers import write_nemo
from speechlm2_jax.layers.module import VariableInfo, Variables
from speechlm2_jax.models import AudioCodec, DuplexS2SModel

CONFIG, WEIGHTS = "model.json", "model"
ASR = "nemo.collections.asr.modules"
CODEC = "nemo.collections.tts.modules.audio_codec_modules"
SPECIALS = ("<pad>", "<s>", "</s>")


@dataclass(frozen=True, kw_only=True)
class DuplexPreset:
    """Sizes of one model; its codec is a nano codec of 80 ms frames with fewer channels."""

    llm: dict[str, int]
    """Vocabulary, width, layers, heads, kv_heads, mlp_width."""
    encoder_width: int
    encoder_layers: int
    encoder_heads: int
    adapter_layers: int
    codec_channels: tuple[int, int]
    """Of the codec's encoder before its first stage, and of its decoder."""
    levels: tuple[int, ...]
    """Of each dimension of a codebook."""
    codebooks: int = 4


PRESETS = {
    "micro": DuplexPreset(  # for tests
        llm=dict(vocab_size=64, width=16, layers=1, heads=2, kv_heads=1, mlp_width=32),
        encoder_width=16,
        encoder_layers=1,
        encoder_heads=2,
        adapter_layers=1,
        codec_channels=(2, 32),
        levels=(3, 3),
        codebooks=2,
    ),
    "tiny": DuplexPreset(
        llm=dict(vocab_size=4000, width=256, layers=4, heads=4, kv_heads=2, mlp_width=768),
        encoder_width=128,
        encoder_layers=4,
        encoder_heads=4,
        adapter_layers=1,
        codec_channels=(4, 64),
        levels=(8, 5, 5, 5),
    ),
    "small": DuplexPreset(
        llm=dict(vocab_size=16000, width=512, layers=8, heads=8, kv_heads=4, mlp_width=1408),
        encoder_width=256,
        encoder_layers=8,
        encoder_heads=4,
        adapter_layers=2,
        codec_channels=(8, 128),
        levels=(8, 7, 6, 6),
    ),
    "tinyllama": DuplexPreset(
        llm=dict(vocab_size=32000, width=2048, layers=22, heads=32, kv_heads=4, mlp_width=5632),
        encoder_width=512,
        encoder_layers=17,
        encoder_heads=8,
        adapter_layers=2,
        codec_channels=(24, 864),
        levels=(9, 8, 8, 7),
    ),
}


def write(folder: Path, preset: DuplexPreset, *, weights: bool = True) -> None:
    """Writes all components; `model.json` comes last: where it is, they are complete."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_llm(folder / "llm", preset.llm)
    write_codec(folder / "codec.nemo", preset)
    cfg = model_cfg(preset)
    if weights:
        DuplexS2SModel(located(cfg, folder)).save_pretrained(folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(cfg, indent=1))


def located(cfg: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The `model:` block with its parts in `folder`."""
    names = ("pretrained_llm", "pretrained_audio_codec")
    return {**cfg, **{name: str(folder.resolve() / cfg[name]) for name in names}}


def model_cfg(preset: DuplexPreset) -> dict[str, Any]:
    """NeMo's `model:` block: as its s2s_duplex.yaml, all but the codec trained."""
    width = preset.encoder_width
    return {
        "pretrained_llm": "llm",
        "pretrained_audio_codec": "codec.nemo",
        "pretrained_asr": None,
        "scoring_asr": None,
        "pretrained_weights": False,
        "freeze_params": ["^audio_codec\\..+$"],
        "prevent_freeze_params": [],
        "audio_loss_weight": 4,
        "text_loss_weight": 3,
        "perception": {
            "target": "nemo.collections.speechlm2.modules.perception.AudioPerceptionModule",
            "preprocessor": {
                "_target_": f"{ASR}.AudioToMelSpectrogramPreprocessor",
                "sample_rate": 16000,
                "features": 80,
                "normalize": "NA",
                "window_size": 0.025,
                "window_stride": 0.01,
                "window": "hann",
                "n_fft": 512,
                "dither": 0.0,
                "pad_to": 0,
            },
            "encoder": _conformer(preset, 80, preset.encoder_layers, subsampling_factor=8),
            "modality_adapter": _conformer(
                preset, width, preset.adapter_layers, subsampling_factor=1
            ),
            "output_dim": preset.llm["width"],
        },
        "optimizer": {
            "_target_": "torch.optim.AdamW",
            "lr": 1e-4,
            "betas": [0.9, 0.98],
            "weight_decay": 0,
            "foreach": True,
        },
    }


def _conformer(
    preset: DuplexPreset, feat_in: int, layers: int, *, subsampling_factor: int
) -> dict[str, Any]:
    """A streaming FastConformer, as that of NeMo's recipe."""
    return {
        "_target_": f"{ASR}.ConformerEncoder",
        "feat_in": feat_in,
        "feat_out": -1,
        "n_layers": layers,
        "d_model": preset.encoder_width,
        "subsampling": "dw_striding",
        "subsampling_factor": subsampling_factor,
        "subsampling_conv_channels": 256,
        "causal_downsampling": True,
        "ff_expansion_factor": 4,
        "self_attention_model": "rel_pos",
        "n_heads": preset.encoder_heads,
        "att_context_size": [70, 1],
        "att_context_style": "chunked_limited",
        "xscaling": True,
        "untie_biases": True,
        "pos_emb_max_len": 5000,
        "conv_kernel_size": 9,
        "conv_norm_type": "layer_norm",
        "conv_context_size": "causal",
        "dropout": 0.0,
        "dropout_pre_encoder": 0.0,
        "dropout_emb": 0.0,
        "dropout_att": 0.0,
    }


def _write_llm(folder: Path, sizes: dict[str, int]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(exist_ok=True)
    count = sizes["vocab_size"]
    words = [*SPECIALS, *(f"w{n}" for n in range(count - len(SPECIALS)))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIALS))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIALS, strict=True))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": count,
        "hidden_size": sizes["width"],
        "intermediate_size": sizes["mlp_width"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def write_codec(path: Path, preset: DuplexPreset) -> None:
    """A codec with random weights, which NeMo opens too."""
    cfg = codec_cfg(preset)
    codec = AudioCodec(cfg)
    host = _random(codec.infos, preset.levels)
    write_nemo(path, {**cfg, **ASKED_BY_NEMO}, mapping.export(host, codec_table(codec.config)), {})


def _random(infos: Mapping[str, VariableInfo], levels: tuple[int, ...]) -> Variables:
    """Weights of a codec: drawn here, as the program that draws them takes minutes to compile."""
    random, host = np.random.default_rng(0), {}
    for path, info in infos.items():
        name = path.rpartition(".")[2]
        if name == "direction":
            scale = 1.0 / np.sqrt(3 * np.prod(info.shape[1:]))
            host[path] = random.normal(0.0, scale, info.shape).astype(np.float32)
        elif name == "alpha":
            host[path] = np.ones(info.shape, np.float32)
        elif name in ("levels", "bases"):
            values = levels if name == "levels" else np.cumprod((1, *levels[:-1]))
            host[path] = np.broadcast_to(np.asarray(values, np.int32), info.shape).copy()
        elif name == "bias":
            host[path] = np.zeros(info.shape, np.float32)
    for path in [p for p in host if p.endswith(".direction")]:
        gain = np.sqrt(np.sum(np.square(host[path]), axis=(1, 2)))
        host[path.removesuffix("direction") + "gain"] = gain
    return host


def codec_cfg(preset: DuplexPreset) -> dict[str, Any]:
    """NeMo's config of a nano codec: an encoder that looks ahead, a causal decoder."""
    channels, decoder_channels = preset.codec_channels
    width = preset.codebooks * len(preset.levels)
    return {
        "sample_rate": 22050,
        "samples_per_frame": 1764,
        "audio_encoder": {
            "_target_": f"{CODEC}.HiFiGANEncoder",
            "down_sample_rates": [2, 3, 6, 7, 7],
            "encoded_dim": width,
            "base_channels": channels,
            "activation": "lrelu",
            "pad_mode": "replicate",
        },
        "audio_decoder": {
            "_target_": f"{CODEC}.CausalHiFiGANDecoder",
            "up_sample_rates": [7, 7, 6, 3, 2],
            "input_dim": width,
            "base_channels": decoder_channels,
            "activation": "half_snake",
            "output_activation": "clamp",
            "pad_mode": "zeros",
            "n_groups_equal_to_out_channels": True,
        },
        "vector_quantizer": {
            "_target_": f"{CODEC}.GroupFiniteScalarQuantizer",
            "num_groups": preset.codebooks,
            "num_levels_per_group": list(preset.levels),
        },
    }


def main() -> None:
    """Writes the parts that are asked for."""
    parser = timing.parser(__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--no-weights", action="store_true")
    arguments = parser.parse_args()
    keep_compiled_programs("auto")
    write(arguments.folder, PRESETS[arguments.preset], weights=not arguments.no_weights)


if __name__ == "__main__":
    main()
