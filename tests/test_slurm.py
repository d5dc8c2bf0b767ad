"""The workflow through a real one-node SLURM, started here on loopback; the oracle is a run without one.

Needs Debian's slurm-wlm and munge, root, and snakemake-executor-plugin-slurm. `SPARSETRACE_REQUIRE_SLURM=1`, which CI
sets, makes a test that cannot run fail instead of being skipped.
"""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROFILE = ROOT / "profiles" / "slurm"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "sinfo")
CONFIGURATION = """
ClusterName=sparsetrace
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
# more is asked for than a small machine has
SlurmdParameters=config_overrides
MpiDefault=none
KillWait=2
ReturnToService=2
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=1000000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def unavailable() -> str | None:
    """Why SLURM cannot be started here."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if missing := [name for name in PROGRAMS if shutil.which(name, path=path) is None]:
        return f"{', '.join(missing)} not found: apt-get install slurm-wlm munge"
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        return "snakemake-executor-plugin-slurm is not installed"
    return None if os.getuid() == 0 else "slurmd must be started by root"


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


kill = load(ROOT / "benchmarks" / "kill.py")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def daemon(words: list, env: dict[str, str], log: Path):
    with log.open("w") as out, subprocess.Popen(list(map(str, words)), env=env, stdout=out, stderr=out) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_for(what, seconds: float = 60, every: float = 0.2):
    """The first true answer."""
    end = time.monotonic() + seconds
    while not (answer := what()):
        assert time.monotonic() < end, f"nothing came of {what.__name__} in {seconds} s"
        time.sleep(every)
    return answer


@pytest.fixture(scope="module")
def slurm():
    """Environment of a shell on a one-node cluster with two (unreal) GPUs."""
    if reason := unavailable():
        assert not os.environ.get("SPARSETRACE_REQUIRE_SLURM"), reason
        pytest.skip(reason)
    # names of sockets are short
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    ports = {"ctld_port": free_port(), "slurmd_port": free_port()}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, folder=folder, **ports))
    for number in range(2):
        (folder / f"gpu{number}").symlink_to("/dev/null")
    (folder / "gres.conf").write_text(f"NodeName={host} Name=gpu File={folder}/gpu[0-1]\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
    env |= {"PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    env["PYTHONPATH"] = os.pathsep.join([f"{ROOT}/src", f"{ROOT}/kernels"])
    # the jobstep plugin drops SLURM_CONF before it calls srun
    srun = folder / "bin" / "srun"
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
    srun.chmod(0o755)
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"]
    munge += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]

    def idle() -> bool:
        answer = subprocess.run(["sinfo", "-h", "-o", "%t"], env=env, capture_output=True, text=True)
        return answer.stdout.strip() == "idle"

    with ExitStack() as stack:
        stack.enter_context(daemon(munge, env, folder / "munged.out"))
        wait_for((folder / "munge.socket").exists)
        stack.enter_context(daemon(["slurmctld", "-D"], env, folder / "slurmctld.out"))
        stack.enter_context(daemon(["slurmd", "-D", "-N", host], env, folder / "slurmd.out"))
        wait_for(idle)
        yield env
    shutil.rmtree(folder)


def jobs(env: dict[str, str]) -> list[tuple[str, str, str, str]]:
    """(number, state, memory, what Snakemake says of it) of each job."""
    lines = subprocess.run(["squeue", "-h", "-o", "%i|%t|%m|%k"], env=env, capture_output=True, text=True).stdout
    return [tuple(line.split("|")) for line in lines.splitlines()]


def test_shards_run_side_by_side_and_a_cancelled_one_is_resubmitted(slurm, tmp_path):
    study, plain = tmp_path / "study", tmp_path / "plain"
    # long enough to be met while it runs; `auto` asks for a GPU, and takes the CPU where torch sees none
    size = ["--prompts", "80", "--max-new-tokens", "40", "--device", "auto"]
    subprocess.run([sys.executable, kill.__file__, "--undisturbed", plain, *size], env=slurm, check=True)
    shutil.copytree(plain, study, ignore=shutil.ignore_patterns("out"))
    words = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "workflow" / "Snakefile"]
    words += ["--profile", PROFILE, "--configfile", "my.yaml", "--slurm-no-account"]
    # the plugin waits 10 s longer after each time that it found no job done: it looks after 3, 16 and 39 s
    words += ["--slurm-init-seconds-before-status-checks", "3"]
    # what comes before generation in one submission, and what comes after it, to save waits
    early = ("convert", "calibrate", "split")
    words += ["--groups", *(f"{rule}=early" for rule in early), "pack=late", "index=late"]
    words += ["--latency-wait", "5", "--default-resources", "slurm_partition=main"]
    dump = study / "out" / "tiny" / "first" / "teal-0.5" / "dump"

    def both_under_way():
        running = [job for job in jobs(slurm) if job[1] == "R" and "generate" in job[3]]
        sealed = [len(list((dump / shard).glob("group-?????.json"))) for shard in ("00000", "00001")]
        assert snakemake.poll() is None, (tmp_path / "log").read_text()
        return running if len(running) == 2 and min(sealed) > 0 else None

    with (tmp_path / "log").open("w") as log:
        snakemake = subprocess.Popen(list(map(str, words)), cwd=study, env=slurm, stdout=log, stderr=log)
        running = wait_for(both_under_way, 300)
        cancelled, _, memory, what = running[0]
        asked = subprocess.run(["scontrol", "show", "job", cancelled], env=slurm, capture_output=True, text=True).stdout
        for word in ("TresPerJob=gres:gpu:1", f"MinMemoryNode={memory}", "CPUs/Task=1", "TimeLimit=02:00:00"):
            assert word in asked, asked
        subprocess.run(["scancel", cancelled], env=slurm, check=True)

        def resubmitted():
            return [job for job in jobs(slurm) if job[0] not in {one[0] for one in running} and job[3] == what]

        ((_, _, more, _),) = wait_for(resubmitted, 60)
        assert int(more.removesuffix("M")) == 2 * int(memory.removesuffix("M"))
        assert snakemake.wait(300) == 0, (tmp_path / "log").read_text()
    assert "Trying to restart job" in (tmp_path / "log").read_text()
    # all but the dump, which the workflow removes
    for part in ("model", "first/teal-0.5/parts", "first/teal-0.5/workload"):
        assert kill.tree(study / "out" / "tiny" / part) == kill.tree(plain / "out" / "tiny" / part)


@pytest.mark.parametrize(
    ("option", "name", "status", "said"),
    [
        pytest.param("--profile", "slurm", 0, f"Using profiles {PROFILE} and ", id="used"),
        pytest.param("--profile", "slrum", 1, "no profile.yaml (or config.yaml) found", id="refused"),
        # ignored without a word: docs/cluster.md says to use --profile and to look for the line
        pytest.param("--workflow-profile", "slrum", 0, "", id="ignored"),
    ],
)
def test_the_line_that_names_a_profile(option, name, status, said, tmp_path):
    words = ["--snakefile", ROOT / "workflow" / "Snakefile", option, ROOT / "profiles" / name]
    words += ["--dry-run", "--cores", "1", "--executor", "local"]
    run = subprocess.run(
        [sys.executable, "-m", "snakemake", *words],
        cwd=tmp_path,
        env=kill.environment(),
        capture_output=True,
        text=True,
    )
    output = run.stdout + run.stderr
    assert run.returncode == status and said in output
    assert (f"Using profiles {PROFILE}" in output) == (name == "slurm")
    assert "Using profiles profiles/slurm and " in (ROOT / "docs" / "cluster.md").read_text()
