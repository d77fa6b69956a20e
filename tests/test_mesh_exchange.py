"""What the devices exchange in the compiled step: every message is accounted for, and none grows unseen."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.model import small
from tvq import config, mesh, state, train_step
from tvq.model.layers import N_PROBE
from tvq.plan import step
from tvq.plan.program import Program

pytestmark = pytest.mark.slow
B, U, N_UNIT = 8, 16, 2
SGD = optax.sgd(0.1)
N_METRIC = 8  # losses, mask and keys; those of the codebooks are computed on each device


@functools.cache
def links(
    update_len: int = U,
    n_head: int = 2,
    grad_thru_cache: bool = True,
    reproducible: bool = False,
    **shape: int | bool,
) -> dict[tuple[str, str], tuple[int, float]]:
    """`{(kind, axes): (messages, bytes that a device sends)}` of one update."""
    run = config.Config(
        model=dataclasses.replace(small.MODEL, n_head=n_head, grad_thru_cache=grad_thru_cache),
        train=config.Train(
            steps=1,
            global_batch_size=B,
            sequence_len=update_len,
            update_len=update_len,
            reproducible=reproducible,
        ),
        mesh=config.Mesh(**{"devices": 1} | shape),
    )
    n_device = math.prod(getattr(run.mesh, axis) for axis in mesh.AXES)
    devices = mesh.make(run.mesh, jax.devices()[:n_device])
    tokens = jax.ShapeDtypeStruct((B, update_len), jnp.int32, sharding=mesh.sharding(devices, mesh.BATCH))
    batch = dict.fromkeys(("inputs", "targets", "doc_ids", "loss_mask"), tokens)
    lowered = train_step.make(run, devices, SGD).lower(state.place(run, SGD, devices), batch)
    compiled = lowered.compile()
    return step.links(Program.read(compiled.as_text()), devices)


def size(tree: object) -> int:
    return sum(4 * x.size for x in jax.tree.leaves(tree))


def test_the_default_mesh_sums_everything_once():
    """Gradients, codebook statistics, metrics and the probe's keys; and, whole numbers, the probe's mask.

    A new message is a new term here.
    """
    like = state.abstract(small.MODEL, SGD)
    n_key = N_UNIT * N_PROBE
    keys, mask = 4 * n_key * small.MODEL.n_head * small.MODEL.d_k, 4 * n_key
    reduced = size(like.params) + size(like.codebooks) + 4 * N_METRIC + keys + mask
    assert links(devices=8) == {("all-reduce", "devices"): (2, 2 * 7 / 8 * reduced)}


def test_a_fixed_order_sends_as_many_bytes():
    """But for padding: less than a number a device, array and way."""
    (_, want), *_ = links(devices=8).values()
    found = links(devices=8, reproducible=True)
    assert set(found) == {("all-to-all", "devices"), ("all-gather", "devices")}
    (n_to_all, to_all), (n_gather, gather) = found.values()
    assert n_to_all == n_gather
    assert want <= to_all + gather < want + 4 * 7 * (n_to_all + n_gather)


def test_cut_parameters_cost_a_device_no_more_on_more_devices():
    for kind in ("all-gather", "reduce-scatter"):
        (n_few, few), (n_many, many) = (links(devices=n, shard_params=True)[kind, "devices"] for n in (2, 8))
        assert n_few == n_many
        # Each device has the n-th already.
        assert many / (7 / 8) == pytest.approx(few / (1 / 2))


def test_parts_of_a_sequence_exchange_the_same_however_long_it_is():
    short, long = (links(update_len=update_len, sequence=4) for update_len in (64, 256))
    assert short == long
    assert {kind for kind, _ in short} == {"all-reduce", "all-to-all", "collective-permute"}
    # A halo of M keys, values and codes and two messages of a count and V sums a code, and the way back.
    V, K, S, M = small.MODEL.d_v, small.MODEL.d_k, small.MODEL.n_code, small.MODEL.mem_len
    halo = (2 * (K + V) + 1) * M
    sums = (2 * (2 * V) + 2) * S * 3 / 4
    sent = short["collective-permute", "sequence"][1] + short["all-to-all", "sequence"][1]
    assert sent == N_UNIT * B * 2 * 4 * (halo + sums)


def test_without_gradients_through_the_cache_nothing_is_sent_back():
    found = links(update_len=64, sequence=4, grad_thru_cache=False)
    V, K, S, M = small.MODEL.d_v, small.MODEL.d_k, small.MODEL.n_code, small.MODEL.mem_len
    assert found["collective-permute", "sequence"][1] == N_UNIT * B * 2 * 4 * (K + V + 1) * M
    assert found["all-to-all", "sequence"][1] == N_UNIT * B * 2 * 4 * 2 * (V + 1) * S * 3 / 4


def test_a_cut_value_width_has_one_reduction_a_unit_and_pass():
    found = links(n_head=1, tensor=2)
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert found["all-reduce", "tensor"][0] == 2 * N_UNIT + 1  # and the norms of gradients and parameters
