"""Named shapes, those of the PyTorch peer: a FastConformer, a projection and an LLM with LoRA."""

from dataclasses import dataclass

from speechlm2_jax.layers.lora import LoraConfig
from speechlm2_jax.layers.stack import Remat, RematPolicy
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.networks.salm import SalmConfig
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig
from speechlm2_jax.perception.log_mel import LogMelConfig
from speechlm2_jax.perception.modality_adapter import IdentityConfig
from speechlm2_jax.perception.perception import PerceptionConfig


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes of one model."""

    mel_bins: int
    encoder_width: int
    encoder_layers: int
    encoder_heads: int
    llm: DecoderConfig
    lora_rank: int

    def network(
        self, *, dtype: str = "float32", remat: RematPolicy = "none", lora: bool = True
    ) -> SalmConfig:
        """The architecture, without dropout."""
        return SalmConfig(
            llm=self.llm,
            perception=self.perception,
            lora=LoraConfig(r=self.lora_rank, lora_alpha=2 * self.lora_rank) if lora else None,
            compute_dtype=dtype,
            remat=Remat(llm=remat, perception=remat),
        )

    @property
    def perception(self) -> PerceptionConfig:
        """Mel features, encoder and projection."""
        encoder = FastConformerConfig(
            feat_in=self.mel_bins,
            n_layers=self.encoder_layers,
            d_model=self.encoder_width,
            n_heads=self.encoder_heads,
            subsampling="dw_striding",
            subsampling_factor=8,
            subsampling_conv_channels=256,
            conv_kernel_size=9,
            dropout=0.0,
            dropout_pre_encoder=0.0,
            dropout_emb=0.0,
            dropout_att=0.0,
        )
        return PerceptionConfig(
            preprocessor=LogMelConfig(features=self.mel_bins),
            encoder=encoder,
            modality_adapter=IdentityConfig(d_model=self.encoder_width),
            output_dim=self.llm.width,
        )


PRESETS = {
    "micro": Preset(  # for tests
        mel_bins=8,
        encoder_width=16,
        encoder_layers=1,
        encoder_heads=2,
        llm=DecoderConfig(
            vocab_size=64,
            width=16,
            layers=1,
            heads=4,
            kv_heads=2,
            head_width=8,
            mlp_width=32,
            qk_norm="head",
            tied=True,
        ),
        lora_rank=2,
    ),
    "tiny": Preset(
        mel_bins=80,
        encoder_width=128,
        encoder_layers=4,
        encoder_heads=4,
        llm=DecoderConfig(
            vocab_size=4000,
            width=256,
            layers=4,
            heads=4,
            kv_heads=2,
            head_width=64,
            mlp_width=768,
            qk_norm="head",
            tied=True,
        ),
        lora_rank=8,
    ),
    "small": Preset(
        mel_bins=80,
        encoder_width=256,
        encoder_layers=12,
        encoder_heads=4,
        llm=DecoderConfig(
            vocab_size=16000,
            width=512,
            layers=8,
            heads=8,
            kv_heads=4,
            head_width=64,
            mlp_width=1408,
        ),
        lora_rank=16,
    ),
    "large": Preset(
        mel_bins=80,
        encoder_width=512,
        encoder_layers=17,
        encoder_heads=8,
        llm=DecoderConfig(
            vocab_size=32000,
            width=768,
            layers=12,
            heads=12,
            kv_heads=4,
            head_width=64,
            mlp_width=2048,
        ),
        lora_rank=16,
    ),
    "canary-qwen-2.5b": Preset(
        mel_bins=128,
        encoder_width=1024,
        encoder_layers=32,
        encoder_heads=8,
        llm=DecoderConfig(
            vocab_size=151936,
            width=2048,
            layers=28,
            heads=16,
            kv_heads=8,
            head_width=128,
            mlp_width=6144,
            qk_norm="head",
            tied=True,
        ),
        lora_rank=128,
    ),
}
