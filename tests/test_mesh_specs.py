"""How every array of each preset lies on the mesh, kept as text: a change of sharding shows in review.

`python -m tests.test_mesh_specs` writes golden_specs/NAME.txt anew: in front the preset's own mesh, with 8
devices where it takes all there are, then one that cuts along every axis.
"""

import difflib
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh

from tests.test_config import PRESETS
from tvq import config, schema, sharding
from tvq import model as lm
from tvq.training import optimizer, state

GOLDEN = Path(__file__).parent / "golden_specs"
EVERY_AXIS = schema.Mesh(replica=2, devices=2, sequence=2, tensor=2, shard_params=True)


def text(path: Path) -> str:
    c = config.build(config.load(str(path)))
    like = state.abstract(c.model, optimizer.make(c.optimizer, c.model))
    memory = jax.eval_shape(lambda: lm.start(c.model, 1))
    columns = []
    for shape in (c.mesh, EVERY_AXIS):
        sizes = [getattr(shape, axis) for axis in sharding.AXES]
        devices = AbstractMesh(tuple(8 if size == -1 else size for size in sizes), sharding.AXES)
        axes = sharding.axes(devices, c.model, shape.shard_params)
        found = {
            "state": state.specs(like, c.model, axes),
            "attention": lm.state_specs(c.model, axes),
        }
        columns.append([str(tuple(spec)) for spec in jax.tree.leaves(found)])
    arrays = {"state": like, "attention": memory}
    names = [
        f"{sharding.name(path)} {'x'.join(map(str, x.shape))}"
        for path, x in jax.tree.leaves_with_path(arrays)
    ]
    return "".join(f"{name}: {own} | {cut}\n" for name, own, cut in zip(names, *columns, strict=True))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_arrays_lie_where_they_did(path: Path) -> None:
    golden = GOLDEN / f"{path.stem}.txt"
    old = golden.read_text().splitlines() if golden.exists() else []
    lines = difflib.unified_diff(old, text(path).splitlines(), str(golden), str(path), n=0, lineterm="")
    differences = "\n".join(lines)
    assert not differences, f"{differences}\nIf this is meant: python -m tests.test_mesh_specs"


def test_golden_files_belong_to_presets() -> None:
    assert {path.stem for path in GOLDEN.glob("*")} == {path.stem for path in PRESETS}


if __name__ == "__main__":
    for preset in PRESETS:
        GOLDEN.mkdir(exist_ok=True)
        (GOLDEN / f"{preset.stem}.txt").write_text(text(preset))
