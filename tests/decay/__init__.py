"""Another model behind the front of `tvq.model`: linear attention with exponential decay, one head a layer.

    python -m tests.decay COMMAND ...     the tvq command with this model instead of ours

Layer n adds `q_i sum_j a^(i-j) k_j v_j` over the tokens j <= i of the document, with `a = 1 - 2^-(4+n)`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from tvq import sharding
from tvq.model import Declared, Draws, Weights, draw_probe  # noqa: F401
from tvq.schema import END, Model


class State(NamedTuple):
    position: jax.Array
    sum_NBKV: jax.Array


Decoding = State
TRAINING_ONLY = ()
DIMS = {"q": ("N", "D", "K"), "k": ("N", "D", "K"), "v": ("N", "D", "V"), "out": ("N", "V", "D")}


def named(config: Model) -> dict[str, Declared]:
    sizes = {
        "C": config.n_vocab, "D": config.d_model, "K": config.d_k, "V": config.d_v, "N": config.n_layer,
    }  # fmt: skip
    dims = {"embed/table": ("C", "D"), **{f"layers/{name}": dims for name, dims in DIMS.items()}}
    shape = lambda letters: tuple(sizes[letter] for letter in letters)
    return {
        path: Declared(shape(letters), jnp.dtype(config.param_dtype), letters, original="", decays=True)
        for path, letters in dims.items()
    }


def declared(config: Model) -> Weights:
    flat = named(config)
    return Weights(
        {
            "embed": {"table": flat["embed/table"]},
            "layers": {name: flat[f"layers/{name}"] for name in DIMS},
        },
        {},
    )


def init(config: Model, key: jax.Array) -> Weights:
    like, structure = jax.tree.flatten(declared(config))
    keys = jax.random.split(key, len(like))
    draw = lambda key, one: one.shape[-2] ** -0.5 * jax.random.normal(key, one.shape, one.dtype)
    return jax.tree.unflatten(structure, map(draw, keys, like))


def specs(config: Model, axes: sharding.Axes) -> Weights:
    return jax.tree.map(lambda like: sharding.spec(like.dims, axes), declared(config))


def gather(weights: Weights, config: Model, axes: sharding.Axes) -> Weights:
    if axes.D is None:
        return weights
    whole = lambda x, like: sharding.whole(x, axes, like.dims.index("D"), x.dtype)
    return jax.tree.map(whole, weights, declared(config))


def start(config: Model, n_sequence: int) -> State:
    return State(jnp.int32(0), jnp.zeros((config.n_layer, n_sequence, config.d_k, config.d_v)))


def state_dims(config: Model) -> State:
    return State("", "NBKV")


def state_specs(config: Model, axes: sharding.Axes) -> State:
    return jax.tree.map(lambda dims: sharding.spec(dims, axes), state_dims(config))


def layer(params: dict, x_BLD: jax.Array, sum_BKV: jax.Array, n: jax.Array, number_BL: jax.Array) -> tuple:
    """The next hidden, and the sum after the tokens. Tokens of document 0 continue the sum before them."""
    decay, L = 1.0 - 2.0 ** -(4.0 + n), x_BLD.shape[1]
    normed = x_BLD * lax.rsqrt(1e-6 + jnp.mean(x_BLD**2, -1, keepdims=True))
    q_BLK, k_BLK, v_BLV = (normed @ params[name] for name in ("q", "k", "v"))
    distance_LL = jnp.arange(L)[:, None] - jnp.arange(L)[None]
    same_BLL = (number_BL[:, :, None] == number_BL[:, None]) & (distance_LL >= 0)[None]
    weight_BLL = jnp.where(same_BLL, decay ** jnp.maximum(distance_LL, 0)[None], 0.0)
    o_BLV = (q_BLK @ k_BLK.swapaxes(1, 2) * weight_BLL) @ v_BLV
    before_BL1 = jnp.where(number_BL == 0, decay ** (1 + jnp.arange(L))[None], 0.0)[..., None]
    o_BLV += before_BL1 * jnp.einsum("blk,bkv->blv", q_BLK, sum_BKV)
    sum_BKV = before_BL1[:, -1:] * sum_BKV + (weight_BLL[:, -1, :, None] * k_BLK).swapaxes(1, 2) @ v_BLV
    return x_BLD + o_BLV @ params["out"], sum_BKV


def forward(
    weights: Weights,
    inputs_BT: jax.Array,
    mask_BT: jax.Array,
    state: State,
    config: Model,
    draws: Draws | None = None,
    axes: sharding.Axes = sharding.UNCUT,
) -> tuple[jax.Array, State, dict, dict]:
    number_BT = jnp.cumsum(inputs_BT == END, 1)

    def one(x_BTD: jax.Array, scanned: tuple) -> tuple:
        return layer(scanned[0], x_BTD, scanned[1], scanned[2], number_BT)

    layers = weights.params["layers"], state.sum_NBKV, jnp.arange(config.n_layer)
    x_BTD, sum_NBKV = lax.scan(one, weights.params["embed"]["table"][inputs_BT], layers)
    return x_BTD, State(state.position + inputs_BT.shape[1], sum_NBKV), {"probe": {}}, {}


def logits(weights: Weights, x_BTD: jax.Array, config: Model) -> jax.Array:
    return x_BTD @ weights.params["embed"]["table"].T


def log_probs(weights: Weights, x_BTD: jax.Array, config: Model) -> jax.Array:
    return jax.nn.log_softmax(logits(weights, x_BTD, config))


def begin(weights: Weights, state: State, config: Model) -> Decoding:
    return state


def step(weights: Weights, token_B: jax.Array, state: Decoding, config: Model) -> tuple[jax.Array, Decoding]:
    x_BTD, state, *_ = forward(weights, token_B[:, None], jnp.ones_like(token_B)[:, None], state, config)
    return log_probs(weights, x_BTD, config)[:, 0], state


# What this model lacks: an auxiliary loss, weights other than parameters, and their health.
auxiliary_loss = lambda metrics, config: 0.0
stats_specs = lambda config, axes: {"probe": {}}
learn = lambda weights, stats, config: weights
measure = remember = lambda weights: {}
snapshot = lambda weights, probe, before, initial: ({}, {}, before)
for_platform = lambda config, platform: config
describe = lambda config: f"{config.n_layer} layers of decaying linear attention"
train_flops = lambda config, sequence_len: 6.0 * sum(x.size for x in jax.tree.leaves(init_shapes(config)))
init_shapes = lambda config: jax.eval_shape(lambda: init(config, jax.random.key(0)))
