"""The train step: n_update = T / U parameter updates over consecutive pieces of T-token sequences.

Attention state passes from piece to piece without gradient (truncated backpropagation through time) and
starts empty. Loss and gradient are computed in `shard_map`, each device on its own sequences, and reduced
explicitly; the optimizer works outside of it on whole arrays.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh

from tvq import loss, mesh, optimizer, state
from tvq.config import Config, Model
from tvq.model import transformer, vq
from tvq.model.layers import Draws, draw_probe
from tvq.state import TrainState


def loss_fn(
    params: dict,
    codebooks: dict,
    batch: dict,
    state: transformer.State,
    draws: Draws | None,
    config: Model,
    segment_len: int = 0,
    axes: mesh.Axes = mesh.UNCUT,
) -> tuple[jax.Array, tuple]:
    """The loss of one update on `batch` arrays `[B,U]`, and (next state, codebook statistics, metrics).

    With a segment_len, which divides U, the tokens are read in segments of it, and the backward pass keeps
    but the state between them: the same gradient through U tokens in the memory of one segment.
    """
    params = transformer.gather_tables(params, axes)

    def read(state: transformer.State, batch: dict) -> tuple:
        mask_BT = batch["loss_mask"]
        x_BTD, state, stats = transformer.forward(
            params, codebooks, batch["inputs"], mask_BT, state, config, draws, axes
        )
        commit, key_metrics = stats["commit"].sum(), jax.tree.map(jnp.mean, stats["metrics"])
        if axes.H:
            commit, key_metrics = lax.psum(commit, axes.H), lax.pmean(key_metrics, axes.H)
        nll_BT = loss.token_nll(params, x_BTD, batch["targets"], mask_BT, config)
        metrics = {
            # Masked positions count in the denominator; the mean of the mask is there to undo that.
            "loss_lm_per_token_unscaled": nll_BT.mean(),
            "loss_mask_per_token": mask_BT.mean(dtype=nll_BT.dtype),
            "loss_commit_per_token": commit,
            **key_metrics,
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


def accumulated(
    gradient: Callable, n: int, batch: dict, state: transformer.State, draws: Draws, in_pairs: bool = False
) -> tuple:
    """What `gradient(batch, state, draws)` returns for all sequences, read n-th by n-th.

    That is sums of gradients, statistics and metrics, and the next state. Parts are added one by one, or in
    pairs, as `mesh.in_pairs` goes on over devices.
    """
    if n == 1:
        return gradient(batch, state, draws)
    cut = lambda x, dim: jnp.moveaxis(x.reshape(*x.shape[:dim], n, -1, *x.shape[dim + 1 :]), dim, 0)
    parts = (
        *jax.tree.map(lambda x: cut(x, 0), (batch, draws.sequence_B, state.start_BE)),
        jax.tree.map(lambda x: cut(x, 1), state.units),
    )
    first = jax.tree.map(lambda x: x[0], parts)
    read = lambda batch, sequence_B, start_BE, units: gradient(
        batch, state._replace(units=units, start_BE=start_BE), draws._replace(sequence_B=sequence_B)
    )

    if in_pairs:
        (grads, stats, metrics), states = pairs(read, parts, n)
    else:

        def add(total: tuple, part: tuple) -> tuple:
            *found, state = read(*part)
            return jax.tree.map(jnp.add, total, tuple(found)), state

        like = tuple(jax.eval_shape(read, *first)[:3])
        zero = jax.tree.map(lambda x: mesh.varying(jnp.zeros(x.shape, x.dtype), mesh.varies(x)), like)
        (grads, stats, metrics), states = lax.scan(add, zero, parts)
    join = lambda x, dim: jnp.moveaxis(x, 0, dim).reshape(*x.shape[1 : dim + 1], -1, *x.shape[dim + 2 :])
    units = jax.tree.map(lambda x: join(x, 1), states.units)
    start_BE = jax.tree.map(lambda x: join(x, 0), states.start_BE)
    return grads, stats, metrics, transformer.State(states.position[0], units, start_BE)


def pairs(read: Callable, parts: tuple, n: int) -> tuple:
    """Sums of what `read(*part)` finds for n parts, added as `mesh.in_pairs` does, and the next states."""
    if n == 1:
        *found, state = read(*jax.tree.map(lambda x: x[0], parts))
        return found, jax.tree.map(lambda x: x[None], state)
    n_outer = 2 if n % 2 == 0 else n
    parts = jax.tree.map(lambda x: x.reshape(n_outer, -1, *x.shape[1:]), parts)
    found, states = lax.map(lambda part: pairs(read, part, n // n_outer), parts)
    # Added outside of the loop: in it a product may be fused with the sum, which then is rounded once.
    return jax.tree.map(lambda x: x.sum(0), found), jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), states)


def make(config: Config, devices: Mesh, tx: optax.GradientTransformation) -> jax.stages.Wrapped:
    """The jitted step `(state, batch [B_global,T]) -> (state, metrics)`; the old state is donated.

    The metrics are means over updates; "probe" is that of the last: `{"key": [N,H,X,K], "mask": [N,X]}`.
    """
    model = transformer.suited(config.model, mesh.platform(devices))
    n_update = config.train.sequence_len // config.train.update_len
    schedule = optimizer.schedule(config.optimizer)
    axes = mesh.axes(devices, model, config.mesh.shard_params)
    placed = state.place(config, tx, devices)
    specs = jax.tree.map(lambda x: x.sharding.spec, placed)
    attention_specs = transformer.state_specs(model, axes)
    stats_specs = {name: specs.codebooks[name] for name in ("sum", "count")}
    stats_specs["probe"] = {"key": mesh.spec("NHXK", axes), "mask": mesh.WHOLE}
    segment_len = config.train.segment_len or config.train.update_len
    accumulate, fixed_order = config.train.accumulate, config.train.reproducible

    def gradient(
        params: dict, codebooks: dict, batch: dict, state: transformer.State, draws: Draws
    ) -> tuple[dict, dict, dict, transformer.State]:
        """Gradients, codebook statistics and metrics of the whole batch, from the part on this device."""
        params = mesh.varying(params, axes.cut_tokens)

        def of_part(batch: dict, state: transformer.State, draws: Draws) -> tuple:
            (_, (state, stats, metrics)), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                params, codebooks, batch, state, draws, model, segment_len // devices.shape["sequence"], axes
            )
            return grads, stats, metrics, lax.stop_gradient(state)

        grads, stats, metrics, state = accumulated(of_part, accumulate, batch, state, draws, fixed_order)
        n_part = accumulate * math.prod(devices.shape[axis] for axis in axes.cut_tokens)
        with jax.named_scope("reduce"):
            add = mesh.in_pairs if fixed_order else lax.psum
            grads = mesh.total(grads, specs.params, axes.cut_tokens, fixed_order)
            stats, metrics = add((stats, metrics), axes.cut_tokens)
            grads, metrics = jax.tree.map(lambda x: x / n_part, (grads, metrics))
        return grads, stats, metrics, state

    sharded_gradient = jax.shard_map(
        gradient,
        mesh=devices,
        in_specs=(
            specs.params,
            specs.codebooks,
            mesh.spec("BT", axes),
            attention_specs,
            Draws(mesh.WHOLE, mesh.WHOLE, mesh.BATCH, mesh.WHOLE),  # type: ignore[arg-type]
        ),
        out_specs=(specs.params, stats_specs, mesh.WHOLE, attention_specs),
    )

    def update(carry: tuple, piece: dict) -> tuple:
        state, attention_state = carry
        ephemeral = jax.random.fold_in(jax.random.fold_in(state.key, 0), state.step)
        probe_X2 = draw_probe(ephemeral, *piece["inputs"].shape)
        draws = Draws(
            ephemeral=ephemeral,
            timeless=jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step // n_update),
            sequence_B=jnp.arange(piece["inputs"].shape[0]),
            probe_X2=probe_X2.at[:, 1].add(attention_state.position),
        )
        grads, stats, metrics, attention_state = sharded_gradient(
            state.params, state.codebooks, mesh.dealt(devices, piece, segment_len), attention_state, draws
        )
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        metrics |= transformer.codebook_metrics(state.codebooks)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "learning_rate": config.optimizer.lr_max * schedule(state.step),
        }
        codebooks = vq.moving_average(state.codebooks, stats, config.model.c_gamma)
        if config.model.revive_codes:
            codebooks = jax.vmap(vq.revive, in_axes=(0, 0, 0, None))(
                state.codebooks, codebooks, stats, config.model.revive_codes
            )
        state = TrainState(
            step=state.step + 1,
            params=params,
            codebooks=codebooks,
            opt_state=opt_state,
            key=state.key,
        )
        return (state, attention_state), (metrics, stats["probe"])

    def train_step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        empty = transformer.initial_state(config.model, batch["inputs"].shape[0])
        (state, _), (metrics, probe) = lax.scan(
            update, (state, empty), pieces(batch, config.train.update_len)
        )
        return state, jax.tree.map(jnp.mean, metrics) | {"probe": jax.tree.map(lambda x: x[-1], probe)}

    shardings = jax.tree.map(lambda x: x.sharding, placed)
    out = (shardings, mesh.sharding(devices, mesh.WHOLE))
    return jax.jit(train_step, donate_argnums=0, out_shardings=out)
