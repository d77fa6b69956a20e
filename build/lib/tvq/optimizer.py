"""The optax chain of SPEC.md "Optimizer": clip, optimizer at the peak rate, schedule, weight decay."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from tvq.config import Optimizer

# Vectors of a unit and biases; every kernel, table and scale decays.
NO_DECAY = frozenset({"gain", "bias", "u", "w"})


def schedule(config: Optimizer) -> optax.Schedule:
    """The factor on `lr_max` after a number of updates: linear warm-up from 0, then decay.

    cosine and linear end at 0.1 and stay there; inv_sqrt is sqrt(n_warmup_step / updates), without end.
    """
    warmup, rest = config.n_warmup_step, config.n_max_step - config.n_warmup_step
    decays = {
        "cosine": optax.cosine_decay_schedule(1.0, rest, alpha=0.1),
        "linear": optax.linear_schedule(1.0, 0.1, rest),
        "inv_sqrt": lambda count: (1.0 + count / max(warmup, 1)) ** -0.5,
    }
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), decays[config.schedule]], [warmup])


def make(config: Optimizer) -> optax.GradientTransformation:
    """Updates of the parameters; the codebooks have their moving average instead."""
    rate = config.lr_max
    optimizers = {
        "adamw": lambda: optax.adam(rate, b1=0.9, b2=0.98, eps=1e-9),
        "lion": lambda: optax.lion(rate, b1=0.95, b2=0.98, mu_dtype=jnp.bfloat16, weight_decay=0.0),
        "adafactor": lambda: each_unit(optax.adafactor(rate)),
    }
    chain = [optax.clip_by_global_norm(config.grad_clip)] if config.grad_clip > 0 else []
    chain += [optimizers[config.name](), optax.scale_by_schedule(schedule(config))]
    if config.wd_lam > 0:
        chain += [optax.add_decayed_weights(-config.wd_lam, mask=decayed)]
    return optax.chain(*chain)


def decayed(params: Any) -> Any:
    """True where weight decay applies."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in NO_DECAY, params)


def each_unit(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` applied to each gated unit by itself, where it would see the whole stack as one array.

    Adafactor scales by the root mean square of an array: of a unit's parameter, not of all 2 n_layer.
    """

    def split(tree: Any) -> tuple[Any, Any]:
        return tree["units"], {name: value for name, value in tree.items() if name != "units"}

    def init(params: Any) -> dict:
        units, rest = split(params)
        return {"units": jax.vmap(tx.init)(units), "rest": tx.init(rest)}

    def update(grads: Any, state: dict, params: Any) -> tuple[Any, dict]:
        (unit_grads, rest_grads), (units, rest) = split(grads), split(params)
        unit_updates, unit_state = jax.vmap(tx.update)(unit_grads, state["units"], units)
        updates, rest_state = tx.update(rest_grads, state["rest"], rest)
        return updates | {"units": unit_updates}, {"units": unit_state, "rest": rest_state}

    return optax.GradientTransformation(init, update)
