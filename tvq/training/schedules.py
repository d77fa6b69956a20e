"""The factor on the peak learning rate, a function of the number of updates done."""

import optax

from tvq.schema import Optimizer


def schedule(config: Optimizer) -> optax.Schedule:
    """Linear warm-up from 0, then by `config.schedule`.

    cosine, linear and wsd are at the floor at n_max_step, and stay there; wsd leaves 1 n_decay_step before.
    inv_sqrt is sqrt(n_warmup_step / updates) and has no floor.
    """
    warmup, end, floor = config.n_warmup_step, config.n_max_step, config.floor
    rest = end - warmup
    schedules = {
        "cosine": lambda: cosine(rest, floor),
        "linear": lambda: linear(rest, floor),
        "inv_sqrt": lambda: lambda count: (1.0 + count / max(warmup, 1)) ** -0.5,
        "constant": lambda: optax.constant_schedule(1.0),
        "wsd": lambda: optax.join_schedules(
            [optax.constant_schedule(1.0), SHAPES[config.decay_shape](config.n_decay, floor)],
            [rest - config.n_decay],
        ),
    }
    return optax.join_schedules(
        [optax.linear_schedule(0.0, 1.0, warmup), schedules[config.schedule]()], [warmup]
    )


def cosine(n: int, floor: float) -> optax.Schedule:
    return optax.cosine_decay_schedule(1.0, n, alpha=floor)


def linear(n: int, floor: float) -> optax.Schedule:
    return optax.linear_schedule(1.0, floor, n)


def sqrt(n: int, floor: float) -> optax.Schedule:
    """1 - sqrt of the part that is over (Haegele et al., 2024): steep at first, then ever slower."""
    over = optax.linear_schedule(0.0, 1.0, n)
    return lambda count: 1.0 - (1.0 - floor) * over(count) ** 0.5


SHAPES = {"linear": linear, "cosine": cosine, "sqrt": sqrt}
