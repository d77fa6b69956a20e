"""Where a process stands, from settings and each scheduler's environment."""

import http.server
import threading

import pytest

from tvq import cluster, schema
from tvq.cluster.place import expand_nodes

SLURM = {
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURMD_NODENAME": "gpu08",
}
TPU = {"TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3", "TPU_WORKER_ID": "2"}
EXPLICIT = {"TVQ_COORDINATOR": "a:1000", "TVQ_N_PROCESS": "4", "TVQ_PROCESS_ID": "3"}


def section(**fields: object) -> schema.Cluster:
    return schema.Cluster(**fields)


def found(environ: dict[str, str], metadata: dict[str, str] | None = None, **fields: object) -> tuple:
    place = cluster.find(section(**fields), environ, metadata.__getitem__ if metadata else None)
    return place.n_process, place.process_id, place.coordinator


def test_one_process_needs_nothing() -> None:
    place = cluster.find(section(), {})
    assert (place.n_process, place.process_id, place.is_main) == (1, 0, True)
    assert str(place) == "one process (no other process is named)"


def test_explicit_settings_from_environment_or_config() -> None:
    assert found(EXPLICIT) == (4, 3, "a:1000")
    assert found({}, coordinator="a:1000", n_process=4, process_id=3) == (4, 3, "a:1000")
    assert found({"TVQ_PROCESS_ID": "0"}, coordinator="[::1]:1000", n_process=4) == (4, 0, "[::1]:1000")
    place = cluster.find(
        section(), {"TVQ_COORDINATOR": "[::1]:1000", "TVQ_N_PROCESS": "2", "TVQ_PROCESS_ID": "0"}
    )
    assert place.address == ("::1", 1000)


def test_explicit_settings_win_over_the_scheduler() -> None:
    assert found(SLURM | {"TVQ_COORDINATOR": "other:5"}) == (2, 1, "other:5")
    assert found(SLURM | {"TVQ_N_PROCESS": "1"})[:2] == (1, 0)


NO_STEP = {key: value for key, value in SLURM.items() if key != "SLURM_STEP_NODELIST"}


@pytest.mark.parametrize(
    ("environ", "fields", "message"),
    [
        ({"TVQ_N_PROCESS": "4"}, {}, "coordinator, process_id.*TVQ_PROCESS_ID.*TVQ_N_PROCESS=1"),
        (EXPLICIT | {"TVQ_PROCESS_ID": "4"}, {}, "process id 4.*processes 4"),
        (EXPLICIT | {"TVQ_PROCESS_ID": "x"}, {}, "TVQ_PROCESS_ID.*'x'"),
        (EXPLICIT | {"TVQ_COORDINATOR": "a"}, {}, "'a'.*HOST:PORT"),
        (EXPLICIT | {"TVQ_COORDINATOR": "a:65535"}, {}, "'a:65535'.*a PORT below 65535"),
        (EXPLICIT, {"n_process": 2}, "config.cluster.n_process is 2.*TVQ_N_PROCESS is 4"),
        (NO_STEP, {}, "2 tasks.*srun"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "6"}, {}, "8 GPUs.*3 tasks"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, {}, "Open MPI.*TVQ_COORDINATOR"),
        ({"KUBERNETES_SERVICE_HOST": "k", "JOB_COMPLETION_INDEX": "1"}, {}, "TVQ_N_PROCESS"),
    ],
)
def test_what_cannot_be_is_refused(environ: dict[str, str], fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster.find(section(**fields), environ)


def test_slurm_takes_every_gpu_of_the_node() -> None:
    place = cluster.find(section(), SLURM)
    assert (place.n_process, place.process_id, place.coordinator) == (2, 1, "gpu07:12246")
    assert (place.hosts, place.local_devices, place.local_device_ids) == (("gpu07", "gpu08"), 8, None)
    assert "gpu08" in str(place)


def test_slurm_tasks_that_all_see_all_gpus_take_equal_parts() -> None:
    shared = SLURM | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "6", "SLURM_LOCALID": "2"}
    place = cluster.find(section(), shared | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"})
    assert (place.local_devices, place.local_device_ids) == (2, (4, 5))
    place = cluster.find(section(), shared | {"CUDA_VISIBLE_DEVICES": "4,5"})
    assert (place.local_devices, place.local_device_ids) == (2, None)


def test_slurm_one_task_still_expects_its_gpus() -> None:
    one = NO_STEP | {"SLURM_STEP_NUM_TASKS": "1"}
    assert cluster.find(section(), one).local_devices == 8
    assert cluster.find(section(), one | {"JAX_PLATFORMS": "cpu"}).local_devices == 0
    assert cluster.find(section(local_devices=2), one).local_devices == 2


def test_node_lists() -> None:
    assert expand_nodes("a[01-03,7],b") == ("a01", "a02", "a03", "a7", "b")
    assert expand_nodes("r[1-2]n[09-10]") == ("r1n09", "r1n10", "r2n09", "r2n10")


def test_open_mpi() -> None:
    environ = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
    uri = {"OMPI_MCA_orte_hnp_uri": f"{5 << 12}.0;tcp://10.0.0.1,10.1.0.1:34911"}
    assert found(environ | uri) == (4, 3, "10.0.0.1:12010")
    uri = {"OMPI_MCA_orte_hnp_uri": f"{5 << 12}.0;tcp6://[fe80::1,fe80::2]:34911"}
    assert found(environ | uri) == (4, 3, "[fe80::1]:12010")


def test_gke_tpu_one_slice_and_many() -> None:
    assert found(TPU) == (4, 2, "t0:8482")
    many = {
        "MEGASCALE_NUM_SLICES": "3",
        "MEGASCALE_SLICE_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "first:8081",
    }
    assert found(TPU | many) == (12, 6, "first:8482")
    assert cluster.find(section(), TPU | many).hosts[3:9] == ("", "t0", "t1", "t2", "t3", "")
    assert found({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"})[0] == 1
    assert found(TPU | {"JAX_PLATFORMS": "cpu"})[0] == 1


def test_tpu_vm_metadata() -> None:
    data = {
        "worker-network-endpoints": "x:1:10.0.0.1,x:2:10.0.0.2",
        "agent-worker-number": "1",
        "tpu-env": "A: 'b'\n",
    }
    assert found({}, data) == (2, 1, "10.0.0.1:8482")
    slices = "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\nMEGASCALE_COORDINATOR_ADDRESS: '10.9.0.1'\n"
    assert found({}, data | {"tpu-env": slices}) == (4, 3, "10.9.0.1:8482")
    assert found({}, data | {"worker-network-endpoints": "h0"})[0] == 1


def test_tpu_metadata_is_read_over_http_only_where_there_are_chips(tmp_path) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.path.rpartition("/")[2].encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environ = {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
        assert cluster.tpu_metadata(environ, str(tmp_path)) is None
        (tmp_path / "accel0").touch()
        read = cluster.tpu_metadata(environ, str(tmp_path))
        assert read is not None
        assert read("tpu-env") == "tpu-env"
        assert cluster.tpu_metadata(environ | {"JAX_PLATFORMS": "cpu"}, str(tmp_path)) is None
        server.shutdown()
    with pytest.raises(cluster.ClusterError, match="TVQ_N_PROCESS=1 for this host alone"):
        read("tpu-env")


def test_kubernetes_index_joins_the_settings_of_the_job() -> None:
    environ = {"KUBERNETES_SERVICE_HOST": "k", "JOB_COMPLETION_INDEX": "3"}
    settings = {"TVQ_COORDINATOR": "job-0.svc:8482", "TVQ_N_PROCESS": "8"}
    assert found(environ | settings) == (8, 3, "job-0.svc:8482")
