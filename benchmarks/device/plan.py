"""What is measured, for how long at most, and what of it fits into a device's memory."""

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.presets import PRESETS, Preset
from benchmarks.salm_work import Sizes, Work

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Part:
    """One process. Time that a part leaves over goes to the parts behind it."""

    name: str
    budget_s: float


PARTS = (
    Part(name="matmul", budget_s=30),
    Part(name="training-15s", budget_s=100),
    Part(name="training-40s", budget_s=80),
    Part(name="generation", budget_s=95),
    Part(name="duplex", budget_s=65),
    Part(name="codec", budget_s=40),
    Part(name="pytorch", budget_s=120),
)
"""In the order in which they run: what matters most comes first. 530 s in all."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training step: the first batch that fits is timed, then `extra` while time is left."""

    seconds: float
    batches: tuple[int, ...]
    remat: str = "dots"
    extra: tuple[tuple[int, str], ...] = ()
    """Further (batch, remat)."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of all parts."""

    preset: str
    duplex_preset: str
    trainings: dict[str, Training]
    prompt: int = 16
    target: int = 32
    """Tokens that are scored in each training row."""
    generation_batches: tuple[int, ...] = (1, 32, 192)
    generation_seconds: float = 15.0
    new_tokens: int = 128
    conversation_s: float = 8.0
    conversations: tuple[int, ...] = (1, 8)
    codec_seconds: float = 10.0
    codec_batches: tuple[int, ...] = (1, 16)
    matmul_size: int = 8192
    matmul_chain: int = 32
    """Products in one program, one after the other."""
    copy_bytes: int = 2**31
    repeats: int = 5
    rounds: int = 2
    """Turns that this package and the peer take."""
    peer_backend: str = "inductor"
    is_tiny: bool = False

    @property
    def shape(self) -> Preset:
        """Sizes of the SALM."""
        return PRESETS[self.preset]

    def training_sizes(self, seconds: float, batch: int) -> Sizes:
        """One training batch."""
        return Sizes(batch=batch, seconds=seconds, prompt=self.prompt, response=self.target)

    def generation_sizes(self, batch: int) -> Sizes:
        """One batch of prompts."""
        return Sizes(
            batch=batch,
            seconds=self.generation_seconds,
            prompt=self.prompt,
            response=self.new_tokens,
        )


FULL = Plan(
    preset="canary-qwen-2.5b",
    duplex_preset="tinyllama",
    trainings={
        "training-15s": Training(
            seconds=15.0, batches=(32, 16, 8, 4, 2), extra=((32, "none"), (64, "dots"))
        ),
        "training-40s": Training(seconds=40.0, batches=(16, 8, 4, 2, 1), extra=((16, "none"),)),
    },
)
TINY = Plan(
    preset="micro",
    duplex_preset="micro",
    trainings={
        "training-15s": Training(seconds=0.6, batches=(2,)),
        "training-40s": Training(seconds=1.6, batches=(1,)),
    },
    prompt=3,
    target=4,
    generation_batches=(1, 2),
    generation_seconds=0.6,
    new_tokens=8,
    conversation_s=0.8,
    conversations=(1,),
    codec_seconds=0.8,
    codec_batches=(1,),
    matmul_size=128,
    matmul_chain=4,
    copy_bytes=2**20,
    repeats=2,
    rounds=2,
    peer_backend="eager",
    is_tiny=True,
)


def deadlines(parts: tuple[Part, ...]) -> Iterator[tuple[Part, float]]:
    """Each part with the second, counted from the start, at which it is stopped."""
    total = 0.0
    for part in parts:
        total += part.budget_s
        yield part, total


# Bytes of activations that the backward pass keeps per token, layer and unit of width, and of the
# subsampling's feature maps per mel frame and mel bin. From the temporaries of compiled steps of
# canary-qwen-2.5b at 15 s: 1.2 GiB per row with remat dots, 3.4 GiB with none, on a CPU, which
# computes bf16 in fp32 and so needs more than a GPU.
KEPT = {"full": 8.0, "dots": 45.0, "none": 150.0}
SUBSAMPLING = 1500.0
PEER_KEPT = 75.0
"""The peer computes nothing again; its activations are bf16."""


def training_gib(work: Work, remat: str) -> float:
    """Memory that a training step needs, about."""
    copies = 2 * work.count(trained_only=True)  # trained weights in bf16
    return (work.training_bytes + copies + _activations(work, KEPT[remat])) / GIB


def peer_gib(work: Work, itemsize: int) -> float:
    """Memory that the peer's step needs, about: weights, gradients and moments in one dtype."""
    weights = itemsize * (work.count() + 3 * work.count(trained_only=True))
    return (weights + _activations(work, PEER_KEPT)) / GIB


def generation_gib(work: Work, itemsize: int) -> float:
    """Memory that weights, KV cache and the encoder's feature maps of a batch need, about."""
    llm, sizes = work.config.llm, work.sizes
    positions = sizes.batch * (_frames(work) + sizes.prompt + sizes.response)
    cache = 2 * itemsize * llm.layers * llm.kv_heads * llm.head_width * positions
    return (work.weight_bytes + 2 * cache + _feature_maps(work)) / GIB


def _activations(work: Work, kept: float) -> float:
    llm, encoder, sizes = work.config.llm, work.config.perception.encoder, work.sizes
    frames = _frames(work)
    units = frames * encoder.n_layers * encoder.d_model
    units += (frames + sizes.prompt + sizes.response) * llm.layers * llm.width
    return sizes.batch * units * kept + _feature_maps(work)


def _feature_maps(work: Work) -> float:
    return SUBSAMPLING * work.sizes.batch * work.sizes.mel_frames * work.preset.mel_bins


def _frames(work: Work) -> int:
    return work.config.perception.encoder.frame_count(work.sizes.mel_frames)
