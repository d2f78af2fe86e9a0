"""The frozen copy of code and configuration that a run's jobs use, so that edits do not reach a chain on its way."""

from __future__ import annotations

import hashlib
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from configs.cluster import Cluster
from configs.presets import load, load_cluster
from configs.schema import Experiment
from utils.run.artifacts import files_below, published, write_text
from utils.run.environment import REVISION, code_revision
from utils.run.errors import InputError
from utils.run.folders import Folders

CODE = ("configs", "jobs", "stages", "utils")
NEWEST = Path("logs", "newest_submission")
CARRIED = ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")


@dataclass(frozen=True)
class Snapshot:
    """A folder with the code, experiment.yaml, cluster.yaml and site.sh; its name is a digest of them all."""

    folder: Path
    files: dict[str, bytes]

    @classmethod
    def of(cls, root: Path, config: Experiment, cluster: Cluster, python: str) -> Snapshot:
        """Describe the snapshot of a checkout, without writing it. Paths of the run become absolute."""
        folders = Folders.of(config.paths, config.run_name)
        placed = config.paths.model_copy(update={"work": folders.work, "results": folders.results, "cache": folders.cache})
        files = {str(path.relative_to(root)): path.read_bytes() for top in CODE for path in files_below(root / top) if _is_code(path)}
        files["experiment.yaml"] = config.model_copy(update={"paths": placed}).model_dump_json(indent=2).encode()
        files["cluster.yaml"] = cluster.model_dump_json(indent=2).encode()
        files["site.sh"] = _site(root, cluster, python).encode()
        files[REVISION] = code_revision().encode()
        digest = hashlib.sha256()
        for name in sorted(files):
            digest.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
        return cls(submission_folder(folders) / f"code-{digest.hexdigest()[:12]}", files)

    def write(self) -> None:
        """Put it in its place; if it is there, only mark it as the newest."""
        if self.folder.is_dir():
            (self.folder / "experiment.yaml").touch()
            return
        with published(self.folder) as aside:
            for name, content in self.files.items():
                target = aside / name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)


def submission_folder(folders: Folders) -> Path:
    return folders.run / "submission"


def _is_code(path: Path) -> bool:
    """Everything, for a page needs its template as much as its code; but what Python and editors leave."""
    return "__pycache__" not in path.parts and not path.name.startswith(".") and not path.name.endswith("~")


def _site(root: Path, cluster: Cluster, python: str) -> str:
    """Shell lines that a job sources: the checkout, Python, and the site's own environment, whose Python wins."""
    lines = [f"root={shlex.quote(str(root))}", f"network={cluster.network}", f"PYTHON={shlex.quote(python)}"]
    lines += [f"export {name}={shlex.quote(os.environ[name])}" for name in CARRIED if name in os.environ]
    lines += [*cluster.environment, "PYTHON=$(command -v python)"] if cluster.environment else []
    return "\n".join(lines) + "\n"


def stored(folder: Path) -> tuple[Experiment, Cluster]:
    """Configuration of a snapshot. Raises InputError if the folder is none."""
    if not (folder / "experiment.yaml").is_file():
        raise InputError(
            f"{folder}: found no experiment.yaml, expected the frozen code of a submitted run; submit it again: bash run_all.sh"
        )
    return load(str(folder / "experiment.yaml")), load_cluster(str(folder / "cluster.yaml"))


def newest(root: Path) -> Path | None:
    """Snapshot of the last submission from this checkout."""
    try:
        return Path((root / NEWEST).read_text(encoding="utf-8").strip())
    except FileNotFoundError:
        return None


def remember(root: Path, snapshot: Path) -> None:
    write_text(root / NEWEST, f"{snapshot}\n")
