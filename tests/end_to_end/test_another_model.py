"""A model of another kind, in one folder, through the unchanged programs: see `tests/decay`."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.decay import DIMS
from tests.end_to_end.program import Program, end, rows
from tvq.programs.interop import WEIGHTS

pytestmark = pytest.mark.slow


def commands(tvq: Program, n_device: int, *each: list[str]) -> str:
    """What the commands print, one after the other in a process with so many devices."""
    arguments = [argument for command in each for argument in (*command, "--")]
    with tvq.start(*arguments, module="tests.decay", JAX_NUM_CPU_DEVICES=str(n_device)) as process:
        return end(process, 0)[0]


def test_it_trains_resumes_evaluates_and_samples(tvq, tmp_path):
    run = lambda name, *more: ["train", *tvq.options(tmp_path / name, "--config.mesh.devices=-1", *more)]
    to = lambda name: tmp_path / f"{name}_weights"
    export = lambda name: ["export", f"--workdir={tmp_path / name}", f"--output={to(name)}"]
    out = commands(
        tvq, 2,
        run("whole", "--config.mesh.shard_params=true"),
        run("resumed", "--config.mesh.shard_params=true", "--config.train.steps=10"),
        run("resumed", "--config.mesh.shard_params=true"),
        export("whole"),
        export("resumed"),
        ["eval", f"--workdir={tmp_path / 'whole'}", "--config.evaluate.split=test"],
        ["sample", f"--workdir={tmp_path / 'whole'}", "--config.sample.length=9"],
    )  # fmt: skip
    assert "1 layers of decaying linear attention" in out
    assert "test loss" in out
    whole, resumed = (load_file(to(name) / WEIGHTS) for name in ("whole", "resumed"))
    assert (
        whole.keys() == resumed.keys() == {"params.embed.table", *(f"params.layers.{name}" for name in DIMS)}
    )
    for name, x in whole.items():
        np.testing.assert_array_equal(resumed[name], x, err_msg=name)

    commands(tvq, 1, run("alone"))
    losses = lambda name: [row["loss"] for row in rows(Path(tmp_path / name)) if row["split"] == "train"]
    np.testing.assert_allclose(losses("whole")[:2], losses("alone")[:2], rtol=1e-5)
    assert losses("alone")[-1] < 0.9 * losses("alone")[0]
