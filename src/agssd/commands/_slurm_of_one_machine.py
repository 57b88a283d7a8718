"""A real SLURM of one node on this machine: munged, slurmctld and slurmd in a folder of their own, as who runs this."""

from __future__ import annotations

import ctypes
import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "squeue", "scancel")
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_RANDOM = random.SystemRandom()  # another for every process, whatever is seeded
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/local/sbin"  # where Debian puts the daemons

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
FirstJobId={first_job}
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
OverTimeLimit=0
KillWait=60
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 NodeHostname={host} CPUs=4 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=CANCEL
PartitionName=all Nodes={host} Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes={host} PriorityTier=1 PreemptMode=CANCEL GraceTime=0
PartitionName=high Nodes={host} PriorityTier=20 PreemptMode=OFF
"""


def missing() -> str:
    """Return the programs of SLURM that are not installed, an empty string where it is whole."""
    return ", ".join(name for name in PROGRAMS if shutil.which(name, path=_PATH) is None)


def _end_with_parent() -> None:
    """Have the kernel end this process with the one that starts it, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_ports(number: int) -> list[int]:
    """Return ports that nobody listens at, outside of those that a system gives to outgoing connections."""
    found: set[int] = set()
    while len(found) < number:
        port = _RANDOM.randrange(26_000, 32_000)
        with suppress(OSError):
            socket.create_server(("127.0.0.1", port)).close()
            found.add(port)
    return list(found)


class OneMachine:
    """The cluster: started by ``start``, asked by ``call``, ended by ``stop``. Several may stand beside each other.

    Jobs of the partition ``high`` end those of ``low`` without grace; ``all`` is the default.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the three daemons and wait until the node is idle."""
        folder, host = self.folder, socket.gethostname().partition(".")[0]
        folder.mkdir(parents=True)
        folder.chmod(0o755)
        for name in ("state", "spool"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        first_job = _RANDOM.randrange(1, 900) * 10  # ranks meet at a port by the job: another SLURM here needs another
        conf = _CONF.format(host=host, folder=folder, user=getpass.getuser(), ports=_free_ports(2), first_job=first_job)
        (folder / "slurm.conf").write_text(conf)
        files = {
            "--socket": "munge.socket",
            "--key-file": "munge.key",
            "--pid-file": "munge.pid",
            "--log-file": "munge.log",
            "--seed-file": "munge.seed",
        }
        self._daemon("munged", "--foreground", "--force", *(f"{flag}={folder / name}" for flag, name in files.items()))
        self._wait(lambda: (folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D", "-N", host)
        self._wait(lambda: self.call("sinfo", "-h", "-p", "all", "-o", "%T") == "idle", "the node")

    def _daemon(self, name: str, *arguments: str) -> None:
        program = shutil.which(name, path=_PATH)
        assert program is not None
        log = (self.folder / f"{name}.out").open("wb")
        command = [program, *arguments]
        self._daemons.append(
            subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, preexec_fn=_end_with_parent)
        )

    def _wait(self, ready: object, what: str, seconds: float = 120.0) -> None:
        assert callable(ready)
        ends = time.monotonic() + seconds
        while not ready():
            gone = any(daemon.poll() is not None for daemon in self._daemons)
            if gone or time.monotonic() > ends:
                logs = [f"{log.name}:\n{log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*.[lo][ou]*"))]
                why = "as a daemon has ended" if gone else f"after {seconds:.0f} s"
                raise RuntimeError(f"{what} is not ready {why}\n" + "\n".join(logs))
            time.sleep(0.1)

    def call(self, *command: str, check: bool = False) -> str:
        """Return what a SLURM command prints, stripped.

        Raises:
            RuntimeError: if it gives no answer in a minute, or fails and ``check`` is True.
        """
        try:
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{' '.join(command)}: no answer in 60 s") from error
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """Return the state of a job: PENDING, RUNNING, COMPLETED and so on, empty if SLURM knows it no more."""
        return self.fields(job).get("JobState", "")

    def fields(self, job: str) -> dict[str, str]:
        """Return what SLURM says of a job."""
        return dict(field.partition("=")[::2] for field in self.call("scontrol", "show", "job", "-o", job).split())

    def start_now(self, job: str, *changes: str) -> None:
        """Let a job that is back in the queue start, which SLURM makes wait for two minutes.

        In the second in which its last start was ended slurmd would take its new credential for a revoked one.
        """
        time.sleep(1.1)
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now", *changes, check=True)

    def stop(self) -> None:
        """Kill what runs and end the daemons."""
        user = getpass.getuser()
        try:
            self.call("scancel", "--full", "--signal=KILL", "--user", user)
            self.call("scancel", "--user", user)
            ends = time.monotonic() + 30
            while "ING" in self.call("squeue", "-h", "-t", "all", "-o", "%T") and time.monotonic() < ends:
                time.sleep(0.2)
        except RuntimeError:
            pass  # the controller is gone, and the others go now
        finally:
            for daemon in reversed(self._daemons):
                daemon.terminate()
            for daemon in self._daemons:
                try:
                    daemon.wait(timeout=10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
