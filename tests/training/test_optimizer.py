"""AdamW, clipping and layer masks."""

import jax
import numpy as np
import pytest

from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.optimizer import AdamWConfig, Optimizer, read_optimizer

FP32_ATOL = 1e-6  # one AdamW step moves a weight by about lr = 1e-2
STEPS = 5
RNG = np.random.default_rng(0)
PARAMS = {
    "a": RNG.normal(size=(4, 3)).astype(np.float32),
    "b": RNG.normal(size=(3,)).astype(np.float32),
}
GRADS = [{k: RNG.normal(size=v.shape).astype(np.float32) for k, v in PARAMS.items()}] * 2 + [
    {k: 5 * RNG.normal(size=v.shape).astype(np.float32) for k, v in PARAMS.items()}
    for _ in range(STEPS - 2)
]
RATES = [1e-2, 2e-2, 1e-3, 5e-3, 1e-2]


def run(optimizer, params, grads, rates):
    state, norms = optimizer.init(params), []
    update = jax.jit(lambda g, s, p, lr: optimizer.update(g, s, p, lr))
    for grad, rate in zip(grads, rates, strict=True):
        done = update(grad, state, params, rate)
        params, state = done.params, done.opt_state
        norms.append(float(done.grad_norm))
    return params, state, norms


@pytest.mark.parametrize("clip", [0.0, 1.0, 4.0])
def test_five_steps_equal_torch_adamw_with_clipping(clip):
    import torch

    options = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
    theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in PARAMS.items()}
    adamw, their_norms = torch.optim.AdamW(theirs.values(), **options), []
    for grad, rate in zip(GRADS, RATES, strict=True):
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(grad[name])
        limit = clip if clip else float("inf")
        their_norms.append(float(torch.nn.utils.clip_grad_norm_(theirs.values(), limit)))
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
    config = AdamWConfig(**options)
    ours, _, norms = run(
        Optimizer(transform=config.transform(), clip_norm=clip), PARAMS, GRADS, RATES
    )
    np.testing.assert_allclose(norms, their_norms, rtol=1e-6)
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name].detach().numpy(), atol=FP32_ATOL)


def test_frozen_layers_of_a_stack_keep_every_bit_and_leave_the_norm():
    stack = RNG.normal(size=(4, 3, 3)).astype(np.float32)
    grads = [{"w": RNG.normal(size=stack.shape).astype(np.float32)} for _ in range(3)]
    mask = np.array([False, True, False, True])
    decay = AdamWConfig(weight_decay=0.1).transform()
    masked = Optimizer(transform=decay, clip_norm=0.5, masks={"w": mask})
    ours, state, norms = run(masked, {"w": stack}, grads, RATES[:3])
    alone = Optimizer(transform=decay, clip_norm=0.5)
    only = [{"w": g["w"][mask]} for g in grads]
    expected, _, expected_norms = run(alone, {"w": stack[mask]}, only, RATES[:3])
    np.testing.assert_array_equal(ours["w"][~mask], stack[~mask])
    np.testing.assert_allclose(ours["w"][mask], expected["w"], atol=FP32_ATOL)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-6)
    assert all(not np.any(m[~mask]) for m in jax.tree.leaves(state) if m.ndim == 3)


def test_a_gradient_that_is_not_finite_in_a_frozen_layer_does_not_matter():
    stack = np.ones((2, 3), np.float32)
    grad = np.stack([np.full(3, np.nan), np.ones(3)]).astype(np.float32)
    optimizer = Optimizer(transform=AdamWConfig().transform(), masks={"w": np.array([False, True])})
    ours, _, norms = run(optimizer, {"w": stack}, [{"w": grad}], [1e-2])
    assert np.isfinite(norms).all() and np.isfinite(ours["w"]).all()


def test_nemo_optimizer_block_is_read():
    block = {
        "_target_": "torch.optim.AdamW",
        "lr": "3e-4",
        "betas": [0.9, 0.98],
        "weight_decay": 1e-3,
        "foreach": True,
    }
    config = read_optimizer(block)
    assert config == AdamWConfig(lr=3e-4, betas=(0.9, 0.98), weight_decay=1e-3, eps=1e-8)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (None, "model.optimizer: required"),
        ({"_target_": "torch.optim.SGD", "lr": 1.0}, "SGD.*AdamW"),
        ({"_target_": "torch.optim.AdamW", "learning_rate": 1.0}, "unknown key"),
        ({"_target_": "torch.optim.AdamW", "amsgrad": True}, "AMSGrad"),
        ({"_target_": "torch.optim.AdamW", "betas": [0.9, 1.0]}, "betas"),
    ],
)
def test_bad_optimizer_is_refused_by_name(block, message):
    with pytest.raises(SettingsError, match=message):
        read_optimizer(block)
