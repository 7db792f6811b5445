"""Settings of a recipe that is laid over a bundled configuration."""

from pathlib import Path
from typing import Any

import numpy as np

from speechlm2_jax import experiment, settings
from speechlm2_jax.data.datamodule import DataModule
from speechlm2_jax.models.salm import SALM
from speechlm2_jax.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
PARTS = ("pretrained_llm", "pretrained_asr")


def recipe_settings(name: str, base: str = "salm") -> dict[str, Any]:
    """Recipe `name` over configuration `base`; bundled components by their whole paths."""
    recipe = ROOT / f"configs/recipes/{name}.yaml"
    values = settings.load(ROOT / f"configs/{base}.yaml", over=[recipe])
    for key in PARTS:
        if key in values["model"]:
            values["model"][key] = str(ROOT / "configs" / values["model"][key])
    return values


def check_salm_recipe(name: str) -> DataModule:
    """Asserts that every key is known, no row is left out and all parameters are trained.

    The working folder has the recipe's manifests. Returns its data.
    """
    values = recipe_settings(name)
    experiment.check_blocks(values)
    model = SALM(values["model"])
    Trainer(**values["trainer"]).check(model)
    datamodule = DataModule(values["data"], model.tokenizer)
    datamodule.setup(frame_count=model.frame_count, groups=1)
    assert not datamodule.dropped
    frozen = [path for path, is_trained in model.trainable.items() if not np.all(is_trained)]
    assert all(model.infos[path].is_buffer for path in frozen)
    return datamodule
