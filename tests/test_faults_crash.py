"""The crash campaign in small, and what it says of writers that are not safe."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from configs.schema import Experiment
from tests.faults.crash import HANGS, Bench, End, Point, lost_steps, planned
from tests.faults.operations import Operation, Watch
from tests.faults.power import LOSSES, Disk, Loss, after_loss
from tests.killing import waited
from utils.run import artifacts, stage
from utils.run.artifacts import make_folder, sync, write_text

MARK = "scratch/foundation_llm_work/tiny/seed_42/stage_1_monotonicity/manifest.json"


@pytest.fixture
def bench(tiny: Experiment, finished: Path, loaded_once: None, own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # its threads do not survive a fork
    return Bench(tiny, finished, own_folders)


def at(found: list[Operation], kind: str, name: str) -> int:
    return next(number for number, each in enumerate(found, 1) if each.kind == kind and each.path.endswith(name))


@pytest.mark.integration
def test_training_goes_on_after_every_kind_of_end(bench: Bench) -> None:
    found, chance = bench.operations(2), random.Random(0)
    save = at(found, "rename", "checkpoints/step_00000008")
    ends = [End(at(found, "write", "optimizer.safetensors"), torn=True), End(save), End(save + 3, "mixture")]
    for end in ends:
        outcome = bench.tried(Point(2, (end,)), chance)
        assert outcome.survived and outcome.lost_steps == 0, outcome
    twice = bench.tried(Point(2, (End(save, "all"), End(40, torn=True), End(60, "mixture"))), chance)
    assert twice.survived and twice.fault.count("operation") == 3, twice


@pytest.mark.integration
def test_a_writer_that_does_not_sync_is_found_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    last = len(bench.operations(1))
    monkeypatch.setattr(artifacts, "sync", lambda path: None)
    outcome = bench.tried(Point(1, (End(last // 2, "contents"),)), random.Random(0))
    assert not outcome.survived and "started.json" in outcome.found


@pytest.mark.integration
def test_a_writer_that_does_not_rename_is_found_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def in_place(path: Path, near: Path | None = None) -> Iterator[Path]:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path

    monkeypatch.setattr(artifacts, "published", in_place)
    outcome = bench.tried(Point(1, (End(at(bench.operations(1), "write", "manifest.json"), torn=True),)), random.Random(0))
    assert not outcome.survived and "manifest.json" in outcome.found


@pytest.mark.integration
def test_what_nobody_sweeps_away_is_found_out(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    end = End(at(bench.operations(1), "rename", MARK))
    assert bench.tried(Point(1, (end,)), random.Random(0)).survived
    monkeypatch.setattr(stage, "sweep_temporaries", lambda folder: None)
    outcome = bench.tried(Point(1, (end,)), random.Random(0))
    assert not outcome.survived and "left over" in outcome.found and ".tmp-manifest.json" in outcome.found


def test_steps_that_are_made_again_are_counted() -> None:
    def saves(*steps: int, synced: bool = True) -> list[Operation]:
        return [
            Operation(kind, f"state/checkpoints{name}")
            for step in steps
            for kind, name in (("rename", f"/step_{step:08d}"), ("fsync" if synced else "open", ""), ("open", "/x"))
        ]

    assert lost_steps([saves(4, 8), saves(12)], [False]) == 0
    assert lost_steps([saves(4, 8), saves(8, 12)], [False]) == 4
    assert lost_steps([saves(4, 8), saves(4, 8, 12)], [True]) == 8
    assert lost_steps([saves(4, 8, synced=False), saves(4, 8, 12)], [True]) == 0  # nothing was promised
    assert lost_steps([saves(4), saves(8), saves(8, 12)], [False, False]) == 4
    assert lost_steps([saves(4)[:1], saves(4)], [False]) == 0  # the rename was not carried out


def test_points_are_spread_over_stages_and_kinds() -> None:
    found = {number: [Operation(kind, f"{place}") for kind in ("open", "write", "fsync") for place in range(9)] for number in range(8)}
    points = planned(found, 100, random.Random(0))
    assert len(points) == 100
    kinds = Counter((point.stage, found[point.stage][point.ends[0].number - 1].kind) for point in points)
    assert len(kinds) == 8 * 3
    assert sum(len(point.ends) > 1 for point in points) == 34
    assert {end.loss for point in points for end in point.ends} == {None, *LOSSES}


def raw(folder: Path) -> None:
    (folder / "new").write_text("new")


def synced_file(folder: Path) -> None:
    raw(folder)
    sync(folder / "new")


def synced_folder(folder: Path) -> None:
    raw(folder)
    sync(folder)


def published_file(folder: Path) -> None:
    write_text(folder / "old", "new")


def moved_alone(folder: Path) -> None:
    (folder / "aside").write_text("new")
    (folder / "aside").replace(folder / "old")


def below(folder: Path) -> None:
    (folder / "a").mkdir()
    write_text(folder / "a/new", "new")


def properly_below(folder: Path) -> None:
    make_folder(folder / "a/b")
    write_text(folder / "a/b/new", "new")


def appended(folder: Path) -> None:
    with (folder / "old").open("a") as handle:
        handle.write(" and new")


def removed(folder: Path) -> None:
    (folder / "old").unlink()


@pytest.mark.parametrize(
    ("work", "loss", "left"),
    [
        (raw, "all", {"old": "old"}),
        (raw, "contents", {"old": "old", "new": ""}),
        (synced_file, "all", {"old": "old"}),
        (synced_file, "contents", {"old": "old", "new": "new"}),
        (synced_folder, "all", {"old": "old", "new": ""}),
        (published_file, "all", {"old": "new"}),
        (moved_alone, "all", {"old": "old"}),
        (moved_alone, "contents", {"old": ""}),
        (below, "all", {"old": "old"}),
        (properly_below, "all", {"old": "old", "a/b/new": "new"}),
        (appended, "contents", {"old": "old"}),
        (removed, "all", {"old": "old"}),
        (removed, "contents", {}),
    ],
)
def test_what_a_loss_of_power_leaves(work: Callable[[Path], None], loss: Loss, left: dict[str, str], tmp_path: Path) -> None:
    root, log, aside = tmp_path / "root", tmp_path / "log", tmp_path / "aside"
    root.mkdir()
    (root / "old").write_text("old")

    def watched(last: int | None) -> int:
        if (child := os.fork()) == 0:
            try:
                Watch(root, log, last, disk=Disk(root, aside)).install()
                work(root)
                (root / "end").mkdir()
            finally:
                os._exit(0)
        return waited(child, HANGS)

    shutil.copytree(root, tmp_path / "copy")
    assert watched(None) == 0
    number = at(Operation.read(log), "mkdir", "end")
    shutil.rmtree(root)
    shutil.rmtree(aside)
    shutil.move(tmp_path / "copy", root)
    assert watched(number) == -signal.SIGKILL
    after_loss(root, aside, loss, random.Random(0))
    assert {path.relative_to(root).as_posix(): path.read_text() for path in root.rglob("*") if path.is_file()} == left
