"""Two hosts with names, addresses and a cable of their own: network namespaces. Needs root, else skipped."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.pod import ENDLESS, Pod, free_port
from tvq import cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter"))),
        reason="needs root and the commands ip, unshare and nsenter",
    ),
]
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[list[str]]]:
    """What starts a command on host0 and on host1; all of it is gone with the two sleeping processes."""
    names = tmp_path / "hosts"
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{a} host{i}\n" for i, a in enumerate(ADDRESSES)))
    unshare = [
        "unshare",
        "--net",
        "--uts",
        "--mount",
        "--",
        "sh",
        "-c",
        f"touch {tmp_path}/$0; exec sleep 600",
    ]
    sleeping = [subprocess.Popen([*unshare, f"there{i}"]) for i in (0, 1)]
    try:
        while len(list(tmp_path.glob("there?"))) < 2:
            if any(process.poll() is not None for process in sleeping):
                pytest.skip("no namespaces here")
            time.sleep(0.01)
        pids = [str(process.pid) for process in sleeping]
        cable = f"ip link add cable0 netns {pids[0]} type veth peer name cable1 netns {pids[1]}".split()
        if subprocess.run(cable, check=False).returncode:
            pytest.skip("no cables between namespaces here")
        enter = [["nsenter", "-t", pid, "--net", "--uts", "--mount"] for pid in pids]
        for i, address in enumerate(ADDRESSES):
            run(*enter[i], "hostname", f"host{i}")
            run(*enter[i], "mount", "--bind", str(names), "/etc/hosts")
            run(*enter[i], "ip", "address", "add", f"{address}/24", "dev", f"cable{i}")
            for link in ("lo", f"cable{i}"):
                run(*enter[i], "ip", "link", "set", link, "up")
        yield [[*command, f"--wd={os.getcwd()}"] for command in enter]
    finally:
        for process in sleeping:
            process.kill()
            process.wait()


def start(folder: Path, hosts: list[list[str]], *options: str) -> Pod:
    port = free_port()
    place = {"TVQ_COORDINATOR": f"{ADDRESSES[0]}:{port}"}
    return Pod(folder, 2, *options, one={0: place, 1: place}, on=dict(enumerate(hosts)), port=port)


def test_two_hosts_meet_and_a_cut_cable_is_named_by_both(tmp_path: Path, hosts: list[list[str]]) -> None:
    with start(tmp_path, hosts, ENDLESS, "--config.cluster.silence_timeout=6") as pod:
        pod.wait_for("state.json")  # both have computed together
        run(*hosts[1], "ip", "link", "set", "cable1", "down")
        assert pod.codes() == [cluster.EXIT_STUCK] * 2, [pod.said(i) for i in (0, 1)]
    assert f"coordinator {ADDRESSES[0]}:" in pod.said(1)
    assert re.search(r"no sign of life from process 1 \(host1\) for \d+ s: .* cut off", pod.said(0))
    assert "process 0, the coordinator, has not answered for 6 s" in pod.said(1)


def test_an_unreachable_host_is_named(tmp_path: Path, hosts: list[list[str]]) -> None:
    run(*hosts[1], "ip", "link", "set", "cable1", "down")
    with start(tmp_path, hosts, "--config.cluster.start_timeout=4") as pod:
        assert pod.codes() == [cluster.EXIT_FAILED] * 2
    assert "1 of 2 processes are here; missing: process 1" in pod.said(0)
    assert re.search(
        r"process 1 on host1 could not reach process 0 at 10.77.0.1, port \d+: .*unreach", pod.said(1)
    )
