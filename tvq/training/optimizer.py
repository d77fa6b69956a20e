"""The optimizer, an optax chain: clip, optimizer at the peak rate, schedule, weight decay."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tvq import model as lm
from tvq import sharding
from tvq.config import Model, Optimizer


def schedule(config: Optimizer) -> optax.Schedule:
    """The factor on `lr_max` after a number of updates: linear warm-up from 0, then decay.

    cosine and linear end at 0.1 and stay there; inv_sqrt is sqrt(n_warmup_step / updates), with no floor.
    """
    warmup, rest = config.n_warmup_step, config.n_max_step - config.n_warmup_step
    decays = {
        "cosine": optax.cosine_decay_schedule(1.0, rest, alpha=0.1),
        "linear": optax.linear_schedule(1.0, 0.1, rest),
        "inv_sqrt": lambda count: (1.0 + count / max(warmup, 1)) ** -0.5,
    }
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), decays[config.schedule]], [warmup])


def make(config: Optimizer, model: Model) -> optax.GradientTransformation:
    """The optimizer of a model's parameters; its other weights are updated by `lm.learn`."""
    optimizers = {
        "adamw": lambda: optax.scale_by_adam(b1=0.9, b2=0.98, eps=1e-9),
        "lion": lambda: optax.scale_by_lion(b1=0.95, b2=0.98, mu_dtype=jnp.bfloat16),
        "adafactor": lambda: each_unit(adafactor(config.lr_max), model),
    }
    chain = {"clip": optax.clip_by_global_norm(config.grad_clip)} if config.grad_clip > 0 else {}
    chain[config.name] = optimizers[config.name]()
    if config.name != "adafactor":
        chain["rate"] = optax.scale_by_learning_rate(config.lr_max)
    chain["schedule"] = optax.scale_by_schedule(schedule(config))
    if config.wd_lam > 0:
        chain["decay"] = optax.add_decayed_weights(
            -config.wd_lam, mask=functools.partial(decayed, model=model)
        )
    return named(**chain)


def named(**chain: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformations one after another; the state is a dict of the states of those that have one.

    So an array has the same name in a checkpoint whatever else is in the chain.
    """

    def init(params: Any) -> dict:
        states = {name: tx.init(params) for name, tx in chain.items()}
        return {name: state for name, state in states.items() if jax.tree.leaves(state)}

    def update(grads: Any, state: dict, params: Any) -> tuple[Any, dict]:
        after = {}
        for name, tx in chain.items():
            before = state[name] if name in state else tx.init(params)
            grads, after[name] = tx.update(grads, before, params)
        return grads, {name: after[name] for name in state}

    return optax.GradientTransformation(init, update)


def adafactor(rate: float) -> optax.GradientTransformation:
    """`optax.adafactor`, with its single state named."""
    return named(
        factored=optax.scale_by_factored_rms(),
        clip=optax.clip_by_block_rms(1.0),
        rate=optax.scale_by_learning_rate(rate, flip_sign=False),
        scale=optax.scale_by_param_block_rms(),
        sign=optax.scale(-1),
    )


def decayed(params: Any, model: Model) -> Any:
    """True where weight decay applies."""
    declared = lm.named(model)
    return jax.tree.map_with_path(lambda path, _: declared[sharding.name(path)].decays, params)


def dims(model: Model) -> dict[str, tuple[str, ...]]:
    """The dims of all arrays of a model, by path, and of those that Adafactor sees joined."""
    declared = lm.named(model)
    joint = {
        f"{folder}/{name}": (*declared[f"{folder}/{parts[0]}"].dims[:-1], "X")
        for folder in stacks(model)
        for name, parts in joints(model, folder).items()
    }
    return {path: like.dims for path, like in declared.items()} | joint


def stacks(model: Model) -> set[str]:
    """The names under which the parameters of all units or layers are stacked, with a leading dim N."""
    return {path.partition("/")[0] for path, like in lm.named(model).items() if like.dims[:1] == ("N",)}


def joints(model: Model, folder: str) -> dict[str, tuple[str, ...]]:
    """The parameters in a folder that are one array in the original program: `{"kvg": ("k", "v", "g")}`."""
    declared = {path: like for path, like in lm.named(model).items() if path.startswith(f"{folder}/")}
    return {"".join(like.parts): like.parts for like in declared.values() if like.parts}


def each_unit(tx: optax.GradientTransformation, model: Model) -> optax.GradientTransformation:
    """`tx` applied to each gated unit by itself, which would otherwise see the whole stack as one array.

    Adafactor scales by the root mean square of an array: here that of one unit's parameter, not of all
    2 n_layer. Keys, values and gates of a unit are one array to it, as in the original.
    """

    def split(tree: dict) -> tuple[dict, dict]:
        each = {name: joined(tree[name], joints(model, name)) for name in sorted(stacks(model) & set(tree))}
        return each, {name: value for name, value in tree.items() if name not in each}

    def init(params: dict) -> dict:
        each, rest = split(params)
        return {"each": jax.vmap(tx.init)(each), "rest": tx.init(rest)}

    def update(grads: dict, state: dict, params: dict) -> tuple[dict, dict]:
        (each_grads, rest_grads), (each, rest) = split(grads), split(params)
        each_updates, each_state = jax.vmap(tx.update)(each_grads, state["each"], each)
        updates, rest_state = tx.update(rest_grads, state["rest"], rest)
        for name, x in each_updates.items():
            updates[name] = parted(x, params[name], joints(model, name))
        return updates, {"each": each_state, "rest": rest_state}

    return optax.GradientTransformation(init, update)


def joined(units: dict, joints: dict[str, tuple[str, ...]]) -> dict:
    """The parameters, with joint ones concatenated into one array."""
    for name, parts in joints.items():
        if set(parts) <= set(units):
            whole = jnp.concatenate([units[part] for part in parts], -1)
            units = {other: value for other, value in units.items() if other not in parts} | {name: whole}
    return units


def parted(units: dict, like: dict, joints: dict[str, tuple[str, ...]]) -> dict:
    """The inverse of `joined`, with the widths of `like`."""
    for name, parts in joints.items():
        if name in units:
            edges = list(itertools.accumulate(like[part].shape[-1] for part in parts))[:-1]
            pieces = zip(parts, jnp.split(units[name], edges, -1), strict=True)
            units = {other: value for other, value in units.items() if other != name} | dict(pieces)
    return units
