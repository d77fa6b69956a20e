"""The optimizer, an optax chain: clip, direction, weight decay, learning rate, schedule.

The paper's weight decay comes last: a share of the parameters at each update, whatever the rate.
"""

import functools
import importlib
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from tvq import model as lm
from tvq import sharding
from tvq.schema import Config, Model, Optimizer
from tvq.training import skip, transforms
from tvq.training.schedules import schedule


def make(config: Optimizer, model: Model) -> optax.GradientTransformation:
    """The optimizer of a model's parameters; its other weights are updated by `lm.learn`."""
    where = functools.partial(decayed, model=model)
    chain = {"clip": optax.clip_by_global_norm(config.grad_clip)} if config.grad_clip > 0 else {}
    chain[config.name] = module(config.name).direction(config, model)
    if config.wd_lam > 0 and config.wd_times_rate:
        chain["decay"] = optax.add_decayed_weights(config.wd_lam, mask=where)
    chain["rate"] = rate(config, model)
    chain["schedule"] = optax.scale_by_schedule(schedule(config))
    if config.wd_lam > 0 and not config.wd_times_rate:
        chain["decay"] = optax.add_decayed_weights(-config.wd_lam, mask=where)
    if config.skip_sigma > 0:
        chain[skip.STATE] = skip.window(config)
    return transforms.named(**chain)


def module(name: str) -> Any:
    """The module of an optimizer."""
    return importlib.import_module(f"tvq.training.optimizers.{name}")


def describe(config: Config, mesh: Mesh) -> str:
    """What a run should say of its optimizer, or nothing."""
    one = module(config.optimizer.name)
    return one.describe(config, mesh.shape["devices"]) if hasattr(one, "describe") else ""


def rate(config: Optimizer, model: Model) -> optax.GradientTransformation:
    """Down by the peak rate: that of units' kernels, and that of everything else."""
    if not config.lr_rest:
        return optax.scale_by_learning_rate(config.lr_max)
    kernels = transforms.kernels(model)
    of = lambda path: config.lr_max if sharding.name(path) in kernels else config.lr_rest
    down = lambda updates, _: jax.tree.map_with_path(lambda path, x: -of(path) * x, updates)
    return optax.stateless(down)


def decayed(params: Any, model: Model) -> Any:
    """True where weight decay applies."""
    declared = lm.named(model)
    return jax.tree.map_with_path(lambda path, _: declared[sharding.name(path)].decays, params)
