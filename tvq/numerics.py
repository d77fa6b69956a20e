"""The settings of jax and XLA that change numbers: processes agree on them, and a checkpoint records them."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import jax

from tvq.errors import InputError

# They decide what is computed: random numbers, dtypes, the precision of products.
DECIDING = (
    "jax_threefry_partitionable",
    "jax_default_prng_impl",
    "jax_enable_custom_prng",
    "jax_random_seed_offset",
    "jax_high_dynamic_range_gumbel",
    "jax_enable_x64",
    "jax_explicit_x64_dtypes",
    "jax_numpy_dtype_promotion",
    "jax_default_matmul_precision",
    "jax_allow_f16_reductions",
    "jax_softmax_custom_jvp",
)
# They decide how it is compiled, and so the rounding. A resumed run may change them, as it may change
# the machine; within a run all processes must compile the same program.
COMPILING = (
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_optimization_level",
    "jax_exec_time_optimization_effort",
    "jax_use_shardy_partitioner",
    "jax_threefry_gpu_kernel_lowering",
)
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
# Flags of XLA that choose another arithmetic, by parts of their names.
DECIDING_FLAGS = re.compile(r"fast_m|precision|tf32|denormal|ftz|approx|bf16|f16|fp8|f8|rng")
# Flags that change nothing in the compiled program, or that hosts may differ in.
LOCAL_FLAGS = re.compile(r"xla_dump|profil|_dir\b|_cache|host_platform_device_count|parallelism|_log|threads")
VARIABLES = ("NVIDIA_TF32_OVERRIDE",)
UNSET = "not set"


def deciding(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`{name: value}` of what a checkpoint records and a resumed run must repeat; only flags that are set."""
    flags = _flags(environment)
    return _settings(DECIDING) | {
        name: value for name, value in flags.items() if name in VARIABLES or DECIDING_FLAGS.search(name)
    }


def common(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The same for what all processes of a run must agree on, with names as the error message has them."""
    settings = _settings(DECIDING + COMPILING) | _flags(environment)
    return {f"{name} (set it to the same on all processes)": value for name, value in settings.items()}


def check(step: int, saved: Mapping[str, str]) -> None:
    """InputError if a run that resumes from checkpoint `step` would compute with other settings."""
    now = deciding()
    lines = [
        f"  {name}: {saved.get(name, UNSET)} when it was saved, {now.get(name, UNSET)} now"
        for name in sorted(saved.keys() | now.keys())
        if saved.get(name, UNSET) != now.get(name, UNSET)
    ]
    if lines:
        raise InputError(
            f"checkpoint {step} was saved with other settings of jax, which change the numbers:\n"
            + "\n".join(lines)
            + "\nset them in the environment as they were, or start in another workdir"
        )


def _settings(names: tuple[str, ...]) -> dict[str, str]:
    """The settings, by their names in the environment."""
    return {name.upper(): _text(jax.config.values[name]) for name in names if name in jax.config.values}


def _text(value: object) -> str:
    """As the environment writes it."""
    if value is None:
        return UNSET
    return str(value).lower() if isinstance(value, bool) else str(getattr(value, "value", value))


def _flags(environment: Mapping[str, str]) -> dict[str, str]:
    """`{"XLA_FLAGS --xla_name": "value"}` without those that hosts may differ in, and VARIABLES."""
    flags = {name: environment[name] for name in VARIABLES if name in environment}
    for variable in FLAGS:
        text = environment.get(variable, "").strip()
        if text and not text.startswith("-") and Path(text).is_file():  # XLA also accepts a file of flags
            text = Path(text).read_text()
        for flag in text.split():
            name, equals, value = flag.partition("=")
            if not LOCAL_FLAGS.search(name):
                flags[f"{variable} {name}"] = value if equals else "true"
    return flags
