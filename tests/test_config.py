"""The schema, its errors, and the presets: every value of configs/NAME.py is kept in golden_configs/NAME.txt.

`python -m tests.test_config` writes those files again.
"""

import dataclasses
import difflib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from etils import epath
from ml_collections import ConfigDict

from tvq import config, rules, schema

PRESETS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
GOLDEN = Path(__file__).parent / "golden_configs"


def changed(**values: Any) -> ConfigDict:
    """The base config with `section__field=value`."""
    c = config.base().unlock()
    for name, value in values.items():
        section, _, field = name.partition("__")
        c[section][field] = value
    return c


def refused(c: ConfigDict | dict) -> list[str]:
    with pytest.raises(ValueError, match=r"config\.") as error:
        config.build(c)
    return str(error.value).split("\n")


def text(path: Path) -> str:
    built = config.build(config.load(str(path)))
    return "".join(f"{name} = {value!r}\n" for name, value in config.flatten(built).items())


def test_base_is_the_schema():
    assert config.build(config.base()) == schema.Config()
    assert all(doc for doc in config.docs().values())
    assert list(config.flatten(schema.Config())) == list(config.docs()) == list(config.field_types())


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_what_they_were(path):
    golden = GOLDEN / f"{path.stem}.txt"
    old = golden.read_text().splitlines() if golden.exists() else []
    lines = difflib.unified_diff(old, text(path).splitlines(), str(golden), str(path), n=0, lineterm="")
    differences = "\n".join(lines)
    assert not differences, f"{differences}\nIf this is meant: python -m tests.test_config"


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_say_how_to_run_them(path):
    docstring = path.read_text().split('"""')[1]
    assert f"--config=configs/{path.name}" in docstring or "Not meant to be run" in docstring


def test_golden_files_belong_to_presets():
    assert {path.stem for path in GOLDEN.glob("*")} == {path.stem for path in PRESETS}


def test_the_schema_is_frozen_and_starts_no_jax():
    with pytest.raises(dataclasses.FrozenInstanceError):
        schema.Config().model.n_layer = 3  # type: ignore[misc]
    program = "import sys, tvq.config; tvq.config.build(tvq.config.base()); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("section", "field", "message"),
    [
        ("model", "d_modl", "config.model.d_modl is not a field; did you mean model.d_model?"),
        (
            "train",
            "update_length",
            "config.train.update_length is not a field; did you mean train.update_len?",
        ),
        ("zzzzzzzz", "zzzzzzzz", "config.zzzzzzzz.zzzzzzzz is not a field"),
    ],
)
def test_an_unknown_field_names_the_nearest(section, field, message):
    c = config.base().to_dict()
    c.setdefault(section, {})[field] = 1
    assert refused(c) == [message]


def test_an_unknown_section():
    c = config.base().unlock()
    c.modle = {"d_model": 4}
    assert refused(c) == ["config.modle.d_model is not a field; did you mean model.d_model?"]
    c = config.base().unlock()
    c.seed = 3
    assert refused(c) == ["config.seed is not a field; did you mean train.seed?"]


def test_missing_fields_are_named_with_their_meaning():
    c = config.base().to_dict()
    del c["model"]["n_code"], c["log"]
    assert refused(c) == [
        "config.model.n_code is missing (codewords of a head)",
        "config.log.every is missing (updates between rows of metrics.jsonl)",
        "config.log.wandb is missing (project of Weights & Biases to log to (extra wandb); empty: none)",
    ]


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("model.n_layer", "4", "int"),
        ("model.n_layer", 4.0, "int"),
        ("model.n_layer", True, "int"),
        ("model.agg_cache", 1, "bool"),
        ("model.dtype", None, "str"),
        ("optimizer.lr_max", "1e-3", "float"),
        ("optimizer.lr_max", False, "float"),
    ],
)
def test_a_wrong_type(field, value, kind):
    c = config.base().to_dict()
    section, _, name = field.partition(".")
    c[section][name] = value
    assert refused(c) == [f"config.{field} must be {kind}, not {value!r}"]


def test_an_integer_will_do_for_a_float():
    built = config.build(changed(optimizer__lr_max=1))
    assert type(built.optimizer.lr_max) is float


@pytest.mark.parametrize(
    "name", [name for name, kind in config.field_types().items() if kind in (int, float)]
)
def test_every_number_has_a_lowest(name):
    section, _, field = name.partition(".")
    value = config.field_types()[name](-5)
    assert any(
        line.startswith(f"config.{name} ") for line in refused(changed(**{f"{section}__{field}": value}))
    )


@pytest.mark.parametrize("name", [name for name, kind in config.field_types().items() if kind is float])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_every_float_is_finite(name, value):
    section, _, field = name.partition(".")
    assert f"config.{name} must be finite, not {value}" in refused(changed(**{f"{section}__{field}": value}))


# What is refused, and its message.
RULES = [
    ({"model__n_vocab": 3}, "config.model.n_vocab must be at least 4, not 3"),
    ({"model__mem_len": 0}, "config.model.mem_len must be at least 1, not 0"),
    ({"checkpoint__keep": 0}, "config.checkpoint.keep must be at least 1, not 0"),
    ({"model__p_dropres": 1.0}, "config.model.p_dropres must be in [0, 1), not 1.0"),
    ({"model__c_gamma": 1.0}, "config.model.c_gamma must be in [0, 1), not 1.0"),
    ({"train__seed": 2**32}, "config.train.seed must be in [0, 4294967296), not 4294967296"),
    (
        {"optimizer__n_warmup_step": 2**31 - 1, "optimizer__n_max_step": 2**31},
        "config.optimizer.n_max_step must be in [1, 2147483648), not 2147483648",
    ),
    (
        {"cluster__step_timeout": 1e12},
        "config.cluster.step_timeout must be in [1, 1000000000), not 1000000000000.0",
    ),
    ({"sample__nucleus": 1.5}, "config.sample.nucleus must be in [0, 1], not 1.5"),
    ({"model__d_model": 63}, "config.model.d_model must be even (sine and cosine halves), not 63"),
    ({"model__pe_lam": 0.0}, "config.model.pe_lam must be positive, not 0.0"),
    (
        {"optimizer__n_warmup_step": 9, "optimizer__n_max_step": 9},
        "config.optimizer.n_warmup_step 9 must be below n_max_step 9",
    ),
    (
        {"optimizer__name": "adam"},
        "config.optimizer.name must be one of adafactor, adamw, lion, muon, not 'adam'; did you mean adamw?",
    ),
    (
        {"optimizer__schedule": "inverse_sqrt"},
        "config.optimizer.schedule must be one of cosine, linear, inv_sqrt, constant, wsd, not"
        " 'inverse_sqrt'; did you mean inv_sqrt?",
    ),
    (
        {"optimizer__decay_shape": "cos"},
        "config.optimizer.decay_shape must be one of linear, cosine, sqrt, not 'cos'; did you mean cosine?",
    ),
    ({"optimizer__floor": 1.5}, "config.optimizer.floor must be in [0, 1], not 1.5"),
    (
        {
            "optimizer__schedule": "wsd",
            "optimizer__n_warmup_step": 5,
            "optimizer__n_max_step": 20,
            "optimizer__n_decay_step": 16,
        },
        "config.optimizer.n_warmup_step 5 and n_decay_step 16 are more than n_max_step 20;"
        " use n_decay_step 15 or less",
    ),
    (
        {"model__dtype": "bf16"},
        "config.model.dtype must be one of float32, bfloat16, float64, not 'bf16'; did you mean bfloat16?",
    ),
    (
        {"model__param_dtype": "bfloat16"},
        "config.model.param_dtype must be one of float32, float64, not 'bfloat16'; did you mean float64?",
    ),
    (
        {"evaluate__split": "valid"},
        "config.evaluate.split must be one of train, validation, test, not 'valid'; did you mean validation?",
    ),
    (
        {"data__source": "texts", "data__path": "x"},
        "config.data.source must be one of stdlib, text, tokens, not 'texts'; did you mean text?",
    ),
    ({"data__source": "text"}, "config.data.source=text needs config.data.path, a file or folder of text"),
    ({"data__source": "tokens"}, "config.data.source=tokens needs config.data.path, a prepared folder"),
    (
        {"data__path": "book.txt"},
        "config.data.source=stdlib does not read config.data.path 'book.txt'; use config.data.source=text,"
        " or leave the path empty",
    ),
    (
        {"profile__steps": "8:8"},
        "config.profile.steps must be FIRST:LAST, with FIRST below LAST, as in 100:104, not '8:8'",
    ),
    (
        {"profile__steps": "8:13", "train__steps": 12},
        "config.profile.steps 8:13 goes beyond config.train.steps 12",
    ),
    (
        {"model__revive_codes": 3},
        "config.model.revive_codes 3 is below 4, the updates of one sequence (sequence_len / update_len);"
        " use 4 or more, or 0",
    ),
    (
        {"model__attention": "full", "train__update_len": 8192, "evaluate__carry": True},
        "config.evaluate.carry needs config.model.attention=vq: full carries no state",
    ),
    (
        {"model__attention": "full", "train__update_len": 8192, "model__n_parallel": 2},
        "config.model.n_parallel 2 is for config.model.attention=vq; use 0 with full",
    ),
    (
        {
            "model__attention": "flash",
            "train__update_len": 8192,
            "model__attend_across_documents": True,
            "model__d_k": 136,
        },
        "config.model.attention=flash needs config.model.dtype=bfloat16 and a config.model.d_k of at most 128"
        " that is a multiple of 8, not float32 and 136; or use full",
    ),
    (
        {
            "model__attention": "flash",
            "train__update_len": 8192,
            "model__dtype": "bfloat16",
            "model__attend_across_documents": False,
        },
        "config.model.attention=flash cannot keep documents apart: use"
        " config.model.attend_across_documents=true, or full",
    ),
    ({"mesh__devices": 0}, "config.mesh.devices must be positive, or -1 for all, not 0"),
    ({"mesh__tensor": -2}, "config.mesh.tensor must be positive, or -1 for all, not -2"),
    (
        {"mesh__sequence": -1},
        "only one of config.mesh.devices, config.mesh.sequence may be -1; set the others to 1",
    ),
    (
        {"mesh__tensor": 5},
        "config.model.d_v 1536 cannot be cut by config.mesh.tensor 5; use tensor 4",
    ),
    (
        {"mesh__tensor": 5, "model__n_head": 6},
        "config.model.n_head 6 cannot be cut by config.mesh.tensor 5; use tensor 3",
    ),
    (
        {"mesh__sequence": 8},
        "config.train.update_len 2048, in blocks of config.model.block_len 512, cannot be cut by"
        " config.mesh.sequence 8; use sequence 4",
    ),
    (
        {"mesh__sequence": 4, "train__segment_len": 1024},
        "config.train.segment_len 1024, in blocks of config.model.block_len 512, cannot be cut by"
        " config.mesh.sequence 4; use sequence 2",
    ),
    (
        {"mesh__devices": 8, "mesh__shard_params": True, "model__d_model": 100},
        "config.model.d_model 100 (shard_params) cannot be cut by config.mesh.devices 8;"
        " use config.mesh.replica=2 config.mesh.devices=4",
    ),
]
# Refused with the numbers that would do: each is put into the field that the message begins with.
WAYS_OUT = [
    (
        {"train__sequence_len": 8000, "train__steps": 120},
        "config.train.sequence_len 8000 is not a multiple of config.train.update_len 2048; use 6144 or 8192",
    ),
    (
        {"train__update_len": 8192, "model__block_len": 3000, "model__mem_len": 3000},
        "config.train.update_len 8192 is not a multiple of config.model.block_len 3000; use 6000 or 9000",
    ),
    (
        {"train__sequence_len": 1024},
        "config.train.sequence_len 1024 is not a multiple of config.train.update_len 2048; use 2048",
    ),
    (
        {"mesh__devices": 48},
        "config.train.global_batch_size 128 is not a multiple of config.mesh.devices 48; use 96 or 144",
    ),
    (
        {"mesh__replica": 2, "mesh__devices": 4, "train__accumulate": 3, "train__global_batch_size": 32},
        "config.train.global_batch_size 32 is not a multiple of config.mesh.replica 2 x config.mesh.devices 4"
        " x config.train.accumulate 3; use 24 or 48",
    ),
    (
        {"train__steps": 1001},
        "config.train.steps 1001 is not a multiple of 4, the updates of one sequence"
        " (sequence_len / update_len); use 1004",
    ),
]


@pytest.mark.parametrize(
    ("values", "message"), RULES + WAYS_OUT, ids=lambda x: x if isinstance(x, str) else ""
)
def test_what_is_refused(values, message):
    assert refused(changed(**values)) == [message]


@pytest.mark.parametrize(("values", "message"), WAYS_OUT, ids=lambda x: x if isinstance(x, str) else "")
def test_the_way_out_leads_out(values, message):
    section, field = re.match(r"config\.(\w+)\.(\w+)", message).groups()
    for number in re.findall(r"\d+", message.rpartition("use ")[2]):
        found = changed(**values | {f"{section}__{field}": int(number)})
        if field == "update_len":  # the sequence must hold whole updates again
            found.train.sequence_len = int(number)
        config.build(found)


def test_all_broken_rules_are_told_at_once():
    assert len(refused(changed(model__n_layer=0, optimizer__name="sgd", train__steps=0))) == 3


def test_differences_that_decide_the_numbers():
    old = config.to_dict(schema.Config())
    new = changed(
        model__n_layer=2, train__seed=1, train__steps=8, mesh__devices=4, log__every=1, data__workers=2
    ).to_dict()
    assert config.differences(old, old) == []
    assert config.differences(old, new) == [
        "config.model.n_layer: 24 in the run, 2 now",
        "config.train.seed: 0 in the run, 1 now",
    ]
    del old["model"]["n_layer"]
    assert config.differences(old, new)[-1] == "config.model.n_layer: 'absent' in the run, 2 now"


def test_only_what_cannot_change_the_numbers_is_changeable():
    fixed = set(config.docs()) - config.CHANGEABLE
    assert not config.CHANGEABLE - set(config.docs())
    assert not config.LOCAL - config.CHANGEABLE
    sections = {name.split(".")[0] for name in fixed}
    assert sections == {"model", "data", "optimizer", "train"}
    assert {"train.seed", "train.global_batch_size", "train.update_len", "data.path"} <= fixed


def test_processes_agree_on_all_but_what_is_local():
    found = config.common(schema.Config())
    missing = {name.removeprefix("config.") for name in found} ^ set(config.docs())
    assert missing == config.LOCAL


def test_a_recorded_config_comes_back(tmp_path):
    built = config.build(changed(model__n_layer=2, data__source="text", data__path="x"))
    path = epath.Path(tmp_path) / config.FILE
    path.write_text(json.dumps(config.to_dict(built)))
    assert config.build(config.recorded(path)) == built
    # A field that the run did not know yet has its default.
    older = config.to_dict(built)
    del older["log"]
    path.write_text(json.dumps(older))
    assert config.build(config.recorded(path)) == built


@pytest.mark.parametrize(
    ("name", "written", "value"),
    [
        ("model.n_layer", "3", 3),
        ("optimizer.lr_max", "3", 3.0),
        ("optimizer.lr_max", "1e-3", 1e-3),
        ("model.agg_cache", "False", False),
        ("model.agg_cache", "true", True),
        ("sample.prompt", "import ", "import "),
        ("sample.prompt", "", ""),
        ("mesh.devices", "-1", -1),
    ],
)
def test_override(name, written, value):
    c = config.base()
    config.override(c, name, written)
    got = config.flatten(c)[name]
    assert (got, type(got)) == (value, type(value))
    config.build(c)


@pytest.mark.parametrize(
    ("name", "written", "message"),
    [
        ("model.n_layers", "3", "--config.model.n_layers is not a field; did you mean model.n_layer?"),
        ("model", "3", "--config.model is not a field"),
        ("model.n_layer", "3.5", "--config.model.n_layer must be int, not '3.5'"),
        ("optimizer.lr_max", "fast", "--config.optimizer.lr_max must be float, not 'fast'"),
        ("model.agg_cache", "1", "--config.model.agg_cache must be true or false, not '1'"),
    ],
)
def test_an_override_that_does_not_fit(name, written, message):
    c = config.base()
    with pytest.raises(ValueError, match="--config") as error:
        config.override(c, name, written)
    assert str(error.value).startswith(message)
    assert c == config.base()


MISSPELT = """
from tvq import config

def get_config():
    c = config.base()
    c.model.n_layers = 2
    return c
"""


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (None, "there is no such file"),
        ("x = 1", "has no function get_config()"),
        ("def get_config(): return {}", "did not return a ConfigDict"),
        (MISSPELT, "n_layers"),
    ],
)
def test_a_config_file_that_is_none(tmp_path, program, message):
    path = tmp_path / "mine.py"
    if program is not None:
        path.write_text(program)
    with pytest.raises(ValueError, match=f"--config={path}") as error:
        config.load(str(path))
    assert message in str(error.value)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for preset in PRESETS:
        (GOLDEN / f"{preset.stem}.txt").write_text(text(preset))


@pytest.mark.parametrize("n_device", [2, 3, 5, 6, 8])
@pytest.mark.parametrize(
    "values",
    [
        {"mesh__shard_params": True, "model__d_model": 100},
        {"mesh__shard_params": True, "mesh__devices": 2, "train__global_batch_size": 6},
        {"mesh__sequence": 3, "model__d_v": 100, "train__accumulate": 2},
        {"mesh__tensor": 5, "evaluate__batch_size": 7},
    ],
    ids=str,
)
def test_the_advice_for_so_many_devices_obeys_all_rules(values, n_device):
    found = changed(**values)
    built = schema.Config(**{name: cls(**found[name]) for name, cls in get_type_hints(schema.Config).items()})
    advice = rules.fitting(built, n_device)
    for option in advice.split():
        name, _, value = option.removeprefix("config.").partition("=")
        config.override(found, name, value)
    c = config.build(found)
    sizes = {axis: getattr(c.mesh, axis) for axis in rules.MESH_AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: n_device // known if size == -1 else size for axis, size in sizes.items()}
    assert math.prod(sizes.values()) == n_device
    assert rules.misfits(c, sizes) == []
    assert rules.batch_misfit("train", c.train.global_batch_size, sizes, c.train.accumulate) == []
    assert rules.batch_misfit("evaluate", c.evaluate.batch_size, sizes) == []


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("readme.txt", "./readme.txt", True),
        ("readme.txt", f"{os.getcwd()}/readme.txt", True),
        ("data", "data/", True),
        ("~/data", os.path.expanduser("~/data"), True),
        ("readme.txt", "other.txt", False),
        ("gs://bucket/data", "gs://bucket/other", False),
    ],
)
def test_paths_are_compared_by_where_they_lead(old, new, same):
    differing = config.differences({"data": {"path": old}}, {"data": {"path": new}})
    assert (differing == []) is same
    commons = [config.common(schema.Config(data=schema.Data(path=path))) for path in ("a/b", "./a//b/")]
    assert commons[0] == commons[1]
    mixed = [{"data": {"mix": f"{path}:0.5, b:0.5"}} for path in (old, new)]
    assert (config.differences(*mixed) == []) is same
    assert config.differences({"data": {"mix": "a:1,b:2"}}, {"data": {"mix": "a:2,b:1"}})
