"""All keys of a settings file that cannot be used are in one error."""

import pytest
import yaml

from speechlm2_jax import experiment
from speechlm2_jax.settings import SettingsError
from tests.training.tiny_salm import write_config

SLIPS = {
    "model.perception.encoder.n_hedas": 4,
    "model.lora.use_dora": True,
    "model.promt_format": "qwen",
    "trainer.fast_dev_run": True,
    "data.train_ds.bach_size": 4,
    "data.train_ds.input_cfg.0.manifest_filpath": "a",
    "model.optimizer.weight_deccay": 0.1,
    "model.optimizer.amsgrad": True,
    "model.lr_scheduler.warmup_stps": 10,
    "model.lr_scheduler.gamma": 0.5,
    "exp_manager.checkpoint_callback_params.dirpath": "x",
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = write_config(tmp_path_factory.mktemp("keys"), trainer={"max_steps": 1})
    settings = yaml.safe_load(path.read_text())
    settings["model"]["lr_scheduler"] = {"_target_": "CosineAnnealing", "warmup_steps": 0}
    path.write_text(yaml.safe_dump(settings))
    return path


def refusal(config, slips):
    words = [f"+{key}={yaml.safe_dump(value).split(chr(10))[0]}" for key, value in slips.items()]
    with pytest.raises(SettingsError) as raised:
        experiment.build(config, words, dry_run=True)
    return str(raised.value)


def test_all_are_listed_at_once(config):
    message = refusal(config, SLIPS)
    assert message.startswith(f"{len(SLIPS)} keys cannot be used: ")
    for key in SLIPS:
        assert f"{key}: " in message


@pytest.mark.parametrize("key", SLIPS)
def test_one_key_has_the_message_of_its_own(config, key):
    message = refusal(config, {key: SLIPS[key]})
    assert message.startswith(f"{key}: ") and "cannot be used" not in message


@pytest.mark.parametrize(
    ("slips", "keys"),
    [
        (
            {"model.optimizer._target_": "torch.optim.SGD", "model.lr_scheduler.gamma": 0.5},
            ["model.optimizer._target_", "model.lr_scheduler.gamma"],
        ),
        (
            {
                "trainer.strategy._target_": "FSDPStrategy",
                "trainer.strategy.shard_size": 1,
                "trainer.strategy.a": 1,
            },
            ["trainer.strategy.shard_size", "trainer.strategy.a"],
        ),
    ],
)
def test_blocks_that_choose_a_class_are_listed_too(config, slips, keys):
    message = refusal(config, slips)
    assert message.startswith(f"{len(keys)} keys cannot be used: ")
    for key in keys:
        assert f"{key}: " in message


def test_a_good_file_has_none(config):
    experiment.check_keys(yaml.safe_load(config.read_text()))
