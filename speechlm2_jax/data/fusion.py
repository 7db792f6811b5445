"""Several training sets of their own settings, fused into one stream of batches (`multi_config`).

Sets are fused as NeMo's samplers are: in turn, drawn at random, or one batch of each joined into
one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple

from speechlm2_jax.settings import Refusal, SettingsError, build, join, report_ignored

Mode = Literal["round_robin", "randomized_round_robin", "zip"]
RANDOM, ZIP = "randomized_round_robin", "zip"


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """Keys of a `train_ds` with `multi_config: true`, beside the blocks of its sets.

    Its own keys hold for all blocks, before theirs.
    """

    multi_config: bool = True
    """Each key that holds a block is a set of its own, with its own batches."""
    sampler_fusion: Mode = "round_robin"
    """`round_robin`: a batch of each set in turn; `randomized_round_robin`: of a set that is drawn;
    `zip`: a batch of each set, joined into one."""
    sampler_weights: Mapping[str, float] | None = None
    """Of `randomized_round_robin`: each set's part of the draws; null: equal parts."""
    seed: int | str = 0
    """Of all sets, and of the draws."""
    shard_seed: int | str = "trng"
    shuffle: bool = False
    num_workers: int = 1
    """Threads that read audio ahead, in each process that does."""
    worker_processes: int = 0
    """Processes that read training data ahead, for augmentation; 0: threads of the run's own."""

    IGNORED: ClassVar[Mapping[str, Refusal]] = {
        "pin_memory": "JAX has no pinned-memory option",
        "metadata_only": "manifests are read without their audio",
        "force_finite": "validation is finite and training is not",
        "use_lhotse": "Lhotse always reads",
    }
    SHARED: ClassVar[tuple[str, ...]] = (
        "seed",
        "shard_seed",
        "shuffle",
        "num_workers",
        "worker_processes",
    )

    def check(self, names: Sequence[str], where: str) -> None:
        """Raises SettingsError unless weights are of the sets, and there are sets at all."""
        if not names:
            raise SettingsError(f"{where}: multi_config: give a block of settings for each set")
        weights = self.sampler_weights
        if weights is None:
            return
        if self.sampler_fusion != RANDOM:
            report_ignored(join(where, "sampler_weights"), f"it goes with sampler_fusion: {RANDOM}")
        elif sorted(weights) != sorted(names) or not min(weights.values()) > 0:
            raise SettingsError(
                f"{join(where, 'sampler_weights')}: give a positive weight to each of "
                f"{', '.join(names)}, got {dict(weights)}"
            )


class Blocks(NamedTuple):
    """What `train_ds` holds: one set, or several that are fused."""

    fusion: FusionConfig | None
    sets: Mapping[str, tuple[Mapping[str, Any], str]]
    """By name: keys, and where these are."""


def training_sets(values: Mapping[str, Any] | None, where: str) -> Blocks:
    """The sets of `train_ds`: one, named `where`'s last word, or those of `multi_config`.

    Raises SettingsError for a key beside the blocks that is none of FusionConfig.
    """
    if values is None:
        return Blocks(None, {})
    if not isinstance(values, Mapping) or not values.get("multi_config"):
        return Blocks(None, {where.rpartition(".")[2]: (values, where)})
    parts = {
        key: block
        for key, block in values.items()
        if isinstance(block, Mapping) and key != "sampler_weights"
    }
    own = {key: value for key, value in values.items() if key not in parts}
    for key in own.keys() - {f.name for f in fields(FusionConfig)} - FusionConfig.IGNORED.keys():
        raise SettingsError(
            f"{join(where, key)}: with multi_config: true each set has its own keys; move it into "
            f"the blocks ({', '.join(parts) or 'there are none'})"
        )
    fusion = build(FusionConfig, own, where)
    fusion.check(tuple(parts), where)
    shared = {key: getattr(fusion, key) for key in FusionConfig.SHARED}
    sets = {name: ({**block, **shared}, join(where, name)) for name, block in parts.items()}
    return Blocks(fusion, sets)


def joined_shape(shapes: Sequence[Any]) -> Any:
    """The shape that holds batches of several shapes side by side: sequences and clips add up.

    What is not known of one of them (None) is not known of it.
    """
    totals = ("sequences", "clips")

    def joined(name: str) -> Any:
        values = [getattr(shape, name) for shape in shapes]
        if None in values:
            return None
        return sum(values) if name in totals else max(values)

    return replace(shapes[0], **{f.name: joined(f.name) for f in fields(shapes[0])})


def assembling(contents: Sequence[Any]) -> Any:
    """The contents that make arrays of the examples of all: one whose texts have audio, if any.

    Raises SettingsError if these are different tokens.
    """
    tokens = {getattr(one, "placeholder_id", -1) for one in contents} - {-1}
    if len(tokens) > 1:
        raise SettingsError(
            f"audio_locator_tag: fused sets have different ones (token ids {sorted(tokens)})"
        )
    return max(contents, key=lambda one: getattr(one, "placeholder_id", -1))
