"""The frozen code of a run: its name is a digest of all that is in it, and what is in it is enough."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs.cluster import Cluster
from configs.presets import ConfigError, load
from tests.fake_slurm import NEWEST, small_checkout
from tests.fake_stages import ROOT, TINY
from utils.run import environment
from utils.run.errors import InputError
from utils.slurm import snapshot
from utils.slurm.snapshot import CODE, Snapshot


@pytest.fixture
def root(own_folders: Path) -> Path:
    return small_checkout(own_folders / "my checkout's")


def frozen(root: Path, *overrides: str, cluster: Cluster | None = None, python: str = sys.executable) -> Snapshot:
    return Snapshot.of(root, load(TINY, overrides), cluster or Cluster(), python)


def test_snapshot_is_reproducible_and_lies_in_the_run(root: Path, own_folders: Path) -> None:
    one = frozen(root)
    assert one == frozen(root)
    assert one.folder.parent == own_folders / "scratch/foundation_llm_work/tiny/submission"
    assert one.folder.name.startswith("code-")
    assert not one.folder.exists()
    assert "utils/a.py" in one.files
    assert not [name for name in one.files if "__pycache__" in name or name.endswith(".pyc")]


def test_nothing_that_git_keeps_below_the_code_is_left_out() -> None:
    command = ["git", "ls-files", *CODE]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert "utils/report/page.html.j2" in tracked
    assert set(tracked) <= set(frozen(ROOT).files)


def test_digest_changes_with_every_file_and_its_name(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [frozen(root)]
    for path in (root / "utils/a.py", root / "jobs/common.sh", root / "jobs/job_7_aggregate.sh"):
        path.write_text(path.read_text() + "#\n")
        found.append(frozen(root))
    (root / "utils/a.py").rename(root / "utils/b.py")
    found.append(frozen(root))
    (root / "configs").mkdir()
    (root / "configs/own.yaml").write_text("")
    found.append(frozen(root))
    for name, text in {"a": "12", "b": "3"}.items():
        (root / f"stages_{name}.py").write_text(text)  # beside the code: not a part of it
    assert frozen(root) == found[-1]
    found += [frozen(root, "uat.sweeps=1"), frozen(root, cluster=Cluster(max_restarts=3)), frozen(root, python="/other/python")]
    monkeypatch.setenv("HF_HOME", "/models")
    found.append(frozen(root))
    monkeypatch.setattr(snapshot, "code_revision", lambda: "another")
    found.append(frozen(root))
    assert len({one.folder for one in found}) == len(found)


def test_text_that_moves_from_one_file_to_the_next_changes_the_digest(root: Path) -> None:
    names = []
    for first, second in (("12", "3"), ("1", "23")):
        (root / "utils/a.py").write_text(first)
        (root / "utils/b.py").write_text(second)
        names.append(frozen(root).folder)
    assert names[0] != names[1]


def test_written_snapshot_is_read_back_with_absolute_folders(root: Path, own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_folders)
    cluster = Cluster(network="all", max_restarts=3, environment=("module purge",))
    one = frozen(root, "paths.results=here", "seeds=[1, 2]", cluster=cluster)
    one.write()
    assert {str(path.relative_to(one.folder)): path.read_bytes() for path in one.folder.rglob("*") if path.is_file()} == one.files
    for name in ("SCRATCH", "PROJECT"):
        monkeypatch.setenv(name, "/elsewhere")
    config, stored = snapshot.stored(one.folder)
    assert stored == cluster
    assert config.paths.work == own_folders / "scratch/foundation_llm_work"
    assert config.paths.results == own_folders / "here"
    assert config.paths.cache == own_folders / "scratch/foundation_llm_cache"
    assert config.model_copy(update={"paths": load(TINY).paths}) == load(TINY, ["seeds=[1, 2]"])


def test_snapshot_that_is_there_stays_as_it_is(root: Path) -> None:
    one = frozen(root)
    one.write()
    (one.folder / "mark").touch()
    frozen(root).write()
    assert (one.folder / "mark").exists()


def test_folder_that_is_no_snapshot_is_refused(own_folders: Path) -> None:
    with pytest.raises(
        InputError, match=r"code-1: found no experiment\.yaml, expected the frozen code of a submitted run; submit it again"
    ):
        snapshot.stored(own_folders / "code-1")
    (own_folders / "experiment.yaml").write_text("run_name: x")
    with pytest.raises(ConfigError, match="model: missing"):
        snapshot.stored(own_folders)


def sourced(one: Snapshot, *names: str) -> list[str]:
    """What the variables are after a job has sourced site.sh."""
    lines = [one.files["site.sh"].decode(), *(f'echo "${name}"' for name in names)]
    return subprocess.run(["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=True).stdout.splitlines()


def test_site_survives_the_shell(root: Path, own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", "/the cache's $HOME")
    one = frozen(root, python="/opt/py 3/python")
    assert sourced(one, "root", "network", "PYTHON", "HF_HUB_CACHE") == [str(root), "setup", "/opt/py 3/python", "/the cache's $HOME"]
    assert b"HF_HOME" not in one.files["site.sh"]


def test_python_of_the_sites_environment_wins(root: Path, own_folders: Path) -> None:
    (own_folders / "bin").mkdir()
    shutil.copy("/bin/true", own_folders / "bin/python")
    cluster = Cluster(network="none", environment=(f"PATH={shlex.quote(str(own_folders / 'bin'))}:$PATH",))
    assert sourced(frozen(root, cluster=cluster), "network", "PYTHON") == ["none", str(own_folders / "bin/python")]


def test_newest_is_the_one_remembered_last(root: Path, own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "NEWEST", NEWEST)
    assert snapshot.newest(root) is None
    for name in ("code-1", "code 2"):
        snapshot.remember(root, own_folders / name)
    assert snapshot.newest(root) == own_folders / "code 2"
    for script in (ROOT / "jobs").glob("job_*.sh"):  # where a job that is submitted by hand looks
        assert f"$(cat {NEWEST})" in script.read_text()


def test_snapshot_of_the_real_code_stands_alone_and_knows_its_revision(own_folders: Path) -> None:
    one = frozen(ROOT)
    one.write()
    code = "import sys; sys.path[0] = sys.argv.pop(1); from stages.__main__ import main; from utils.run.environment import code_revision; "
    command = [sys.executable, "-c", code + "main(['plan']); print(code_revision())", str(one.folder)]
    lines = subprocess.run(command, cwd=own_folders, capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[0].startswith("0 setup: ")
    assert lines[-1] == environment.code_revision()
