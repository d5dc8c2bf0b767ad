"""Claiming GPUs, with fake devices: what jobs wrote while they held one must never overlap, whatever was killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsetrace.core import devices

SOURCES = Path(devices.__file__).parents[1]
LISTING = """GPU 0: NVIDIA H200 (UUID: GPU-aaaa)
GPU 1: NVIDIA H200 (UUID: GPU-abcd)
GPU 2: NVIDIA H200 (UUID: GPU-cccc)
  MIG 1g.18gb     Device  0: (UUID: MIG-1111)
  MIG 1g.18gb     Device  1: (UUID: MIG-2222)
"""
DEVICES = ["GPU-aaaa", "GPU-abcd", "MIG-1111", "MIG-2222"]
# A job: take a device, say so, keep it for a while, say so again; one system call a line, so that lines stay whole.
JOB = """
import os, sys, time
from pathlib import Path
from sparsetrace.core.devices import lock_one
log = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def say(what, device):
    os.write(log, f"{time.monotonic_ns()} {os.getpid()} {what} {device}\\n".encode())
with lock_one(["GPU-a", "GPU-b"], Path(sys.argv[1]), poll=0.01) as device:
    say("takes", device)
    time.sleep(float(sys.argv[3]))
    say("leaves", device)
"""


def job(folder: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", JOB, folder / "locks", folder / "log", str(seconds)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(SOURCES)})


def events(folder: Path) -> list[tuple[int, int, str, str]]:
    path = folder / "log"
    lines = path.read_text().splitlines() if path.is_file() else []
    return sorted((int(at), int(pid), what, device) for at, pid, what, device in (line.split() for line in lines))


def overlaps(folder: Path, died_at: dict[int, int]) -> list[str]:
    """Jobs that took a device while another had it; a killed job had its device until it was killed."""
    holder: dict[str, int] = {}
    found = []
    for at, pid, what, device in events(folder):
        if what == "takes":
            before = holder.get(device)
            if before is not None and at < died_at.get(before, sys.maxsize):
                found.append(f"{pid} took {device} of {before}")
            holder[device] = pid
        else:
            del holder[device]
    return found


def test_ten_jobs_on_two_devices_never_overlap_also_after_kills(tmp_path):
    jobs = [job(tmp_path, 0.15) for _ in range(10)]
    died_at = {}
    while len(died_at) < 3:
        holding = [pid for _, pid, what, _ in events(tmp_path) if what == "takes"]
        left = {pid for _, pid, what, _ in events(tmp_path) if what == "leaves"}
        alive = [pid for pid in holding if pid not in left and pid not in died_at]
        if alive:
            # noted before: whoever takes the device later took it from a dead job
            died_at[alive[0]] = time.monotonic_ns()
            os.kill(alive[0], signal.SIGKILL)
        time.sleep(0.02)
    status = {one.pid: one.wait() for one in jobs}
    killed = {pid for pid, code in status.items() if code == -signal.SIGKILL}
    assert killed <= set(died_at) and killed and all(code == 0 for pid, code in status.items() if pid not in killed)
    assert overlaps(tmp_path, {pid: died_at[pid] for pid in killed}) == []
    assert len({pid for _, pid, what, _ in events(tmp_path) if what == "takes"}) == 10
    assert {device for *_, device in events(tmp_path)} == {"GPU-a", "GPU-b"}


def test_the_judge_sees_an_overlap(tmp_path):
    (tmp_path / "log").write_text("1 11 takes GPU-a\n2 12 takes GPU-a\n3 11 leaves GPU-a\n")
    assert overlaps(tmp_path, {}) == ["12 took GPU-a of 11"]


def test_waiting_is_told_once(tmp_path):
    told = []
    other = job(tmp_path, 0.3)
    while not events(tmp_path):
        time.sleep(0.01)
    with devices.lock_one(["GPU-a"], tmp_path / "locks", told.append, poll=0.01) as own:
        assert own == "GPU-a"
    assert other.wait() == 0 and told == ["waiting for one of 1 GPUs, all of which are in use by other jobs"]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        pytest.param(None, DEVICES, id="all"),
        pytest.param("1", ["GPU-abcd"], id="number"),
        pytest.param("2, 0", ["MIG-1111", "GPU-aaaa"], id="numbers"),
        pytest.param("GPU-ab", ["GPU-abcd"], id="beginning"),
        pytest.param("GPU-a", [], id="ambiguous"),
        pytest.param("0,9,1", ["GPU-aaaa"], id="unknown-ends-the-list"),
        pytest.param("", [], id="none"),
        pytest.param("-1", [], id="minus-one"),
    ],
)
def test_visible_devices_are_respected(visible, expected):
    environment = {} if visible is None else {devices.VISIBLE: visible}
    assert devices.visible_devices(devices.parse_listing(LISTING), environment) == expected


@pytest.fixture
def node(monkeypatch, tmp_path):
    """A machine with two GPUs and no scheduler."""
    for name in (devices.VISIBLE, *devices.SCHEDULER_JOBS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices, "installed", lambda: ["GPU-aaaa", "GPU-bbbb"])
    monkeypatch.setattr(devices, "lock_folder", lambda job: tmp_path / (job or "all"))
    return monkeypatch


def test_two_claims_of_a_node_differ_and_are_all_that_cuda_sees(node):
    with devices.claimed("auto") as first:
        assert os.environ[devices.VISIBLE] == first == "GPU-aaaa"
        node.delenv(devices.VISIBLE)
        with devices.claimed("cuda") as second:
            assert os.environ[devices.VISIBLE] == second == "GPU-bbbb"


def test_a_scheduler_that_gave_one_device_is_trusted(node):
    node.setenv("SLURM_JOB_ID", "7")
    node.setenv(devices.VISIBLE, "0")
    # each job of a node may see its own device as number 0
    with devices.claimed("auto") as first, devices.claimed("auto") as second:
        assert first == second == os.environ[devices.VISIBLE] == "0"


def test_devices_of_one_allocation_are_shared_out(node):
    node.setenv("SLURM_JOB_ID", "7")
    node.setenv(devices.VISIBLE, "0,1")
    with devices.claimed("auto") as first:
        node.setenv(devices.VISIBLE, "0,1")
        with devices.claimed("auto") as second:
            assert {first, second} == {"GPU-aaaa", "GPU-bbbb"}


def test_a_scheduler_that_gave_no_device_is_no_excuse(node):
    # two jobs of a cluster that does not count GPUs
    node.setenv("SLURM_JOB_ID", "7")
    with devices.claimed("auto") as first:
        node.delenv(devices.VISIBLE)
        node.setenv("SLURM_JOB_ID", "8")
        with devices.claimed("auto") as second:
            assert {first, second} == {"GPU-aaaa", "GPU-bbbb"}


def test_nothing_is_claimed_for_the_cpu_or_without_a_gpu(node, tmp_path):
    with devices.claimed("cpu") as none:
        assert none is None
    node.setattr(devices, "installed", list)
    with devices.claimed("auto") as none:
        assert none is None and devices.VISIBLE not in os.environ
    assert not list(tmp_path.iterdir())


def test_shards_auto_is_a_few_for_each_gpu(node):
    assert devices.auto_shards() == 2 * devices.SHARDS_PER_GPU
    node.setenv(devices.VISIBLE, "1")
    assert devices.auto_shards() == devices.SHARDS_PER_GPU
    node.setattr(devices, "installed", list)
    assert devices.auto_shards() == 1
