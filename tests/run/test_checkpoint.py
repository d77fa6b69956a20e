import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tensorstore
from etils import epath
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tvq import model as lm
from tvq.errors import InputError
from tvq.run import seal
from tvq.run.checkpoint import Checkpoints, SaveError, kept
from tvq.run.restore import read_weights
from tvq.training.state import TrainState

DATA, CONFIG = {"batch": 7}, {"model": {"d_model": 8, "dtype": "float32"}}


@partial(jax.tree_util.register_dataclass, data_fields=["mean", "count"], meta_fields=["name"])
@dataclass
class Averages:
    mean: Any
    count: Any
    name: str = "codes"


def mesh(n_device: int) -> Mesh:
    return Mesh(np.asarray(jax.devices()[:n_device]), ("devices",), axis_types=(AxisType.Auto,))


def make_state(n_device: int = 8, seed: int = 0) -> dict:
    """Every kind of leaf and container; `w` is cut over the devices, the rest is whole on each."""
    cut = NamedSharding(mesh(n_device), PartitionSpec("devices"))
    whole = NamedSharding(mesh(n_device), PartitionSpec())
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(64, 48)).astype(np.float32)
    params = {"w": w, "b": rng.normal(size=16).astype(jnp.bfloat16), "empty": {}}
    state = {
        "params": params,
        "opt_state": optax.chain(optax.clip_by_global_norm(1.0), optax.lion(0.1, mu_dtype=jnp.bfloat16)).init(
            jax.tree.map(jnp.asarray, params)
        ),
        "codebooks": Averages(rng.normal(size=(4, 3)).astype(np.float32), np.arange(4, dtype=np.int32)),
        "key": jax.random.key(seed),
        "step": np.int32(seed),
        "flags": (np.asarray([True, False]), None, np.asarray([250], np.uint8)),
    }
    shardings = jax.tree.map_with_path(lambda path, _: cut if "'w'" in str(path[-1]) else whole, state)
    return jax.device_put(state, shardings)


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(actual: Any, wanted: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert (a.dtype, a.shape, a.sharding) == (b.dtype, b.shape, b.sharding)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def silent(line: str) -> None:
    raise AssertionError(line)


def open_(folder: Path, keep: int = 3, keep_every: int = 0, **options: bool) -> Checkpoints:
    return Checkpoints(folder, keep=keep, keep_every=keep_every, **options)


def save_all(folder: Path, *steps: int) -> None:
    with open_(folder, keep=9) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(seed=step), {"batch": step}, CONFIG)


def test_nothing_saved(tmp_path: Path) -> None:
    with open_(tmp_path / "none") as checkpoints:
        assert checkpoints.steps() == []
        assert checkpoints.restore(abstract(make_state()), silent) is None


def test_every_kind_of_leaf_comes_back_bitwise(tmp_path: Path) -> None:
    state = make_state(seed=3)
    with open_(tmp_path) as checkpoints:
        checkpoints.save(3, state, DATA, CONFIG)
        assert checkpoints.steps() == [3]
    with open_(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(state), silent)
    assert restored is not None
    assert (restored.step, restored.data) == (3, DATA)
    assert_same(restored.state, state)


def test_a_relative_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_all(Path("run/checkpoints"), 1)
    with open_(Path("run/checkpoints")) as checkpoints:
        assert checkpoints.restore(abstract(make_state()), silent) is not None
    assert (tmp_path / "run/checkpoints/1/state").is_dir()


@pytest.mark.parametrize("n_device", [1, 2, 4])
def test_another_number_of_devices(tmp_path: Path, n_device: int) -> None:
    save_all(tmp_path, 1)
    wanted = make_state(n_device, seed=1)
    with open_(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(wanted), silent)
        assert restored is not None
        assert_same(restored.state, wanted)
        checkpoints.save(2, restored.state, DATA, CONFIG)
    with open_(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(make_state(8)), silent)
    assert restored is not None
    assert restored.step == 2
    assert_same(restored.state, make_state(8, seed=1))


@pytest.mark.parametrize("spec", [PartitionSpec("devices"), PartitionSpec()])
def test_the_state_may_be_donated_right_after_save(tmp_path: Path, spec: PartitionSpec) -> None:
    update = jax.jit(lambda x: x * -2.0, donate_argnums=0)
    values = np.random.default_rng(0).normal(size=(8, 1 << 16)).astype(np.float32)
    with open_(tmp_path, keep=9) as checkpoints:
        x = jax.device_put(values, NamedSharding(mesh(8), spec))
        for step in range(4):
            checkpoints.save(step, {"x": x}, {}, {})
            x = update(x)
    for step in (3, 2, 1, 0):
        with open_(tmp_path) as checkpoints:
            restored = checkpoints.restore(abstract({"x": x}), silent)
        assert restored is not None
        assert restored.step == step
        np.testing.assert_array_equal(restored.state["x"], values * np.float32(-2) ** step)
        (tmp_path / str(step)).rename(tmp_path / f"seen_{step}")


def test_saving_a_saved_step_changes_nothing(tmp_path: Path) -> None:
    with open_(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(seed=1), DATA, CONFIG)
        checkpoints.save(1, make_state(seed=2), DATA, CONFIG)  # on its way
        checkpoints.wait()
        checkpoints.save(1, make_state(seed=2), DATA, CONFIG)  # committed
        restored = checkpoints.restore(abstract(make_state()), silent)
    assert restored is not None
    assert_same(restored.state, make_state(seed=1))


@pytest.mark.parametrize(
    ("keep", "keep_every", "stay"),
    [
        (1, 0, [28]),
        (2, 0, [24, 28]),
        (9, 0, [4, 8, 12, 16, 20, 24, 28]),
        (1, 10, [12, 20, 28]),  # 28 would be kept as the last alone; 12 and 20 reach 10 and 20 first
        (2, 4, [4, 8, 12, 16, 20, 24, 28]),
        (1, 100, [28]),
    ],
)
def test_what_is_kept(keep: int, keep_every: int, stay: list[int]) -> None:
    steps: list[int] = []
    for step in range(4, 29, 4):
        steps.append(step)
        steps = [s for s, k in zip(steps, kept(steps, keep, keep_every), strict=True) if k]
    assert steps == stay


def test_old_checkpoints_are_removed_across_restarts(tmp_path: Path) -> None:
    for start in (4, 16):
        with open_(tmp_path, keep=2, keep_every=10) as checkpoints:
            for step in range(start, start + 12, 4):
                checkpoints.save(step, make_state(), DATA, CONFIG)
    assert sorted(int(p.name) for p in tmp_path.iterdir()) == [12, 20, 24]
    with open_(tmp_path) as checkpoints:
        assert checkpoints.steps() == [12, 20, 24]


def test_a_checkpoint_of_an_earlier_version_is_said_to_be_one(tmp_path: Path) -> None:
    save_all(tmp_path, 1)
    wanted = {"weights": {"params": abstract(make_state())["params"]}}
    with open_(tmp_path) as checkpoints, pytest.raises(ValueError, match="1 is of an earlier version of tvq"):
        checkpoints.restore(wanted, silent)


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE: dict[str, Callable[[Path], None]] = {
    "array file flipped": lambda step: flip(largest(step / "state")),
    "array file truncated": lambda step: truncate(largest(step / "state")),
    "array file missing": lambda step: largest(step / "state").unlink(),
    "array index flipped": lambda step: flip(step / "state" / "manifest.ocdbt"),
    "array metadata missing": lambda step: (step / "state" / "_METADATA").unlink(),
    "all arrays missing": lambda step: (step / "state").rename(step.parent / "elsewhere"),
    "position flipped": lambda step: (step / "meta" / "metadata").write_text(
        (step / "meta" / "metadata").read_text().replace('"batch": 3', '"batch": 2')
    ),
    "position missing": lambda step: (step / "meta" / "metadata").unlink(),
    "seal missing": lambda step: (step / "state" / "SEAL.json").unlink(),
    "seal truncated": lambda step: truncate(step / "meta" / "SEAL.json"),
    "empty": lambda step: [(step / item).rename(step.parent / item) for item in ("state", "meta")],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_falls_back_and_is_saved_again(
    tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    save_all(tmp_path, 1, 2, 3)
    DAMAGE[kind](tmp_path / "3")
    said: list[str] = []
    with open_(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(abstract(make_state()), said.append)
        assert restored is not None
        assert (restored.step, restored.data) == (2, {"batch": 2})
        assert_same(restored.state, make_state(seed=2))
        assert len(said) == 1
        assert said[0].startswith("checkpoint 3 is damaged (")
        assert said[0].endswith("); falling back to 2")
        assert checkpoints.steps() == [1, 2]
        checkpoints.save(3, make_state(seed=3), {"batch": 3}, CONFIG)
        assert checkpoints.steps() == [2, 3]
    assert (tmp_path / "damaged_3").is_dir()
    with open_(tmp_path) as checkpoints:
        restored = checkpoints.restore(abstract(make_state()), silent)
        assert checkpoints.steps() == [2, 3]
    assert restored is not None
    assert_same(restored.state, make_state(seed=3))
    assert capfd.readouterr() == ("", "")


def test_a_step_damaged_twice(tmp_path: Path) -> None:
    save_all(tmp_path, 1, 2)
    for _ in range(2):
        flip(largest(tmp_path / "2" / "state"))
        said: list[str] = []
        with open_(tmp_path) as checkpoints:
            assert checkpoints.restore(abstract(make_state()), said.append)
            checkpoints.save(2, make_state(seed=2), DATA, CONFIG)
        assert len(said) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "damaged_2"]


def test_all_damaged(tmp_path: Path) -> None:
    save_all(tmp_path, 1, 2)
    for step in ("1", "2"):
        flip(largest(tmp_path / step / "state"))
    message = r"(?s)all 2 checkpoints .*checkpoint 2 .*\n.*checkpoint 1 "
    with open_(tmp_path) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.restore(abstract(make_state()), silent)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_other_arrays_are_refused_with_a_list(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_all(tmp_path, 1)
    wanted = abstract(make_state())
    wanted["params"]["w"] = wanted["params"]["w"].update(shape=(64, 50))
    wanted["params"]["b"] = wanted["params"]["b"].update(dtype=jnp.float32)
    wanted["params"]["v"] = wanted["params"]["b"]
    del wanted["step"]
    with open_(tmp_path) as checkpoints, pytest.raises(ValueError, match="4 arrays differ") as error:
        checkpoints.restore(wanted, silent)
    assert "  params.w: float32[64, 48] saved, float32[64, 50] wanted" in str(error.value)
    assert "  params.b: bfloat16[16] saved, float32[16] wanted" in str(error.value)
    assert "  params.v: absent saved, float32[16] wanted" in str(error.value)
    assert "  step: int32[] saved, absent wanted" in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_long_list_is_cut(tmp_path: Path) -> None:
    with open_(tmp_path) as checkpoints:
        checkpoints.save(1, {str(i): jnp.zeros(3) for i in range(30)}, {}, {})
        wanted = abstract({str(i): jnp.zeros(4) for i in range(30)})
        with pytest.raises(ValueError, match="30 arrays differ") as error:
            checkpoints.restore(wanted, silent)
    assert str(error.value).endswith("and 10 more")
    assert len(str(error.value).splitlines()) == 22


def test_a_failed_save_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    save_all(tmp_path, 1)
    monkeypatch.setattr("tvq.run.seal.seal", full)
    message = r"a checkpoint cannot be written \(\[Errno 28\] No space left on device\); make room"
    with pytest.raises(SaveError, match=message), open_(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, make_state(), DATA, CONFIG)
    monkeypatch.undo()
    with open_(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1]


# TensorStore may answer when Orbax, which has failed by then, no longer listens.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("gone", ["", "state", "state/ocdbt.process_0", "state/ocdbt.process_0/d"])
def test_a_save_whose_files_are_removed(tmp_path: Path, gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finalize = ocp.StandardCheckpointHandler.finalize

    def remove_and_finalize(self: ocp.StandardCheckpointHandler, folder: Path) -> None:
        for path in tmp_path.glob("2.*"):
            inner = next(path.glob("state*")) / gone.removeprefix("state").strip("/") if gone else path
            shutil.rmtree(inner, ignore_errors=True)
        finalize(self, folder)

    save_all(tmp_path, 1)
    monkeypatch.setattr(ocp.StandardCheckpointHandler, "finalize", remove_and_finalize)
    message = "a checkpoint cannot be written .* do not remove its files while it is written"
    with pytest.raises(SaveError, match=message), open_(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, make_state(), DATA, CONFIG)


def test_a_part_of_an_array_that_is_missing_is_noticed(tmp_path: Path) -> None:
    """As if one process's folder were lost and not the others'."""
    folder = tmp_path / "a #1%20"
    save_all(folder, 1)
    assert seal.missing(epath.Path(folder / "1" / "state")) == []
    base = {"driver": "file", "path": f"{folder}/1/state/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    for key, lost in ((b"params.w/3.0", ["params.w"]), (b"step/.zarray", ["params.w", "step"])):
        assert key in store.list().result()
        store.write(key, None).result()
        assert seal.missing(epath.Path(folder / "1" / "state")) == lost


def test_a_reader_leaves_everything_as_it_is(tmp_path: Path) -> None:
    with open_(tmp_path / "none", read_only=True) as checkpoints:
        assert checkpoints.restore(abstract(make_state()), silent) is None
    assert list(tmp_path.iterdir()) == []
    save_all(tmp_path, 1, 2)
    flip(largest(tmp_path / "2"))
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    said: list[str] = []
    with open_(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.restore(abstract(make_state()), said.append)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "3.orbax-checkpoint-tmp"]
    assert len(said) == 1


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    save_all(tmp_path, 1)
    (tmp_path / "1").rename(tmp_path / "2.orbax-checkpoint-tmp")
    save_all(tmp_path, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["3"]


def test_a_removal_cut_short_is_completed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_all(tmp_path, 1, 2)
    (tmp_path / "1" / "_CHECKPOINT_METADATA").unlink()
    largest(tmp_path / "1").unlink()
    with open_(tmp_path, keep=2) as checkpoints:
        restored = checkpoints.restore(abstract(make_state()), silent)
        assert restored is not None
        assert restored.step == 2
        checkpoints.save(3, make_state(), DATA, CONFIG)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]
    assert caplog.text == ""


def test_waiting_for_a_save_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.MonkeyPatch.context() as patch, open_(tmp_path) as checkpoints:
        patch.setattr("tvq.run.seal.seal", lambda _: time.sleep(0.6))  # twice; Orbax warns after 1 s
        checkpoints.save(1, {"x": jnp.zeros(3)}, {}, {})
        checkpoints.save(2, {"x": jnp.zeros(3)}, {}, {})
        patch.undo()
    assert caplog.text == ""


def weights(state: dict) -> dict:
    return {name: state[name] for name in ("params", "codebooks")}


def test_weights_are_read_alone(tmp_path: Path) -> None:
    """Whatever the rest of the state is called: its arrays are neither compared nor read."""
    save_all(tmp_path, 1)
    wanted = weights(make_state(seed=1))
    restored = read_weights(tmp_path, abstract(wanted), silent)
    assert restored is not None
    assert (restored.step, restored.data) == (1, {"batch": 1})
    assert_same(restored.state, wanted)
    other = abstract(wanted)
    other["params"]["b"] = other["params"]["b"].update(dtype=jnp.float32)
    del other["params"]["w"]
    with pytest.raises(ValueError, match="2 arrays differ") as error:
        read_weights(tmp_path, other, silent)
    assert "params.w: float32[64, 48] saved, absent wanted" in str(error.value)


def test_an_optional_array_may_be_missing(tmp_path: Path) -> None:
    state = {"params": {"w": jnp.ones(3), "n": jnp.zeros(2)}}
    with open_(tmp_path) as checkpoints:
        checkpoints.save(1, state, {}, {})
    less, more = {"params": {"w": state["params"]["w"]}}, {"params": state["params"] | {"o": jnp.ones(4)}}
    for wanted, optional in ((less, {"params.n"}), (more, {"params.o"})):
        with pytest.raises(ValueError, match="1 arrays differ"):
            read_weights(tmp_path, abstract(wanted), silent)
        restored = read_weights(tmp_path, abstract(wanted), silent, optional)
        assert restored is not None
        assert restored.state["params"].get("o") is None
        np.testing.assert_array_equal(restored.state["params"]["w"], np.ones(3))


# TensorStore may answer when Orbax, which has failed by then, no longer listens.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("gone", ["2", "2/state", "2/meta", "2/state/d", "2/state/manifest.ocdbt"])
@pytest.mark.parametrize("when", ["__init__", "_newest", "_read_meta"])
def test_a_checkpoint_that_is_removed_under_its_reader(
    tmp_path: Path, gone: str, when: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run has saved the next by then, and that is read."""
    save_all(tmp_path, 2, 3)
    (tmp_path / "3").rename(tmp_path / "next")
    real = getattr(Checkpoints, when)

    def and_then_it_goes(*arguments: Any, **options: Any) -> Any:
        found = real(*arguments, **options)
        if (tmp_path / "next").exists():
            (tmp_path / "next").rename(tmp_path / "3")
            (tmp_path / gone).rename(tmp_path / "removed")
        return found

    monkeypatch.setattr(Checkpoints, when, and_then_it_goes)
    restored = read_weights(tmp_path, abstract(weights(make_state())), silent)
    assert restored is not None
    if (gone, when) != ("2/meta", "_read_meta"):  # which was read by then
        assert restored.step == 3
        assert_same(restored.state, weights(make_state(seed=3)))
    assert capfd.readouterr() == ("", "")


def test_a_reader_gives_up_after_some_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_all(tmp_path, 1)
    real, newest = Checkpoints._read_meta, [1]

    def and_then_it_goes(self: Checkpoints, step: int) -> dict:
        found = real(self, step)
        newest[0] += 1
        (tmp_path / str(step)).rename(tmp_path / str(newest[0]))
        return found

    monkeypatch.setattr(Checkpoints, "_read_meta", and_then_it_goes)
    with pytest.raises(
        InputError, match=r"10 checkpoints in .* were removed .*raise its config.checkpoint.k"
    ):
        read_weights(tmp_path, abstract(weights(make_state())), silent)
    monkeypatch.undo()
    (tmp_path / "11" / "meta" / "metadata").unlink()  # damaged, and no newer one is on its way
    with pytest.raises(InputError, match="all 1 checkpoints"):
        read_weights(tmp_path, abstract(weights(make_state())), silent)


def test_other_settings_of_jax_are_refused(tmp_path: Path) -> None:
    save_all(tmp_path, 1)
    with jax.threefry_partitionable(False), open_(tmp_path) as checkpoints:
        with pytest.raises(InputError, match="checkpoint 1 was saved with other settings of jax") as error:
            checkpoints.restore(abstract(make_state()), silent)
        assert "\n  JAX_THREEFRY_PARTITIONABLE: true when it was saved, false now\n" in str(error.value)
        assert read_weights(tmp_path, abstract(weights(make_state())), silent), (
            "a program that does not train"
        )
    path = tmp_path / "1" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    del meta["settings"]  # of a run of an older version
    path.write_text(json.dumps(meta))
    (path.parent / seal.FILE).unlink()
    seal.seal(epath.Path(path.parent))
    with jax.threefry_partitionable(False), open_(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(make_state()), silent)


def test_weights_that_are_not_finite_do_not_go_on(tmp_path: Path) -> None:
    """Under the names that a train state has; what the optimizer keeps may be infinite."""
    weights = lm.Weights({"w": jnp.asarray([1.0, jnp.nan])}, {"codebooks": {"sum": jnp.ones(2)}})
    state = TrainState(jnp.zeros((), jnp.int32), weights, {"n": jnp.inf}, jax.random.key(0))
    with open_(tmp_path) as checkpoints:
        checkpoints.save(1, jax.tree.map(jnp.asarray, state), {}, {})
        with pytest.raises(
            InputError,
            match=r"checkpoint 1 holds weights .* in weights\.params\.w: no run can resume from it",
        ):
            checkpoints.restore(abstract(jax.tree.map(jnp.asarray, state)), silent)


SAVER = """
import sys
import numpy as np, jax, jax.numpy as jnp
from tvq.run.checkpoint import Checkpoints
with Checkpoints(sys.argv[1], keep=2, keep_every=0) as checkpoints:
    step = max(checkpoints.steps(), default=0)
    while True:
        step += 1
        x = jnp.asarray(np.random.default_rng(step).normal(size=1 << 20).astype(np.float32))
        checkpoints.save(step, {"x": x}, {"batch": step}, {})
"""


def kill_in_a_save(saver: subprocess.Popen, folder: Path, newest: int, pause: Callable[[], float]) -> None:
    """At a random moment of a save, once a checkpoint after `newest` is committed."""
    while True:
        time.sleep(pause())
        saver.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, saver.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        assert saver.poll() is None
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        if any("tmp" in name for name in names) and any(n.isdecimal() and int(n) > newest for n in names):
            saver.kill()
            saver.wait()
            return
        saver.send_signal(signal.SIGCONT)


@pytest.mark.slow
def test_kill_while_saving(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    rng = np.random.default_rng(0)
    wanted = abstract({"x": jnp.zeros(1 << 20, jnp.float32)})
    newest = 0
    for _ in range(4):
        with (tmp_path / "stderr").open("w") as stderr:
            saver = subprocess.Popen([sys.executable, "-c", SAVER, folder], stderr=stderr)
        kill_in_a_save(saver, folder, newest, lambda: rng.uniform(0.01, 0.2))
        assert (tmp_path / "stderr").read_text() == ""
        with open_(folder, read_only=True) as checkpoints:
            steps = checkpoints.steps()[-2:]  # older ones were being removed
        assert max(steps) > newest
        newest = max(steps)
        for step in reversed(steps):
            with open_(folder) as checkpoints:
                restored = checkpoints.restore(wanted, silent)
            assert restored is not None
            assert (restored.step, restored.data) == (step, {"batch": step})
            x = np.random.default_rng(step).normal(size=1 << 20).astype(np.float32)
            np.testing.assert_array_equal(restored.state["x"], x)
            (folder / str(step)).rename(tmp_path / str(step))  # the one before is the newest now
        for step in steps:
            (tmp_path / str(step)).rename(folder / str(step))
