"""A cluster with an accounting database, where a wrong qos or account is refused: slurmdbd and MariaDB, started for one test."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
from pathlib import Path

from tests.slurm.cluster import SBIN, Cluster, _end

PROGRAMS = ("slurmdbd", "mariadbd", "mariadb-install-db", "sacctmgr", "sacct")
UNPACKED = Path(os.environ.get("SLURM_ACCOUNTING", "/"))  # where their Debian packages are unpacked (dpkg -x), if not installed
FOLDERS = f"{UNPACKED}/usr/sbin:{UNPACKED}/usr/bin:{SBIN}:{os.environ.get('PATH', '')}"
LIBRARIES = "usr/lib/x86_64-linux-gnu"
CONF = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={user}
PidFile={folder}/run/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
PluginDir=/{libraries}/slurm-wlm:{unpacked}/{libraries}/slurm-wlm
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={database_port}
StorageUser=slurm
"""
EXTRA = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStoragePass={folder}/munge/socket
AccountingStorageEnforce=associations,limits,qos
MinJobAge=2
"""


def missing_accounting() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name, path=FOLDERS) is None]


class AccountingCluster(Cluster):
    """The account `foo` has the one user; of the qualities of service there is `normal` alone. What has ended is soon forgotten."""

    database: subprocess.Popen[bytes] | None = None

    def __init__(self) -> None:
        super().__init__(nodes=1)
        names = {"folder": self.folder, "port": self.spare_port, "database_port": self.spare_port + 1, "user": getpass.getuser()}
        self.conf.write_text(self.conf.read_text().replace("MinJobAge=3600\n", "") + EXTRA.format(**names))
        conf = self.folder / "slurmdbd.conf"
        conf.touch(mode=0o600)
        conf.write_text(CONF.format(**names, libraries=LIBRARIES, unpacked=UNPACKED))

    def start_controller(self) -> None:
        """The database first: without it the controller does not start."""
        data, log = self.folder / "data", self.folder / "log/database.err"
        common = ["--no-defaults", f"--datadir={data}", f"--user={getpass.getuser()}"]
        environment = self._environment()
        base = UNPACKED / "usr"
        subprocess.run(
            ["mariadb-install-db", *common, f"--basedir={base}", "--auth-root-authentication-method=normal", "--skip-test-db", "--force"],
            check=True, env=environment, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        self.database = subprocess.Popen(
            [
                "mariadbd", *common, f"--basedir={base}", f"--socket={self.folder}/run/database", f"--port={self.spare_port + 1}",
                "--bind-address=127.0.0.1", "--skip-grant-tables", f"--log-error={log}",
            ],
            env=environment,
        )  # fmt: skip
        self.wait_for(lambda: log.exists() and "ready for connections" in log.read_text(), 30, "the database does not start")
        self._daemon("slurmdbd")
        self.wait_for(lambda: not self._manage("show", "cluster"), 30, "slurmdbd does not answer")
        for what in (("cluster", "sandbox"), ("account", "foo"), ("user", getpass.getuser(), "account=foo")):
            assert not self._manage("add", *what)
        super().start_controller()

    def stop(self) -> None:
        _end(self.folder / "run/slurmdbd.pid", signal.SIGTERM)
        if self.database:
            self.database.terminate()
            self.database.wait(timeout=30)
        super().stop()

    def limit_submissions(self, number: int) -> None:
        assert not self._manage("modify", "user", getpass.getuser(), "set", f"MaxSubmitJobs={number}")

    def _manage(self, *arguments: str) -> int:
        return subprocess.run(["sacctmgr", "-i", *arguments], env=self._environment(), capture_output=True, timeout=30).returncode

    def _environment(self) -> dict[str, str]:
        return super()._environment() | {"PATH": FOLDERS, "LD_LIBRARY_PATH": f"{UNPACKED}/{LIBRARIES}:{UNPACKED}/lib/x86_64-linux-gnu"}
