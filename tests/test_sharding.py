"""The mesh over eight CPU devices; processes are in tests/cluster."""

import functools
import re
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tvq import schema, sharding
from tvq.model import layers, parameters
from tvq.training import sums


def on(n_device: int) -> jax.sharding.Mesh:
    return sharding.make(schema.Mesh(), jax.devices()[:n_device])


def test_minus_one_takes_all_devices():
    shape = {"replica": 1, "devices": 8, "sequence": 1, "tensor": 1}
    assert dict(on(8).shape) == dict(sharding.make(schema.Mesh(devices=8), jax.devices()).shape) == shape
    assert sharding.n_data(on(4)) == 4


@pytest.mark.parametrize("wanted", [4, 16])
def test_a_mesh_takes_exactly_the_devices_there_are(wanted):
    with pytest.raises(
        ValueError, match=f"config.mesh.devices is {wanted} but there are 8 cpu devices"
    ) as error:
        sharding.make(schema.Mesh(devices=wanted), jax.devices())
    assert "use 8 or -1" in str(error.value)
    assert f"--cpu_devices={wanted}" in str(error.value)


def test_one_axis_takes_what_is_left():
    shape = schema.Mesh(replica=2, devices=1, sequence=-1, tensor=2)
    assert sharding.make(shape, jax.devices()).devices.shape == (2, 1, 2, 2)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            schema.Mesh(devices=2, tensor=2),
            "config.mesh is devices 2 x tensor 2 but there are 8 cpu devices; use config.mesh.devices=4,"
            " or pass --cpu_devices=4",
        ),
        (
            schema.Mesh(sequence=6),
            "config.mesh is devices -1 x sequence 6 but there are 8 cpu devices; use config.mesh.replica=1"
            " config.mesh.sequence=2 config.mesh.tensor=1 config.mesh.devices=4, or pass --cpu_devices=6",
        ),
    ],
)
def test_a_product_that_does_not_fit_names_a_shape_that_does(shape, message):
    with pytest.raises(ValueError, match="there are 8") as error:
        sharding.make(shape, jax.devices())
    assert str(error.value) == message


def test_each_slice_holds_whole_copies(monkeypatch):
    """On several slices, copies lie on slices, or else parts of the batch."""

    def devices(n_slice: int) -> list:
        chip = lambda i: types.SimpleNamespace(
            id=i, slice_index=i // 4, platform="tpu", device_kind="TPU v5 lite", process_index=i // 4,
            coords=(i % 4 // 2, i % 2, 0), core_on_chip=0,
        )  # fmt: skip
        return [chip(i) for i in range(4 * n_slice)]

    slices = lambda shape, n: np.vectorize(lambda d: d.slice_index)(sharding.order(shape, devices(n)))
    assert [np.unique(copy).tolist() for copy in slices((2, 2, 1, 2), 2)] == [[0], [1]]
    assert [np.unique(part).tolist() for part in slices((1, 4, 2, 1), 2)[0]] == [[0], [0], [1], [1]]
    with pytest.raises(ValueError, match="not multiples of the 3 slices; use"):
        sharding.order((2, 2, 3, 1), devices(3))


@pytest.mark.parametrize(("n_device", "size", "way_out"), [(4, 6, "4 or 8"), (8, 3, "8")])
def test_a_batch_that_does_not_divide(n_device, size, way_out):
    sharding.check_batch(on(n_device), "evaluate.batch_size", 2 * n_device)
    with pytest.raises(ValueError, match="evaluate") as error:
        sharding.check_batch(on(n_device), "evaluate.batch_size", size)
    assert str(error.value) == (
        f"config.evaluate.batch_size {size} is not a multiple of config.mesh.devices {n_device};"
        f" use {way_out}"
    )


def test_rows_go_to_their_places_whatever_the_order_of_the_devices():
    """On a torus they are not in the order of their numbers; parts of a sequence share rows."""
    shape = schema.Mesh(devices=4, sequence=2)
    devices = [jax.devices()[i] for i in (0, 1, 4, 5, 6, 7, 2, 3)]
    placed = sharding.make(shape, devices)
    rows = np.arange(8, dtype=np.int32)[:, None]
    array = sharding.global_batch(placed, {"x": rows}, 8)["x"]
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, rows[shard.index])
    np.testing.assert_array_equal(array, rows)


def test_one_process_supplies_all_rows():
    assert sharding.local_rows(on(4), 8) == list(range(8))
    assert sharding.local_rows(on(1), 5) == list(range(5))


def test_global_batch_holds_the_rows_in_order_and_cut_evenly():
    rows = {"inputs": np.arange(24, dtype=np.int32).reshape(8, 3), "weight": np.arange(8.0, dtype=np.float32)}
    placed = sharding.global_batch(on(4), rows, 8)
    assert set(placed) == set(rows)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, rows[name])
        assert array.dtype == rows[name].dtype
        for i, shard in enumerate(sorted(array.addressable_shards, key=lambda s: s.device.id)):
            np.testing.assert_array_equal(shard.data, rows[name][2 * i : 2 * i + 2])


def test_a_batch_of_other_size_than_said_is_refused():
    with pytest.raises(ValueError, match="8"):
        sharding.global_batch(on(4), {"inputs": np.zeros((4, 3), np.int32)}, 8)


def test_shapes_are_placed_without_making_arrays():
    tree = {"a": jax.ShapeDtypeStruct((4, 2), np.float32)}
    placed = sharding.with_sharding(on(4), tree)["a"]
    assert (placed.shape, placed.dtype) == ((4, 2), np.float32)
    assert placed.sharding == sharding.sharding(on(4), sharding.WHOLE)
    assert sharding.with_sharding(on(4), tree, sharding.BATCH)["a"].sharding.spec == sharding.BATCH


@pytest.mark.parametrize("shape", [{}, {"replica": 2, "devices": 4}, {"replica": 4, "devices": 2}])
def test_a_sum_in_pairs_has_one_order(shape):
    """Of float32 numbers of all sizes, whose sum depends on it; none of the three sizes divides by eight."""
    rng = np.random.default_rng(0)
    terms = {
        n: (rng.normal(size=(8, n)) * 10.0 ** rng.integers(-4, 4, (8, n))).astype("f") for n in (1, 5, 30)
    }
    mesh = sharding.make(schema.Mesh(**shape), jax.devices())
    add = jax.shard_map(
        lambda x: sums.in_pairs(jax.tree.map(lambda row: row[0], x), sharding.DATA_AXES),
        mesh=mesh, in_specs=sharding.BATCH, out_specs=sharding.WHOLE,
    )  # fmt: skip
    for n, total in jax.jit(add)(terms).items():
        x = terms[n]
        want = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))
        np.testing.assert_array_equal(total, want)
        assert n == 1 or (want != x.sum(0)).any()


def test_an_odd_number_of_devices_is_added_up_too():
    add = jax.shard_map(
        lambda x: sums.in_pairs(x, sharding.DATA_AXES),
        mesh=on(6),
        in_specs=sharding.BATCH,
        out_specs=sharding.WHOLE,
    )
    np.testing.assert_array_equal(jax.jit(add)(np.arange(6, dtype=np.int32)), [15])


@pytest.mark.parametrize(("D", "narrow"), [(24, "bf16"), (64, "f32")])  # 64: the 8 rows of a tile
def test_parameters_sent_in_few_bytes_are_as_if_cast_afterwards(D, narrow):
    """Bit by bit, and their gradients too, which are summed in float32."""
    cut = PartitionSpec("devices")
    kernel_DX, x_TD = (
        jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(D, 5), (16, D)])
    )

    def both(dtype: str, kernel_DX: jax.Array, x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
        def output(kernel_DX: jax.Array) -> jax.Array:
            like = {"q": parameters.declared(schema.Model()).params["units"]["q"]}
            whole = parameters.gather({"q": kernel_DX}, like, sharding.Axes(D="devices"), dtype)
            return layers.dense(x_TD.astype("bfloat16"), whole["q"])

        y_TX, back = jax.vjp(output, kernel_DX)
        return y_TX, *back(y_TX)

    found = []
    for dtype, sent in ("", "f32"), ("bfloat16", narrow):
        one = jax.shard_map(
            functools.partial(both, dtype), mesh=on(8), in_specs=(cut, cut), out_specs=(cut, cut)
        )
        found.append(jax.jit(one)(kernel_DX, x_TD))
        text = str(jax.make_jaxpr(one)(kernel_DX, x_TD))
        assert re.findall(r":(\w+)\[.*= (all_gather|reduce_scatter)\b", text) == [
            (sent, "all_gather"),
            ("f32", "reduce_scatter"),
        ]
    for a, b in zip(*found, strict=True):
        np.testing.assert_array_equal(a, b)
