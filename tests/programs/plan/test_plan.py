"""tvq plan: what it says of the real train step, compiled for the CPU devices of the tests."""

import dataclasses
import functools
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from tests.model import small
from tvq import __main__ as door
from tvq import chips, cluster, schema, sharding
from tvq import model as lm
from tvq.model import layers
from tvq.programs import plan
from tvq.programs.plan import bound, step, targets
from tvq.programs.plan import sweep as sweeping
from tvq.programs.plan.step import TooLargeError
from tvq.training import optimizer, state, train_step

ROOT = Path(__file__).parents[3]
NOWHERE = cluster.find(schema.Cluster(), {}, None)
CHIP = chips.Chip(1e12, 1e12, 1e12, 1e11, 16 * chips.GIB, 1e10)
CONFIG = schema.Config(
    model=dataclasses.replace(small.MODEL, d_model=128, d_k=32, d_v=256, n_code=64, block_len=64, mem_len=64),
    train=schema.Train(global_batch_size=8, sequence_len=512, update_len=256, steps=2),
    plan=schema.Plan(topology="v5e:2x4"),
)


@pytest.fixture(autouse=True)
def eight_chips(monkeypatch):
    monkeypatch.setattr(targets, "devices", lambda topology: jax.devices())
    monkeypatch.setattr(chips, "chip", lambda kind: CHIP)


ESTIMATE = step.estimate  # the real one, where a test has put another in its place


@functools.cache
def found() -> step.Estimate:
    return ESTIMATE(CONFIG, sharding.make(schema.Mesh(), jax.devices()))


def run(c: schema.Config) -> int:
    return plan.plan(c, epath.Path("."), NOWHERE, cluster.Log(Path("none"), NOWHERE))


def test_work_is_what_the_mathematics_needs():
    """The backward pass computes the scores again, which does not count."""
    parts = lm.unit_flops(CONFIG.model, CONFIG.train.update_len)
    again = 2 * (parts["scores"] + parts["relative scores"] + parts["cache scores"])  # two units
    needed = found().analytic + again * found().n_token / 8
    assert found().compiled == pytest.approx(needed, rel=0.03)


def test_memory_is_that_of_one_device():
    memory, params = (
        found().memory,
        state.abstract(CONFIG.model, optimizer.make(CONFIG.optimizer, CONFIG.model)).weights.params,
    )
    assert memory["parameters"] == sum(4 * x.size for x in jax.tree.leaves(params))
    assert memory["optimizer state"] == pytest.approx(2 * memory["parameters"], rel=0.01)
    assert memory["batch"] == 3 * 4 * 512  # three arrays of one sequence
    assert min(memory.values()) > 0


# Some keys of each unit, and their mask.
PROBE = 4 * 2 * CONFIG.model.n_layer * layers.N_PROBE * (CONFIG.model.n_head * CONFIG.model.d_k + 1)


def test_gradients_and_statistics_are_all_that_devices_exchange():
    (((kind, axes), (_, sent)),) = found().links.items()
    assert (kind, axes) == ("all-reduce", "devices")
    reduced = found().memory["parameters"] + found().memory["codebooks"]
    assert sent == pytest.approx(2 * (2 * 7 / 8) * (reduced + PROBE), rel=0.01)  # in each of two updates


@pytest.mark.parametrize(
    ("group", "n"), [((0, 1), 1), ((0, 2), 1), ((0, 1, 2, 3), 2), ((0, 3), 2), ((0,), 1)]
)
def test_an_exchange_has_a_ring_along_each_dimension(group, n):
    """On chips in a 2 x 2 x 1 slice."""
    chips = [types.SimpleNamespace(coords=(i // 2, i % 2, 0)) for i in range(4)]
    slice_ = types.SimpleNamespace(devices=np.array(chips))
    assert step.n_ring(slice_, group) == n
    assert step.n_ring(sharding.make(schema.Mesh(), jax.devices()), (0, 1, 2, 3)) == 1


def test_the_temporaries_of_a_tpu_share_memory():
    """By its compiler's peak, which holds arguments and new results too."""
    sizes = {"temp": 900, "generated_code": 1, "argument": 100, "output": 102, "alias": 100}
    used = types.SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
    used.peak_memory_in_bytes = 500
    assert step.temporaries(used, "gpu") == 901
    assert step.temporaries(used, "tpu") == 500 - 100 - 2


def test_the_old_state_is_donated():
    """The metrics and the probe, and nothing else, need new memory."""
    assert found().memory["metrics"] < 1000 + PROBE


def test_a_deeper_model_is_no_longer_program():
    def lines(n_layer: int) -> int:
        c = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, n_layer=n_layer))
        devices, tx = sharding.make(schema.Mesh(), jax.devices()), optimizer.make(c.optimizer, c.model)
        carried = sharding.with_sharding(devices, state.abstract(c.model, tx))
        batch = dict.fromkeys(("inputs", "targets", "loss_mask"), jnp.zeros((8, 512), jnp.int32))
        return len(train_step.make(c, devices, tx).lower(carried, batch).as_text().splitlines())

    assert lines(3) == lines(12)


def test_page(capsys, monkeypatch):
    monkeypatch.setattr(step, "estimate", lambda *_: found())
    assert run(CONFIG) == 0
    text = capsys.readouterr().out
    assert f"parameters          {found().n_param:,}" in text
    assert "optimizer state" in text
    assert "all-reduce along devices" in text
    small_chip = dataclasses.replace(found(), chip=CHIP._replace(memory=1e6))
    monkeypatch.setattr(step, "estimate", lambda *_: small_chip)
    assert run(CONFIG) == 1
    assert "does not fit: " in capsys.readouterr().out


def test_the_compiler_may_say_that_it_does_not_fit(capsys, monkeypatch):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries"
                " (384.00G) exceeds available HBM (15.75G)."
            )

    with pytest.raises(TooLargeError) as error:
        step.compiled(Lowered())
    assert error.value.args == ("384.00G", "15.75G")
    monkeypatch.setattr(train_step, "make", lambda *_: type("Step", (), {"lower": lambda *_: Lowered()}))
    assert run(CONFIG) == 1
    assert "does not fit: 384.00G" in capsys.readouterr().out


def sweep(monkeypatch, n_compile: int = 8, **fake) -> int:
    """A sweep over shapes of eight chips, each of which compiles as `fake` says by its number of devices."""
    found()  # before its parts are replaced

    def estimate(c: schema.Config, mesh: jax.sharding.Mesh) -> step.Estimate:
        outcome = fake[f"devices_{c.mesh.devices}"]
        if isinstance(outcome, BaseException):
            raise outcome
        return dataclasses.replace(found(), seconds={"products": outcome})

    monkeypatch.setattr(step, "estimate", estimate)
    trial = lambda n, **cut: dataclasses.replace(CONFIG, mesh=schema.Mesh(devices=n, **cut))
    trials = [
        ("three", trial(3)),
        ("two", trial(2, sequence=4)),
        ("four", trial(4, sequence=2)),
        ("eight", trial(8)),
    ]
    monkeypatch.setattr(sweeping, "shapes", lambda *_: trials)
    asked = schema.Plan(topology="v5e:2x4", sweep=True, n_compile=n_compile)
    return run(dataclasses.replace(CONFIG, plan=asked))


def table(text: str) -> list[str]:
    return text.partition("| --- |")[2].splitlines()[1:]


def test_sweep_ranks(capsys, monkeypatch):
    assert sweep(monkeypatch, devices_8=2.0, devices_4=1.0, devices_2=TooLargeError("30G", "16G")) == 0
    text = capsys.readouterr().out
    assert "4 shapes, of which 3 may fit; compiling 3 " in text
    assert "3 of 3, 0 s left: | " in text
    four, eight, *others = table(text)
    assert four.startswith("| four | yes | ")
    assert eight.startswith("| eight | yes | ")
    assert sorted(line.split(" | ")[0] for line in others) == ["| three", "| two"]
    assert "| two | no: 30G of memory needed on a device, 16G available | " in text
    assert "is not a multiple of" in text


def test_a_sweep_compiles_the_most_promising(capsys, monkeypatch):
    assert sweep(monkeypatch, n_compile=1, devices_8=2.0) == 0
    eight, *others = table(capsys.readouterr().out)
    assert eight.startswith("| eight | yes | ")
    assert [line.split(" | ")[1] for line in others[:2]] == ["not compiled", "not compiled"]


def test_what_cannot_fit_is_not_compiled(capsys, monkeypatch):
    monkeypatch.setattr(chips, "chip", lambda kind: CHIP._replace(memory=1e6))
    assert sweep(monkeypatch) == 1
    text = capsys.readouterr().out
    assert "4 shapes, of which 0 may fit" in text
    assert all(" | no | at least " in line for line in table(text)[:3])


def test_a_sweep_that_is_stopped_prints_what_it_found(capsys, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        sweep(monkeypatch, n_compile=2, devices_8=2.0, devices_4=KeyboardInterrupt())
    eight, *others = table(capsys.readouterr().out)
    assert eight.startswith("| eight | yes | ")
    assert [line.split(" | ")[1] for line in others[:2]] == ["not compiled", "not compiled"]


def test_the_program_needs_more_than_the_bound():
    least = bound.bound(CONFIG, sharding.make(schema.Mesh(), jax.devices()))
    assert 0.5 * found().bytes_needed < least.bytes_needed < found().bytes_needed
    assert least.step_seconds < found().step_seconds
    # Messages of the gradient alone; those of statistics and of the probe are left out.
    ((_, sent),) = found().links.values()
    mesh = sharding.make(schema.Mesh(), jax.devices())
    gradients = found().memory["parameters"]
    assert 2 * bound.gradient_messages(CONFIG, mesh, gradients) == pytest.approx(sent, rel=0.1)


def test_shapes_multiply_to_the_devices():
    assert sorted(sweeping.factors(12, 2)) == [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)]
    for _, trial in sweeping.shapes(CONFIG, 8):
        assert trial.mesh.devices * trial.mesh.sequence * trial.mesh.tensor == 8


def test_the_door(monkeypatch, capsys):
    monkeypatch.undo()
    seen = []
    program = lambda run, *_: seen.append(run.plan) or 0
    monkeypatch.setattr("tvq.programs.plan.plan", program)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    arguments = ["plan", f"--config={ROOT}/configs/debug.py", "--topology=v5e:4x4"]
    assert door.main([*arguments, "--sweep"]) == 0
    assert door.main(arguments) == 0
    assert [(asked.topology, asked.sweep) for asked in seen] == [("v5e:4x4", True), ("v5e:4x4", False)]


def test_the_tabulated_plans_are_commands(monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in (ROOT / "docs" / "plans.txt").read_text().splitlines():
        name, *options = line.split()
        arguments, overrides = door.parser().parse_known_args(["plan", *options])
        assert door.read_config(arguments, overrides).plan.topology, name


@pytest.mark.parametrize("topology", ["", "v5e", "v5e:4y4", "h200:0", "h200:2x2", "abacus:4"])
def test_machines_that_are_not_known(monkeypatch, topology):
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is not known; use a TPU slice such as v5e:4x4"):
        targets.devices(topology)


@pytest.mark.parametrize("topology", ["v5e:2x1", "v5e:16", "v6e:2x2x2", "v5p:4x4", "v4:1x2x2", "v4:2x2x2x2"])
def test_slices_that_there_are_not(monkeypatch, topology):
    monkeypatch.undo()
    kind = topology.partition(":")[0]
    with pytest.raises(ValueError, match=f"{topology} is not a slice .*; use {kind}:.*, {kind}:"):
        targets.devices(topology)


@pytest.mark.parametrize(("topology", "extra"), [("v4:2x2x1", "tpu"), ("h100:8", "cuda")])
def test_a_compiler_that_is_not_installed(monkeypatch, topology, extra):
    monkeypatch.undo()
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"pip install 'tvq\[{extra}\]'"):
        targets.devices(topology)
