"""The folders of a run as places on disks."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.presets import load
from tests.fake_stages import TINY
from utils.run import places
from utils.run.checks import Check
from utils.run.folders import Folders

STUDY = ("model={source: pretrained, name: EleutherAI/pythia-1.4b}",)


def test_file_system_is_what_df_says(own_folders: Path) -> None:
    for path in (own_folders, Path("/"), Path("/proc")):
        told = subprocess.run(["df", "--output=fstype", path], capture_output=True, text=True, check=True).stdout.split()[1]
        assert places.file_system(path) in (told, "rootfs")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/a", "nfs4"),
        ("/homes", "ext4"),
        ("/scratch/my dir/work", "lustre"),
        ("/scratch/größe/work", "beegfs"),
        ("/over/work", "gpfs"),
    ],
)
def test_file_system_is_that_of_the_longest_and_newest_mount(path: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = r"""/dev/a / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
x /scratch/my\040dir lustre rw 0 0
y /scratch/größe beegfs rw 0 0
z /scratch xfs rw 0 0
v /over xfs rw 0 0
w /over gpfs rw 0 0"""
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: mounts)
    assert places.file_system(Path(path)) == kind


def test_file_system_is_unknown_without_a_list_of_mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(self: Path, encoding: str) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", absent)
    assert places.file_system(Path("/")) == ""


@pytest.mark.parametrize(
    ("overrides", "gigabytes"),
    [
        # 1.4e9 parameters; base, two controls: 16.8; a seed: three models 16.8, 2 arms x (2 kept + best + written) x 16.8 = 134.4
        ((*STUDY, "data.train_tokens=250_000_000"), 16.8 + 16.8 + 134.4 + 1.0),
        ((*STUDY, "data.train_tokens=250_000_000", "model.earlier_revisions=[a, b]"), 16.8 + 11.2 + 16.8 + 134.4 + 1.0),
        ((*STUDY, "data.train_tokens=250_000_000", "seeds=[1, 2]"), 16.8 + 2 * (16.8 + 134.4) + 1.0),
        ((*STUDY, "data.train_tokens=250_000_000", "training.keep_last=1"), 16.8 + 16.8 + 100.8 + 1.0),
        (("model={source: pretrained, name: HuggingFaceTB/SmolLM2-135M}", "data.train_tokens=1000"), 0.135 * 120 + 4e-6),
        # tiny.yaml: 2 x 512 x 32 embeddings, 2 layers of 4 x 32 x 32 and 2 x 32 x 64: 49152 parameters, two earlier ones; 60 000 tokens
        ((), (49152 * (120 + 8) + 240_000) / 1e9),
    ],
)
def test_need_is_what_a_hand_computes(overrides: tuple[str, ...], gigabytes: float) -> None:
    given = ["model.scratch=null", *overrides] if overrides else []
    assert places.needed_gigabytes(load(TINY, given)) == pytest.approx(gigabytes, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("EleutherAI/pythia-70m", 70e6),
        ("meta-llama/Llama-3.2-1B", 1e9),
        ("/models/8bit/pythia-6.9b-deduped", 6.9e9),
        ("gpt2", None),
        ("my-2base", None),
    ],
)
def test_size_is_read_from_the_name(name: str, parameters: float | None) -> None:
    assert places.parameters_of(load(TINY, ["model.scratch=null", "model.source=pretrained", f"model.name={name}"])) == parameters


def test_disk_is_held_against_the_need(own_folders: Path, free: Callable[[float], None]) -> None:
    config = load(TINY, ["model.scratch=null", *STUDY])
    folders = Folders.of(config.paths, config.run_name)
    folders.work.mkdir(parents=True)
    free(100)
    words = f"{folders.work}: 100 GB free, about 168 GB needed; make room or set paths.work"
    assert places.free_space(config, folders) == Check("disk", "no", words)
    free(200)
    assert places.free_space(config, folders) == Check("disk", "ok", "200 GB free, about 168.0 GB needed")
    unknown = load(TINY, ["model.scratch=null", "model={source: pretrained, name: gpt2}"])
    assert places.free_space(unknown, folders) == Check("disk", "warn", "200 GB free; the need is not known, as the size of gpt2 is not")


def test_disk_is_that_of_the_folder_to_come(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or real(path))
    config = load(TINY)
    assert places.free_space(config, Folders.of(config.paths, config.run_name)).verdict == "ok"
    assert asked == [own_folders]


def test_a_visit_leaves_no_empty_folder(own_folders: Path) -> None:
    with places.visited(own_folders / "a" / "b"):
        (own_folders / "a" / "b").mkdir(parents=True)
    assert list(own_folders.iterdir()) == []
    with places.visited(own_folders / "a" / "b"):
        (own_folders / "a" / "b").mkdir(parents=True)
        (own_folders / "a" / "kept").touch()
    assert [path.name for path in (own_folders / "a").iterdir()] == ["kept"]
    with places.visited(own_folders / "a"):
        (own_folders / "a" / "kept").unlink()
    assert (own_folders / "a").is_dir()


def test_a_visit_to_a_closed_folder(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(self: Path) -> bool:
        raise PermissionError

    monkeypatch.setattr(Path, "exists", closed)
    with places.visited(own_folders / "a"):
        pass
    monkeypatch.undo()
    assert own_folders.is_dir()
