"""A real SLURM cluster on this machine: one controller, several node daemons, its own key, fake A100s, and a clock that may run fast."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "mungekey", "sbatch", "squeue", "scontrol", "scancel")
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
SBIN = "/usr/sbin"
CONF = """\
ClusterName=sandbox
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPort={port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
GresTypes=gpu
JobRequeue=1
MinJobAge=3600
KillWait={kill_wait}
SlurmdTimeout=5
SlurmctldTimeout=30
InactiveLimit=0
PartitionName=aa100 Nodes=ALL Default=YES MaxTime=1-00:00:00 DefaultTime=01:00:00 State=UP
PartitionName=short Nodes=n1 MaxTime=00:10:00 State=UP
"""


def missing() -> list[str]:
    """Programs without which no cluster can be started here."""
    path = f"{os.environ.get('PATH', '')}:{SBIN}"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None] + ([] if FAKETIME.exists() else ["libfaketime"])


class Cluster:
    """A running cluster. Its clock is `speed` times as fast as the real one; jobs themselves have the real clock."""

    def __init__(self, speed: int = 10, nodes: int = 4, kill_wait: int = 30, extra: str = "") -> None:
        self.speed, self.nodes = speed, [f"n{number + 1}" for number in range(nodes)]
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: the socket's path is limited to 108 bytes
        self.folder.chmod(0o755)
        for name in ("state", "log", "run", "munge", "dev", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        port = _free_ports(nodes + 4)
        self.spare_port = port + nodes + 2  # and the one after it
        host = socket.gethostname().split(".")[0]
        for number in range(4):
            (self.folder / f"dev/nvidia{number}").symlink_to("/dev/null")
        names = {"host": host, "user": getpass.getuser(), "folder": self.folder, "kill_wait": kill_wait}
        conf = CONF.format(**names, port=port, node_port=port + 1) + extra
        for number, node in enumerate(self.nodes):
            conf += (
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port + 2 + number} CPUs=64 Sockets=2 CoresPerSocket=32 "
                "ThreadsPerCore=1 RealMemory=512000 Gres=gpu:a100:4 State=UNKNOWN\n"
            )
        self.conf = self.folder / "slurm.conf"
        self.conf.write_text(conf)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName=n[1-{nodes}] Name=gpu Type=a100 File={self.folder}/dev/nvidia[0-3]\n"
        )

    # --- daemons

    def start(self) -> None:
        munge = self.folder / "munge"
        subprocess.run(["mungekey", "--create", f"--keyfile={munge}/key", "--bits=1024"], check=True, env=self._environment())
        self._daemon(
            "munged",
            *(f"--{key}={munge}/{name}" for key, name in [("socket", "socket"), ("key-file", "key"), ("log-file", "log")]),
            *(f"--{key}={munge}/{name}" for key, name in [("pid-file", "pid"), ("seed-file", "seed")]),
            "--num-threads=2",
        )
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        self.wait_for(lambda: set(self.call("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"}, 20, "nodes are not idle")

    def start_node(self, node: str) -> None:
        self._daemon("slurmd", "-N", node)

    def start_controller(self) -> None:
        self._daemon("slurmctld")

    def stop_controller(self, number: signal.Signals = signal.SIGTERM) -> None:
        _end(self.folder / "run/slurmctld.pid", number)

    def crash(self, node: str) -> None:
        """The node is gone: its daemon, and everything that ran there."""
        self.kill_daemon(node)
        marks = {f"SLURM_CONF={self.conf}", f"SLURMD_NODENAME={node}"}
        there = [pid for pid, _ in _processes() if marks <= set(_environment_of(pid).split("\0"))]
        for pid in [*(_parent(pid) for pid in there if "slurmstepd" in _line(_parent(pid))), *there]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def kill_daemon(self, node: str) -> None:
        """What runs there goes on."""
        _end(self.folder / f"run/slurmd-{node}.pid", signal.SIGKILL)

    def hold(self, state: str = "DOWN") -> None:
        """No job starts any more."""
        for partition in ("aa100", "short"):
            self.call("scontrol", "update", f"PartitionName={partition}", f"State={state}")

    def release(self) -> None:
        self.hold("UP")

    def stop(self) -> None:
        """Cancel all jobs, then end the daemons, and only those."""
        with suppress(subprocess.SubprocessError, AssertionError):
            ids = self.call("squeue", "-h", "-o", "%A").split()
            for job in ids:
                self.call("scontrol", "update", f"JobId={job}", "Requeue=0", check=False)
            if ids:
                self.call("scancel", "--signal=KILL", "--full", *ids, check=False)
                self.call("scancel", *ids, check=False)
                self.wait_for(lambda: not self.call("squeue", "-h", "-t", "R,CG", "-o", "%A").split(), 20, "jobs do not end")
        for file in (*sorted(self.folder.glob("run/slurmd-*.pid")), self.folder / "run/slurmctld.pid", self.folder / "munge/pid"):
            _end(file, signal.SIGTERM)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _daemon(self, *command: str) -> None:
        environment = self._environment()
        if self.speed != 1:
            environment |= {"LD_PRELOAD": str(FAKETIME), "FAKETIME": f"+0 x{self.speed}", "FAKETIME_DONT_FAKE_MONOTONIC": "0"}
        subprocess.run(command, check=True, env=environment, timeout=30)

    def _environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.conf), "PATH": f"{os.environ.get('PATH', '')}:{SBIN}"}

    # --- questions

    def call(self, *command: str, check: bool = True, seconds: float = 120) -> str:
        """Standard output of a SLURM command."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=self._environment())
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.stderr}")
        return done.stdout

    def states(self) -> dict[str, str]:
        """{job id, 17 or 17_2: state} of all jobs that SLURM remembers."""
        return dict(line.split() for line in self.call("squeue", "-h", "-r", "-t", "all", "-o", "%i %T").splitlines())

    def show(self, field: str, *filters: str) -> list[str]:
        """One field of squeue (%E: what a job waits for) of the jobs that are still to end, or of those that the options of squeue name."""
        return self.call("squeue", "-h", "-r", "--sort=i", *filters, "-o", field).splitlines()

    def wait(self, job: str, *wanted: str, seconds: float = 180) -> str:
        """Wait until a job is in one of the wanted states (default: at an end); returns the state."""
        ended = wanted or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        self.wait_for(lambda: self.states().get(job) in ended, seconds, f"job {job} does not become {' or '.join(ended)}", pause=0.2)
        return self.states()[job]

    def wait_for(self, condition: Callable[[], bool], seconds: float, failure: str, pause: float = 0.05) -> None:
        """`seconds` is what an idle machine needs at most; a busy one is given more."""
        seconds *= 5
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                queue = self.call("squeue", "-t", "all", "-o", "%i %j %T %r %E", check=False)
                raise AssertionError(f"{failure} within {seconds} s; the queue:\n{queue}")
            time.sleep(pause)


@contextmanager
def running(kind: type[Cluster] = Cluster, **options: int | str) -> Iterator[Cluster]:
    cluster = kind(**options)  # type: ignore[arg-type]
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> int:
    """First of `count` free ports in a row."""
    for base in range(21000 + os.getpid() % 500 * 20, 60000, count):
        with suppress(OSError):
            for port in range(base, base + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return base
    raise RuntimeError("no free ports")


def _alive(pid: int) -> bool:
    """A zombie is not alive: where the first process does not reap, ended daemons stay as zombies."""
    try:
        state = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("State"))
    except (FileNotFoundError, ProcessLookupError):
        return False
    return "Z" not in state.split()[1]


def _end(file: Path, number: signal.Signals) -> None:
    """Send a signal to the daemon that a PID file names and wait for its end."""
    if not file.exists() or not file.read_text().strip():
        return
    pid = int(file.read_text())
    if not _alive(pid) or not any(name in Path(f"/proc/{pid}/cmdline").read_text() for name in ("slurm", "munged")):
        return
    os.kill(pid, number)
    for _ in range(250):
        if not _alive(pid):
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)


def _processes() -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            yield int(folder.name), _line(int(folder.name))


def _line(pid: int) -> str:
    """Command line of a process."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    return ""


def _parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _environment_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    return ""
