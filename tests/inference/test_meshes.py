"""Where weights lie for inference: copies where they fit, parts where they do not."""

import jax
import numpy as np
import pytest

from speechlm2_jax.inference import meshes
from speechlm2_jax.models import SALM
from speechlm2_jax.settings import SettingsError
from tests.parity.salm_golden import DATA

RUN = DATA / "llama_adapter_hf"


@pytest.fixture(scope="module")
def model():
    return SALM.from_pretrained(RUN)


@pytest.mark.parametrize(
    ("devices_per_copy", "sizes"), [(0.9, (8, 1)), (2.5, (2, 4)), (7.9, (1, 8))]
)
def test_auto_takes_as_few_devices_for_a_copy_as_hold_it(
    model, monkeypatch, devices_per_copy, sizes
):
    weights = meshes.weight_bytes(model.infos, "float32")
    assert weights == sum(4 * np.prod(info.shape) for info in model.infos.values())
    room = weights / devices_per_copy
    monkeypatch.setattr(meshes, "memory_bytes", lambda devices: room / meshes.WEIGHTS_SHARE)
    found = meshes.inference_sharding("auto", jax.devices(), model.infos, "float32")
    assert (found.data_parallel_size, found.tensor_size) == sizes


def test_weights_that_no_devices_hold_are_named_with_their_size(model, monkeypatch):
    monkeypatch.setattr(meshes, "memory_bytes", lambda devices: 1000.0)
    with pytest.raises(SettingsError, match=r"the weights take .* 8 devices have room for .*GiB"):
        meshes.inference_sharding("auto", jax.devices(), model.infos, "float32")


def test_sizes_that_do_not_fit_the_devices_name_the_key(model):
    strategy = {"_target_": "ModelParallelStrategy", "tensor_parallel_size": 3}
    with pytest.raises(SettingsError, match=r"^strategy: .*8 devices"):
        meshes.inference_sharding(strategy, jax.devices(), model.infos, "float32")


@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_each_device_reads_only_its_part(model, strategy):
    """The weights equal those of one device."""
    many = SALM.from_pretrained(RUN, strategy=strategy)
    assert many.variables.keys() == model.variables.keys()
    for path, value in model.variables.items():
        np.testing.assert_array_equal(many.variables[path], value, err_msg=path)
        assert len(many.variables[path].devices()) == 8
    if strategy == "fsdp":
        weight = many.variables["llm.layers.attention.query.weight"]
        assert weight.addressable_shards[0].data.size == weight.size // 8
