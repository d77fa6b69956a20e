"""The model: embedding, a scanned stack of gated units, output projection.

Flax modules hold the parameters; everything else is a pure function of plain dictionaries:

    params     embed/table, [position/scale], units/{norm/{gain,bias}, q, k, v, g, r, u, w, out},
               [out_norm/{gain,bias}], embed/bias if tied, else out/{kernel,bias}
    codebooks  {sum [N,H,S,K], count [N,H,S], [idle [N,H,S]]}

All N = 2 n_layer units are one stack: their parameters have a leading dim N.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tvq import mesh
from tvq.config import Model
from tvq.model import attention, flash, layers, parts, recurrence, vq
from tvq.schema import END

# Applied to kernels [in, out] and to codebook sums [H,S,K].
kernel_init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")


class Codebook(nnx.Variable):
    """Moving averages; no parameters, so no optimizer sees them."""


class GatedUnit(nnx.Module):
    def __init__(self, config: Model, rngs: nnx.Rngs):
        D, H, K, V, S = config.d_model, config.n_head, config.d_k, config.d_v, config.n_code
        dtype = jnp.dtype(config.param_dtype)
        kernel = lambda *shape: nnx.Param(kernel_init(rngs.params(), shape, dtype))
        self.norm = Norm(D, dtype)
        self.q = kernel(D, H * K)
        self.k = kernel(D, H * K)
        self.v = kernel(D, H * V)
        self.g = kernel(D, H * V)
        self.r = kernel(D, H * K)
        self.u = nnx.Param(jnp.zeros(H * K, dtype))
        self.w = nnx.Param(jnp.zeros(H * K, dtype))
        self.out = kernel(H * V, D)
        self.sum = Codebook(kernel_init(rngs.params(), (H, S, K), dtype))
        self.count = Codebook(jnp.ones((H, S), dtype))
        if config.revive_codes:
            self.idle = Codebook(jnp.zeros((H, S), jnp.int32))


class Norm(nnx.Module):
    def __init__(self, width: int, dtype: jnp.dtype):
        self.gain = nnx.Param(jnp.ones(width, dtype))
        self.bias = nnx.Param(jnp.zeros(width, dtype))


class Embed(nnx.Module):
    def __init__(self, config: Model, rngs: nnx.Rngs):
        C, D, dtype = config.n_vocab, config.d_model, jnp.dtype(config.param_dtype)
        self.table = nnx.Param(jax.random.normal(rngs.params(), (C, D), dtype))
        if config.e_tie:
            self.bias = nnx.Param(jnp.zeros(C, dtype))


class Output(nnx.Module):
    def __init__(self, config: Model, rngs: nnx.Rngs):
        C, D, dtype = config.n_vocab, config.d_model, jnp.dtype(config.param_dtype)
        self.kernel = nnx.Param(kernel_init(rngs.params(), (D, C), dtype))
        self.bias = nnx.Param(jnp.zeros(C, dtype))


class Position(nnx.Module):
    def __init__(self, config: Model):
        self.scale = nnx.Param(jnp.zeros((), jnp.dtype(config.param_dtype)))


class Transformer(nnx.Module):
    def __init__(self, config: Model, rngs: nnx.Rngs):
        self.embed = Embed(config, rngs)
        self.units = nnx.vmap(lambda rngs: GatedUnit(config, rngs))(rngs.split(n_unit(config)))
        if config.pe_abs:
            self.position = Position(config)
        if config.e_preln:
            self.out_norm = Norm(config.d_model, jnp.dtype(config.param_dtype))
        if not config.e_tie:
            self.out = Output(config, rngs)


class State(NamedTuple):
    """Attention state of all units, and the number of tokens seen.

    Where documents are kept apart, `start_BE` is the position of the first token of the document that each of
    the last M + 1 tokens is of, the same for all units: of those in memory, and of the last that left it.
    """

    position: jax.Array  # int32
    units: attention.State  # every array with a leading N
    start_BE: jax.Array | None = None  # int32


def n_unit(config: Model) -> int:
    return 2 * config.n_layer


def suited(config: Model, platform: str) -> Model:
    """The config with n_parallel chosen for cpu, gpu or tpu, where it is 0.

    A CPU is fastest while the scores of a few blocks stay in its cache, a TPU block by block with the state
    in its fast memory, a GPU with all blocks at once. Full attention takes all at once where there
    is a kernel for it, else one.
    """
    if config.attention == "full":
        at_once = sys.maxsize if platform == "gpu" and flash.fits(config) else 1
        return dataclasses.replace(config, n_parallel=config.n_parallel or at_once)
    best = {"cpu": max(1, 2048 // config.block_len), "tpu": 1}
    return dataclasses.replace(config, n_parallel=config.n_parallel or best.get(platform, 0))


def init(config: Model, key: jax.Array) -> tuple[dict, dict]:
    """Fresh parameters and codebooks."""
    model = Transformer(config, nnx.Rngs(params=key))
    params, codebooks = nnx.state(model, nnx.Param, Codebook)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(codebooks)["units"]


def initial_state(config: Model, n_sequence: int) -> State:
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


def state_specs(config: Model, axes: mesh.Axes) -> State:
    """How each array of the state lies on the mesh: the letters of its name are its dims."""
    like = jax.eval_shape(lambda: initial_state(config, 1))
    letters = lambda path: mesh.name(path).rpartition("_")[2]
    units = jax.tree.map_with_path(lambda path, _: mesh.spec(("N", *letters(path)), axes), like.units)
    starts = None if like.start_BE is None else mesh.BATCH
    return State(mesh.WHOLE, units, starts)  # type: ignore[arg-type]


def gather_tables(params: dict, axes: mesh.Axes) -> dict:
    """All parameters whole but those of units, which `forward` makes whole one unit at a time."""
    return {name: x if name == "units" else mesh.gather(x, axes, name) for name, x in params.items()}


def starts(inputs_BT: jax.Array, first: jax.Array, state: State, axes: mesh.Axes) -> jax.Array | None:
    """The starts before the inputs, then theirs: `[B,M+1+T]`. An end id begins the next document."""
    if state.start_BE is None:
        return None
    position_T = first + jnp.arange(inputs_BT.shape[1], dtype=jnp.int32)
    begun_BT = jnp.where(inputs_BT == END, position_T[None], 0)
    if axes.T:
        return parts.starts(state.start_BE, begun_BT, axes.T)
    return jax.lax.cummax(jnp.concatenate([state.start_BE, begun_BT], 1), axis=1)


@jax.named_scope("embed")
def embed(params: dict, inputs_BT: jax.Array, position_BT: jax.Array, config: Model) -> jax.Array:
    """`[B,T,D]`; positions count from the first token, or from that of the document: `[1,T]` or `[B,T]`."""
    dtype = jnp.dtype(config.dtype)
    x_BTD = params["embed"]["table"].astype(dtype)[inputs_BT]
    if config.pe_abs:
        wide = jnp.promote_types(dtype, jnp.float32)
        sinusoid_BTD = layers.sinusoid(position_BT, config.d_model, config.pe_lam, wide)
        x_BTD = x_BTD + (params["position"]["scale"] * sinusoid_BTD).astype(dtype)
    return x_BTD


def distances(config: Model) -> jax.Array:
    """Sinusoids `[E,D]` of the distances 0 .. M."""
    dtype = jnp.promote_types(config.dtype, jnp.float32)
    return layers.sinusoid(jnp.arange(config.mem_len + 1), config.d_model, config.pe_lam, dtype)


def forward(
    params: dict,
    codebooks: dict,
    inputs_BT: jax.Array,
    mask_BT: jax.Array,
    state: State,
    config: Model,
    draws: layers.Draws | None = None,
    axes: mesh.Axes = mesh.UNCUT,
) -> tuple[jax.Array, State, dict]:
    """The last hidden `[B,T,D]`, the next state, and each unit's statistics stacked along N.

    Dropout acts where `draws` are given. T must be a multiple of block_len.
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
    x_BTD = embed(params, inputs_BT, position_BT, config)
    if draws is not None:
        keys_B = layers.sequence_keys(draws.ephemeral, layers.EMBEDDING, 0, draws.sequence_B)
        x_BTD = layers.token_dropout(x_BTD, config.p_dropemb, keys_B, config.block_len, first)
    distance_ED = distances(config)
    probe = None if draws is None else layers.local_probe(draws, first, T)

    def unit(x_BTD: jax.Array, scanned: tuple) -> tuple:
        pairs, codebook, unit_state, index = scanned
        unit_params = mesh.gather(unpaired(pairs), axes, "units", dict.fromkeys(layers.KERNELS, config.dtype))
        sinusoid_BED = jnp.broadcast_to(distance_ED[None], (x_BTD.shape[0], *distance_ED.shape))
        if draws is not None:
            keys_B = layers.sequence_keys(draws.timeless, layers.SINUSOID, index, draws.sequence_B)
            sinusoid_BED = layers.dropout(sinusoid_BED, config.p_dropsin, keys_B)
        y_BTD, unit_state, stats = layers.gated_unit(
            unit_params, codebook, x_BTD, mask_BT, sinusoid_BED, unit_state, config, start_BX, probe, axes
        )
        if draws is not None:
            keys_B = layers.sequence_keys(draws.ephemeral, layers.RESIDUAL, index, draws.sequence_B)
            y_BTD = layers.token_dropout(y_BTD, config.p_dropres, keys_B, config.block_len, first)
            keys_B = layers.sequence_keys(draws.timeless, layers.LAYER, index, draws.sequence_B)
            keep_B11 = layers.dropout(jnp.ones((x_BTD.shape[0], 1, 1), y_BTD.dtype), config.p_droplyr, keys_B)
            y_BTD = y_BTD * keep_B11
        means_X = jnp.stack([stats["commit"], *stats["metrics"].values()])
        return x_BTD + y_BTD, (unit_state, stats["codebook"], means_X)

    scanned = (paired(params["units"]), codebooks, state.units, jnp.arange(n_unit(config)))
    unit = rematerialised(unit, config.remat)
    x_BTD, (units, codebook_stats, means_NX) = jax.lax.scan(unit, x_BTD, scanned)
    metrics = dict(zip(vq.KEY_METRICS, means_NX[:, 1:].T, strict=True))
    stats = {"commit": means_NX[:, 0], "codebook": codebook_stats, "metrics": metrics}
    after_BE = None if start_BX is None else start_BX[:, T:]
    if axes.T:
        after_BE = parts.carried_out(after_BE, axes.T)
    return x_BTD, State(state.position + n_part * T, units, after_BE), stats


def paired(units: dict) -> dict:
    """The parameters of all units with small ones side by side: each array that a loop reads, or makes the
    gradient of, is copied on its own.
    """
    pair = lambda one, other: jnp.concatenate([one, other], -1)
    pairs = {
        "norm": pair(units["norm"]["gain"], units["norm"]["bias"]),
        "qk": pair(units["q"], units["k"]),
        "uw": pair(units["u"], units["w"]),
    }
    return pairs | {name: units[name] for name in ("r", "v", "g", "out")}


def unpaired(pairs: dict) -> dict:
    """The parameters of one unit."""
    (gain, bias), (q, k), (u, w) = (jnp.split(pairs[name], 2, -1) for name in ("norm", "qk", "uw"))
    kernels = {name: pairs[name] for name in ("r", "v", "g", "out")}
    return {"norm": {"gain": gain, "bias": bias}, "q": q, "k": k, "u": u, "w": w} | kernels


def rematerialised(unit: Callable, remat: str) -> Callable:
    """`unit` that keeps for its backward pass, besides its input: all, what is named KEPT, or nothing."""
    if remat == "all":
        return unit
    policies = {
        "names": jax.checkpoint_policies.save_only_these_names(attention.KEPT),
        "nothing": jax.checkpoint_policies.nothing_saveable,
    }
    # The scan keeps the two passes apart already.
    return jax.checkpoint(unit, prevent_cse=False, policy=policies[remat])


def log_probs(params: dict, x_BTD: jax.Array, config: Model) -> jax.Array:
    """Log-probabilities `[B,T,C]` in float32 at least."""
    if config.e_preln:
        x_BTD = layers.norm(x_BTD, params["out_norm"])
    x_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
    if config.e_tie:
        kernel_DC, bias_C = params["embed"]["table"].T, params["embed"]["bias"]
    else:
        kernel_DC, bias_C = params["out"]["kernel"], params["out"]["bias"]
    logits_BTC = layers.dense(x_BTD, kernel_DC) + bias_C[None, None]
    return jax.nn.log_softmax(logits_BTC * config.e_scale)


class Decoding(NamedTuple):
    """What `decode` needs and changes. Keys of codes and distances are made once, not at every token."""

    position: jax.Array  # int32, tokens seen
    rings: recurrence.Ring  # every array with a leading N
    c_NHSK: jax.Array
    r_NHEK: jax.Array
    start_B: jax.Array | None  # of the document, where documents are kept apart


def decoding(params: dict, codebooks: dict, state: State, config: Model) -> Decoding:
    """Where decoding goes on after `forward`."""
    units, start_B = state.units, None
    if state.start_BE is not None:  # of what the memory and the cache hold, only the last document goes on
        start_B = state.start_BE[:, -1]
        own_BE = state.start_BE == start_B[:, None]
        units = units._replace(
            z_BHM=jnp.where(own_BE[None, :, None, 1:], units.z_BHM, config.n_code),
            count_BHS=jnp.where(own_BE[None, :, None, :1], units.count_BHS, 0.0),
        )
    distance_1ED = distances(config)[None]
    position_keys = lambda unit_params: layers.position_keys(unit_params, distance_1ED, config.n_head)[0]
    return Decoding(
        position=state.position,
        rings=jax.vmap(recurrence.ring_from_state, in_axes=(0, None))(units, state.position),
        c_NHSK=jax.vmap(vq.codewords)(codebooks),
        r_NHEK=jax.lax.map(position_keys, params["units"]),
        start_B=start_B,
    )


def decode(params: dict, token_B: jax.Array, state: Decoding, config: Model) -> tuple[jax.Array, Decoding]:
    """Log-probabilities `[B,C]` after one more token: those of `forward`, at constant cost."""
    position_B1, rings, start_B = state.position[None, None], state.rings, state.start_B
    if start_B is not None:
        start_B = jnp.where(token_B == END, state.position, start_B)
        position_B1 = position_B1 - start_B[:, None]
        rings = jax.vmap(recurrence.emptied, in_axes=(0, None))(rings, token_B == END)
    x_BTD = embed(params, token_B[:, None], position_B1, config)

    def unit(x_BTD: jax.Array, scanned: tuple) -> tuple:
        unit_params, c_HSK, r_HEK, ring = scanned
        y_BTD, ring = layers.gated_unit_next(unit_params, c_HSK, r_HEK, x_BTD, ring, state.position, config)
        return x_BTD + y_BTD, ring

    scanned = (params["units"], state.c_NHSK, state.r_NHEK, rings)
    x_BTD, rings = jax.lax.scan(unit, x_BTD, scanned)
    state = state._replace(position=state.position + 1, rings=rings, start_B=start_B)
    return log_probs(params, x_BTD, config)[:, 0], state


def codebook_metrics(codebooks: dict) -> dict[str, jax.Array]:
    """`vq.codebook_metrics` averaged over units, one unit at a time."""
    means = jax.lax.map(vq.codebook_metrics, codebooks)
    return jax.tree.map(jnp.mean, means)
