"""Settings of jax and flags of XLA that change numbers, as processes and checkpoints compare them."""

import jax
import pytest

from tvq import numerics
from tvq.errors import InputError


@pytest.mark.parametrize(
    ("setting", "value", "name", "text"),
    [
        ("jax_threefry_partitionable", False, "JAX_THREEFRY_PARTITIONABLE", "false"),
        ("jax_enable_x64", True, "JAX_ENABLE_X64", "true"),
        ("jax_default_matmul_precision", "highest", "JAX_DEFAULT_MATMUL_PRECISION", "highest"),
        ("jax_default_prng_impl", "rbg", "JAX_DEFAULT_PRNG_IMPL", "rbg"),
        ("jax_numpy_dtype_promotion", "strict", "JAX_NUMPY_DTYPE_PROMOTION", "strict"),
        ("jax_random_seed_offset", 3, "JAX_RANDOM_SEED_OFFSET", "3"),
    ],
)
def test_settings_of_jax(setting, value, name, text):
    before, usual = jax.config.values[setting], numerics.deciding({})
    jax.config.update(setting, value)
    try:
        changed, common = numerics.deciding({}), numerics.common({})
        with pytest.raises(InputError) as error:
            numerics.check(7, usual)
    finally:
        jax.config.update(setting, getattr(before, "value", before))
    assert {key for key in usual if usual[key] != changed[key]} == {name}
    assert changed[name] == text
    assert common[f"{name} (set it to the same on all processes)"] == text
    assert str(error.value).splitlines() == [
        "checkpoint 7 was saved with other settings of jax, which change the numbers:",
        f"  {name}: {usual[name]} when it was saved, {text} now",
        "set them in the environment as they were, or start in another workdir",
    ]


def test_flags_of_xla(tmp_path):
    flags = "--xla_allow_excess_precision=false --xla_cpu_enable_fast_math --xla_dump_to=/tmp/x --xla_other=3"
    (tmp_path / "flags").write_text(flags)
    usual = numerics.deciding({}).keys()
    for text in (flags, str(tmp_path / "flags")):
        variables = {"XLA_FLAGS": text, "LIBTPU_INIT_ARGS": "", "NVIDIA_TF32_OVERRIDE": "0"}
        found = numerics.deciding(variables)
        assert {name: value for name, value in found.items() if name not in usual} == {
            "XLA_FLAGS --xla_allow_excess_precision": "false",
            "XLA_FLAGS --xla_cpu_enable_fast_math": "true",
            "NVIDIA_TF32_OVERRIDE": "0",
        }
        compiled = [name for name in numerics.common(variables) if "XLA_FLAGS" in name]
        assert [name.split()[1] for name in compiled] == [
            "--xla_allow_excess_precision", "--xla_cpu_enable_fast_math", "--xla_other",
        ]  # fmt: skip


def test_what_a_resumed_run_may_change():
    """The kernels that repeat bitwise, of config.train.reproducible, and the number of CPU devices."""
    flags = "--xla_gpu_deterministic_ops=true --xla_force_host_platform_device_count=2"
    assert numerics.deciding({"XLA_FLAGS": flags}) == numerics.deciding({})
