"""The mesh over eight CPU devices; processes are in tests/cluster."""

import jax
import numpy as np
import pytest

from tvq import config, mesh


def on(n_device: int) -> jax.sharding.Mesh:
    return mesh.make(config.Mesh(), jax.devices()[:n_device])


def test_minus_one_takes_all_devices():
    assert dict(on(8).shape) == dict(mesh.make(config.Mesh(devices=8), jax.devices()).shape) == {"devices": 8}
    assert mesh.n_data(on(4)) == 4


@pytest.mark.parametrize("wanted", [4, 16])
def test_a_mesh_takes_exactly_the_devices_there_are(wanted):
    with pytest.raises(
        ValueError, match=f"config.mesh.devices is {wanted} but there are 8 cpu devices"
    ) as error:
        mesh.make(config.Mesh(devices=wanted), jax.devices())
    assert "use 8 or -1" in str(error.value)
    assert f"--cpu_devices={wanted}" in str(error.value)


@pytest.mark.parametrize(("n_device", "size", "way_out"), [(4, 6, "4 or 8"), (8, 3, "8")])
def test_a_batch_that_does_not_divide(n_device, size, way_out):
    mesh.check_batch(on(n_device), "evaluate.batch_size", 2 * n_device)
    with pytest.raises(ValueError, match="evaluate") as error:
        mesh.check_batch(on(n_device), "evaluate.batch_size", size)
    assert str(error.value) == (
        f"config.evaluate.batch_size {size} is not divisible by mesh.devices {n_device}; use {way_out}"
    )


def test_one_process_supplies_all_rows():
    assert mesh.local_rows(on(4), 8) == slice(0, 8)
    assert mesh.local_rows(on(1), 5) == slice(0, 5)


def test_global_batch_holds_the_rows_in_order_and_cut_evenly():
    rows = {"inputs": np.arange(24, dtype=np.int32).reshape(8, 3), "weight": np.arange(8.0, dtype=np.float32)}
    placed = mesh.global_batch(on(4), rows, 8)
    assert set(placed) == set(rows)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, rows[name])
        assert array.dtype == rows[name].dtype
        for i, shard in enumerate(sorted(array.addressable_shards, key=lambda s: s.device.id)):
            np.testing.assert_array_equal(shard.data, rows[name][2 * i : 2 * i + 2])


def test_a_batch_of_other_size_than_said_is_refused():
    with pytest.raises(ValueError, match="8"):
        mesh.global_batch(on(4), {"inputs": np.zeros((4, 3), np.int32)}, 8)


def test_shapes_are_placed_without_making_arrays():
    tree = {"a": jax.ShapeDtypeStruct((4, 2), np.float32)}
    placed = mesh.with_sharding(on(4), tree)["a"]
    assert (placed.shape, placed.dtype) == ((4, 2), np.float32)
    assert placed.sharding == mesh.sharding(on(4), mesh.WHOLE)
    assert mesh.with_sharding(on(4), tree, mesh.BATCH)["a"].sharding.spec == mesh.BATCH
