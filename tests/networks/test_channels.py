"""Channels of a conversation: the codes that the codec decodes."""

import jax.numpy as jnp
import numpy as np

from speechlm2_jax.networks.channels import Codebooks, without_control

CODEBOOKS = Codebooks(count=2, size=10)


def test_control_codes_become_the_first_codes_or_silence():
    bos, eos, delay = CODEBOOKS.bos, CODEBOOKS.eos, CODEBOOKS.delay
    codes = [
        [[3, 4], [bos, bos], [5, 6], [eos, 7]],
        [[bos, 4], [1, delay], [eos, eos], [9, 9]],
    ]
    decodable = without_control(jnp.array(codes), jnp.array([7, 8]), CODEBOOKS)
    np.testing.assert_array_equal(decodable[0], [[3, 4], [3, 4], [5, 6], [3, 7]])
    np.testing.assert_array_equal(decodable[1], [[7, 4], [1, 4], [7, 4], [9, 9]])
    exact = without_control(jnp.array(codes), jnp.array([7, 8]), CODEBOOKS, nemo_exact=True)
    np.testing.assert_array_equal(exact[0], decodable[0])
    np.testing.assert_array_equal(exact[1], [[bos, 4], [1, 4], [bos, 4], [9, 9]])
