"""The shared cache: built once, checked whenever used, rebuilt when damaged, gone on with when interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import pytest

from utils.run.cache import cached
from utils.run.errors import StoppedInTime
from utils.run.preemption import Stop

STOP = Stop()


class Builder:
    """Counts its builds, and notes what it found in `state`."""

    def __init__(self) -> None:
        self.builds = 0
        self.found: list[list[str]] = []

    def __call__(self, target: Path, state: Path) -> None:
        self.builds += 1
        self.found.append(sorted(path.name for path in state.glob("*")))
        state.mkdir(exist_ok=True)
        (state / f"part_{self.builds}").write_text("done")
        (target / "data").write_text("content")


def test_built_once_for_equal_descriptions(tmp_path: Path) -> None:
    build = Builder()
    first = cached(tmp_path, "kind", {"a": 1, "b": [2]}, build, STOP)
    assert cached(tmp_path, "kind", {"b": [2], "a": 1}, build, STOP) == first
    assert (first / "data").read_text() == "content"
    assert build.builds == 1
    others = {cached(tmp_path, "kind", {"a": 2}, build, STOP), cached(tmp_path, "sort", {"a": 1, "b": [2]}, build, STOP)}
    assert len(others | {first}) == build.builds == 3
    assert not list(tmp_path.rglob("state"))


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda entry: (entry / "content/data").write_text("contenT"), "SHA-256"),
        (lambda entry: (entry / "content/data").write_text("cut"), "has 3 bytes, expected 7"),
        (lambda entry: (entry / "content/data").unlink(), "is missing"),
        (lambda entry: (entry / "manifest.json").write_text('{"files"'), "manifest.json is not readable"),
        (lambda entry: (entry / "manifest.json").write_text("{}"), "manifest.json is not readable"),
        (lambda entry: (entry / "manifest.json").write_text("[]"), "manifest.json is not readable"),
    ],
)
def test_damaged_entry_is_named_and_built_again(
    harm: Callable[[Path], object], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = Builder()
    content = cached(tmp_path, "kind", {}, build, STOP)
    harm(content.parent)
    assert cached(tmp_path, "kind", {}, build, STOP) == content
    assert build.builds == 2
    assert (content / "data").read_text() == "content"
    out = capsys.readouterr().out
    assert words in out
    assert str(content.parent) in out
    assert "building it again" in out
    cached(tmp_path, "kind", {}, build, STOP)
    assert build.builds == 2


def test_interrupted_build_keeps_its_state_and_nothing_else(tmp_path: Path) -> None:
    build = Builder()

    def interrupted(target: Path, state: Path) -> None:
        build(target, state)
        raise StoppedInTime("the test says so")

    for _ in range(2):
        with pytest.raises(StoppedInTime):
            cached(tmp_path, "kind", {}, interrupted, STOP)
    (entry,) = tmp_path.iterdir()
    assert sorted(path.name for path in entry.iterdir()) == [".lock", "state"]
    content = cached(tmp_path, "kind", {}, build, STOP)
    assert build.found == [[], ["part_1"], ["part_1", "part_2"]]
    assert sorted(path.name for path in entry.iterdir()) == [".lock", "content", "manifest.json"]
    assert content == entry / "content"


def test_state_of_a_build_that_was_killed_at_its_very_end_goes_away(tmp_path: Path) -> None:
    content = cached(tmp_path, "kind", {}, Builder(), STOP)
    (content.parent / "state/checkpoints").mkdir(parents=True)
    assert cached(tmp_path, "kind", {}, Builder(), STOP) == content
    assert sorted(path.name for path in content.parent.iterdir()) == [".lock", "content", "manifest.json"]


def test_killed_build_is_not_trusted(tmp_path: Path) -> None:
    build = Builder()
    content = cached(tmp_path, "kind", {}, build, STOP)
    (content.parent / "manifest.json").unlink()
    (content / "data").write_text("half")
    (content.parent / ".tmp-content-0123").mkdir()
    assert (cached(tmp_path, "kind", {}, build, STOP) / "data").read_text() == "content"
    assert build.builds == 2
    assert not list(tmp_path.rglob(".tmp-*"))


def test_second_user_waits_for_the_first_and_builds_nothing(tmp_path: Path) -> None:
    began, go_on, slow, fast = Event(), Event(), Builder(), Builder()

    def held(target: Path, state: Path) -> None:
        began.set()
        assert go_on.wait(30)
        slow(target, state)

    first = Thread(target=cached, args=(tmp_path, "kind", {}, held, STOP))
    second = Thread(target=cached, args=(tmp_path, "kind", {}, fast, STOP))
    first.start()
    assert began.wait(30)
    second.start()
    assert second.is_alive()
    go_on.set()
    first.join()
    second.join()
    assert (slow.builds, fast.builds) == (1, 0)


def test_waiting_for_a_build_ends_when_asked_to_stop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop = Stop()
    stop.reason = "signal SIGUSR1"

    def build_twice(target: Path, state: Path) -> None:
        with pytest.raises(StoppedInTime, match="SIGUSR1"):
            cached(tmp_path, "kind", {}, Builder(), stop)

    cached(tmp_path, "kind", {}, build_twice, STOP)
    assert "waiting for process" in capsys.readouterr().out
