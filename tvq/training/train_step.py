"""The train step: n_update = T / U parameter updates over consecutive pieces of T-token sequences.

Attention state passes from piece to piece without gradient (truncated backpropagation through time) and
starts empty. Loss and gradient are computed in `shard_map`, each device on its own sequences, and reduced
explicitly; the optimizer works outside it, on whole arrays.
"""

import contextlib
import math

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from tvq import model as lm
from tvq import sharding
from tvq.schema import Config, Model
from tvq.training import accumulate, loss, optimizer, skip, state, sums
from tvq.training.state import TrainState


def loss_fn(
    params: dict,
    extra: dict,
    batch: dict,
    state: lm.State,
    draws: lm.Draws | None,
    config: Model,
    segment_len: int = 0,
    axes: sharding.Axes = sharding.UNCUT,
    z_loss: float = 0.0,
) -> tuple[jax.Array, tuple]:
    """The loss of one update on `batch` arrays `[B,U]`, and (next state, statistics, metrics).

    With a segment_len, which divides U, the tokens are read in segments of it, and the backward pass keeps
    only the state between them: the same gradient through U tokens in the memory of one segment.
    """
    weights = lm.gather(lm.Weights(params, extra), config, axes)

    def read(state: lm.State, batch: dict) -> tuple:
        mask_BT = batch["loss_mask"]
        x_BTD, state, stats, metrics = lm.forward(
            weights, batch["inputs"], mask_BT, state, config, draws, axes
        )
        if z_loss:
            nll_BT, z_BT = loss.token_nll_and_z(weights, x_BTD, batch["targets"], mask_BT, config)
            metrics["loss_z_per_token"] = z_BT.mean()
        else:
            nll_BT = loss.token_nll(weights, x_BTD, batch["targets"], mask_BT, config)
        metrics |= {
            # Masked positions count in the denominator; the mean of the mask lets one undo that.
            "loss_lm_per_token_unscaled": nll_BT.mean(),
            "loss_mask_per_token": mask_BT.mean(dtype=nll_BT.dtype),
        }
        return state, (stats, metrics)

    if segment_len in (0, batch["inputs"].shape[1]):
        state, (stats, metrics) = read(state, batch)
    else:
        read = jax.checkpoint(read, prevent_cse=False)
        state, (stats, metrics) = lax.scan(read, state, pieces(batch, segment_len))
        stats = jax.tree.map(lambda x: x.sum(0), stats)
        metrics = jax.tree.map(lambda x: x.mean(0), metrics)
    total = metrics["loss_lm_per_token_unscaled"] + lm.auxiliary_loss(metrics, config)
    if z_loss:
        total += z_loss * metrics["loss_z_per_token"]
    return total, (state, stats, metrics)


def pieces(batch: dict, length: int) -> dict:
    """Arrays `[B,T]` cut along T: `[T/length,B,length]`."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, length).swapaxes(0, 1), batch)


def make(config: Config, mesh: Mesh, tx: optax.GradientTransformation) -> jax.stages.Wrapped:
    """The jitted step `(state, batch [B_global,T]) -> (state, metrics)`; the old state is donated.

    The metrics are means over updates; "probe" is that of the last, for `lm.snapshot`.
    """
    model = lm.for_platform(config.model, sharding.platform(mesh))
    n_update = config.train.sequence_len // config.train.update_len
    schedule = optimizer.schedule(config.optimizer)
    axes = sharding.axes(mesh, model, config.mesh.shard_params)
    placed = state.place(config, tx, mesh)
    specs, state_specs = lm.specs(model, axes), lm.state_specs(model, axes)
    segment_len = config.train.segment_len or config.train.update_len
    n_part, fixed_order = config.train.accumulate, config.train.reproducible

    def gradient(weights: lm.Weights, batch: dict, state: lm.State, draws: lm.Draws) -> tuple:
        """Gradients, statistics and metrics of the whole batch, from the part on this device."""
        params = sharding.varying(weights.params, axes.cut_tokens)

        def of_part(batch: dict, sequence_B: jax.Array, state: lm.State) -> tuple:
            part = draws._replace(sequence_B=sequence_B)
            length = segment_len // mesh.shape["sequence"]
            (_, (state, stats, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                params, weights.extra, batch, state, part, model, length, axes, config.train.z_loss
            )
            return (grads, stats, metrics), lax.stop_gradient(state)

        (grads, stats, metrics), state = accumulate.over_parts(
            of_part, n_part, (batch, draws.sequence_B), state, lm.state_dims(model), in_pairs=fixed_order
        )
        n_total = n_part * math.prod(mesh.shape[axis] for axis in axes.cut_tokens)
        with jax.named_scope("reduce"):
            add = sums.in_pairs if fixed_order else lax.psum
            grads = sums.total(grads, specs.params, axes.cut_tokens, fixed_order)
            stats, metrics = add((stats, metrics), axes.cut_tokens)
            grads, metrics = jax.tree.map(lambda x: x / n_total, (grads, metrics))
        return grads, stats, metrics, state

    sharded_gradient = jax.shard_map(
        gradient,
        mesh=mesh,
        in_specs=(
            specs,
            sharding.spec("BT", axes),
            state_specs,
            lm.Draws(sharding.WHOLE, sharding.WHOLE, sharding.BATCH, sharding.WHOLE),  # type: ignore[arg-type]
        ),
        out_specs=(specs.params, lm.stats_specs(model, axes), sharding.WHOLE, state_specs),
    )

    def update(carry: tuple, piece: dict) -> tuple:
        state, read = carry
        n_sequence, n_token = piece["inputs"].shape
        ephemeral = jax.random.fold_in(jax.random.fold_in(state.key, 0), state.step)
        draws = lm.Draws(
            ephemeral=ephemeral,
            timeless=jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step // n_update),
            sequence_B=jnp.arange(n_sequence),
            probe_X2=lm.draw_probe(ephemeral, n_sequence, n_token).at[:, 1].add(read.position),
        )
        grads, stats, metrics, read = sharded_gradient(
            state.weights, sharding.split_over_sequence(mesh, piece, segment_len), read, draws
        )
        # An optimizer may then say how its arrays lie; a fixed order of sums leaves them where they are.
        here = contextlib.nullcontext() if fixed_order else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
        with jax.named_scope("optimizer"), here:
            updates, opt_state = tx.update(grads, state.opt_state, state.weights.params)
            params = optax.apply_updates(state.weights.params, updates)
        metrics |= lm.measure(state.weights)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "learning_rate": config.optimizer.lr_max * schedule(state.step),
        }
        weights = lm.learn(state.weights._replace(params=params), stats, model)
        if config.optimizer.skip_sigma:
            before = state.weights, state.opt_state
            weights, opt_state = skip.held_back(config.optimizer, before, (weights, opt_state), metrics)
        state = TrainState(step=state.step + 1, weights=weights, opt_state=opt_state, key=state.key)
        return (state, read), (metrics, stats["probe"])

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        empty = lm.start(model, batch["inputs"].shape[0])
        (state, _), (metrics, probe) = lax.scan(
            update, (state, empty), pieces(batch, config.train.update_len)
        )
        metrics = jax.tree.map(jnp.mean, metrics) | {"probe": jax.tree.map(lambda x: x[-1], probe)}
        if config.optimizer.skip_sigma:
            metrics["updates_skipped"] = state.opt_state[skip.STATE].n_skipped
        return state, metrics

    shardings = jax.tree.map(lambda x: x.sharding, placed)
    out = (shardings, sharding.sharding(mesh, sharding.WHOLE))
    return jax.jit(train_step, donate_argnums=0, out_shardings=out)
