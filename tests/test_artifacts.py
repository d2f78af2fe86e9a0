"""Files exist completely or not at all; digests against hashlib; damage in words."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from utils.run import artifacts
from utils.run.artifacts import (
    damage,
    file_digest,
    inventory,
    left_behind,
    link_or_copy,
    make_folder,
    published,
    read_json,
    read_sealed,
    remove,
    sweep_temporaries,
    value_digest,
    write_json,
    write_sealed,
    write_text,
)
from utils.run.errors import InputError


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_published_file_is_the_old_one_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_text(path, "old")
    with published(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
        assert aside.parent == path.parent  # a rename across file systems would not be atomic
    assert path.read_text() == "new"
    assert names(tmp_path) == ["deep", "deep/file"]


def test_failure_inside_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with pytest.raises(KeyError), published(path) as aside:
        aside.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_published_folder_replaces_the_whole_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for name in ("one", "two"):
        with published(path) as aside:
            aside.mkdir()
            (aside / name).write_text(name)
    assert names(path) == ["two"]
    with pytest.raises(ZeroDivisionError), published(path) as aside:
        aside.mkdir()
        raise ZeroDivisionError
    assert names(tmp_path) == ["folder", "folder/two"]


def test_every_file_is_synced_before_the_move_and_the_folder_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(artifacts, "sync", lambda path: log.append(f"sync {path.name.split('-')[0]}"))
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (log.append("move"), replace(self, target))[1])
    with published(tmp_path / "folder") as aside:
        aside.mkdir()
        (aside / "a").write_text("a")
        (aside / "b").write_text("b")
    assert log == ["sync a", "sync b", "sync .tmp", "move", f"sync {tmp_path.name.split('-')[0]}"]


def test_failed_write_names_its_place(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(OSError, match="No space left") as caught, published(path):
        Path("/dev/full").write_text("x")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as other, published(path):
        (tmp_path / "nowhere").read_text()
    assert other.value.filename == str(tmp_path / "nowhere")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [-float("inf")]}])
def test_json_is_strict_and_a_refused_value_touches_nothing(value: object, tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"ü": 1.5, "text": "a\u2028b"})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, value)
    assert path.read_bytes() == before
    assert json.loads(before) == read_json(path) == {"ü": 1.5, "text": "a\u2028b"}
    assert names(tmp_path) == ["value.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe", b"nonsense"])
def test_unreadable_json_names_the_path(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    with pytest.raises(InputError, match=r"value\.json: not found"):
        read_json(path)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"value\.json: expected a JSON file, found something else"):
        read_json(path)


def test_digests_agree_with_hashlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "file").write_bytes(data)
    assert file_digest(tmp_path / "file") == hashlib.sha256(data).hexdigest()
    monkeypatch.delattr(hashlib, "file_digest", raising=False)  # Python 3.10
    assert file_digest(tmp_path / "file") == hashlib.sha256(data).hexdigest()
    assert artifacts._digest(io.BytesIO(b"")) == hashlib.sha256().hexdigest()
    assert value_digest({"a": 1, "b": [2]}) == value_digest({"b": [2], "a": 1}) != value_digest({"a": 1, "b": ["2"]})


def test_inventory_and_every_kind_of_damage(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    write_text(folder / "sub" / "a", "hello")
    write_text(folder / "b", "")
    listed = inventory(folder)
    assert listed["sub/a"] == {"sha256": hashlib.sha256(b"hello").hexdigest(), "bytes": 5}
    assert list(listed) == ["b", "sub/a"]
    assert damage(folder, listed) is None
    assert inventory(folder / "b") == {".": listed["b"]}
    assert damage(folder / "b", {".": listed["b"]}) is None
    (folder / "sub" / "a").write_text("jello")
    assert damage(folder, listed) == f"{folder / 'sub/a'} differs from its SHA-256 checksum"
    (folder / "sub" / "a").write_text("hell")
    assert damage(folder, listed) == f"{folder / 'sub/a'} has 4 bytes, expected 5"
    remove(folder / "sub")
    assert damage(folder, listed) == f"{folder / 'sub/a'} is missing"
    assert damage(tmp_path / "gone", {".": listed["b"]}) == f"{tmp_path / 'gone'} is missing"


def test_remove_takes_files_folders_links_and_nothing(tmp_path: Path) -> None:
    write_text(tmp_path / "kept" / "file", "x")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("link", "nothing"):
        remove(tmp_path / name)
    assert names(tmp_path) == ["kept", "kept/file"]
    remove(tmp_path / "kept" / "file")
    remove(tmp_path / "kept")
    assert names(tmp_path) == []


def test_sweep_takes_half_written_files_at_any_depth_and_no_others(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "kept", "x")
    (tmp_path / "a" / ".tmp-file-01").write_text("half")
    (tmp_path / ".tmp-folder-02" / ".tmp-inner-03").mkdir(parents=True)
    sweep_temporaries(tmp_path)
    sweep_temporaries(tmp_path / "nowhere")
    assert names(tmp_path) == ["a", "a/kept"]


def no_links(*_: object) -> None:
    raise OSError(errno.EXDEV, "Invalid cross-device link")


@pytest.mark.parametrize("link", [os.link, no_links])
def test_link_or_copy_places_equal_files(link: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "source" / "sub" / "a", "hello")
    write_text(tmp_path / "source" / "b", "more")
    monkeypatch.setattr(os, "link", link)
    link_or_copy(tmp_path / "source", tmp_path / "folder")
    link_or_copy(tmp_path / "source" / "b", tmp_path / "file")
    assert inventory(tmp_path / "folder") == inventory(tmp_path / "source")
    assert (tmp_path / "file").read_text() == "more"
    assert (tmp_path / "file").stat().st_nlink == (1 if link is no_links else 3)


def test_a_temporary_may_lie_elsewhere(tmp_path: Path) -> None:
    """For a folder that many write to and nobody sweeps: what a killed process leaves lies in the folder of its own."""
    own = tmp_path / "own"
    own.mkdir()
    with published(tmp_path / "shared/file", near=own) as aside:
        assert aside.parent == own
        aside.write_text("text")
        assert list((tmp_path / "shared").iterdir()) == []
    assert (tmp_path / "shared/file").read_text() == "text" and list(own.iterdir()) == []


def test_a_sealed_file_is_what_was_written_or_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "state.json"
    value = {"numbers": [1, 0.1 + 0.2, None], "text": "ü\u2028", "below": {"b": 1, "a": 2}}
    write_sealed(path, value)
    assert left_behind(tmp_path / "nothing") is None
    assert left_behind(path) == read_sealed(path) == value
    text = path.read_text(encoding="utf-8")
    for damaged in (text.replace("1,", "7,", 1), text[:40], "", "[]", "{}", '{"numbers": 1}'):
        path.write_text(damaged, encoding="utf-8")
        assert left_behind(path) is None
        assert f"{path}: expected" in capsys.readouterr().out
        with pytest.raises(InputError, match=r"state\.json: expected"):
            read_sealed(path)


def test_new_folders_are_named_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(artifacts, "sync", synced.append)
    make_folder(tmp_path / "a/b/c")
    make_folder(tmp_path / "a/b")
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a/b"]


def test_what_cannot_be_read_now_is_not_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A passing fault of the disk must not cost a checkpoint or a cache entry."""

    def fails(path: Path, encoding: str) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))  # as a read does, which names no file

    path = tmp_path / "state.json"
    write_sealed(path, {"step": 1})
    monkeypatch.setattr(Path, "read_text", fails)
    for read in (read_json, read_sealed, left_behind):
        with pytest.raises(OSError, match=r"Input/output error: '.*state\.json'"):
            read(path)
