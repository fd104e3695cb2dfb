"""A real Slurm on two virtual nodes: munge, slurmctld on the head, a slurmd on each node."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.patience import PATIENCE_SECONDS
from tests.slurm.nodes import ADDRESSES, DIES_WITH_US, HEAD, NODES, Nodes
from tests.slurm.nodes import why_not as why_no_nodes

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel", "sinfo")
# CgroupPlugin is asked for even where no cgroup is used; a requeued job waits for cred_expire; a
# node that is gone is noticed after SlurmdTimeout; KillWait lies between TERM and KILL.
CONF = """\
ClusterName=tests
SlurmctldHost=head({head})
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
ReturnToService=2
KillWait=5
MinJobAge=3600
SlurmctldTimeout=30
SlurmdTimeout=10
JobRequeue=1
"""


def why_not() -> str:
    """Why there is no Slurm to test with; empty where there is."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        packages = "slurmd slurmctld slurm-client munge"
        return f"no {', '.join(missing)} (Debian: apt-get install {packages})"
    return why_no_nodes()


class Cluster:
    """Starts on construction; ``close`` ends every job and every daemon."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("state", "log", "run", "munge"):
            (folder / name).mkdir()
        (folder / "munge").chmod(0o700)
        (folder / "munge" / "key").write_bytes(os.urandom(128))
        (folder / "munge" / "key").chmod(0o600)
        lines = [CONF.format(head=ADDRESSES[HEAD], folder=folder)]
        for name in NODES:
            (folder / f"spool.{name}").mkdir()
            lines.append(
                f"NodeName={name} NodeHostname={name} NodeAddr={ADDRESSES[name]} Port=16818 "
                "CPUs=8 RealMemory=8000 State=UNKNOWN\n"
            )
        lines.append("PartitionName=test Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP\n")
        self.conf = folder / "slurm.conf"
        self.conf.write_text("".join(lines))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self.nodes = Nodes(folder)
        self._daemons: list[subprocess.Popen] = []
        self._start_daemons()

    def _start_daemons(self) -> None:
        run, log = self.folder / "run", self.folder / "log"
        munge = ["munged", "--foreground", "--force", f"--socket={run}/munge.sock"]
        munge += [f"--key-file={self.folder}/munge/key", f"--pid-file={run}/munged.pid"]
        munge += [f"--log-file={log}/munged.log", f"--seed-file={self.folder}/munge/seed"]
        self._spawn(munge, "munged")
        self._wait((run / "munge.sock").exists, "munge's socket")
        control = ["unshare", "--uts", "bash", "-c", "hostname head; exec slurmctld -D"]
        self._spawn([*self.nodes.inside(HEAD), *control], "slurmctld")
        for name in NODES:
            self.start_node(name)
        self.wait_for_nodes()

    def _spawn(self, command: list[str], name: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("w") as out:
            self._daemons.append(
                subprocess.Popen(
                    [*DIES_WITH_US, *command],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                )
            )

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.conf)}

    def start_node(self, name: str) -> None:
        """Boots a node, also one that has crashed."""
        log = self.folder / "log" / f"{name}.out"
        self.nodes.start(name, ["slurmd", "-D", "-N", name], log, SLURM_CONF=str(self.conf))

    def wait_for_nodes(self) -> None:
        """Until both nodes are idle."""

        def idle() -> bool:
            return len(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").stdout.split()) == 2

        self._wait(idle, "idle nodes")

    def run(self, *command: str, stdin: str = "", cwd: Path | None = None, **environment: str):
        """A client command on the head; its CompletedProcess."""
        return subprocess.run(
            [*self.nodes.inside(HEAD), "timeout", "60", *command],
            env=self.environment | environment,
            input=stdin,
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
        )

    def job(self, job_id: str) -> dict[str, str]:
        """What ``scontrol show job`` says: JobState, ExitCode, Restarts and so on."""
        text = self.run("scontrol", "-o", "show", "job", job_id).stdout
        return dict(part.split("=", 1) for part in text.split() if "=" in part)

    def queued_messages(self) -> int:
        """Messages to nodes that the controller has to send, or to send again."""
        lines = self.run("sdiag").stdout.splitlines()
        return int(next(x for x in lines if x.startswith("Agent queue size")).split(":")[1])

    def close(self) -> None:
        """Ends what is left of jobs, the nodes and the daemons."""
        self.run("scancel", "-u", "root")
        deadline = time.monotonic() + 20
        while self.run("squeue", "-h").stdout.strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        for daemon in reversed(self._daemons):  # the controller before the nodes: they would wait
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.nodes.close()

    def _wait(self, happened, what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not happened():
            if time.monotonic() > deadline:
                logs = [path.read_text()[-2000:] for path in (self.folder / "log").iterdir()]
                raise AssertionError(f"no {what}:\n" + "\n".join(logs))
            time.sleep(0.1)
