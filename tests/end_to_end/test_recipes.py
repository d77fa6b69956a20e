"""The paper's recipes: their sizes, and in small from raw data to a score by the real commands."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.data import raw
from tests.end_to_end.conftest import Here
from tests.end_to_end.program import REPOSITORY, Program, newest, rows
from tvq import config, schema
from tvq.model import parameters

RECIPES = json.loads((REPOSITORY / "tests" / "golden" / "recipes.json").read_text())["recipes"]
# Names of the original's settings that are others here.
RENAMED = {"optimizer": "name", "lr_schedule": "schedule", "p_nucleus": "nucleus"}


def recipe(name: str) -> schema.Config:
    return config.build(config.load(str(REPOSITORY / "configs" / f"{name}.py")))


@pytest.mark.parametrize("name", RECIPES)
def test_settings_are_the_papers(name: str) -> None:
    found = {field.partition(".")[2]: value for field, value in config.flatten(recipe(name)).items()}
    assert found["attend_across_documents"]
    for setting, value in RECIPES[name]["settings"].items():
        if setting not in ("d_ff", "dtype"):  # the model has no such layer; the paper's is an option of its
            assert found[RENAMED.get(setting, setting)] == (value or 0), setting


@pytest.mark.parametrize("name", RECIPES)
def test_parameters_at_full_size(name: str) -> None:
    model = recipe(name).model
    weights = jax.eval_shape(lambda: parameters.init(model, jax.random.key(0)))
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    unused = 0 if model.e_tie else model.n_vocab  # the original's bias of the embedding, which nothing reads
    assert count(weights.extra) == RECIPES[name]["n_param_codebook"]
    assert count(weights) + unused == RECIPES[name]["n_param_total"]


SMALL = [
    "model.n_layer=1", "model.d_model=16", "model.d_k=8", "model.d_v=16", "model.n_code=8",
    "optimizer.n_warmup_step=5", "train.global_batch_size=4", "train.steps=24", "evaluate.every=0",
    "log.every=4", "sample.length=8",
]  # fmt: skip
TEXT = ["model.block_len=16", "model.mem_len=16", "train.sequence_len=128", "train.update_len=32"]


def put_enwik8(folder: Path) -> Path:
    return raw.packed(folder, "enwik8.zip", raw.XML * 2)


def put_pg19(folder: Path) -> Path:
    return raw.library(folder / "pg19")


def put_imagenet64(folder: Path) -> Path:
    return raw.batches(folder / "imagenet64")


FEW = ["train.steps=8", "train.global_batch_size=2", "optimizer.n_max_step=8"]
CASES = {
    "enwik8": (put_enwik8, ["--n_train=10000"], TEXT),
    "pg19": (put_pg19, ["--pieces=120"], [*TEXT, "model.n_vocab=120"]),
    "imagenet64": (put_imagenet64, ["--n_train=8"], ["sample.every=0", *FEW]),  # an image takes long
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_from_raw_data_to_a_score(tvq: Program, here: Here, tmp_path: Path, name: str) -> None:
    put, options, smaller = CASES[name]
    data, workdir = tmp_path / "data", tmp_path / "run"
    here("prepare", name, f"--input={put(tmp_path)}", f"--output={data}", *options)
    fields = [f"data.path={data}", f"data.cache={tvq.folder / 'cache'}", *SMALL, *smaller]
    preset = f"--config={REPOSITORY / 'configs' / name}.py"
    tvq.run("train", preset, f"--workdir={workdir}", *(f"--config.{field}" for field in fields))
    step = newest(workdir).step
    assert step == (8 if name == "imagenet64" else 24)
    losses = [row["loss"] for row in rows(workdir) if row["split"] == "train"]
    n_vocab = json.loads((data / "manifest.json").read_text())["vocabulary"]["size"]
    np.testing.assert_allclose(losses, np.log(n_vocab), atol=1)  # a start: too few steps to learn much
    stdout, _ = tvq.run("eval", f"--workdir={workdir}", "--split=test")
    found = json.loads(stdout.splitlines()[-1])
    split = json.loads((data / "manifest.json").read_text())["splits"]["test"]
    assert (found["step"], found["split"], found["n_token"]) == (step, "test", split["n_token"])
    assert found["bits_per_byte"] == pytest.approx(
        found["bits_per_token"] * found["n_token"] / split["n_byte"]
    )
