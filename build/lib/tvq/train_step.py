"""The train step: n_update = T / U parameter updates over consecutive pieces of T-token sequences.

Attention state passes from piece to piece without gradient (truncated backpropagation through time) and
starts empty. Loss and gradient are computed in `shard_map`, each device on its own sequences, and reduced
explicitly; the optimizer works outside of it on whole arrays.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from tvq import loss, mesh, optimizer
from tvq.config import Config, Model
from tvq.model import transformer, vq
from tvq.model.layers import Draws
from tvq.state import TrainState

ATTENTION_STATE = transformer.State(mesh.WHOLE, mesh.STATE, mesh.BATCH)  # type: ignore[arg-type]


def loss_fn(
    params: dict,
    codebooks: dict,
    batch: dict,
    state: transformer.State,
    draws: Draws | None,
    config: Model,
    segment_len: int = 0,
) -> tuple[jax.Array, tuple]:
    """The loss of one update on `batch` arrays `[B,U]`, and (next state, codebook statistics, metrics).

    With a segment_len, which divides U, the tokens are read in segments of it, and the backward pass keeps
    but the state between them: the same gradient through U tokens in the memory of one segment.
    """

    def read(state: transformer.State, batch: dict) -> tuple:
        mask_BT = batch["loss_mask"]
        x_BTD, state, stats = transformer.forward(
            params, codebooks, batch["inputs"], mask_BT, state, config, draws
        )
        nll_BT = loss.token_nll(params, x_BTD, batch["targets"], mask_BT, config)
        metrics = {
            # Masked positions count in the denominator; the mean of the mask is there to undo that.
            "loss_lm_per_token_unscaled": nll_BT.mean(),
            "loss_mask_per_token": mask_BT.mean(dtype=nll_BT.dtype),
            "loss_commit_per_token": stats["commit"].sum(),
            **jax.tree.map(jnp.mean, stats["metrics"]),
        }
        return state, (stats["codebook"], metrics)

    if segment_len in (0, batch["inputs"].shape[1]):
        state, (stats, metrics) = read(state, batch)
    else:
        read = jax.checkpoint(read, prevent_cse=False)
        state, (stats, metrics) = lax.scan(read, state, pieces(batch, segment_len))
        stats = jax.tree.map(lambda x: x.sum(0), stats)
        metrics = jax.tree.map(lambda x: x.mean(0), metrics)
    total = metrics["loss_lm_per_token_unscaled"] + config.c_beta * metrics["loss_commit_per_token"]
    return total, (state, stats, metrics)


def pieces(batch: dict, length: int) -> dict:
    """Arrays `[B,T]` cut along T: `[T/length,B,length]`."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, length).swapaxes(0, 1), batch)


def make(config: Config, devices: Mesh, tx: optax.GradientTransformation) -> jax.stages.Wrapped:
    """The jitted step `(state, batch [B_global,T]) -> (state, metrics)`; the old state is donated."""
    model = transformer.suited(config.model, mesh.platform(devices))
    n_update = config.train.sequence_len // config.train.update_len
    schedule = optimizer.schedule(config.optimizer)

    def gradient(
        params: dict, codebooks: dict, batch: dict, state: transformer.State, draws: Draws
    ) -> tuple[dict, dict, dict, transformer.State]:
        """Gradients, codebook statistics and metrics of the whole batch, from the part on this device."""
        params = lax.pcast(params, mesh.DATA_AXES, to="varying")
        (_, (state, stats, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            params, codebooks, batch, state, draws, model, config.train.segment_len
        )
        grads, metrics = lax.pmean((grads, metrics), mesh.DATA_AXES)
        return grads, lax.psum(stats, mesh.DATA_AXES), metrics, lax.stop_gradient(state)

    sharded_gradient = jax.shard_map(
        gradient,
        mesh=devices,
        in_specs=(
            mesh.WHOLE,
            mesh.WHOLE,
            mesh.BATCH,
            ATTENTION_STATE,
            Draws(mesh.WHOLE, mesh.WHOLE, mesh.BATCH),  # type: ignore[arg-type]
        ),
        out_specs=(mesh.WHOLE, mesh.WHOLE, mesh.WHOLE, ATTENTION_STATE),
    )

    def update(carry: tuple, piece: dict) -> tuple:
        state, attention_state = carry
        draws = Draws(
            ephemeral=jax.random.fold_in(jax.random.fold_in(state.key, 0), state.step),
            timeless=jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step // n_update),
            sequence_B=jnp.arange(piece["inputs"].shape[0]),
        )
        grads, stats, metrics, attention_state = sharded_gradient(
            state.params, state.codebooks, piece, attention_state, draws
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= transformer.codebook_metrics(state.codebooks)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "learning_rate": config.optimizer.lr_max * schedule(state.step),
        }
        state = TrainState(
            step=state.step + 1,
            params=params,
            codebooks=vq.moving_average(state.codebooks, stats, config.model.c_gamma),
            opt_state=opt_state,
            key=state.key,
        )
        return (state, attention_state), metrics

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        empty = transformer.initial_state(config.model, batch["inputs"].shape[0])
        (state, _), metrics = lax.scan(update, (state, empty), pieces(batch, config.train.update_len))
        return state, jax.tree.map(jnp.mean, metrics)

    whole = mesh.sharding(devices, mesh.WHOLE)
    return jax.jit(train_step, donate_argnums=0, out_shardings=whole)
