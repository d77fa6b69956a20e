"""What a run says of itself in words: what runs where, what it needs, and what slows it down."""

import contextlib
from collections.abc import Iterator, Mapping

import jax
from etils import epath
from jax.sharding import Mesh

from tvq import chips, sharding
from tvq import model as lm
from tvq.data import prepared
from tvq.data.corpus import Corpus
from tvq.run import metrics
from tvq.schema import ENDING, Config
from tvq.training import optimizer

CACHE_HIT = "/jax/compilation_cache/cache_hits"
# Shares of the wall time that are worth a word, and the word.
SLOW = {
    "data": (0.1, "read ahead in processes: config.data.workers=2 or more; tvq bench data measures it"),
    "evaluate": (0.25, "raise config.evaluate.every"),
    "sample": (0.1, "raise config.sample.every"),
    "save": (0.1, "raise config.checkpoint.every"),
}
AT_FLOOR = 0.2  # of the run with the learning rate at its floor is worth a word
LEAST_SECONDS = 60.0  # shares of less say little


def start(
    config: Config, mesh: Mesh, corpus: Corpus, workdir: epath.Path, n_param: int, saved: list[int]
) -> str:
    """What runs where, in a few lines. It resumes from the last of the steps `saved`."""
    m, t, info = config.model, config.train, corpus.info("train")
    n_batch = f"{t.global_batch_size} x {t.sequence_len:,} tokens"
    axes = [
        f"{axis}={n} ({sharding.ROLES[axis]})" for axis, n in mesh.shape.items() if n > 1 or axis == "devices"
    ]
    left_out = [name for folder in corpus.folders for name in folder.source.get("left_out", ())]
    without = f"; left out, as tvq made it: {', '.join(left_out)}" if left_out else ""
    if unknown := prepared.unknown(info):
        without += f"; {unknown}"
    lines = {
        "model": f"{n_param:,} parameters, {m.dtype}; {lm.describe(m)}",
        "mesh": f"{mesh.size} x {mesh.devices.flat[0].device_kind}: {', '.join(axes)}",
        "data": f"{corpus.where}: {info.n_token:,} tokens in {info.n_document:,} documents{without}",
        "batch": f"{n_batch}, an update each {t.update_len:,} tokens",
        "workdir": f"{workdir}: " + (f"resuming from step {saved[-1]:,}" if saved else "a new run"),
    }
    for what, remedy in of_schedule(config):
        lines["schedule"] = f"{what}: {remedy}"
    if text := optimizer.describe(config, mesh):
        lines[config.optimizer.name] = text
    if t.reproducible:
        lines["repeats"] = (
            "bitwise on equal meshes, and on others by docs/mesh.md; on GPUs without their fastest kernels:"
            " tvq bench train tells"
        )
    return "\n".join(f"{name:8} {text}" for name, text in lines.items())


def of_schedule(config: Config) -> list[tuple[str, str]]:
    """What is odd about a schedule beside the length of the run, and what to change."""
    o, steps = config.optimizer, config.train.steps
    highest = f"config.optimizer.lr_max {o.lr_max:g}"
    if o.n_warmup_step >= steps:
        return [
            (
                f"the warm-up of {o.n_warmup_step:,} updates is not over at the end of the run, at {steps:,}:"
                f" the learning rate comes to {steps / o.n_warmup_step:.2g} of {highest}",
                "lower config.optimizer.n_warmup_step, or raise config.train.steps",
            )
        ]
    at_floor = max(steps - o.n_max_step, 0)
    if o.schedule in ENDING and at_floor > (AT_FLOOR * steps if o.floor else 0):
        share = f"{at_floor / steps:.0%}".replace("%", " %")
        return [
            (
                f"it ends at update {o.n_max_step:,} of {steps:,}: for {share} of the run the learning rate"
                f" is {o.floor:g} of {highest}" + ("" if o.floor else ", and nothing is learnt"),
                f"in a new run, set config.optimizer.n_max_step={steps}",
            )
        ]
    return []


@contextlib.contextmanager
def counting_cache_hits() -> Iterator[list[str]]:
    """A list to which each program is added that the compilation cache had."""
    hits: list[str] = []

    def hear(event: str, **_: object) -> None:
        if event == CACHE_HIT:
            hits.append(event)

    jax.monitoring.register_event_listener(hear)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(hear)


def compiled(program: jax.stages.Compiled, seconds: float, is_cached: bool) -> str:
    """How long the step took to compile, and the memory it will need."""
    text = f"compile  {metrics.duration(seconds)}{' (it was in the cache)' if is_cached else ''}"
    memory = program.memory_analysis()
    if memory is None:  # not every backend says
        return text
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    there = sharding.device_memory("bytes_limit")
    of = "" if there is None else f" of {there / 2**20:,.0f}"
    return f"{text}\nmemory   {needed / 2**20:,.0f}{of} MiB per device, predicted"


def memory() -> dict[str, int]:
    """The column `memory_peak_bytes`: what a device of this process has needed at most; none on a CPU."""
    peak = sharding.device_memory("peak_bytes_in_use")
    return {} if peak is None else {"memory_peak_bytes": peak}


def peak(config: Config, mesh: Mesh) -> float | None:
    """Tokens a second at the peak of the devices, where that is known."""
    chip = chips.chip(mesh.devices.flat[0].device_kind)
    if chip is None or config.model.dtype == "float64":
        return None
    peak = chip.bfloat16 if config.model.dtype == "bfloat16" else chip.float32
    return peak * mesh.size / lm.train_flops(config.model, config.train.update_len)


def spent(seconds: Mapping[str, float]) -> str:
    """Where the wall time went, what can be done about it, and the memory that it took."""
    total = sum(seconds.values())
    lines = [f"time     {metrics.spent_line(seconds)}"]
    lines += [
        f"{100 * seconds[kind] / total:.0f} % of the time went into {kind}: {remedy}"
        for kind, (share, remedy) in SLOW.items()
        if total >= LEAST_SECONDS and seconds[kind] > share * total
    ]
    lines += [f"memory   {peak / 2**20:,.0f} MiB per device, measured" for peak in memory().values()]
    return "\n".join(lines)
