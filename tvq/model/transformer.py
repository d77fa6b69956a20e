"""The model: embedding, a scanned stack of gated units, output projection. All functions are pure."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tvq import sharding
from tvq.model import attention, layers, parts, recurrence, vq, window
from tvq.model.parameters import Weights, declared, gather, n_unit, narrowed, paired, specs, unpaired
from tvq.model.unit import gated_unit, gated_unit_next, position_keys
from tvq.schema import END, Model


class State(NamedTuple):
    """Attention state of all units, and the number of tokens seen.

    Where documents are kept apart, `start_BE` is the start of the document of each of the last M + 1 tokens:
    those in memory, and the last that left it. It is the same for all units.
    """

    position: jax.Array  # int32
    units: attention.State  # every array with a leading N
    start_BE: jax.Array | None = None  # int32


def for_platform(config: Model, platform: str) -> Model:
    """The config with n_parallel chosen for cpu, gpu or tpu, where it is 0.

    A CPU is fastest while the scores of a few blocks stay in its cache, a TPU block by block with the state
    in its fast memory, a GPU with all blocks at once.
    """
    best = {"cpu": max(1, 2048 // config.block_len), "tpu": 1}
    return dataclasses.replace(config, n_parallel=config.n_parallel or best.get(platform, 0))


def describe(config: Model) -> str:
    """A short description of the model."""
    return (
        f"{n_unit(config)} gated units of {config.n_head} x {config.n_code} codes, exact in a window of"
        f" {config.mem_len} + {config.block_len} tokens"
    )


def start(config: Model, n_sequence: int) -> State:
    """The state before the first token."""
    one = attention.initial_state(
        n_sequence,
        config.n_head,
        config.mem_len,
        config.n_code,
        config.d_k,
        config.d_v,
        jnp.dtype(config.dtype),
    )
    stack = lambda x: jnp.broadcast_to(x[None], (n_unit(config), *x.shape))
    start_BE = (
        None if config.attend_across_documents else jnp.zeros((n_sequence, config.mem_len + 1), jnp.int32)
    )
    return State(jnp.zeros((), jnp.int32), jax.tree.map(stack, one), start_BE)


def state_dims(config: Model) -> State:
    """The letters of the dims of each array of the state, as far as a mesh may cut them."""
    like = jax.eval_shape(lambda: start(config, 1))
    letters = lambda path, _: "N" + sharding.name(path).rpartition("_")[2]
    return State("", jax.tree.map_with_path(letters, like.units), None if like.start_BE is None else "B")  # type: ignore[arg-type]


def state_specs(config: Model, axes: sharding.Axes) -> State:
    """How each array of the state lies on the mesh."""
    return jax.tree.map(lambda dims: sharding.spec(dims, axes), state_dims(config))


def starts(inputs_BT: jax.Array, first: jax.Array, state: State, axes: sharding.Axes) -> jax.Array | None:
    """The starts before the inputs, then theirs: `[B,M+1+T]`. An end id begins the next document."""
    if state.start_BE is None:
        return None
    position_T = first + jnp.arange(inputs_BT.shape[1], dtype=jnp.int32)
    begun_BT = jnp.where(inputs_BT == END, position_T[None], 0)
    if axes.T:
        return parts.starts(state.start_BE, begun_BT, axes.T)
    return jax.lax.cummax(jnp.concatenate([state.start_BE, begun_BT], 1), axis=1)


@jax.named_scope("embed")
def embed(weights: Weights, inputs_BT: jax.Array, position_BT: jax.Array, config: Model) -> jax.Array:
    """`[B,T,D]`; positions count from the first token, or from that of the document: `[1,T]` or `[B,T]`."""
    dtype = jnp.dtype(config.dtype)
    x_BTD = weights.params["embed"]["table"].astype(dtype)[inputs_BT]
    if config.pe_abs:
        wide = jnp.promote_types(dtype, jnp.float32)
        sinusoid_BTD = layers.sinusoid(position_BT, config.d_model, config.pe_lam, wide)
        x_BTD = x_BTD + (weights.params["position"]["scale"] * sinusoid_BTD).astype(dtype)
    return x_BTD


def distances(config: Model) -> jax.Array:
    """Sinusoids `[E,D]` of the distances 0 .. M."""
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    return layers.sinusoid(jnp.arange(config.mem_len + 1), config.d_model, config.pe_lam, dtype)


def forward(
    weights: Weights,
    inputs_BT: jax.Array,
    mask_BT: jax.Array,
    state: State,
    config: Model,
    draws: layers.Draws | None = None,
    axes: sharding.Axes = sharding.UNCUT,
) -> tuple[jax.Array, State, dict, dict]:
    """The last hidden states `[B,T,D]`, the next state, statistics for `learn`, and metrics.

    Statistics are sums over tokens, metrics are means. Dropout is on if `draws` are given. T must be a
    multiple of block_len.
    """
    T, E, n_part = inputs_BT.shape[1], config.mem_len + 1, 1
    assert (state.start_BE is None) == config.attend_across_documents, "a state of the other kind"
    first = state.position
    if axes.T:
        n_part = jax.lax.axis_size(axes.T)
        first = first + jax.lax.axis_index(axes.T) * T
    start_BX, position_BT = starts(inputs_BT, first, state, axes), (first + jnp.arange(T))[None]
    if start_BX is not None:
        position_BT = position_BT - start_BX[:, E:]
    x_BTD = embed(weights, inputs_BT, position_BT, config)
    if draws is not None:
        keys_B = layers.sequence_keys(draws.ephemeral, layers.EMBEDDING, 0, draws.sequence_B)
        x_BTD = layers.token_dropout(x_BTD, config.p_dropemb, keys_B, config.block_len, first)
    distance_ED = distances(config)
    probe = None if draws is None else layers.local_probe(draws, first, T)

    def unit(x_BTD: jax.Array, scanned: tuple) -> tuple:
        pairs, codebook, unit_state, index = scanned
        unit_params = gather(unpaired(pairs, config), declared(config).params["units"], axes, config.dtype)
        sinusoid_BED = jnp.broadcast_to(distance_ED[None], (x_BTD.shape[0], *distance_ED.shape))
        if draws is not None:
            keys_B = layers.sequence_keys(draws.timeless, layers.SINUSOID, index, draws.sequence_B)
            sinusoid_BED = layers.dropout(sinusoid_BED, config.p_dropsin, keys_B)
        y_BTD, unit_state, stats = gated_unit(
            unit_params, codebook, x_BTD, mask_BT, sinusoid_BED, unit_state, config, start_BX, probe, axes
        )
        if draws is not None:
            y_BTD = drop(y_BTD, draws, index, first, config)
        means_X = jnp.stack([stats["commit"], *stats["metrics"].values()])
        return x_BTD + y_BTD, (unit_state, stats["codebook"], means_X)

    units, codebooks = weights.params["units"], weights.extra["codebooks"]
    scanned = (paired(units, config), codebooks, state.units, jnp.arange(n_unit(config)))
    unit = rematerialised(unit, config.remat)
    x_BTD, (state_units, stats, means_NX) = jax.lax.scan(unit, x_BTD, scanned)
    commit, metrics = means_NX[:, 0].sum(), dict(zip(vq.KEY_METRICS, means_NX[:, 1:].T, strict=True))
    metrics = jax.tree.map(jnp.mean, metrics)
    if axes.H:
        commit, metrics = jax.lax.psum(commit, axes.H), jax.lax.pmean(metrics, axes.H)
    after_BE = None if start_BX is None else start_BX[:, T:]
    if axes.T:
        after_BE = parts.carried_out(after_BE, axes.T)
    after = State(state.position + n_part * T, state_units, after_BE)
    return x_BTD, after, stats, {"loss_commit_per_token": commit, **metrics}


def drop(
    y_BTD: jax.Array, draws: layers.Draws, index: jax.Array, first: jax.Array, config: Model
) -> jax.Array:
    """The output of a unit after dropout of entries, and of the unit for whole sequences."""
    keys_B = layers.sequence_keys(draws.ephemeral, layers.RESIDUAL, index, draws.sequence_B)
    y_BTD = layers.token_dropout(y_BTD, config.p_dropres, keys_B, config.block_len, first)
    keys_B = layers.sequence_keys(draws.timeless, layers.LAYER, index, draws.sequence_B)
    keep_B11 = layers.dropout(jnp.ones((y_BTD.shape[0], 1, 1), y_BTD.dtype), config.p_droplyr, keys_B)
    return y_BTD * keep_B11


def auxiliary_loss(metrics: dict, config: Model) -> jax.Array:
    """What is added to the token loss."""
    return config.c_beta * metrics["loss_commit_per_token"]


def stats_specs(config: Model, axes: sharding.Axes) -> dict:
    """How the statistics of `forward` lie on the mesh."""
    codebooks = specs(config, axes).extra["codebooks"]
    probe = {"key": sharding.spec("NHXK", axes), "mask": sharding.WHOLE}
    return {"sum": codebooks["sum"], "count": codebooks["count"], "probe": probe}


def learn(weights: Weights, stats: dict, config: Model) -> Weights:
    """The weights with codebooks moved towards the keys of an update."""
    codebooks = weights.extra["codebooks"]
    averaged = vq.moving_average(codebooks, stats, config.c_gamma)
    if config.revive_codes:
        revive = jax.vmap(vq.revive, in_axes=(0, 0, 0, None))
        averaged = revive(codebooks, averaged, stats, config.revive_codes)
    return weights._replace(extra={"codebooks": averaged})


def rematerialised(unit: Callable, remat: str) -> Callable:
    """`unit` that keeps for its backward pass, besides its input: all, what is named KEPT, or nothing."""
    if remat == "all":
        return unit
    policies = {
        "names": jax.checkpoint_policies.save_only_these_names(window.KEPT),
        "nothing": jax.checkpoint_policies.nothing_saveable,
    }
    # The scan already keeps the two passes apart.
    return jax.checkpoint(unit, prevent_cse=False, policy=policies[remat])


def logits(weights: Weights, x_BTD: jax.Array, config: Model) -> jax.Array:
    """Logits `[B,T,C]` in float32 at least."""
    params = weights.params
    if config.e_preln:
        x_BTD = layers.norm(x_BTD, params["out_norm"])
    x_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
    if config.e_tie:
        kernel_DC, bias_C = params["embed"]["table"].T, params["embed"]["bias"]
    else:
        kernel_DC, bias_C = params["out"]["kernel"], params["out"]["bias"]
    return (layers.dense(x_BTD, kernel_DC) + bias_C[None, None]) * config.e_scale


def log_probs(weights: Weights, x_BTD: jax.Array, config: Model) -> jax.Array:
    """Log-probabilities `[B,T,C]` in float32 at least."""
    return jax.nn.log_softmax(logits(weights, x_BTD, config))


class Decoding(NamedTuple):
    """What `step` needs and changes. Casts, and keys of codes and distances, are made once."""

    position: jax.Array  # int32, tokens seen
    rings: recurrence.Rings
    units: dict  # parameters
    c_NHSK: jax.Array
    r_NHEK: jax.Array
    start_B: jax.Array | None  # of the document, where documents are kept apart


def begin(weights: Weights, state: State, config: Model) -> Decoding:
    """The state in which decoding continues after `forward`."""
    units, start_B = state.units, None
    if state.start_BE is not None:  # of the documents in memory and cache, only the last continues
        start_B = state.start_BE[:, -1]
        own_BE = state.start_BE == start_B[:, None]
        units = units._replace(
            z_BHM=jnp.where(own_BE[None, :, None, 1:], units.z_BHM, config.n_code),
            count_BHS=jnp.where(own_BE[None, :, None, :1], units.count_BHS, 0.0),
        )
    distance_1ED = distances(config)[None]
    keys_of = lambda unit_params: position_keys(unit_params, distance_1ED, config.n_head)[0]
    return Decoding(
        position=state.position,
        rings=recurrence.rings_from_state(units, state.position),
        units=narrowed(weights.params["units"], config),
        c_NHSK=jax.vmap(vq.codewords)(weights.extra["codebooks"]),
        r_NHEK=jax.lax.map(keys_of, weights.params["units"]),
        start_B=start_B,
    )


def step(weights: Weights, token_B: jax.Array, state: Decoding, config: Model) -> tuple[jax.Array, Decoding]:
    """Log-probabilities `[B,C]` after one more token: those of `forward`, at constant cost."""
    position_B1, rings, start_B = state.position[None, None], state.rings, state.start_B
    if start_B is not None:
        start_B = jnp.where(token_B == END, state.position, start_B)
        position_B1 = position_B1 - start_B[:, None]
        rings = recurrence.emptied(rings, token_B == END)
    x_BTD = embed(weights, token_B[:, None], position_B1, config)

    # Carried, not scanned over: scanning would copy all rings at each token.
    def unit(carry: tuple, scanned: tuple) -> tuple:
        x_BTD, rings = carry
        unit_params, c_HSK, r_HEK, n = scanned
        y_BTD, rings = gated_unit_next(unit_params, c_HSK, r_HEK, x_BTD, rings, n, state.position, config)
        return (x_BTD + y_BTD, rings), None

    scanned = (state.units, state.c_NHSK, state.r_NHEK, jnp.arange(n_unit(config)))
    (x_BTD, rings), _ = jax.lax.scan(unit, (x_BTD, rings), scanned)
    state = state._replace(position=state.position + 1, rings=rings, start_B=start_B)
    return log_probs(weights, x_BTD, config)[:, 0], state


def measure(weights: Weights) -> dict[str, jax.Array]:
    """Metrics of the codebooks, averaged over units, one unit at a time."""
    means = jax.lax.map(vq.codebook_metrics, weights.extra["codebooks"])
    return jax.tree.map(jnp.mean, means)
