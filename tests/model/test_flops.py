"""Counts of products against the compiler's own, and what is known of chips."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.model import small
from tvq import chips, schema
from tvq.model import flops, parameters, transformer
from tvq.model.unit import gated_unit


def lowered_flops(model: schema.Model, n_token: int, backward: bool = False) -> float:
    """XLA's count for one unit without loops, a token."""
    weights = jax.eval_shape(lambda: parameters.init(model, jax.random.key(0)))
    shapes = (weights.params["units"], weights.extra["codebooks"], transformer.start(model, 1).units)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)
    x_BTD = jax.ShapeDtypeStruct((1, n_token, model.d_model), jnp.float32)

    def unit(params, x_BTD, codebook, state):
        mask_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
        sinusoid_BED = transformer.distances(model)[None]
        y_BTD, _, stats = gated_unit(params, codebook, x_BTD, mask_BT, sinusoid_BED, state, model)
        return (y_BTD.sum(), stats) if backward else (y_BTD, stats)

    program = jax.value_and_grad(unit, argnums=(0, 1), has_aux=True) if backward else unit
    count = jax.jit(program).lower(one[0], x_BTD, *one[1:]).cost_analysis()["flops"]
    return count / n_token


@pytest.mark.parametrize("n_head", [1, 2])
def test_flops_are_those_of_the_compiler(n_head):
    """Elementwise work, which is not counted, is small beside products of wide values."""
    model = dataclasses.replace(
        schema.Model(), d_model=512, d_v=1024, n_head=n_head, n_code=256, block_len=256, mem_len=256,
        n_parallel=8,
    )  # fmt: skip
    counted = sum(flops.unit_flops(model, 2048).values())
    assert lowered_flops(model, 2048) == pytest.approx(counted, rel=0.03)
    full_model = dataclasses.replace(model, attention="full")
    assert sum(flops.unit_flops(full_model, 2048).values()) > counted
    # The backward pass computes the scores again, which does not count.
    parts = flops.unit_flops(model, 2048)
    again = parts["scores"] + parts["relative scores"] + parts["cache scores"]
    both = sum(flops.unit_flops(model, 2048, backward=True).values()) + again
    assert lowered_flops(model, 2048, backward=True) == pytest.approx(both, rel=0.05)


def test_flops_of_full_attention_grow_with_the_square():
    model = dataclasses.replace(small.MODEL, attention="full")
    scores = [flops.unit_flops(model, T)["scores"] for T in (1023, 2047)]
    assert scores[1] == 2 * scores[0]
    assert flops.unit_flops(small.MODEL, 2047)["scores"] == flops.unit_flops(small.MODEL, 1023)["scores"]


def test_chips():
    assert chips.chip("NVIDIA H200").bfloat16 == 989e12
    assert chips.chip("NVIDIA H100 PCIe").bfloat16 < chips.chip("NVIDIA H100 80GB HBM3").bfloat16
    assert chips.chip("TPU v5 lite").memory < chips.chip("TPU v5p").memory
    assert chips.chip("cpu") is None
