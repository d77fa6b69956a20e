"""Machines that are not there: devices of a TPU slice or a GPU host, for their compiler to work for."""

import importlib.util
import math
import os
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

TPUS = ("v4", "v5e", "v5p", "v6e")
# The compiler asks no metadata server, does not mind a second process that uses it, and writes no log files.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
}  # fmt: skip


class Gpu(NamedTuple):
    """What the GPU compiler wants to know, from the vendor's white papers."""

    name: str
    capability: tuple[int, int]
    n_core: int
    clock_ghz: float
    bandwidth: float
    memory: int
    l2: int
    shared: int  # bytes of a core; a block gets all but a KiB


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 2.039e12, 80 << 30, 40 << 20, 164 << 10),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 3.35e12, 80 << 30, 50 << 20, 228 << 10),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 1.98, 4.8e12, 141 << 30, 50 << 20, 228 << 10),
}
GPU_CONFIG = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: {gpu.n_core} fpus_per_core: 128 clock_rate_ghz: {gpu.clock_ghz}
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared} shared_memory_per_block_optin: {block}
  l2_cache_size: {gpu.l2} memory_bandwidth: {gpu.bandwidth:.0f} device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
  device_vendor: "NVIDIA Corporation" name: "{gpu.name}"
  driver_version: "12.8.0" runtime_version: "12.8.0" compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{gpu.name}"
"""


def devices(topology: str) -> list[jax.Device]:
    """The devices of `v5e:4x4` or `h200:8`. ValueError: there is no such machine, or no compiler for it."""
    kind, _, shape = topology.partition(":")
    sizes = [int(n) if n.isdecimal() else 0 for n in shape.split("x")] if shape else [1]
    if kind in GPUS and len(sizes) == 1 and sizes[0] > 0:
        return gpus(GPUS[kind], sizes[0])
    if kind in TPUS and shape and all(sizes):
        return tpus(topology, kind, sizes)
    raise ValueError(
        f"--topology={topology} is not known; use a TPU slice such as v5e:4x4 ({', '.join(TPUS)}), or GPUs of"
        f" one machine such as h200:8 ({', '.join(GPUS)})"
    )


def gpus(gpu: Gpu, n: int) -> list[jax.Device]:
    need("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12", extra="cuda")
    text = GPU_CONFIG.format(gpu=gpu, block=gpu.shared - 1024)
    return topologies.get_topology_desc(platform="cuda", target_config=text, topology=f"1x1x{n}").devices


def tpus(topology: str, kind: str, sizes: list[int]) -> list[jax.Device]:
    need("libtpu", extra="tpu")
    for name, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if kind == "v4":  # two cores are one device
        options = {"chip_config_name": "megacore", "chips_per_host_bounds": (2, 2, 1)}
    if math.prod(sizes) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        return topologies.get_topology_desc(topology, platform="tpu", **options).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--topology={topology} is no slice that there is: {reason}") from error


def need(*modules: str, extra: str) -> None:
    """ValueError: none of the modules of a compiler is installed."""
    for name in modules:
        try:
            if importlib.util.find_spec(name):
                return
        except ModuleNotFoundError:  # not even the package that would hold it
            continue
    raise ValueError(f"the compiler for this topology is not installed: pip install 'tvq[{extra}]'")
