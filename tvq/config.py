"""The config of a run: read from a file, overridden, checked, and frozen into the schema's dataclasses.

A config file returns `base()` with fields assigned; `build` turns it, once, into frozen dataclasses. No jax.
"""

import dataclasses
import difflib
import json
import math
import os
import re
import runpy
import traceback
from collections.abc import Mapping
from typing import Any, get_type_hints

from etils import epath
from ml_collections import ConfigDict

from tvq.errors import InputError
from tvq.schema import (
    Bench,
    Checkpoint,
    Cluster,
    Config,
    Data,
    Evaluate,
    Log,
    Mesh,
    Model,
    Optimizer,
    Plan,
    Profile,
    Recall,
    Sample,
    Train,
)

__all__ = [
    "Bench",
    "Checkpoint",
    "Cluster",
    "Config",
    "Data",
    "Evaluate",
    "Log",
    "Mesh",
    "Model",
    "Optimizer",
    "Plan",
    "Profile",
    "Recall",
    "Sample",
    "Train",
]

# The resolved config of a run, in its workdir.
FILE = "config.json"
# What may differ between a run and its resumption: everything else decides the numbers.
CHANGEABLE = frozenset(
    {"model.n_parallel", "model.remat", "train.segment_len", "train.accumulate", "train.steps"}
    | {"train.reproducible", "data.cache", "data.workers"}
    | {
        f"{name}.{f.name}"
        for name, cls in get_type_hints(Config).items()
        for f in dataclasses.fields(cls)
        if name not in ("model", "data", "optimizer", "train")
    }
)
# What may differ between the processes of one run.
LOCAL = frozenset({"cluster.coordinator", "cluster.process_id", "data.cache"})


def base() -> ConfigDict:
    """Every field at its default. A misspelt assignment is an error."""
    return ConfigDict(dataclasses.asdict(Config())).lock()


def load(path: str) -> ConfigDict:
    """What `get_config()` of the Python file at `path` returns. InputError: there is no such thing."""
    if not os.path.isfile(path):
        raise InputError(f"--config={path}: there is no such file")
    try:
        names = runpy.run_path(path)
    except SyntaxError as error:
        raise InputError(f"--config={path}: line {error.lineno} is not Python: {error.msg}") from error
    if "get_config" not in names:
        raise InputError(f"--config={path} has no function get_config()")
    try:
        config = names["get_config"]()
    except (AttributeError, KeyError, TypeError) as error:  # a locked ConfigDict's word for a wrong field
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = "".join(f", line {line}" for line in lines[-1:])
        reason: Any = error
        while isinstance(reason, Exception):  # an AttributeError of ConfigDict's holds a KeyError
            reason = reason.args[0] if reason.args else repr(reason)
        words = re.sub(r' Other fields present: ".*"', "", str(reason)).replace("\n", " ")
        raise InputError(f"--config={path}{where}: {words}") from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"--config={path}: get_config() returned no ConfigDict; start from config.base()")
    return config


def recorded(path: epath.Path) -> ConfigDict:
    """The config that a run left in its workdir; fields that are newer than the run have their default."""
    config = base().unlock()
    try:
        config.update(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise InputError(f"line {error.lineno} of {path} is not JSON: {error.msg}; mend it") from error
    except (AttributeError, TypeError, UnicodeDecodeError) as error:  # a ConfigDict's word for other values
        raise InputError(f"{path} is no config ({error}); mend it") from error
    return config


def override(config: ConfigDict, name: str, text: str) -> None:
    """Sets `section.field` to what was written on the command line. InputError: no such field, wrong type."""
    section, _, key = name.partition(".")
    types = field_types()
    if name not in types:
        raise InputError(f"--config.{name} is not a field{nearest(name)}")
    wanted = types[name]
    value: Any = {"true": True, "false": False}.get(text.lower()) if wanted is bool else text
    if wanted in (int, float):
        try:
            value = wanted(text)
        except ValueError:
            value = None
    if value is None:
        kind = "true or false" if wanted is bool else wanted.__name__
        raise InputError(f"--config.{name} must be {kind}, not {text!r}")
    config[section][key] = value


def field_types() -> dict[str, type]:
    """`{"section.field": type}`."""
    return {
        f"{name}.{key}": kind
        for name, cls in get_type_hints(Config).items()
        for key, kind in get_type_hints(cls).items()
    }


def flatten(config: ConfigDict | dict | Config) -> dict[str, Any]:
    """`{"section.field": value}` in the schema's order; unknown names come last."""
    sections = dataclasses.asdict(config) if isinstance(config, Config) else config
    flat = {}
    for name, values in sections.items():
        if hasattr(values, "items"):
            flat.update({f"{name}.{key}": value for key, value in values.items()})
        else:
            flat[name] = values
    return flat


def common(config: Config) -> dict[str, Any]:
    """The fields on which all processes of a run must agree."""
    return {f"config.{name}": value for name, value in flatten(config).items() if name not in LOCAL}


def to_dict(config: Config) -> dict[str, Any]:
    """For JSON: `{"section": {"field": value}}`."""
    return dataclasses.asdict(config)


def fields() -> dict[str, dataclasses.Field]:
    """`{"section.field": its dataclass field}`."""
    sections = get_type_hints(Config)
    return {f"{name}.{f.name}": f for name, cls in sections.items() for f in dataclasses.fields(cls)}


def docs() -> dict[str, str]:
    """`{"section.field": meaning}`."""
    return {name: f.metadata["doc"] for name, f in fields().items()}


def listing(config: Config, before: ConfigDict) -> str:
    """A line a field, as the command line writes it, with its meaning.

    `*` marks what is not at its default, `>` what differs from `before`, where the command line began.
    """
    now, was, usual = flatten(config), flatten(before), flatten(Config())
    marks = {
        name: ">" if now[name] != was[name] else "*" if now[name] != usual[name] else " " for name in now
    }
    lines = {name: f"{marks[name]} --config.{name}={value!r}" for name, value in now.items()}
    width = max(map(len, lines.values()))
    notes = {name: f" (default {usual[name]!r})" for name in now if now[name] != usual[name]}
    return "\n".join(f"{lines[name]:{width}}  {doc}{notes.get(name, '')}" for name, doc in docs().items())


def nearest(name: str) -> str:
    """` (did you mean ...?)` for a mistyped field, or nothing."""
    close = difflib.get_close_matches(name, list(docs()), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def build(config: ConfigDict | dict) -> Config:
    """The validated, frozen form. InputError names each unknown, missing, mistyped or impossible field."""
    flat, known = flatten(config), docs()
    errors = [f"config.{name} is not a field{nearest(name)}" for name in flat if name not in known]
    errors += [f"config.{name} is missing ({doc})" for name, doc in known.items() if name not in flat]
    if errors:
        raise InputError("\n".join(errors))
    sections = {}
    for section_name, cls in get_type_hints(Config).items():
        types, values = get_type_hints(cls), {}
        for f in dataclasses.fields(cls):
            name, value, wanted = f"{section_name}.{f.name}", flat[f"{section_name}.{f.name}"], types[f.name]
            if wanted is float and type(value) is int:
                value = float(value)
            if type(value) is not wanted:
                errors.append(f"config.{name} must be {wanted.__name__}, not {value!r}")
            values[f.name] = value
        sections[section_name] = cls(**values)
    if errors:
        raise InputError("\n".join(errors))
    built = Config(**sections)
    validate(built)
    return built


def differences(old: dict, new: dict) -> list[str]:
    """One line for each field whose value differs and decides the numbers of a run."""
    old_flat, new_flat = flatten(old), flatten(new)
    names = [name for name in old_flat | new_flat if name not in CHANGEABLE]
    return [
        f"config.{name}: {old_flat.get(name, 'absent')!r} in the run, {new_flat.get(name, 'absent')!r} now"
        for name in names
        if old_flat.get(name) != new_flat.get(name)
    ]


def traced_updates(config: Profile) -> range:
    """The updates to trace. InputError: profile.steps is something else."""
    found = re.fullmatch(r"(\d+):(\d+)", config.steps or "0:0")
    updates = range(int(found[1]), int(found[2])) if found else range(0)
    if config.steps and not updates:
        raise InputError(
            "config.profile.steps must be FIRST:LAST, with FIRST below LAST, as in 100:104,"
            f" not {config.steps!r}"
        )
    return updates


def out_of_range(config: Config) -> list[str]:
    """A line for each number that is not finite or outside the range of its field."""
    errors = []
    ranges = {name: (f.metadata["at_least"], f.metadata["below"]) for name, f in fields().items()}
    for name, value in flatten(config).items():
        low, high = ranges[name]
        if isinstance(value, float) and not math.isfinite(value):
            errors.append(f"config.{name} must be finite, not {value}")
        elif isinstance(value, int | float) and not low <= value < high:
            span = f"at least {low}" if value < low else f"in [{low}, {high})"
            errors.append(f"config.{name} must be {span}, not {value}")
    return errors


def misfits(config: Config, sizes: Mapping[str, int]) -> list[str]:
    """A line for each rule by which the model or an update cannot be cut over mesh axes of these sizes."""
    errors = []
    m, t = config.model, config.train

    def fit(what: str, value: int, axis: str, also: int = 1) -> None:
        if value % (sizes[axis] * also):
            fits = lambda n: value // also % n == 0 and (axis != "devices" or t.global_batch_size % n == 0)
            fitting = max(filter(fits, range(1, sizes[axis] + 1)), default=1)
            errors.append(f"{what} cannot be cut by config.mesh.{axis} {sizes[axis]}; use {axis} {fitting}")

    if config.mesh.shard_params:
        fit(f"config.model.d_model {m.d_model} (shard_params)", m.d_model, "devices")
    if m.n_head % sizes["tensor"]:
        if m.n_head > 1:
            fit(f"config.model.n_head {m.n_head}", m.n_head, "tensor")
        else:
            fit(f"config.model.d_v {m.d_v}", m.d_v, "tensor")
    if sizes["sequence"] > 1:
        name = "segment_len" if t.segment_len else "update_len"
        length = t.segment_len or t.update_len
        if m.attention == "full":
            errors.append("config.model.attention=full reads whole sequences; use config.mesh.sequence 1")
        elif length % m.block_len == 0:
            what = f"config.train.{name} {length}, in blocks of config.model.block_len {m.block_len},"
            fit(what, length, "sequence", m.block_len)
    return errors


def batch_misfit(name: str, size: int, sizes: Mapping[str, int], accumulate: int = 1) -> list[str]:
    """A line if a batch of this size cannot be cut over mesh axes of these sizes."""
    cuts = {f"mesh.{axis}": sizes[axis] for axis in ("replica", "devices")} | {"train.accumulate": accumulate}
    parts = math.prod(cuts.values())
    if size <= 0 or size % parts == 0:
        return []
    by = " x ".join(f"config.{cut} {n}" for cut, n in cuts.items() if n > 1)
    lower = size // parts * parts
    options = f"{lower} or {lower + parts}" if lower else str(parts)
    return [f"config.{name} {size} is not a multiple of {by}; use {options}"]


def validate(config: Config) -> None:
    """Ranges and divisibility that need no device. InputError holds one line for each broken rule."""
    errors = out_of_range(config)

    def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            close = difflib.get_close_matches(value, allowed, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            errors.append(f"config.{name} must be one of {', '.join(allowed)}, not {value!r}{hint}")

    def divides(name: str, value: int, by_name: str, by: int) -> None:
        if by > 0 and value > 0 and value % by:
            down, up = value // by * by, -(-value // by) * by
            options = f"{down} or {up}" if down else str(up)
            errors.append(f"config.{name} {value} is not a multiple of config.{by_name} {by}; use {options}")

    m, t, o = config.model, config.train, config.optimizer
    if not 0 <= config.sample.nucleus <= 1:
        errors.append(f"config.sample.nucleus must be in [0, 1], not {config.sample.nucleus}")
    if m.d_model % 2:
        errors.append(f"config.model.d_model must be even (sine and cosine halves), not {m.d_model}")
    for name, value in (("pe_lam", m.pe_lam), ("e_scale", m.e_scale)):
        if value <= 0:
            errors.append(f"config.model.{name} must be positive, not {value}")
    if o.n_warmup_step >= o.n_max_step:
        errors.append(
            f"config.optimizer.n_warmup_step {o.n_warmup_step} must be below n_max_step {o.n_max_step}"
        )
    one_of("model.dtype", m.dtype, ("float32", "bfloat16", "float64"))
    one_of("model.param_dtype", m.param_dtype, ("float32", "float64"))
    one_of("model.attention", m.attention, ("vq", "full"))
    if m.attention == "full" and (t.update_len != t.sequence_len or t.segment_len):
        errors.append(
            "config.model.attention=full carries no state: it needs train.update_len equal to"
            f" train.sequence_len {t.sequence_len}, not {t.update_len}, and train.segment_len 0"
        )
    if m.attention == "full" and m.n_parallel > 1:
        errors.append(
            f"config.model.n_parallel {m.n_parallel} must be 1 (a block at a time) or 0 where"
            " config.model.attention is full"
        )
    if m.attention == "full" and config.evaluate.carry:
        errors.append("config.evaluate.carry needs config.model.attention=vq: full carries no state")
    one_of("model.remat", m.remat, ("all", "names", "nothing"))
    one_of("optimizer.name", o.name, ("adamw", "lion", "adafactor"))
    one_of("optimizer.schedule", o.schedule, ("cosine", "linear", "inv_sqrt"))
    one_of("data.source", config.data.source, ("stdlib", "text", "tokens"))
    one_of("evaluate.split", config.evaluate.split, ("train", "validation", "test"))
    if config.data.mix and (config.data.source, config.data.path) != ("tokens", ""):
        errors.append(
            "config.data.mix names prepared folders: it needs config.data.source=tokens and an empty"
            f" config.data.path, not {config.data.source!r} and {config.data.path!r}"
        )
    if config.data.source == "text" and not config.data.path:
        errors.append("config.data.source=text needs config.data.path, a file or folder of text")
    if config.data.source == "tokens" and not config.data.path and not config.data.mix:
        errors.append("config.data.source=tokens needs config.data.path, a prepared folder")
    if config.data.source == "stdlib" and config.data.path:
        errors.append(
            f"config.data.source=stdlib does not read config.data.path {config.data.path!r};"
            " use config.data.source=text, or leave the path empty"
        )
    try:
        if traced_updates(config.profile).stop > t.steps:
            errors.append(
                f"config.profile.steps {config.profile.steps} goes beyond config.train.steps {t.steps}"
            )
    except InputError as error:
        errors.append(str(error))
    divides("train.sequence_len", t.sequence_len, "train.update_len", t.update_len)
    divides("train.update_len", t.update_len, "model.block_len", m.block_len)
    if t.segment_len:
        divides("train.update_len", t.update_len, "train.segment_len", t.segment_len)
        divides("train.segment_len", t.segment_len, "model.block_len", m.block_len)
    if t.update_len > 0 and not t.sequence_len % t.update_len and t.steps > 0:
        n_update = t.sequence_len // t.update_len
        if 0 < m.revive_codes < n_update:
            # Values in memory and cache would change their key.
            errors.append(
                f"config.model.revive_codes {m.revive_codes} is below {n_update}, the updates of one sequence"
                f" (sequence_len / update_len); use {n_update} or more, or 0"
            )
        if t.steps % n_update:
            errors.append(
                f"config.train.steps {t.steps} is not a multiple of {n_update}, the updates of one sequence"
                f" (sequence_len / update_len); use {-(-t.steps // n_update) * n_update}"
            )
    sizes = dataclasses.asdict(config.mesh)
    del sizes["shard_params"]
    wrong = [name for name, size in sizes.items() if size == 0 or size < -1]
    errors += [f"config.mesh.{n} must be positive, or -1 for all, not {sizes[n]}" for n in wrong]
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        errors.append(f"only one of config.mesh.{', config.mesh.'.join(free)} may be -1; set the others to 1")
    if not wrong:
        known = {name: max(size, 1) for name, size in sizes.items()}
        errors += misfits(config, known)
        errors += batch_misfit("train.global_batch_size", t.global_batch_size, known, t.accumulate)
    if errors:
        raise InputError("\n".join(errors))
