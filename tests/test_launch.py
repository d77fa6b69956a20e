"""The real scripts of launch/, against a pretended gcloud and SLURM that start local processes."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.program import Program, has_rows, write_corpus
from tests.end_to_end.test_processes import assert_close
from tests.fakes.pod import ENDLESS, SHORT_RUN, environment, free_port

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
STARTED = sorted(path for path in SCRIPTS if path.name != "common.sh")


def worker(workdir: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "tests.fakes.worker", f"--workdir={workdir}", *options]


def script(
    name: str, *arguments: str, root: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    return script_through([str(root / "launch" / name), *arguments], root, **variables)


def script_through(
    command: list[str], root: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment(**variables),
        cwd=root,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


@contextlib.contextmanager
def background(
    name: str, *arguments: str, root: Path = ROOT, **variables: str
) -> Iterator[subprocess.Popen[str]]:
    """A script in a session of its own; what is left of that at the end of the block is killed."""
    with in_session([str(root / "launch" / name), *arguments], root, **variables) as process:
        yield process


@contextlib.contextmanager
def in_session(command: list[str], where: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        command,
        env=environment(**variables),
        cwd=where,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):  # nothing is left
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition, what: str, seconds: float = 250) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def kill_marked(mark: str, word: str = "", program: str = "") -> list[int]:
    """SIGKILL to the processes of this `program` that a test started with `mark` in their environment."""
    killed = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
            is_meant = word.encode() in command and command.startswith(program.encode())
            if is_meant and f"{mark}\0".encode() in (folder / "environ").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)
                killed.append(int(folder.name))
        except OSError:
            continue
    return killed


def kill_all_marked(mark: str) -> None:
    """Those too that were being started meanwhile."""
    while kill_marked(mark):
        time.sleep(0.01)


def read_a_line_and_leave(process: subprocess.Popen[str]) -> None:
    """Ctrl-C to a program that shows a log, once it does."""
    assert process.stdout is not None
    assert process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)


def result(workdir: Path, n: int) -> list[dict]:
    return [json.loads((workdir / f"done_{i}.json").read_text()) for i in range(n)]


def assert_unbroken(workdir: Path, steps: int) -> None:
    """Two processes of two devices ended after these steps, or later if they had got further."""
    for found in result(workdir, 2):
        assert found["devices"] == 4
        assert found["step"] >= steps
        assert found["sum"] == 8.0 * sum(range(found["step"]))


# --- every script -----------------------------------------------------------------------------------------


def test_shellcheck_finds_nothing() -> None:
    checker = Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([checker, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("path", STARTED, ids=lambda path: path.name)
def test_help_shows_how_to_call_it(path: Path) -> None:
    if path.name == "notice_gce.sh":  # takes no options: a program for supervise.sh --notice
        return
    shown = script(path.name, "--help")
    assert shown.returncode == 0, shown.stderr
    assert f"launch/{path.name} " in shown.stdout
    assert os.access(path, os.X_OK)


ONE_GIVES_UP = "[ $TVQ_PROCESS_ID = 0 ] && { sleep 0.3; exit 2; }; exec sleep 600"


@pytest.mark.parametrize("where", ["2>&1 | true", ">/dev/full 2>&1", ">&- 2>&-"])
@pytest.mark.parametrize(
    ("command", "code"),
    [
        (("supervise.sh", "--backoff", "0", "--restarts", "2", "--", "bash", "-c", "sleep 0.3; exit 4"), 4),
        (("local.sh", "2", "--", "bash", "-c", ONE_GIVES_UP), 2),
    ],
    ids=["supervise", "local"],
)
def test_words_that_nobody_reads_change_nothing(command: tuple[str, ...], code: int, where: str) -> None:
    shell = f'"$@" {where}; exit ${{PIPESTATUS[0]}}'
    done = script_through(["bash", "-c", shell, "bash", str(ROOT / "launch" / command[0]), *command[1:]])
    assert done.returncode == code


@pytest.mark.parametrize("name", ["supervise.sh", "local.sh", "tpu.sh", "slurm.sh", "gke.sh"])
def test_bad_options_are_refused(name: str) -> None:
    refused = script(name, "--nonsense")
    assert refused.returncode == 2
    assert "--help" in refused.stderr


# --- supervise --------------------------------------------------------------------------------------------

FLAKY = """
import pathlib, sys
count = pathlib.Path(sys.argv[1]); n = int(count.read_text()) if count.exists() else 0
count.write_text(str(n + 1)); codes = sys.argv[2].split(",")
sys.exit(int(codes[min(n, len(codes) - 1)]))
"""


@pytest.mark.parametrize(
    ("codes", "code", "runs"),
    [
        ("0", 0, 1),
        ("1,75,70,0", 0, 4),
        ("2", 2, 1),
        ("75,3", 3, 2),
        ("1,2", 2, 2),
        ("1", 1, 4),
        ("75", 75, 4),
        ("127", 127, 4),
    ],
)
def test_supervise_starts_again_within_its_budget(tmp_path: Path, codes: str, code: int, runs: int) -> None:
    count = tmp_path / "count"
    done = script(
        "supervise.sh",
        "--restarts",
        "3",
        "--backoff",
        "0",
        "--",
        sys.executable,
        "-c",
        FLAKY,
        str(count),
        codes,
    )
    assert (done.returncode, int(count.read_text())) == (code, runs), done.stderr


def test_supervise_forgives_every_preemption_of_a_settled_run(tmp_path: Path) -> None:
    slow = ["bash", "-c", f"sleep 1.2; exec {sys.executable} -c '{FLAKY}' {tmp_path}/count 75,75,0"]
    done = script("supervise.sh", "--restarts", "0", "--backoff", "0", "--settled", "1", "--", *slow)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_supervise_passes_a_stop_on_and_does_not_start_again(tmp_path: Path, number: signal.Signals) -> None:
    saving = "trap 'sleep 0.5; echo saved; exit 75' TERM; touch ready; while :; do sleep 0.1; done"
    command = ["bash", "-c", f"cd {tmp_path}; {saving}"]
    with background(
        "supervise.sh", "--backoff", "60", "--record", str(tmp_path / "run"), "--", *command
    ) as process:
        wait_for((tmp_path / "ready").exists, "the command did not start")
        assert int((tmp_path / "run.pid").read_text()) == process.pid
        process.send_signal(number)
        output = process.communicate(timeout=250)[0]
    assert process.returncode == 75
    assert "saved" in output
    assert (tmp_path / "run.code").read_text() == "75\n"


def test_supervise_stops_while_it_waits() -> None:
    with background("supervise.sh", "--backoff", "1000", "--", "bash", "-c", "exit 1") as process:
        assert process.stdout is not None
        assert "starting again in 1000 s" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=250)
    assert process.returncode == 1


def test_supervise_asks_to_save_at_the_machine_own_notice(tmp_path: Path) -> None:
    notice = tmp_path / "notice"
    notice.write_text(f"#!/bin/sh\n[ ! -e {tmp_path}/saved ] || exec sleep 60\nsleep 0.7\n")
    notice.chmod(0o755)
    once = f"cd {tmp_path}; [ ! -e saved ] || exit 0; trap 'touch saved; exit 75' TERM; "
    once += "while :; do sleep 0.1; done"
    done = script("supervise.sh", "--backoff", "0", "--notice", str(notice), "--", "bash", "-c", once)
    assert done.returncode == 0
    assert "about to go" in done.stderr


def test_notice_gce_asks_the_metadata_server(tmp_path: Path) -> None:
    curl = tmp_path / "curl"
    curl.write_text(
        '#!/bin/sh\ncase "$*" in *preempted) echo FALSE ;; *) echo TERMINATE_ON_HOST_MAINTENANCE ;; esac\n'
    )
    curl.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert script("notice_gce.sh", "0.1", PATH=path).returncode == 0
    curl.write_text("#!/bin/sh\necho NONE\n")
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run(
            [ROOT / "launch/notice_gce.sh", "0.1"], env=environment(PATH=path), timeout=1, check=False
        )


# --- local ------------------------------------------------------------------------------------------------


def test_local_prints_what_it_would_start() -> None:
    shown = script(
        "local.sh", "2", "--gpus-each", "4", "--port", "12346", "--dry-run", "--", "tvq", "train", "a b"
    )
    first, second = shown.stdout.splitlines()
    assert first.startswith("env TVQ_COORDINATOR=127.0.0.1:12346 TVQ_N_PROCESS=2 TVQ_PROCESS_ID=0 ")
    assert "CUDA_VISIBLE_DEVICES=4\\,5\\,6\\,7" in second
    assert second.endswith("launch/supervise.sh -- tvq train a\\ b")


@pytest.mark.slow
def test_local_goes_on_after_one_process_is_killed(tmp_path: Path) -> None:
    command = worker(tmp_path, ENDLESS, "--pause=0.05", "--config.cluster.silence_timeout=6")
    more = ("--port", str(free_port()), "--cpu-devices", "2", "--backoff", "0")
    with background("local.sh", "2", *more, "--", *command) as process:
        wait_for((tmp_path / "state.json").exists, "no checkpoint")
        (tmp_path / "steps").write_text("60")
        assert kill_marked("TVQ_PROCESS_ID=1", f"--workdir={tmp_path}\0", sys.executable)  # no supervisor
        output = process.communicate(timeout=250)[0]
    assert process.returncode == 0, output
    assert "starting again" in output
    assert_unbroken(tmp_path, 60)


def test_local_saves_at_sigterm(tmp_path: Path) -> None:
    command = worker(tmp_path, ENDLESS, "--pause=0.05")
    with background("local.sh", "2", "--port", str(free_port()), "--", *command) as process:
        wait_for((tmp_path / "state.json").exists, "no checkpoint")
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=250)[0]
    assert process.returncode == 75, output


def test_local_gives_up_together(tmp_path: Path) -> None:
    done = script(
        "local.sh",
        "2",
        "--backoff",
        "0",
        "--",
        "bash",
        "-c",
        "[ $TVQ_PROCESS_ID = 0 ] && exit 2; exec sleep 600",
    )
    assert done.returncode == 2
    assert "process 0 ended with exit code 2" in done.stderr


# --- tpu --------------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clean checkout with one commit, whose tvq is a stand-in."""
    root = tmp_path / "checkout"
    for folder in ("launch", "tvq", "tests/fakes", "tests/end_to_end"):
        shutil.copytree(
            ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"), symlinks=True
        )
    (root / "tests/__init__.py").touch()
    (root / ".gitignore").write_text(".venv/\nruns/\nlogs/\n__pycache__/\n")
    (root / "Makefile").write_text("setup:\n\tmkdir -p .venv/bin\n\tcp tvq.sh .venv/bin/tvq\n")
    stand_in = f'exec {sys.executable} -m tests.fakes.worker "$a" $STAND_IN'
    (root / "tvq.sh").write_text(f"#!/bin/sh\nfor a; do case $a in --workdir=*) {stand_in};; esac; done\n")
    (root / "tvq.sh").chmod(0o755)
    identity = ("-c", "user.name=a", "-c", "user.email=a@b")
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return root


class Cloud:
    """A pretended cloud with one slice, "pod"."""

    def __init__(self, folder: Path, checkout: Path, n_worker: int):
        self.folder, self.checkout = folder, checkout
        self.variables = {
            "FAKE_CLOUD": str(folder),
            "FAKE_CLOUD_WORKERS": str(n_worker),
            "FAKE_CLOUD_PORT": str(free_port()),
            "PATH": f"{ROOT / 'tests/fakes/bin'}:{os.environ['PATH']}",
        }
        self.common = ["--name", "pod", "--zone", "z", "--poll", "0.3"]
        self.make = ["--type", "v5litepod-8", "--version", "v2", "--install", f"ln -sfn {sys.prefix} .venv"]

    def tpu(self, what: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return script(
            "tpu.sh", what, *self.common, *arguments, root=self.checkout, **self.variables, **variables
        )

    def start(self, what: str, *arguments: str) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
        return background("tpu.sh", what, *self.common, *arguments, root=self.checkout, **self.variables)

    def command(self, workdir: Path, *options: str) -> list[str]:
        return ["--", ".venv/bin/python", "-m", "tests.fakes.worker", f"--workdir={workdir}", *options]

    def put(self, file: str, **values: str) -> None:
        content, part = json.loads((self.folder / file).read_text()), self.folder / f"{file}.part"
        part.write_text(json.dumps(content | values))
        part.rename(self.folder / file)  # gcloud may be looking

    def calls(self) -> str:
        return (self.folder / "calls.txt").read_text()


@pytest.fixture
def cloud(tmp_path: Path, checkout: Path) -> Iterator[Cloud]:
    (tmp_path / "cloud").mkdir()
    cloud = Cloud(tmp_path / "cloud", checkout, 2)
    yield cloud
    kill_all_marked(f"FAKE_CLOUD={cloud.folder}")


def test_tpu_prints_every_command(cloud: Cloud) -> None:
    shown = cloud.tpu("run", *cloud.make, "--spot", "--dry-run", "--", "tvq", "train")
    lines = shown.stdout.splitlines()
    assert [re.sub(r"gcloud compute tpus (tpu-vm \S+).*", r"\1", line) for line in lines] == [
        "tpu-vm create",
        "tpu-vm scp",
        "tpu-vm ssh",
        "tpu-vm ssh",
        "tpu-vm ssh",
    ]
    assert "--spot" in lines[0]
    assert not (cloud.folder / "calls.txt").exists()
    for what in ("status", "stop", "delete", "logs"):
        assert "gcloud compute tpus" in cloud.tpu(what, "--dry-run").stdout


def test_tpu_refuses_a_dirty_checkout(cloud: Cloud) -> None:
    (cloud.checkout / "new.txt").touch()
    refused = cloud.tpu("setup", *cloud.make)
    assert refused.returncode == 2
    assert "in no commit" in refused.stderr
    assert cloud.tpu("setup", *cloud.make, "--dirty", "--dry-run").returncode == 0


def test_tpu_names_the_worker_that_failed_with_its_last_lines(cloud: Cloud) -> None:
    assert cloud.tpu("create", *cloud.make).returncode == 0
    failed = cloud.tpu("setup", *cloud.make, FAKE_CLOUD_FAIL="1:tar")
    assert failed.returncode == 1
    assert "setup failed on worker 1 of 2" in failed.stderr
    assert "[worker 1] no space left on device" in failed.stderr


@pytest.mark.slow
@pytest.mark.parametrize("slices", [1, 2])
def test_tpu_run_makes_slices_again_when_one_is_taken_and_goes_on(
    cloud: Cloud, tmp_path: Path, slices: int
) -> None:
    """A slice of two workers is preempted; of two slices of one worker one is gone, the request suspended."""
    cloud.variables["FAKE_CLOUD_WORKERS"] = str(2 // slices)
    cloud.common += ["--slices", str(slices)]
    workdir, taken = tmp_path / "work", "pod" if slices == 1 else "pod-1"
    arguments = (*cloud.make, "--spot", *cloud.command(workdir, ENDLESS, "--pause=0.05"))
    with cloud.start("run", *arguments) as process:
        wait_for((workdir / "state.json").exists, "no checkpoint")
        (workdir / "steps").write_text("50")
        if slices == 1:
            cloud.put("pod.json", state="PREEMPTED")
        else:
            cloud.put("pod.queue", state="SUSPENDED")
            (cloud.folder / "pod-1.json").unlink()
        kill_marked(f"FAKE_SLICE={cloud.folder / taken}", "supervise")
        kill_all_marked(f"FAKE_SLICE={cloud.folder / taken}")
        output = process.communicate(timeout=250)[0]
    assert process.returncode == 0, output
    assert "restart 1 of 50" in output
    create = (
        "queued-resources create pod --node-count=2 --node-prefix=pod" if slices == 2 else "tpu-vm create pod"
    )
    assert cloud.calls().count(create) == 2
    assert_unbroken(workdir, 50)
    assert "worker 1: ended 0" in cloud.tpu("status").stdout
    assert cloud.tpu("delete").returncode == 0
    assert "pod: ABSENT" in cloud.tpu("status").stdout


@pytest.mark.slow
def test_tpu_stop_saves_on_all_workers(cloud: Cloud, tmp_path: Path) -> None:
    workdir = tmp_path / "work"
    arguments = cloud.command(workdir, ENDLESS, "--pause=0.05")
    for what in ("create", "setup"):
        done = cloud.tpu(what, *cloud.make)
        assert done.returncode == 0, done.stderr
    assert cloud.tpu("train", *arguments).returncode == 0
    wait_for((workdir / "state.json").exists, "no checkpoint")
    again = cloud.tpu("train", *arguments)
    assert again.returncode == 1
    assert "a run is in progress" in again.stderr
    assert cloud.tpu("setup", *cloud.make).returncode == 1
    assert "worker 1: running" in cloud.tpu("status").stdout
    with cloud.start("logs") as process:
        read_a_line_and_leave(process)
        assert "the run continues" in process.communicate(timeout=250)[0]
    stopped = cloud.tpu("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert "worker 0: ended 75" in cloud.tpu("status").stdout


@pytest.mark.slow
def test_a_pod_ends_like_an_unbroken_run_though_a_worker_rebooted(cloud: Cloud, tmp_path: Path) -> None:
    """The real program, on one mesh of two workers with two devices each."""
    goes_on = tmp_path / "goes_on"
    cloud.variables |= SHORT_RUN | {"TVQ_TEST_HOLD": str(goes_on)}
    program = Program(tmp_path)
    write_corpus(program.corpus)
    workdir, unbroken = tmp_path / "work", tmp_path / "unbroken"
    options = (
        "--config=tests/end_to_end/tiny.py",
        "--config.sample.every=0",
        "--config.cluster.silence_timeout=20",
    )
    command = [".venv/bin/python", "-m", "tests.fakes.cached", "train", *program.options(workdir, *options)]
    with cloud.start("run", *cloud.make, "--", *command) as process:
        wait_for(lambda: has_rows(workdir), "no step")
        assert len(kill_marked("TVQ_PROCESS_ID=1", f"--workdir={workdir}\0")) >= 2  # supervisor too
        goes_on.touch()
        output = process.communicate(timeout=250)[0]
    assert process.returncode == 0, output
    assert output.count("mesh     4 x cpu") >= 2, output
    assert cloud.calls().count("tpu-vm create") == 1
    program.train(unbroken, "--config.sample.every=0", "--cpu_devices=4")
    assert_close(workdir, unbroken, 1e-5)


# --- SLURM and Kubernetes ---------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    (tmp_path / "slurm").mkdir()
    path = f"{ROOT / 'tests/fakes/bin'}:{os.environ['PATH']}"
    job = str((free_port() - 12000) // 2)  # which makes that the port of the job
    yield {"FAKE_SLURM": str(tmp_path / "slurm"), "FAKE_SLURM_JOB": job, "PATH": path}
    kill_all_marked(f"FAKE_SLURM={tmp_path / 'slurm'}")


def test_slurm_prints_what_it_would_submit() -> None:
    arguments = (
        "--nodes",
        "4",
        "--gpus",
        "2",
        "--sbatch",
        "--partition=p --account=q",
        "--dry-run",
        "--",
        "tvq",
        "train",
    )
    line = script("slurm.sh", "submit", *arguments).stdout.splitlines()[-1]
    assert line.startswith("sbatch --job-name=tvq --nodes=4 --ntasks-per-node=1 ")
    assert "--gpus-per-node=2 --partition=p --account=q" in line
    assert "--requeue" in line
    assert line.endswith("launch/slurm.sh job 10 tvq train")


def submit(workdir: Path, checkout: Path, slurm: dict[str, str], *options: str) -> None:
    command = worker(workdir, *options)
    done = script("slurm.sh", "submit", "--nodes", "2", "--gpus", "0", "--", *command, root=checkout, **slurm)
    assert done.returncode == 0, done.stderr


def preempt(slurm: dict[str, str]) -> None:
    subprocess.run(
        ["scancel", "--signal=TERM", slurm["FAKE_SLURM_JOB"]], env=environment(**slurm), check=True
    )


@pytest.mark.slow
def test_slurm_requeues_a_run_whose_time_is_over(
    tmp_path: Path, checkout: Path, slurm: dict[str, str]
) -> None:
    workdir, code = tmp_path / "work", tmp_path / "slurm/code"
    submit(workdir, checkout, slurm, ENDLESS, "--pause=0.05")
    wait_for((workdir / "state.json").exists, "no checkpoint")
    (workdir / "steps").write_text("80")
    preempt(slurm)
    wait_for(code.exists, "the job did not end")
    assert code.read_text() == "0"
    assert f"scontrol requeue {slurm['FAKE_SLURM_JOB']}" in (tmp_path / "slurm/calls.txt").read_text()
    assert_unbroken(workdir, 80)
    assert f"SLURM job {slurm['FAKE_SLURM_JOB']}" in (workdir / "logs/process_1.log").read_text()


def test_slurm_stop_saves_and_does_not_requeue(tmp_path: Path, checkout: Path, slurm: dict[str, str]) -> None:
    workdir, code = tmp_path / "work", tmp_path / "slurm/code"
    submit(workdir, checkout, slurm, ENDLESS, "--pause=0.05")
    wait_for((workdir / "state.json").exists, "no checkpoint")
    assert script("slurm.sh", "stop", slurm["FAKE_SLURM_JOB"], root=checkout, **slurm).returncode == 0
    wait_for(code.exists, "the job did not end")
    assert code.read_text() == "75"
    assert "scontrol requeue" not in (tmp_path / "slurm/calls.txt").read_text()


def test_slurm_requeues_a_run_that_was_preempted_before_it_could_save(
    tmp_path: Path, checkout: Path, slurm: dict[str, str]
) -> None:
    starting = ["bash", "-c", f"echo >>{tmp_path}/starts; exec sleep 600"]
    done = script("slurm.sh", "submit", "--gpus", "0", "--", *starting, root=checkout, **slurm)
    assert done.returncode == 0, done.stderr
    starts = lambda: (tmp_path / "starts").exists() and (tmp_path / "starts").read_text().count("\n")
    wait_for(lambda: starts() == 1, "no start")
    preempt(slurm)
    wait_for(lambda: starts() >= 2, "no second start")


def test_gke_prints_an_indexed_job() -> None:
    yaml = pytest.importorskip("yaml")
    arguments = ("--name", "run1", "--image", "a/b:c", "--hosts", "4", "--limit", "google.com/tpu=4")
    shown = script("gke.sh", *arguments, "--select", "x.y/z=4x4", "--", "train", "--workdir=gs://it's")
    service, job = yaml.safe_load_all(shown.stdout)
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    on_exit = lambda *codes: {"containerName": "tvq", "operator": "In", "values": [*codes]}
    assert spec["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onExitCodes": on_exit(2, 3)},
        {"action": "Ignore", "onExitCodes": on_exit(75)},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]},
    ]
    assert spec["backoffLimit"] == 80
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    assert (pod["subdomain"], pod["nodeSelector"]) == ("run1", {"x.y/z": "4x4"})
    assert container["args"] == ["train", "--workdir=gs://it's"]
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}
    assert {e["name"]: e["value"] for e in container["env"]} == {
        "TVQ_COORDINATOR": "run1-0.run1:8482",
        "TVQ_N_PROCESS": "4",
    }
    assert script("gke.sh", *arguments[2:], "--", "train").returncode == 2


# --- the first page ---------------------------------------------------------------------------------------


def commands(section: str) -> list[str]:
    """The commands of a section of README.md, one a line."""
    text = (ROOT / "README.md").read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    block = text.split("```sh\n")[1].split("```")[0].replace("\\\n", "")
    return block.splitlines()


def follow(section: str, where: Path, variables: dict[str, str], saved: Path, **words: str) -> None:
    """Runs a section's commands with the stand-in; following a log gets Ctrl-C once the run has saved."""
    subprocess.run(["make", "--quiet", "setup"], cwd=where, check=True)
    for command in commands(section):
        for word, value in {"us-west4-a": "us-west4-a --poll 0.3", **words}.items():
            command = command.replace(word, value)
        with in_session(["bash", "-c", command], where, **variables) as process:
            if "logs" in command:
                wait_for(saved.exists, "no checkpoint")
                read_a_line_and_leave(process)
            output = process.communicate(timeout=250)[0]
        assert process.returncode == 0, f"{command}\n{output}"


@pytest.mark.slow
def test_readme_on_gpus(checkout: Path) -> None:
    ports = {f"local.sh {n}": f"local.sh {n} --port {free_port()}" for n in (2, 4)}
    follow("On GPUs", checkout, {}, checkout / "runs/gpus/state.json", **ports)
    for name, n, devices in (("gpus", 1, 2), ("pairs", 2, 4), ("cpus", 4, 8)):
        assert [r["devices"] for r in result(checkout / "runs" / name, n)] == [devices] * n


@pytest.mark.slow
def test_readme_on_a_tpu_pod(cloud: Cloud, tmp_path: Path) -> None:
    bucket = {"gs://BUCKET": os.fspath(tmp_path)}
    follow("On a TPU pod", cloud.checkout, cloud.variables, tmp_path / "pod/state.json", **bucket)
    assert [r["devices"] for r in result(tmp_path / "pod", 2)] == [4, 4]
    assert "delete pod" in cloud.calls()


def test_readme_on_slurm(tmp_path: Path, checkout: Path, slurm: dict[str, str]) -> None:
    slurm["STAND_IN"], job = f"{ENDLESS} --pause=0.05", slurm["FAKE_SLURM_JOB"]
    follow("On SLURM", checkout, slurm, checkout / "runs/slurm/state.json", JOB=job)
    code = tmp_path / "slurm/code"
    wait_for(code.exists, "the job did not end")
    assert code.read_text() == "75", (checkout / f"logs/tvq-{job}.out").read_text()
    assert "--gpus-per-node=8" in (tmp_path / "slurm/calls.txt").read_text()
