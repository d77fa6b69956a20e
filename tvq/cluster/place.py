"""The place of this process in a run of several: coordinator, number of processes, its own number.

Explicit settings (`config.cluster`, or TVQ_COORDINATOR, TVQ_N_PROCESS, TVQ_PROCESS_ID) come first; the rest
comes from a scheduler: SLURM, Open MPI, Cloud TPU, GKE, indexed Kubernetes jobs.
"""

import dataclasses
import glob
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from tvq import schema
from tvq.errors import ClusterError, InputError

TPU_PORT, LAST_PORT = 8482, 65535
OPTIONS = {
    "coordinator": ("config.cluster.coordinator", "TVQ_COORDINATOR"),
    "n_process": ("config.cluster.n_process", "TVQ_N_PROCESS"),
    "process_id": ("config.cluster.process_id", "TVQ_PROCESS_ID"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """One process among `n_process`. `hosts` has a name for each process, empty where unknown."""

    how: str
    n_process: int = 1
    process_id: int = 0
    coordinator: str = ""
    hosts: tuple[str, ...] = ("",)
    local_devices: int = 0  # devices this process must see; 0: not known
    local_device_ids: tuple[int, ...] | None = None  # which of the visible devices to use; None: all
    # Connections of the rendezvous, by file descriptor: between process 0 and each of the others. Nothing
    # more is sent, and only the kernel closes them: however a process ends, process 0 notices.
    lines: list[int] = dataclasses.field(default_factory=list, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """The one process that writes to a terminal and to outside services."""
        return self.process_id == 0

    def check_alone(self, command: str) -> None:
        """InputError if several processes start a command that is for one."""
        if self.n_process > 1:
            raise InputError(f"tvq {command} is for one process, but {self}; start it by itself")

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)

    def __str__(self) -> str:
        if self.n_process == 1:
            return f"one process ({self.how})"
        return f"process {self.process_id} of {self.n_process}, coordinator {self.coordinator} ({self.how})"


def find(
    section: schema.Cluster, environ: Mapping[str, str], metadata: Callable[[str], str] | None = None
) -> Place:
    """The place of this process.

    Args:
        section: config.cluster.
        environ: the environment of the process.
        metadata: reads a key of a TPU VM's instance metadata; None away from TPU VMs.
    Returns:
        What the settings and the first scheduler present say; one process if there is neither.
    Raises:
        InputError: settings contradict each other, are incomplete, or make no sense.
    """
    given, how = _explicit(section, environ)
    if given.get("n_process") == 1:
        return Place(how=how, local_devices=section.local_devices)
    for scheduler in (_slurm, _open_mpi, _gke_tpu, _kubernetes):
        scheduled = scheduler(environ)
        if scheduled:
            break
    else:
        scheduled = _gce_tpu(metadata) if metadata else {}
    if not given and scheduled.get("n_process", 0) == 1:
        return Place(
            how=scheduled["how"], local_devices=section.local_devices or scheduled.get("local_devices", 0)
        )
    if not given and not scheduled:
        return Place(how="no other process is named", local_devices=section.local_devices)
    merged = scheduled | given | {"how": ", ".join(filter(None, (how, scheduled.get("how"))))}
    if section.local_devices:
        merged["local_devices"] = section.local_devices
    missing = [name for name in OPTIONS if name not in merged]
    if missing:
        ways = "; ".join(" or ".join(OPTIONS[name]) for name in missing)
        raise InputError(
            f"{merged['how']}: a run of several processes also needs {', '.join(missing)}: set {ways};"
            " for a single process set TVQ_N_PROCESS=1"
        )
    return _checked(merged)


def _checked(merged: dict[str, Any]) -> Place:
    n, i = merged["n_process"], merged["process_id"]
    if not 0 <= i < n:
        raise InputError(f"{merged['how']}: process id {i} is not below the number of processes {n}")
    port = re.fullmatch(r".+:(\d{1,5})", merged["coordinator"])
    if not port or not 0 < int(port[1]) < LAST_PORT:  # the rendezvous uses the next one
        raise InputError(
            f"{merged['how']}: coordinator {merged['coordinator']!r} must be HOST:PORT, with a PORT below"
            f" {LAST_PORT}"
        )
    hosts = merged.get("hosts", ())
    merged["hosts"] = tuple(hosts) if len(hosts) == n else ("",) * n
    return Place(**merged)


def _explicit(section: schema.Cluster, environ: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    values: dict[str, Any] = {}
    sources = []
    for name, (field, variable) in OPTIONS.items():
        in_config = getattr(section, name)
        in_config = None if in_config in ("", -1) or (name == "n_process" and in_config == 0) else in_config
        in_environ: Any = environ.get(variable) or None
        if in_environ and name != "coordinator":
            if not in_environ.isdecimal():
                raise InputError(f"{variable} must be a whole number, not {in_environ!r}")
            in_environ = int(in_environ)
        if None not in (in_config, in_environ) and in_config != in_environ:
            raise InputError(f"{field} is {in_config!r} but {variable} is {in_environ!r}; unset one of them")
        if in_config is not None or in_environ is not None:
            values[name] = in_config if in_environ is None else in_environ
            sources.append(field if in_environ is None else variable)
    return values, " ".join(sources)


def _slurm(environ: Mapping[str, str]) -> dict[str, Any]:
    if "SLURM_JOB_ID" not in environ or "SLURM_PROCID" not in environ:
        return {}
    job = environ["SLURM_JOB_ID"]
    n = int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1")))
    if "SLURM_STEP_NODELIST" not in environ:
        if n > 1:
            raise InputError(
                f"SLURM job {job} has {n} tasks, but this is its batch shell, not a step: start with srun,"
                " or set TVQ_N_PROCESS=1 for a single process"
            )
        return {"how": f"SLURM job {job}", "n_process": 1} | _gpus(environ, 1, 0, _granted(environ))
    nodes = expand_nodes(environ["SLURM_STEP_NODELIST"])
    tasks = max(1, n // len(nodes))
    told: dict[str, Any] = {
        "how": f"SLURM job {job} on {environ.get('SLURMD_NODENAME', 'a node')}",
        "n_process": n,
        "process_id": int(environ["SLURM_PROCID"]),
        "coordinator": f"{nodes[0]}:{12000 + 2 * (int(job) % 4000)}",
        "hosts": nodes if tasks == 1 else (),
    }
    return told | _gpus(environ, tasks, int(environ.get("SLURM_LOCALID", "0")), _granted(environ))


def _granted(environ: Mapping[str, str]) -> int:
    """GPUs that SLURM gave the job on this node; a step that sees fewer is an error."""
    return int(re.sub(r"\D", "", environ.get("SLURM_GPUS_ON_NODE", "")) or "0")


def _gpus(environ: Mapping[str, str], tasks: int, local_id: int, granted: int) -> dict[str, Any]:
    """The GPUs of one of `tasks` processes on a node: its own binding, or an equal part of those visible."""
    platforms = environ.get("JAX_PLATFORMS", "")
    if not granted or (platforms and "cuda" not in platforms and "gpu" not in platforms):
        return {}
    if granted % tasks:
        raise InputError(f"{granted} GPUs on this node do not divide into {tasks} tasks; ask for a multiple")
    share = granted // tasks
    visible = [v for v in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
    if len(visible) == granted and tasks > 1:
        ids = tuple(range(local_id * share, (local_id + 1) * share))
        return {"local_devices": share, "local_device_ids": ids}
    return {"local_devices": share}


def expand_nodes(text: str) -> tuple[str, ...]:
    """`a[01-03,7],b` -> (a01, a02, a03, a7, b)."""
    nodes: list[str] = []
    for word in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        match = re.search(r"\[([^\]]*)\]", word)
        if not match:
            nodes.append(word)
            continue
        for span in match[1].split(","):
            low, _, high = span.partition("-")
            for i in range(int(low), int(high or low) + 1):
                nodes.extend(expand_nodes(f"{word[: match.start()]}{i:0{len(low)}}{word[match.end() :]}"))
    return tuple(nodes)


def _open_mpi(environ: Mapping[str, str]) -> dict[str, Any]:
    if "OMPI_COMM_WORLD_SIZE" not in environ:
        return {}
    told: dict[str, Any] = {
        "how": "Open MPI",
        "n_process": int(environ["OMPI_COMM_WORLD_SIZE"]),
        "process_id": int(environ["OMPI_COMM_WORLD_RANK"]),
    }
    # Only Open MPI 4 tells where mpirun runs, which by default is where rank 0 is.
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    mpirun = re.match(r"(\d+)\.\d+;(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri)
    if mpirun:
        host = mpirun[2] or f"[{mpirun[3]}]"
        told["coordinator"] = f"{host}:{12000 + 2 * ((int(mpirun[1]) >> 12) % 4000)}"
    tasks, local_id = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"), environ.get("OMPI_COMM_WORLD_LOCAL_RANK")
    visible = [v for v in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
    if tasks and local_id and len(visible) > 1:
        told |= _gpus(environ, int(tasks), int(local_id), len(visible))
    return told


def _gke_tpu(environ: Mapping[str, str]) -> dict[str, Any]:
    names = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
    if not names or "TPU_WORKER_ID" not in environ or not _tpu_wanted(environ):
        return {}
    hosts = tuple(name.partition(":")[0] for name in names.split(","))
    return _tpu("GKE TPU", hosts, int(environ["TPU_WORKER_ID"]), environ)


def _gce_tpu(metadata: Callable[[str], str]) -> dict[str, Any]:
    # An endpoint is a host name, or (older) name:id:address.
    endpoints = metadata("worker-network-endpoints").split(",")
    hosts = tuple(e.split(":")[2] if e.count(":") == 2 else e for e in endpoints)
    lines = (line.partition(":") for line in metadata("tpu-env").splitlines())
    slices = {key.strip(): value.strip().strip("'\"") for key, _, value in lines}
    return _tpu("TPU VM", hosts, int(metadata("agent-worker-number")), slices)


def _tpu(how: str, hosts: tuple[str, ...], worker: int, slices: Mapping[str, str]) -> dict[str, Any]:
    n_slice, i_slice = (
        int(slices.get("MEGASCALE_NUM_SLICES") or 1),
        int(slices.get("MEGASCALE_SLICE_ID") or 0),
    )
    before, after = len(hosts) * i_slice, len(hosts) * (n_slice - 1 - i_slice)
    first = slices.get("MEGASCALE_COORDINATOR_ADDRESS", "").partition(":")[0] if n_slice > 1 else hosts[0]
    return {
        "how": f"{how}, worker {worker} of slice {i_slice} of {n_slice}" if n_slice > 1 else how,
        "n_process": len(hosts) * n_slice,
        "process_id": before + worker,
        "coordinator": f"{first}:{TPU_PORT}",
        "hosts": ("",) * before + hosts + ("",) * after,
    }


def _kubernetes(environ: Mapping[str, str]) -> dict[str, Any]:
    # The job's template gives coordinator and count (launch/gke.sh); the index is Kubernetes' own.
    if "KUBERNETES_SERVICE_HOST" not in environ or "JOB_COMPLETION_INDEX" not in environ:
        return {}
    return {"how": "Kubernetes indexed job", "process_id": int(environ["JOB_COMPLETION_INDEX"])}


def _tpu_wanted(environ: Mapping[str, str]) -> bool:
    return "tpu" in environ.get("JAX_PLATFORMS", "") or not environ.get("JAX_PLATFORMS")


def tpu_metadata(environ: Mapping[str, str], devices: str = "/dev") -> Callable[[str], str] | None:
    """A reader of this TPU VM's metadata; None if there are no TPU chips, or if they are not to be used."""
    chips = glob.glob(f"{devices}/accel[0-9]*") + glob.glob(f"{devices}/vfio/[0-9]*")
    skipped = environ.get("TPU_SKIP_MDS_QUERY") or environ.get("TVQ_N_PROCESS") == "1"
    if not chips or skipped or not _tpu_wanted(environ) or glob.glob(f"{devices}/nvidia[0-9]*"):
        return None
    host = environ.get("GCE_METADATA_IP", "metadata.google.internal")

    def read(key: str) -> str:
        url = f"http://{host}/computeMetadata/v1/instance/attributes/{key}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.read().decode()
        except (urllib.error.URLError, TimeoutError) as error:
            raise ClusterError(
                f"this machine has TPU chips ({chips[0]}), but its metadata at {url} cannot be read: {error};"
                " set TVQ_N_PROCESS=1 for this host alone, or TVQ_COORDINATOR, TVQ_N_PROCESS, TVQ_PROCESS_ID"
            ) from error

    return read
