"""What optimizers are made of: a chain with a named state, parameters divided among transformations."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from tvq import model as lm
from tvq.schema import Model


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


def kernels(model: Model) -> dict[str, lm.Declared]:
    """The declarations of the matrices of all units or layers, by path: `units/q`."""
    declared = lm.named(model)
    return {path: like for path, like in declared.items() if like.dims[:1] == ("N",) and len(like.dims) == 3}


def divided(
    parts: dict[str, optax.GradientTransformation], where: Callable[[str], str]
) -> optax.GradientTransformation:
    """Each of `parts` for the parameters whose path `where` gives its name for; the state is a dict."""

    def divide(tree: dict) -> dict[str, dict]:
        flat: dict[str, dict] = {name: {} for name in parts}
        for path, x in flatten_dict(tree, sep="/").items():
            flat[where(path)][path] = x
        return {name: unflatten_dict(part, sep="/") for name, part in flat.items()}

    def init(params: dict) -> dict:
        return {name: parts[name].init(part) for name, part in divide(params).items()}

    def update(grads: dict, state: dict, params: dict) -> tuple[dict, dict]:
        each, of = divide(grads), divide(params)
        done = {name: tx.update(each[name], state[name], of[name]) for name, tx in parts.items()}
        flat = {path: x for updates, _ in done.values() for path, x in flatten_dict(updates, sep="/").items()}
        return unflatten_dict(flat, sep="/"), {name: after for name, (_, after) in done.items()}

    return optax.GradientTransformation(init, update)


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
