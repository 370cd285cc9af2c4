"""A real Slurm on this machine: one node, its daemons in a temporary directory, stopped again by `stop`.

Needs slurmctld, slurmd, munged (Debian: apt-get install slurm-wlm munge) and root.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")
PATH = os.environ["PATH"] + ":/usr/sbin:/sbin"
MUNGE_SOCKET = Path("/run/munge/munge.socket.2")

CONFIG = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmdPort={slurmd_port}
AuthType=auth/munge
AuthInfo=cred_expire=5
SlurmUser=root
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=20
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.log
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
{gres_types}
NodeName=node1 NodeAddr=127.0.0.1 NodeHostname={host} CPUs={cpus} RealMemory=4000 State=UNKNOWN {gres}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def why_not() -> str:
    """Why Slurm cannot be started here; empty if it can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]
    if missing:
        return f"no {', '.join(missing)} here (Debian: apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "starting Slurm's daemons needs root"


@contextmanager
def running(directory: Path, *, cpus: int, num_gpus: int) -> Iterator[LocalCluster]:
    """A started cluster; the test is skipped where a container has not what the daemons need."""
    cluster = LocalCluster(directory, cpus=cpus, num_gpus=num_gpus)
    try:
        try:
            cluster.start()
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            pytest.skip(f"Slurm is installed and does not start here: {error}")
        yield cluster
    finally:
        cluster.stop()


class LocalCluster:
    """Daemons and commands of one throw-away Slurm."""

    def __init__(self, directory: Path, *, cpus: int = 2, num_gpus: int = 0) -> None:
        self.directory = directory
        self._daemons: list[subprocess.Popen] = []
        for name in ("state", "spool"):
            (directory / name).mkdir(parents=True)
        text = CONFIG.format(
            directory=directory, host=socket.gethostname(), cpus=cpus, ctld_port=_free_port(), slurmd_port=_free_port(),
            gres_types="GresTypes=gpu" if num_gpus else "", gres=f"Gres=gpu:{num_gpus}" if num_gpus else "",
        )  # fmt: skip
        self.config = directory / "slurm.conf"
        self.config.write_text(text)
        for index in range(num_gpus):  # slurmd wants to see a device file for each
            (directory / f"gpu{index}").touch()
        gres = f"NodeName=node1 Name=gpu File={directory}/gpu[0-{num_gpus - 1}]\n" if num_gpus else ""
        (directory / "gres.conf").write_text(gres)
        drop = ("SLURM_", "SBATCH_", "SVDTRAIN_")
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
        self.environment |= {"SLURM_CONF": str(self.config), "PATH": PATH}

    def start(self) -> None:
        self._start_munge()
        for name in ("slurmctld", "slurmd"):
            command = [name, "-D", "-f", str(self.config), *(["-N", "node1"] if name == "slurmd" else [])]
            log = open(self.directory / f"{name}.out", "w")  # noqa: SIM115 - belongs to the daemon
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))
            log.close()
        self.wait(lambda: "idle" in self.run("sinfo", "-h", "-o", "%T", check=False), 60, "the node does not come up")

    def _start_munge(self) -> None:
        if MUNGE_SOCKET.exists() and subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
            return
        MUNGE_SOCKET.parent.mkdir(exist_ok=True)
        shutil.chown(MUNGE_SOCKET.parent, "munge", "munge")
        command = ["setpriv", "--reuid", "munge", "--regid", "munge", "--clear-groups", "munged", "-F"]
        self._daemons.append(subprocess.Popen(command, env=self.environment, stderr=subprocess.DEVNULL))
        self.wait(MUNGE_SOCKET.exists, 20, "munged does not start")

    def stop(self) -> None:
        """Cancel what runs, then end exactly the processes that were started here."""
        self.run("scancel", "--user=root", check=False)
        end = time.monotonic() + 40  # KillWait and a little: without its daemons a step would never end
        while self.run("squeue", "-h", check=False).strip() and time.monotonic() < end:
            time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(20)

    def run(self, *command: str, check: bool = True, cwd: Path | None = None, **environment: str) -> str:
        """Output of one of Slurm's commands; with its errors behind it."""
        env = self.environment | environment
        done = subprocess.run(command, env=env, cwd=cwd, text=True, capture_output=True, timeout=60)
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED ..."""
        fields = dict(p.split("=", 1) for p in self.run("scontrol", "show", "job", job).split() if "=" in p)
        return fields["JobState"]

    def wait(self, condition, timeout_s: float, problem: str) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, problem
            time.sleep(0.5)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
