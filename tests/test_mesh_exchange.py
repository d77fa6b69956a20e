"""What the devices exchange in the compiled step: every message is accounted for, and none grows unseen."""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.model import small
from tvq import config, schema, sharding
from tvq.model.layers import N_PROBE
from tvq.programs.plan import bound, step
from tvq.programs.plan.program import Program
from tvq.training import state, train_step

pytestmark = pytest.mark.slow
B, U, N_UNIT = 8, 16, 2
ENWIK8 = Path(__file__).parents[1] / "configs" / "enwik8.py"
SGD = optax.sgd(0.1)
N_METRIC = 8  # losses, mask and keys; those of the codebooks are computed on each device


@functools.cache
def links(
    update_len: int = U,
    n_head: int = 2,
    grad_thru_cache: bool = True,
    reproducible: bool = False,
    n_sequence: int = B,
    **shape: int | bool,
) -> dict[tuple[str, str], tuple[int, float]]:
    """`{(kind, axes): (messages, bytes that a device sends)}` of one update."""
    run = schema.Config(
        model=dataclasses.replace(small.MODEL, n_head=n_head, grad_thru_cache=grad_thru_cache),
        train=schema.Train(
            steps=1,
            global_batch_size=n_sequence,
            sequence_len=update_len,
            update_len=update_len,
            reproducible=reproducible,
        ),
        mesh=schema.Mesh(**{"devices": 1} | shape),
    )
    n_device = math.prod(getattr(run.mesh, axis) for axis in sharding.AXES)
    mesh = sharding.make(run.mesh, jax.devices()[:n_device])
    tokens = jax.ShapeDtypeStruct(
        (n_sequence, update_len), jnp.int32, sharding=sharding.sharding(mesh, sharding.BATCH)
    )
    batch = dict.fromkeys(("inputs", "targets", "loss_mask"), tokens)
    lowered = train_step.make(run, mesh, SGD).lower(state.place(run, SGD, mesh), batch)
    compiled = lowered.compile()
    return step.links(Program.read(compiled.as_text()).collectives(n_device), mesh)


def size(tree: object) -> int:
    return sum(4 * x.size for x in jax.tree.leaves(tree))


def test_the_default_mesh_sums_everything_once():
    """Gradients, codebook statistics, metrics and the probe's keys; and, whole numbers, the probe's mask.

    A new message is a new term here.
    """
    like = state.abstract(small.MODEL, SGD)
    n_key = N_UNIT * N_PROBE
    keys, mask = 4 * n_key * small.MODEL.n_head * small.MODEL.d_k, 4 * n_key
    reduced = size(like.weights) + 4 * N_METRIC + keys + mask
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
    """Four sequences on each. It has the n-th already: one of 256 sends 1.14 times as much as one of 8."""
    few, many = (links(devices=n, n_sequence=4 * n, shard_params=True) for n in (2, 8))
    assert {kind for kind, _ in few} == {"all-gather", "reduce-scatter", "all-reduce"}
    assert few.keys() == many.keys()
    for message in few:
        (n_few, sent_few), (n_many, sent_many) = few[message], many[message]
        assert n_few == n_many
        assert sent_many / (7 / 8) == pytest.approx(sent_few / (1 / 2))


def for_attention(found: dict[tuple[str, str], tuple[int, float]]) -> float:
    return sum(found[kind, "sequence"][1] for kind in ("collective-permute", "all-to-all"))


def exchanged(model: schema.Model, n_part: int) -> float:
    """Bytes that a device sends, a unit and a sequence, in four bytes each, both ways.

    A halo of M keys, values and codes, and two messages of a count and V sums a code, of which codes and
    counts have no gradient.
    """
    halo = (2 * (model.d_k + model.d_v) + 1) * model.mem_len
    sums = (2 * (2 * model.d_v) + 2) * model.n_code * (n_part - 1) / n_part
    return 4 * model.n_head * (halo + sums)


def test_parts_of_a_sequence_exchange_the_same_however_long_it_is():
    short, long = (links(update_len=update_len, sequence=4) for update_len in (64, 256))
    assert short == long
    assert {kind for kind, _ in short} == {"all-reduce", "all-to-all", "collective-permute"}
    assert for_attention(short) == N_UNIT * B * exchanged(small.MODEL, 4)
    parts = sharding.make(schema.Mesh(devices=1, sequence=4), jax.devices()[:4])
    assert bound.unit_messages(small.MODEL, parts, B, B * 16) == pytest.approx(for_attention(short), rel=0.05)


def test_a_million_tokens_over_64_devices_send_a_hundredth_of_ring_attention():
    """By the formula that compiled steps keep to at any number of parts, for the enwik8 recipe."""
    for n_part in (2, 8):
        found = links(update_len=64, sequence=n_part)
        assert for_attention(found) == N_UNIT * B * exchanged(small.MODEL, n_part)
    model = config.build(config.load(str(ENWIK8))).model
    # All keys and values pass each device but one, in two bytes, and their gradients on the way back.
    ring = 2 * 2 * model.n_head * (model.d_k + model.d_v) * 2**20 * 63 / 64
    assert 100 * exchanged(model, 64) < ring


def test_without_gradients_through_the_cache_nothing_is_sent_back():
    found = links(update_len=64, sequence=4, grad_thru_cache=False)
    V, K, S, M = small.MODEL.d_v, small.MODEL.d_k, small.MODEL.n_code, small.MODEL.mem_len
    assert found["collective-permute", "sequence"][1] == N_UNIT * B * 2 * 4 * (K + V + 1) * M
    assert found["all-to-all", "sequence"][1] == N_UNIT * B * 2 * 4 * 2 * (V + 1) * S * 3 / 4


def test_a_cut_value_width_has_one_reduction_a_unit_and_pass():
    found = links(n_head=1, tensor=2)
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert found["all-reduce", "tensor"][0] == 2 * N_UNIT + 1  # and the norms of gradients and parameters
    parts = sharding.make(schema.Mesh(devices=1, tensor=2), jax.devices()[:2])
    model = dataclasses.replace(small.MODEL, n_head=1, d_v=small.MODEL.d_v // 2)
    assert found["all-reduce", "tensor"][1] > bound.unit_messages(model, parts, B, B * U) > 0
