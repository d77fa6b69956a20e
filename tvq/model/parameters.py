"""Every array of the model, declared once. Placement, casts, decay, import and export follow from this.

Flax modules hold the values, each with its declaration (`Declared`) as metadata:

    dims      a letter for each dim, by which the mesh cuts it; HK and HV are keys or values of all heads
    original  its name in the original program's files; for a unit's array, within the unit
    decays    whether weight decay applies
    narrow    whether it is only used in the dtype of activations, so that it may be cast before it is sent
    beside    parameters that the loop over units reads as one array, in this order
    parts     parameters that are one array in the original program, in this order

All N = 2 n_layer units are one stack: their arrays have a leading dim N, which is not declared.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from tvq import sharding
from tvq.schema import Model

# Arrays that only training reads, and that a checkpoint may lack.
TRAINING_ONLY = ("codebooks/idle",)
# Applied to kernels [in, out] and to codebook sums [H,S,K].
kernel_init = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")


@dataclasses.dataclass(frozen=True)
class Declared:
    """An array of the model, without its values."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    dims: tuple[str, ...]
    original: str
    decays: bool = False
    narrow: bool = False
    beside: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()


class Weights(NamedTuple):
    """A trained model: `params`, which the optimizer updates, and `extra`, which `learn` updates.

    params  embed/table, [position/scale], units/{norm/{gain,bias}, q, k, v, g, r, u, w, out},
            [out_norm/{gain,bias}], embed/bias if tied, else out/{kernel,bias}
    extra   codebooks/{sum [N,H,S,K], count [N,H,S], [idle [N,H,S]]}
    """

    params: dict
    extra: dict


class Codebook(nnx.Variable):
    """Moving averages: the optimizer does not see them."""


def kernel(
    rngs: nnx.Rngs, config: Model, shape: tuple[int, ...], dims: tuple[str, ...], **more: Any
) -> nnx.Param:
    value = kernel_init(rngs.params(), shape, jnp.dtype(config.param_dtype))
    return nnx.Param(value, dims=dims, decays=True, **more)


def vector(config: Model, width: int, dim: str, value: float = 0.0, **more: Any) -> nnx.Param:
    return nnx.Param(jnp.full(width, value, jnp.dtype(config.param_dtype)), dims=(dim,), **more)


class GatedUnit(nnx.Module):
    def __init__(self, config: Model, rngs: nnx.Rngs):
        D, H, K, V, S = config.d_model, config.n_head, config.d_k, config.d_v, config.n_code
        dtype, qk, uw, kvg = jnp.dtype(config.param_dtype), ("q", "k"), ("u", "w"), ("k", "v", "g")
        make = functools.partial(kernel, rngs, config)
        self.norm = Norm(config, "input_ln")
        self.q = make((D, H * K), ("D", "HK"), original="q_proj/kernel", narrow=True, beside=qk)
        self.k = make((D, H * K), ("D", "HK"), original="kvg_proj/kernel", parts=kvg, narrow=True, beside=qk)
        self.v = make((D, H * V), ("D", "HV"), original="kvg_proj/kernel", parts=kvg, narrow=True)
        self.g = make((D, H * V), ("D", "HV"), original="kvg_proj/kernel", parts=kvg, narrow=True)
        self.r = make((D, H * K), ("D", "HK"), original="r_proj/kernel")
        self.u = vector(config, H * K, "HK", original="u", beside=uw)
        self.w = vector(config, H * K, "HK", original="v", beside=uw)
        self.out = make((H * V, D), ("HV", "D"), original="res_proj/kernel", narrow=True)
        sums = kernel_init(rngs.params(), (H, S, K), dtype)
        self.sum = Codebook(sums, dims=("H", "S", "K"), original="quantizer/c_sum")
        self.count = Codebook(jnp.ones((H, S), dtype), dims=("H", "S"), original="quantizer/c_count")
        if config.revive_codes:
            self.idle = Codebook(jnp.zeros((H, S), jnp.int32), dims=("H", "S"), original="")


class Norm(nnx.Module):
    def __init__(self, config: Model, original: str):
        pair = ("gain", "bias")
        self.gain = vector(config, config.d_model, "X", 1.0, original=f"{original}/g", beside=pair)
        self.bias = vector(config, config.d_model, "X", original=f"{original}/b", beside=pair)


class Embed(nnx.Module):
    def __init__(self, config: Model, rngs: nnx.Rngs):
        C, D, dtype = config.n_vocab, config.d_model, jnp.dtype(config.param_dtype)
        table = jax.random.normal(rngs.params(), (C, D), dtype)
        self.table = nnx.Param(table, dims=("C", "D"), decays=True, original="token_embedder/embs")
        if config.e_tie:
            self.bias = vector(config, C, "C", original="token_embedder/bias_out")


class Output(nnx.Module):
    def __init__(self, config: Model, rngs: nnx.Rngs):
        shape = config.d_model, config.n_vocab
        self.kernel = kernel(rngs, config, shape, ("D", "C"), original="out_proj/kernel")
        self.bias = vector(config, config.n_vocab, "C", original="out_proj/bias")


class Position(nnx.Module):
    def __init__(self, config: Model):
        scale = jnp.zeros((), jnp.dtype(config.param_dtype))
        self.scale = nnx.Param(scale, dims=(), decays=True, original="position_embedder/scale")


class Transformer(nnx.Module):
    def __init__(self, config: Model, rngs: nnx.Rngs):
        self.embed = Embed(config, rngs)
        self.units = nnx.vmap(lambda rngs: GatedUnit(config, rngs))(rngs.split(n_unit(config)))
        if config.pe_abs:
            self.position = Position(config)
        if config.e_preln:
            self.out_norm = Norm(config, "out_ln")
        if not config.e_tie:
            self.out = Output(config, rngs)


def n_unit(config: Model) -> int:
    return 2 * config.n_layer


def init(config: Model, key: jax.Array) -> Weights:
    """Fresh weights."""
    params, codebooks = nnx.state(Transformer(config, nnx.Rngs(params=key)), nnx.Param, Codebook)
    return Weights(nnx.to_pure_dict(params), {"codebooks": nnx.to_pure_dict(codebooks)["units"]})


@functools.cache
def declared(config: Model) -> Weights:
    """The tree of `init` with each array replaced by its declaration; units' arrays also have the dim N."""
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(params=0)))
    fields = [field.name for field in dataclasses.fields(Declared)]

    def one(path: tuple, variable: nnx.Variable) -> Declared:
        told = {name: x for name, x in variable.get_metadata().items() if name in fields}
        told["dims"] = ("N", *told["dims"]) if path[0] == "units" else told["dims"]
        like = variable.get_value()
        return Declared(like.shape, like.dtype, **told)

    def tree(kind: type) -> dict:
        flat = nnx.to_flat_state(nnx.state(model, kind))
        return unflatten_dict({path: one(path, variable) for path, variable in flat})

    return Weights(tree(nnx.Param), {"codebooks": tree(Codebook)["units"]})


def named(config: Model) -> dict[str, Declared]:
    """The declarations, by path: `units/q`, `codebooks/sum`."""
    params, extra = declared(config)
    return flatten_dict(params | extra, sep="/")


def specs(config: Model, axes: sharding.Axes) -> Weights:
    """How each array lies on the mesh."""
    return jax.tree.map(lambda like: sharding.spec(like.dims, axes), declared(config))


def gather(tree: dict, like: dict, axes: sharding.Axes, dtype: str = "") -> dict:
    """Inside `shard_map`, stored parameters with their dim D whole; `like` holds their declarations.

    The gradient of each part is then the sum over the devices, cut in the same way. For units, the tree
    is that of one unit. Parameters that may be narrow are cast to `dtype` before they are sent.
    """
    if axes.D is None:
        return tree

    def one(x: jax.Array, like: Declared) -> jax.Array:
        dims = [dim for dim in like.dims if dim != "N"]
        narrow = dtype if like.narrow and dtype else x.dtype
        return sharding.whole(x, axes, dims.index("D"), narrow) if "D" in dims else x

    return jax.tree.map(one, tree, like)


def narrowed(units: dict, config: Model) -> dict:
    """The parameters of units, cast where they are only used in the dtype of activations."""
    one = lambda x, like: x.astype(config.dtype) if like.narrow else x
    return jax.tree.map(one, units, declared(config).params["units"])


def gather_tables(weights: Weights, config: Model, axes: sharding.Axes) -> Weights:
    """All parameters whole, except those of units, which `forward` gathers one unit at a time."""
    like, params = declared(config).params, weights.params
    whole = {name: x if name == "units" else gather(x, like[name], axes) for name, x in params.items()}
    return weights._replace(params=whole)


def _arrays(config: Model) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The arrays that a loop over units reads: name, and the paths of the parameters that lie in it."""
    units = flatten_dict(declared(config).params["units"], sep="/")
    for path, like in units.items():
        folder, slash, name = path.rpartition("/")
        if not like.beside:
            yield path, (path,)
        elif name == like.beside[0]:
            yield (
                folder + slash + "".join(like.beside),
                tuple(folder + slash + other for other in like.beside),
            )


def paired(units: dict, config: Model) -> dict:
    """The parameters of all units, small ones joined: a loop copies separately each array that it reads, or
    whose gradient it makes.
    """
    flat = flatten_dict(units, sep="/")
    beside = lambda paths: jnp.concatenate([flat[path] for path in paths], -1)
    return {name: flat[name] if len(paths) == 1 else beside(paths) for name, paths in _arrays(config)}


def unpaired(pairs: dict, config: Model) -> dict:
    """The parameters of one unit."""
    flat: dict[str, jax.Array] = {}
    for name, paths in _arrays(config):
        flat |= zip(
            paths, jnp.split(pairs[name], len(paths), -1) if len(paths) > 1 else [pairs[name]], strict=True
        )
    return unflatten_dict(flat, sep="/")
