"""The config of a run: read from a file, overridden, checked, and frozen into the schema's dataclasses.

A config file returns `base()` with fields assigned; `build` turns it, once, into frozen dataclasses. No jax.
"""

import dataclasses
import difflib
import json
import os
import re
import runpy
import traceback
from typing import Any, get_type_hints

from etils import epath
from ml_collections import ConfigDict

from tvq.errors import InputError
from tvq.rules import validate
from tvq.schema import Config

# The resolved config of a run, in its workdir.
FILE = "config.json"
# Where that of `tvq export --format=hf`, whose other entries are those of transformers, holds it.
NESTED = "tvq"
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
# Compared by the place they lead to.
PATHS = frozenset({"data.path", "data.mix"})
# What may differ between the processes of one run.
LOCAL = frozenset({"cluster.coordinator", "cluster.process_id", "data.cache"})


def base() -> ConfigDict:
    """Every field at its default. A misspelt assignment is an error."""
    return ConfigDict(dataclasses.asdict(Config())).lock()


def load(path: str) -> ConfigDict:
    """What `get_config()` of the Python file at `path` returns. InputError if there is none."""
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
    except (
        AttributeError,
        KeyError,
        TypeError,
    ) as error:  # what a locked ConfigDict raises for a wrong field
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = "".join(f", line {line}" for line in lines[-1:])
        reason: Any = error
        while isinstance(reason, Exception):  # an AttributeError of ConfigDict's holds a KeyError
            reason = reason.args[0] if reason.args else repr(reason)
        words = re.sub(r' Other fields present: ".*"', "", str(reason)).replace("\n", " ")
        raise InputError(f"--config={path}{where}: {words}") from error
    if not isinstance(config, ConfigDict):
        raise InputError(
            f"--config={path}: get_config() did not return a ConfigDict; start from config.base()"
        )
    return config


def recorded(path: epath.Path) -> ConfigDict:
    """The config that a run recorded in its workdir; fields newer than the run have their defaults."""
    config = base().unlock()
    try:
        told = json.loads(path.read_text())
        config.update(told.get(NESTED, told))
    except json.JSONDecodeError as error:
        raise InputError(f"line {error.lineno} of {path} is not JSON: {error.msg}; fix it") from error
    except (
        AttributeError,
        TypeError,
        UnicodeDecodeError,
    ) as error:  # what a ConfigDict raises for other values
        raise InputError(f"{path} is not a valid config ({error}); fix it") from error
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
    shared = {name: value for name, value in flatten(config).items() if name not in LOCAL}
    if shared["data.path"] and "://" not in shared["data.path"]:
        shared["data.path"] = os.path.normpath(
            shared["data.path"]
        )  # ./data is data, wherever it leads on a host
    return {f"config.{name}": value for name, value in shared.items()}


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
    """One line per field, as written on the command line, with its meaning.

    `*` marks what is not at its default, `>` what differs from `before`, the config without the command line.
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


def differences(old: dict, new: dict, place: str = "in the run") -> list[str]:
    """One line for each field whose value differs and decides the numbers of a run."""
    old_flat, new_flat = flatten(old), flatten(new)
    names = [name for name in old_flat | new_flat if name not in CHANGEABLE]
    return [
        f"config.{name}: {old_flat.get(name, 'absent')!r} {place}, {new_flat.get(name, 'absent')!r} now"
        for name in names
        if _place(name, old_flat.get(name)) != _place(name, new_flat.get(name))
    ]


def _place(name: str, value: Any) -> Any:
    """Where a field that holds paths leads, however it is written; other values as they are."""
    if not isinstance(value, str) or not value or name not in PATHS:
        return value
    place = lambda path: path if "://" in path else os.path.realpath(os.path.expanduser(path))
    if name != "data.mix":
        return place(value)
    parts = [part.strip().rpartition(":") for part in value.split(",")]
    return [(place(folder), weight) for folder, _, weight in parts]
