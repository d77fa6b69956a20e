"""What of a checkpoint a branch takes, without one."""

import dataclasses
from pathlib import Path

import jax
import pytest
from etils import epath

from tests.model import small
from tvq import config, paths, schema, sharding
from tvq.programs import branch
from tvq.run import tensors
from tvq.training import optimizer, state

C = schema.Config(model=small.MODEL)


def changed(**fields) -> schema.Config:
    return dataclasses.replace(C, optimizer=dataclasses.replace(C.optimizer, **fields))


def placed(c: schema.Config) -> state.TrainState:
    mesh = sharding.make(schema.Mesh(), jax.devices()[:1])
    return state.place(c, optimizer.make(c.optimizer, c.model), mesh)


def parent(c: schema.Config) -> branch.Parent:
    """What a checkpoint of such a run says of itself."""
    kinds = {name: tensors.kind(x) for name, x in tensors.named(placed(c)).items()}
    source = branch.Source("--from=run", epath.Path("run"), None, "state")
    return branch.Parent(source, 7, {"config": config.to_dict(c), "arrays": kinds}, "state")


@pytest.mark.parametrize(
    ("then", "now", "takes", "parts"),
    [
        pytest.param({}, {}, "state", {"adamw", "schedule"}, id="the same"),
        pytest.param(
            {}, {"lr_max": 1.0, "schedule": "linear", "wd_lam": 0.0}, "state", {"adamw", "schedule"}
        ),
        pytest.param({}, {"skip_sigma": 6.0}, "state", {"adamw", "schedule"}, id="a part more"),
        pytest.param({"skip_sigma": 6.0}, {}, "state", {"adamw", "schedule"}, id="a part less"),
        pytest.param({}, {"name": "lion"}, "weights", set(), id="another optimizer"),
    ],
)
def test_the_parts_of_the_optimizer_state_that_both_have_are_taken(then, now, takes, parts):
    got = branch.with_optimizer(changed(**now), parent(changed(**then)), placed(changed(**now)))
    assert (got.takes, set(got.parts), got.first_step) == (takes, parts, 7 if parts else 0)
    assert bool(got.fresh) == (takes == "weights")
    assert not got.fresh or got.fresh[0] == "config.optimizer.name is 'lion', not 'adamw'"


def test_a_run_and_a_step(tmp_path: Path):
    """A folder of the whole name comes first."""
    (tmp_path / "a@7").mkdir()
    for text, want in [
        (f"{tmp_path}/a@7", (f"{tmp_path}/a@7", None)),
        (f"{tmp_path}/a@7@12", (f"{tmp_path}/a@7", 12)),
        (f"{tmp_path}/a@8", (f"{tmp_path}/a", 8)),
        ("a@b", ("a@b", None)),
        ("a@-1", ("a@-1", None)),
        ("a@", ("a@", None)),
        ("@7", ("@7", None)),
        ("me@host", ("me@host", None)),
    ]:
        assert paths.run_and_step(text) == want, text


def test_the_rows_before_a_branch_are_those_of_its_whole_family(tmp_path: Path):
    """Up to the step; what a kill cut short is left out."""
    run = epath.Path(tmp_path)
    (run / "before.jsonl").write_bytes(b'{"step": 2}\n')
    (run / "metrics.jsonl").write_bytes(b'{"step": 4}\n{"step": 6}\n{"step": 8}\n[]\n{"step": 5')
    assert branch.rows_before(run, 6) == [b'{"step": 2}', b'{"step": 4}', b'{"step": 6}']
    assert branch.rows_before(run / "none", 6) == []
