"""Derived data that several runs share: built once under a lock, checked against its checksums whenever it is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.run.artifacts import Listed, damage, inventory, published, read_json, remove, sweep_temporaries, value_digest, write_json
from utils.run.errors import InputError
from utils.run.lock import locked
from utils.run.preemption import Stop


def cached(root: Path, kind: str, description: dict[str, Any], build: Callable[[Path, Path], None], stop: Stop) -> Path:
    """Return the folder that `build(target, state)` fills for this description.

    `state` survives an interrupted build, so that a long one can go on. A damaged entry is named and built again.
    """
    entry = root / f"{kind}-{value_digest(description)[:16]}"
    content, mark = entry / "content", entry / "manifest.json"
    with locked(entry, queue=stop):
        sweep_temporaries(entry)
        if mark.exists():
            fault = _fault(content, mark)
            if fault is None:
                remove(entry / "state")  # of a build that was killed at its very end
                return content
            print(f"  cache: {fault}; building it again")
            remove(mark)
        with published(content) as aside:
            aside.mkdir()
            build(aside, entry / "state")
        write_json(mark, {"description": description, "files": inventory(content)})
        remove(entry / "state")
    return content


def _fault(content: Path, mark: Path) -> str | None:
    try:
        return damage(content, read_json(mark, Listed)["files"])
    except InputError as error:
        return f"{mark} is not readable ({error})"
