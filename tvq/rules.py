"""The rules that a config must obey; each message names a value that works. No jax."""

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from tvq.errors import InputError
from tvq.schema import ATTENTIONS, DECAY_SHAPES, OPTIMIZERS, SCHEDULES, Config, Profile

MESH_AXES = ("replica", "devices", "sequence", "tensor")


def traced_updates(config: Profile) -> range:
    """The updates to trace. InputError: profile.steps is not a range."""
    match = re.fullmatch(r"(\d+):(\d+)", config.steps or "0:0")
    updates = range(int(match[1]), int(match[2])) if match else range(0)
    if config.steps and not updates:
        raise InputError(
            "config.profile.steps must be FIRST:LAST, with FIRST below LAST, as in 100:104,"
            f" not {config.steps!r}"
        )
    return updates


def stop_strings(text: str) -> list[str]:
    """The strings in sample.stop: a text, or those of a JSON list. InputError: it begins as a list only."""
    if not text.startswith("["):
        return [text] if text else []
    try:
        strings = json.loads(text)
    except (ValueError, RecursionError):
        strings = None
    if not isinstance(strings, list) or not all(isinstance(x, str) and x for x in strings):
        raise InputError(
            f"config.sample.stop must be a text, or a JSON list of texts that are not empty, not {text!r}; a"
            f" text that begins with [ is written in a list: {json.dumps([text])}"
        )
    return strings


def out_of_range(config: Config) -> list[str]:
    """A line for each number that is not finite or outside the range of its field."""
    errors = []
    sections = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for section, values in sections.items():
        for f in dataclasses.fields(values):
            name, value = f"{section}.{f.name}", getattr(values, f.name)
            low, high = f.metadata["at_least"], f.metadata["below"]
            if isinstance(value, float) and not math.isfinite(value):
                errors.append(f"config.{name} must be finite, not {value}")
            elif isinstance(value, int | float) and not low <= value < high:
                span = f"at least {low}" if value < low else f"in [{low}, {high})"
                errors.append(f"config.{name} must be {span}, not {value}")
    return errors


def misfits(config: Config, sizes: Mapping[str, int]) -> list[str]:
    """A line for each rule by which the model or an update cannot be cut over mesh axes of these sizes.

    An axis at -1 is not known yet and counts as 1; where all are known, the advice is for that many devices.
    """
    known = {axis: max(size, 1) for axis, size in sizes.items()}
    errors = _misfits(config, known)
    if errors and -1 not in sizes.values():
        errors = [error.partition("; ")[0] for error in errors]
        errors[-1] += f"; use {fitting(config, math.prod(known.values()))}"
    return errors


def _misfits(config: Config, sizes: Mapping[str, int]) -> list[str]:
    errors = []
    m, t = config.model, config.train

    def fit(what: str, value: int, axis: str, also: int = 1) -> None:
        if value % (sizes[axis] * also):
            fits = lambda n: value // also % n == 0 and (axis != "devices" or t.global_batch_size % n == 0)
            largest = max(filter(fits, range(1, sizes[axis] + 1)), default=1)
            errors.append(f"{what} cannot be cut by config.mesh.{axis} {sizes[axis]}; use {axis} {largest}")

    if config.mesh.shard_params:
        fit(f"config.model.d_model {m.d_model} (shard_params)", m.d_model, "devices")
    if not m.cuts_heads(sizes["tensor"]):
        if m.n_head > 1:
            fit(f"config.model.n_head {m.n_head}", m.n_head, "tensor")
        else:
            fit(f"config.model.d_v {m.d_v}", m.d_v, "tensor")
    if sizes["sequence"] > 1:
        name = "segment_len" if t.segment_len else "update_len"
        length = t.segment_len or t.update_len
        if not m.carries_state:
            errors.append(
                f"config.model.attention={m.attention} reads whole sequences; use config.mesh.sequence 1"
            )
        elif length % m.block_len == 0:
            what = f"config.train.{name} {length}, in blocks of config.model.block_len {m.block_len},"
            fit(what, length, "sequence", m.block_len)
    return errors


def fitting(config: Config, n_device: int) -> str:
    """Options with which a run fits this many devices: the fewest changes that obey every rule.

    There is always one: unsharded parameters, and a batch that the devices can share.
    """
    candidates = []
    for sizes in shapes(n_device, len(MESH_AXES)):
        for shard_params in {config.mesh.shard_params, False}:
            shape = dict(zip(MESH_AXES, sizes, strict=True))
            mesh = dataclasses.replace(config.mesh, **shape, shard_params=shard_params)
            if _misfits(dataclasses.replace(config, mesh=mesh), shape):
                continue
            if shard_params and shape["devices"] == 1:
                continue  # there would be nothing to shard
            options = {f"mesh.{axis}": size for axis, size in shape.items()}
            options |= {"mesh.shard_params": shard_params} | _fitting_batches(config, shape)
            candidates.append((_changed(config, options), (-shape["devices"], -shape["replica"])))
    # Sharding saves memory: it is given up last.
    changed, _ = min(candidates, key=lambda each: ("mesh.shard_params" in each[0], len(each[0]), each[1]))
    return " ".join(f"config.{name}={_written(value)}" for name, value in changed.items())


def shapes(n: int, n_axis: int) -> Iterator[tuple[int, ...]]:
    """All ways to write n as a product of n_axis numbers."""
    if n_axis == 1:
        yield (n,)
        return
    for size in range(1, n + 1):
        if n % size == 0:
            yield from ((size, *rest) for rest in shapes(n // size, n_axis - 1))


def _fitting_batches(config: Config, sizes: Mapping[str, int]) -> dict[str, int]:
    """The nearest batch sizes that mesh axes of these sizes can cut."""
    parts = sizes["replica"] * sizes["devices"]
    nearest = lambda size, n: max(round(size / n), 1) * n
    t, e = config.train, config.evaluate
    batches = {"train.global_batch_size": nearest(t.global_batch_size, parts * t.accumulate)}
    return batches | ({"evaluate.batch_size": nearest(e.batch_size, parts)} if e.batch_size else {})


def _changed(config: Config, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that differ from the config; an axis at -1 takes what the others leave."""
    sections = dataclasses.asdict(config)
    given = {name: sections[name.split(".")[0]][name.split(".")[1]] for name in options}
    return {name: value for name, value in options.items() if given[name] not in (value, -1)}


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


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
    if config.sample.min_p > 1:
        errors.append(f"config.sample.min_p must be in [0, 1], not {config.sample.min_p}")
    try:
        stop_strings(config.sample.stop)
    except InputError as error:
        errors.append(str(error))
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
    one_of("model.attention", m.attention, tuple(ATTENTIONS))
    if not m.carries_state and (t.update_len != t.sequence_len or t.segment_len):
        errors.append(
            f"config.model.attention={m.attention} carries no state: it needs train.update_len equal to"
            f" train.sequence_len {t.sequence_len}, not {t.update_len}, and train.segment_len 0"
        )
    if not m.carries_state and m.n_parallel:
        errors.append(
            f"config.model.n_parallel {m.n_parallel} is for config.model.attention=vq;"
            f" use 0 with {m.attention}"
        )
    if not m.carries_state and config.evaluate.carry:
        errors.append(
            f"config.evaluate.carry needs config.model.attention=vq: {m.attention} carries no state"
        )
    if m.attention == "flash" and (m.dtype != "bfloat16" or m.d_k > 128 or m.d_k % 8):
        errors.append(
            "config.model.attention=flash needs config.model.dtype=bfloat16 and a config.model.d_k of at most"
            f" 128 that is a multiple of 8, not {m.dtype} and {m.d_k}; or use full"
        )
    if m.attention == "flash" and not m.attend_across_documents:
        errors.append(
            "config.model.attention=flash cannot keep documents apart: use"
            " config.model.attend_across_documents=true, or full"
        )
    one_of("model.remat", m.remat, ("all", "names", "nothing"))
    one_of("optimizer.name", o.name, OPTIMIZERS)
    one_of("optimizer.schedule", o.schedule, SCHEDULES)
    one_of("optimizer.decay_shape", o.decay_shape, DECAY_SHAPES)
    if o.floor > 1:
        errors.append(f"config.optimizer.floor must be in [0, 1], not {o.floor}")
    if o.schedule == "wsd" and o.n_warmup_step < o.n_max_step < o.n_warmup_step + o.n_decay_step:
        errors.append(
            f"config.optimizer.n_warmup_step {o.n_warmup_step} and n_decay_step {o.n_decay_step} are more"
            f" than n_max_step {o.n_max_step}; use n_decay_step {o.n_max_step - o.n_warmup_step} or less"
        )
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
            # Otherwise values in memory and cache would get another key.
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
        errors += misfits(config, sizes)
        errors += batch_misfit("train.global_batch_size", t.global_batch_size, known, t.accumulate)
    if errors:
        raise InputError("\n".join(errors))
