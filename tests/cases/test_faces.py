"""What is seen at a prompt: names of the package, the device of a model."""

import subprocess
import sys

import jax
import pytest

import speechlm2_jax
from speechlm2_jax.inference.stages import device_of

FACES = ("speechlm2_jax", "speechlm2_jax.models", "speechlm2_jax.data", "speechlm2_jax.modules")


@pytest.mark.parametrize("face", FACES)
def test_dir_lists_what_the_package_promises(face):
    module = __import__(face, fromlist=["__all__"])
    assert module.__all__ and set(module.__all__) <= set(dir(module))
    assert "__name__" in dir(module)
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_dir_imports_nothing():
    code = f"import sys, {', '.join(FACES[:2])} as m; dir(m); dir({FACES[0]})\n"
    code += "print([n for n in ('torch', 'lhotse', 'grain', 'transformers') if n in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert found.strip() == "[]"


def test_every_model_names_its_devices():
    for name in speechlm2_jax.models.__all__:
        assert isinstance(getattr(speechlm2_jax.models, name).device, property)


def test_device_is_that_of_the_weights():
    second = jax.devices()[1]
    assert device_of({"w": jax.device_put(1.0, second)}) == second
    assert device_of({"w": 1.0}) == device_of(None) == jax.devices()[0]
    with jax.default_device(second):
        assert device_of(None) == second
    assert "cpu" in str(device_of(None)).lower()
