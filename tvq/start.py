"""Starts a program that computes: the settings of jax, this process's place among all, its log."""

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from tvq import cluster, words
from tvq.commands import Command, program
from tvq.data.corpus import cache_folder
from tvq.errors import InputError, explained, raise_at_interrupt
from tvq.schema import Config

# Forbids operations whose order of summation may change, and choosing kernels by timing them.
DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def on_devices(
    command: Command,
    config: Config,
    workdir: str,
    cpu_devices: int | None,
    own: Mapping[str, Any],
) -> int:
    """Imports the program and runs it; returns its exit code."""
    start = program(command.start)
    raise_at_interrupt()
    set_up(command, config, cpu_devices)
    place = cluster.find(config.cluster, os.environ, cluster.tpu_metadata(os.environ))
    log = open_log(workdir, place)
    # The guard is outside: with several processes it must see the exit, to leave at once.
    with contextlib.closing(log), cluster.guard(place, log.say), explained(log.say):
        code: int = start(config, epath.Path(workdir), place, log, **own)
        return words.arrived(code, log.say) if command.prints_result else code


def set_up(command: Command, config: Config, cpu_devices: int | None) -> None:
    """The settings of jax and XLA, before there are devices."""
    if cpu_devices is not None:
        if cpu_devices < 1:
            raise InputError(f"--cpu_devices must be at least 1, not {cpu_devices}")
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    if config.train.reproducible:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    if "float64" in (config.model.dtype, config.model.param_dtype):
        if config.model.dtype != config.model.param_dtype:
            raise InputError(
                f"config.model.dtype {config.model.dtype} and config.model.param_dtype"
                f" {config.model.param_dtype} do not go together; use float64 for both or neither"
            )
        jax.config.update("jax_enable_x64", True)  # or jax would compute in float32 and only warn
    if not command.keeps_programs:
        jax.config.update("jax_enable_compilation_cache", False)
    elif not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder(config.data) / "compiled"))


def open_log(workdir: str, place: cluster.Place) -> cluster.Log:
    """The log of this process. InputError: the workdir cannot be written."""
    with cluster.writing("--workdir", workdir):
        return cluster.Log(cluster.log_folder(workdir), place)
