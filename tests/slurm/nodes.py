"""Two virtual nodes on this machine, each with its own network, host name, /etc/hosts and /dev/shm.

Root only. Nothing of the machine itself is changed but entries in /run/netns, which ``close``
removes. Processes of a node die with it.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from pathlib import Path

COUNTER = itertools.count()
DIES_WITH_US = ["setpriv", "--pdeathsig=KILL"]  # also where the tests themselves are killed
NETWORK = "198.18.77"  # of the range for benchmarks, RFC 2544; it exists inside the namespaces only
HEAD = "head"
NODES = ("node1", "node2")
ADDRESSES = {HEAD: f"{NETWORK}.1", "node1": f"{NETWORK}.11", "node2": f"{NETWORK}.12"}

# Runs as process 1 of a node: $1 its name, $2 the hosts file, then a command.
ENTER = """
hostname "$1"; mount --bind "$2" /etc/hosts; mount -t tmpfs tmpfs /dev/shm; shift 2
"$@" & while kill -0 $! 2>/dev/null; do wait $!; done
"""


def why_not() -> str:
    """Why this machine cannot have virtual nodes; empty where it can."""
    if os.geteuid() != 0:
        return "virtual nodes need root"
    for tool in ("ip", "nsenter", "unshare", "setpriv"):
        if shutil.which(tool) is None:
            return f"virtual nodes need {tool}"
    tried = subprocess.run(["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"])
    return "" if tried.returncode == 0 else "namespaces are not allowed here"


class Nodes:
    """A network of a head and two nodes; a node has processes once ``start`` was called."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._prefix = f"amrlhf{os.getpid()}-{next(COUNTER)}-"
        self._first: dict[str, subprocess.Popen] = {}  # process 1 of each node, seen from here
        self.hosts = folder / "hosts"
        lines = [f"{address} {name}\n" for name, address in ADDRESSES.items()]
        self.hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))
        for name in (HEAD, *NODES):
            _run("ip", "netns", "add", self._prefix + name)
            self._ip(name, "link", "set", "lo", "up")
        self._ip(HEAD, "link", "add", "br0", "type", "bridge")
        self._ip(HEAD, "addr", "add", f"{ADDRESSES[HEAD]}/24", "dev", "br0")
        self._ip(HEAD, "link", "set", "br0", "up")
        for name in NODES:
            peer = self._prefix + name
            self._ip(HEAD, *f"link add {name} type veth peer name eth0 netns {peer}".split())
            self._ip(HEAD, *f"link set {name} master br0 up".split())
            self._ip(name, *f"addr add {ADDRESSES[name]}/24 dev eth0".split())
            self._ip(name, *"link set eth0 up".split())

    def inside(self, name: str) -> list[str]:
        """What to put before a command so that it runs in the network of a node or the head."""
        return ["nsenter", f"--net=/run/netns/{self._prefix}{name}"]

    def start(self, name: str, command: list[str], log: Path, **environment: str) -> None:
        """Runs a command as the first process of a node."""
        unshare = "unshare --mount --uts --pid --fork --kill-child --mount-proc".split()
        with log.open("a") as out:
            self._first[name] = subprocess.Popen(
                [*DIES_WITH_US, *self.inside(name), *unshare, "--propagation", "private"]
                + ["bash", "-c", ENTER, "bash", name, str(self.hosts), *command],
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def crash(self, name: str) -> None:
        """All processes of a node die at once."""
        process = self._first.pop(name)
        process.kill()
        process.wait()

    def pid(self, name: str) -> int:
        """Process 1 of a node, by its number on this machine."""
        children = f"/proc/{self._first[name].pid}/task/{self._first[name].pid}/children"
        return int(Path(children).read_text().split()[0])

    def close(self) -> None:
        """Ends all processes of the nodes and removes the networks."""
        for name in list(self._first):
            self.crash(name)
        for name in (HEAD, *NODES):
            subprocess.run(["ip", "netns", "del", self._prefix + name], check=False)

    def _ip(self, name: str, *arguments: str) -> None:
        _run("ip", "-n", self._prefix + name, *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)
