"""LSTM (Hochreiter and Schmidhuber 1997), one position at a time or over a whole sequence."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from speechlm2_jax.layers.linear import Linear
from speechlm2_jax.pytrees import register_pytree


@register_pytree
@dataclass(frozen=True, kw_only=True)
class LstmState:
    """Output and cell of every layer after some position."""

    output: Float[Array, "L B D"]
    cell: Float[Array, "L B D"]


class LstmLayer(nnx.Module):
    """One layer. Gates in torch's order: input, forget, candidate, output."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.input = Linear(width, 4 * width, axes=(None, "embed"), rngs=rngs)
        self.recurrent = Linear(width, 4 * width, axes=(None, "embed"), rngs=rngs)

    def __call__(
        self, x: Float[Array, "B D"], output: Float[Array, "B D"], cell: Float[Array, "B D"]
    ) -> tuple[Float[Array, "B D"], Float[Array, "B D"]]:
        """Computes the next output and the next cell."""
        gates = self.input(x) + self.recurrent(output)
        input_gate, forget_gate, candidate, output_gate = jnp.split(gates, 4, axis=-1)
        cell = jax.nn.sigmoid(forget_gate) * cell + jax.nn.sigmoid(input_gate) * jnp.tanh(candidate)
        return jax.nn.sigmoid(output_gate) * jnp.tanh(cell), cell


class Lstm(nnx.Module):
    """A stack of layers of one width."""

    def __init__(self, width: int, n_layers: int, *, rngs: nnx.Rngs):
        self.width = width
        self.layers = nnx.List([LstmLayer(width, rngs=rngs) for _ in range(n_layers)])

    def initial_state(self, batch: int) -> LstmState:
        """Zeros, as before the first position."""
        zeros = jnp.zeros((len(self.layers), batch, self.width), jnp.float32)
        return LstmState(output=zeros, cell=zeros)

    def step(
        self, x: Float[Array, "B D"], state: LstmState
    ) -> tuple[Float[Array, "B D"], LstmState]:
        """Computes the output of the last layer and the state for one position."""
        outputs, cells = [], []
        for index, layer in enumerate(self.layers):
            x, cell = layer(x, state.output[index], state.cell[index])
            outputs.append(x)
            cells.append(cell)
        return x, LstmState(output=jnp.stack(outputs), cell=jnp.stack(cells))

    def __call__(
        self, xs: Float[Array, "B T D"], state: LstmState
    ) -> tuple[Float[Array, "B T D"], LstmState]:
        """Computes the outputs of all positions and the state after the last."""

        def body(state: LstmState, x: Float[Array, "B D"]) -> tuple[LstmState, Array]:
            y, state = self.step(x, state)
            return state, y

        state, ys = jax.lax.scan(body, state, xs.swapaxes(0, 1))
        return ys.swapaxes(0, 1), state
