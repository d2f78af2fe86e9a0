"""A disk that can lose power: contents are as of their file's last fsync, names as of their folder's, whatever the kernel had shown.

POSIX promises no more than that. Between the two a real file system may have got further, in the order of the changes to a folder; the
loss is therefore drawn: nothing more, all names and no contents (the empty files that a rename without an fsync leaves), or a mixture.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

link = os.link  # an operation of the watched process goes by os.link
Loss = Literal["all", "contents", "mixture"]  # of what was not brought to the disk
LOSSES: tuple[Loss, ...] = ("all", "contents", "mixture")


@dataclass
class Folder:
    """{name: number of a file's inode, or a folder} on the disk, and the changes since, each made wholly or not at all."""

    entries: dict[str, int | Folder] = field(default_factory=dict)
    changes: list[dict[str, int | Folder | None]] = field(default_factory=list)


class Disk:
    """Follows what the process that made it does below `root`, all of which is on the disk now. `aside`: on the same file system."""

    def __init__(self, root: Path, aside: Path) -> None:
        self.root, self.aside = root.resolve(), aside
        aside.mkdir()
        self.folders: dict[Path, Folder] = {}
        self.first: set[int] = set()  # inodes whose present contents are on the disk
        self._found(self.root)

    def _found(self, path: Path) -> Folder:
        folder = self.folders[path] = Folder()
        for below in path.iterdir():
            if is_folder(below):
                folder.entries[below.name] = self._found(below)
            else:
                folder.entries[below.name] = self._held(below)
                self.first.add(self._held(below))
        return folder

    def _held(self, path: Path) -> int:
        """Number of a file's inode, which gets a second name, so that neither number nor contents go away."""
        inode = path.lstat().st_ino
        if not (held := self.aside / str(inode)).exists():
            link(path, held, follow_symlinks=False)
        return inode

    def before(self, kind: str, path: Path) -> None:
        """Keep what an operation is about to change."""
        if kind in ("open", "truncate", "unlink", "rename", "link") and path.is_file():
            inode = self._held(path)
            if kind in ("open", "truncate") and inode in self.first:
                self._bring(inode)

    def _bring(self, inode: int) -> None:
        """The contents are on the disk as they are now."""
        self.first.discard(inode)
        shutil.copyfile(self.aside / str(inode), self.aside / f"{inode}.synced")

    def after(self, kind: str, path: Path, other: Path | None = None) -> None:
        """Note what an operation has changed in names, or brought to the disk."""
        match kind:
            case "mkdir":
                self.folders[path] = Folder()
                self._change(path, self.folders[path])
            case "create":
                self._change(path, self._held(path))
            case "unlink" | "rmdir":
                self.folders.pop(path, None)
                self._change(path, None)
            case "link":
                assert other is not None
                self._change(other, self._held(other))
            case "rename":
                assert other is not None
                self._renamed(path, other)
            case "fsync":
                self._synced(path)

    def _folder(self, path: Path) -> Folder:
        if path not in self.folders:  # made by a library
            self.folders[path] = Folder()
        return self.folders[path]

    def _change(self, path: Path, entry: int | Folder | None) -> None:
        self._folder(path.parent).changes.append({path.name: entry})

    def _renamed(self, old: Path, new: Path) -> None:
        entry: int | Folder = self._folder(old) if is_folder(new) else self._held(new)
        for path in [path for path in self.folders if old in (path, *path.parents)]:
            self.folders[new / path.relative_to(old)] = self.folders.pop(path)
        if old.parent == new.parent:
            self._folder(new.parent).changes.append({old.name: None, new.name: entry})
        else:
            self._change(new, entry)
            self._change(old, None)

    def _synced(self, path: Path) -> None:
        if is_folder(path):
            folder = self._folder(path)
            folder.entries, folder.changes = self._listed(path), []
        else:
            self._bring(self._held(path))

    def _listed(self, path: Path) -> dict[str, int | Folder]:
        return {below.name: self._folder(below) if is_folder(below) else self._held(below) for below in path.iterdir()}

    def fail(self) -> None:
        """Write down what is on the disk, for `after_loss`: the process that did the work is about to die."""
        self._unseen(self.root)
        synced = {path.stem for path in self.aside.glob("*.synced")} | set(map(str, self.first))
        facts = {"tree": _plain(self.folders[self.root]), "synced": sorted(synced)}
        Path(self.aside, "disk.json").write_text(json.dumps(facts))

    def _unseen(self, path: Path) -> None:
        """Names that a library made are the latest changes."""
        folder = self._folder(path)
        known = set(folder.entries).union(*folder.changes)
        for name, entry in self._listed(path).items():
            if name not in known:
                folder.changes.append({name: entry})
            if isinstance(entry, Folder):
                self._unseen(path / name)


def is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _plain(entry: int | Folder | None) -> Any:
    if not isinstance(entry, Folder):
        return entry
    changes = [{name: _plain(new) for name, new in change.items()} for change in entry.changes]
    return [{name: _plain(old) for name, old in entry.entries.items()}, changes]


def after_loss(root: Path, aside: Path, loss: Loss, chance: random.Random) -> None:
    """Put `root` into the state in which the power left it, and forget `aside`."""
    facts = json.loads((aside / "disk.json").read_text())
    shutil.rmtree(root)
    _restore(root, facts["tree"], aside, set(facts["synced"]), loss, chance)
    shutil.rmtree(aside)


def _restore(path: Path, entry: Any, aside: Path, synced: set[str], loss: Loss, chance: random.Random) -> None:
    if isinstance(entry, int):
        _restore_file(path, str(entry), aside, synced, loss, chance)
        return
    names, changes = entry
    path.mkdir()
    for change in changes[: {"all": 0, "contents": len(changes), "mixture": chance.randint(0, len(changes))}[loss]]:
        names |= change
    for name, below in names.items():
        if below is not None:
            _restore(path / name, below, aside, synced, loss, chance)


def _restore_file(path: Path, inode: str, aside: Path, synced: set[str], loss: Loss, chance: random.Random) -> None:
    """One inode may have several names."""
    left = aside / f"{inode}.left"
    if not left.exists():
        now, brought = (aside / inode).read_bytes(), aside / f"{inode}.synced"
        old = brought.read_bytes() if brought.exists() else now if inode in synced else b""
        more = max(0, len(now) - len(old))
        further = [old, now, now[: len(old) + chance.randint(0, more)], old + b"\0" * more]
        left.write_bytes(chance.choice(further) if loss == "mixture" and now != old else old)
    link(left, path)
