"""The contract of a stage, held against a pipeline of three fake stages, and against the real one where only that tells."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from configs.presets import load
from tests.fake_stages import NUMBERS, PIPELINE, ROOT, SQUARES, SQUARES_OF_42, TINY, TOTAL, StopAt, contents, folder_of, in_child, run
from utils.run.artifacts import SEAL, read_sealed, write_sealed, write_text
from utils.run.errors import DONE, FAILED, REFUSED, STOPPED, InputError, StoppedInTime, WorkFailed
from utils.run.folders import Folders
from utils.run.lock import locked
from utils.run.preemption import Stop
from utils.run.progress import Progress
from utils.run.stage import Context, Stage, run_stage, set_aside, standing
from utils.run.status import status_table


def must_not_run(ctx: Context) -> None:
    raise AssertionError("the stage ran")


def test_chain_of_stages_ends_with_what_plain_arithmetic_says(own_folders: Path) -> None:
    for seed in (42, 7):
        assert run(NUMBERS, seed=seed) == run(SQUARES, seed=seed) == DONE
    assert run(TOTAL, "seeds=[42, 7]") == DONE
    total = sum(number**2 for number in [*range(42, 54), *range(7, 19)])
    assert json.loads((folder_of(TOTAL, own_folders) / "total.json").read_text()) == total


def test_manifest_lists_every_output_with_its_checksum_and_is_newest(own_folders: Path) -> None:
    run(NUMBERS)
    run(SQUARES)
    folder = folder_of(NUMBERS, own_folders)
    manifest = json.loads((folder / "manifest.json").read_text())
    output = (folder / "below/numbers.json").read_bytes()
    assert manifest["outputs"] == {
        "numbers": {"path": "below/numbers.json", "files": {".": {"sha256": hashlib.sha256(output).hexdigest(), "bytes": len(output)}}}
    }
    assert manifest["identity"]["config"] == {"training.steps": 12}
    assert manifest["identity"]["seed"] == 42
    newest = max((path for path in folder.rglob("*.json")), key=lambda path: path.stat().st_mtime_ns)
    assert newest == folder / "manifest.json"
    assert not (folder_of(SQUARES, own_folders) / "state").exists()


def test_complete_stage_is_not_run_again(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(NUMBERS)
    before = contents(own_folders)
    (folder_of(NUMBERS, own_folders) / "state").mkdir()  # as a kill between manifest and clean-up leaves it
    assert run(replace(NUMBERS, run=must_not_run), stop=StopAt(1)) == DONE
    assert "already complete: " + str(folder_of(NUMBERS, own_folders)) in capsys.readouterr().out
    assert contents(own_folders) == before
    assert not (folder_of(NUMBERS, own_folders) / "state").exists()


def test_missing_input_is_named_with_the_stage_that_makes_it(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(SQUARES) == REFUSED
    message = capsys.readouterr().err
    assert str(folder_of(NUMBERS, own_folders) / "below/numbers.json") in message
    assert "run stage 0 (numbers, seed 42) first" in message
    assert contents(own_folders) == {}


def test_a_sum_goes_on_without_a_seed_that_is_not_done_and_names_it(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The reference's aggregation stopped. What no seed has made is refused; what is made later is taken in without asking."""
    two = ("seeds=[42, 43]",)
    assert run(TOTAL, *two) == REFUSED
    assert "run stage 1 (squares, seed 42) first" in capsys.readouterr().err
    for stage in (NUMBERS, SQUARES):
        run(stage, *two)
    capsys.readouterr()
    assert run(TOTAL, *two) == DONE
    squares = folder_of(SQUARES, own_folders, 43) / "squares.json"
    assert f"goes on without seed 43: the input 'squares' is missing: {squares} is not complete" in capsys.readouterr().out
    total = folder_of(TOTAL, own_folders) / "total.json"
    partial = json.loads(total.read_text())
    assert partial == sum(row["square"] for row in SQUARES_OF_42)
    assert run(replace(TOTAL, run=must_not_run), *two) == DONE
    for stage in (NUMBERS, SQUARES):
        run(stage, *two, seed=43)
    assert run(TOTAL, *two) == DONE
    assert json.loads(total.read_text()) == partial + sum((number + 1) ** 2 for number in range(42, 54))


def test_a_sum_refuses_a_seed_whose_input_is_damaged(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only what is not there is left out; what is wrong is for the user to settle."""
    two = ("seeds=[42, 43]",)
    for seed in (42, 43):
        for stage in (NUMBERS, SQUARES):
            run(stage, *two, seed=seed)
    cut(folder_of(SQUARES, own_folders, 43) / "squares.json")
    assert run(TOTAL, *two) == REFUSED
    assert "the input 'squares' is damaged" in capsys.readouterr().err


def test_changed_configuration_is_refused_and_nothing_is_lost(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(NUMBERS)
    before = contents(own_folders)
    assert run(NUMBERS, "training.steps=13") == REFUSED
    message = capsys.readouterr().err
    assert str(folder_of(NUMBERS, own_folders)) in message
    assert "config.training.steps: 12 -> 13" in message
    assert "--run-name" in message
    assert "--discard" in message
    assert contents(own_folders) == before


def test_key_that_the_stage_does_not_depend_on_may_change(own_folders: Path) -> None:
    assert run(NUMBERS) == DONE
    assert run(replace(NUMBERS, run=must_not_run), "uat.sweeps=1") == DONE


def test_input_made_by_another_configuration_is_refused(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(NUMBERS)
    assert run(SQUARES, "training.steps=13") == REFUSED
    message = capsys.readouterr().err
    assert "the input 'numbers' was made by another configuration" in message
    assert "training.steps: 12 -> 13" in message
    assert "run stage 0 (numbers, seed 42) again with --discard" in message


def test_discard_moves_the_old_folder_aside_and_starts_afresh(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(NUMBERS)
    folder = folder_of(NUMBERS, own_folders)
    before = contents(folder)
    assert run(NUMBERS, "training.steps=13", discard=True) == DONE
    (aside,) = folder.parent.glob(f"{folder.name}.*")
    assert contents(aside) == before
    assert str(aside) in capsys.readouterr().out
    assert len(json.loads((folder / "below/numbers.json").read_text())) == 13


def test_discard_leaves_a_sound_folder_alone(own_folders: Path) -> None:
    run(NUMBERS)
    before = contents(own_folders)
    assert run(replace(NUMBERS, run=must_not_run), discard=True) == DONE
    assert contents(own_folders) == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"42", b"43"))


@pytest.mark.parametrize(("harm", "words"), [(cut, " bytes, expected "), (flip, "SHA-256"), (Path.unlink, "is missing")])
def test_damaged_artefact_is_refused_by_maker_and_reader(
    harm: Callable[[Path], None], words: str, own_folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(NUMBERS)
    path = folder_of(NUMBERS, own_folders) / "below/numbers.json"
    sound = path.read_bytes()
    harm(path)
    assert run(SQUARES) == REFUSED
    message = capsys.readouterr().err
    assert "the input 'numbers' is damaged" in message
    assert str(path) in message
    assert words in message
    assert run(NUMBERS) == REFUSED
    message = capsys.readouterr().err
    assert str(path) in message
    assert words in message
    assert "--discard" in message
    assert run(NUMBERS, discard=True) == run(SQUARES) == DONE
    assert path.read_bytes() == sound


@pytest.mark.parametrize("name", ["started.json", "manifest.json"])
@pytest.mark.parametrize("text", ["", '{"identity": ', "[]", "{}"])
def test_damaged_mark_is_named_and_discard_helps(name: str, text: str, own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(NUMBERS)
    mark = folder_of(NUMBERS, own_folders) / name
    mark.write_text(text)
    assert run(NUMBERS) == REFUSED
    message = capsys.readouterr().err
    assert f"{mark}: expected" in message
    assert "--discard" in message
    assert run(NUMBERS, discard=True) == DONE


@pytest.mark.parametrize("name", ["started.json", "manifest.json"])
def test_one_changed_character_of_a_mark_is_noticed(name: str, own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where it is JSON still. The mark of an older version, which has no checksum, is taken as it is."""
    run(NUMBERS)
    mark = folder_of(NUMBERS, own_folders) / name
    whole = mark.read_text()
    for place in range(0, whole.index(SEAL) - 1, 7):
        mark.write_text(whole[:place] + chr(ord(whole[place]) ^ 1) + whole[place + 1 :])
        assert run(NUMBERS) == REFUSED, whole[place - 20 : place + 20]
        assert f"{mark}: expected" in capsys.readouterr().err
    mark.write_text(json.dumps({key: value for key, value in json.loads(whole).items() if key != SEAL}))
    assert run(NUMBERS) == DONE


@pytest.mark.parametrize("name", ["started.json", "manifest.json"])
def test_a_mark_that_is_a_link_to_nothing_is_not_taken_for_none(name: str, own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(NUMBERS)
    mark = folder_of(NUMBERS, own_folders) / name
    mark.unlink()
    mark.symlink_to("nowhere")
    assert run(NUMBERS) == REFUSED
    assert f"{mark}: not found, a link to nothing" in capsys.readouterr().err


def test_state_that_is_a_link_to_nothing_is_named(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(NUMBERS)
    assert run(SQUARES, stop=StopAt(3)) == STOPPED
    rows = folder_of(SQUARES, own_folders) / "state/squares.jsonl"
    rows.unlink()
    rows.symlink_to("nowhere/rows")
    assert run(SQUARES) == FAILED
    assert f"cannot write or read {rows}: No such file" in capsys.readouterr().err


def test_a_lock_that_is_a_link_is_refused(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(NUMBERS)
    lock = folder_of(NUMBERS, own_folders) / ".lock"
    lock.unlink()
    lock.symlink_to("nowhere/lock")
    assert run(NUMBERS) == REFUSED
    assert f"{lock}: found a link" in capsys.readouterr().err


def test_manifest_without_a_declared_output_is_refused(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(NUMBERS)
    mark = folder_of(NUMBERS, own_folders) / "manifest.json"
    found = read_sealed(mark)
    write_sealed(mark, found | {"outputs": {"other": found["outputs"]["numbers"]}})
    assert run(SQUARES) == run(NUMBERS) == REFUSED
    assert capsys.readouterr().err.count(f"{mark} lists no output 'numbers'") == 2


def test_work_whose_origin_is_unknown_is_not_gone_on_with(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(NUMBERS)
    assert run(SQUARES, stop=StopAt(3)) == STOPPED
    folder = folder_of(SQUARES, own_folders)
    (folder / "started.json").unlink()
    assert run(SQUARES, "uat.sweeps=1") == REFUSED
    assert f"{folder / 'state'} is there, but no started.json" in capsys.readouterr().err
    assert run(SQUARES, "uat.sweeps=1", discard=True) == DONE
    (folder / "started.json").unlink()
    assert run(SQUARES, "uat.sweeps=2") == REFUSED  # the manifest still knows
    assert "config.uat.sweeps: 1 -> 2" in capsys.readouterr().err


def test_stage_that_forgets_an_output_is_not_complete(own_folders: Path) -> None:
    with pytest.raises(RuntimeError, match=r"without its declared output 'numbers': .*numbers.json is missing"):
        run(replace(NUMBERS, run=lambda ctx: None))
    assert not (folder_of(NUMBERS, own_folders) / "manifest.json").exists()


def test_kill_between_output_and_manifest_means_done_again(own_folders: Path) -> None:
    code = """
import os, signal
from tests.fake_stages import NUMBERS, run
from utils.run import manifest
manifest.inventory = lambda path: os.kill(os.getpid(), signal.SIGKILL)
run(NUMBERS)
"""
    assert in_child(code).returncode == -signal.SIGKILL
    folder = folder_of(NUMBERS, own_folders)
    assert (folder / "below/numbers.json").exists()
    assert not (folder / "manifest.json").exists()
    (folder / "below/numbers.json").write_text("half")
    (folder / "below/.tmp-numbers.json-0123").mkdir()
    assert run(SQUARES) == REFUSED
    assert run(NUMBERS) == DONE
    assert json.loads((folder / "below/numbers.json").read_text()) == list(range(42, 54))
    assert not list(folder.rglob(".tmp-*"))
    assert len(json.loads((folder / "manifest.json").read_text())["starts"]) == 2


def test_stop_saves_and_the_same_command_goes_on(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(NUMBERS)
    folder = folder_of(SQUARES, own_folders)
    for look in (3, 2, 3):  # the first look is the runner's own; the second time nothing is gained
        assert run(SQUARES, stop=StopAt(look)) == STOPPED
        assert not (folder / "manifest.json").exists()
    out = capsys.readouterr().out
    assert f"stopped in time (the test says so); the state is saved in {folder}" in out
    assert len((folder / "state/squares.jsonl").read_text().splitlines()) == 10
    assert run(SQUARES) == DONE
    assert json.loads((folder / "squares.json").read_text()) == SQUARES_OF_42


def test_stop_before_the_work_leaves_no_mark(own_folders: Path) -> None:
    assert run(NUMBERS, stop=StopAt(1)) == STOPPED
    assert contents(own_folders) == {}


def test_foreseen_failure_is_one_message_and_others_are_tracebacks(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def diverge(ctx: Context) -> None:
        raise WorkFailed("the loss is nan; lower the learning rate")

    def mistake(ctx: Context) -> None:
        (ctx.folder / "nowhere").read_bytes()

    assert run(replace(NUMBERS, run=diverge)) == FAILED
    assert "failed: the loss is nan; lower the learning rate" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        run(replace(NUMBERS, run=mistake))


def test_summary_is_redone_when_its_inputs_changed_and_the_old_one_is_kept(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (42, 7):
        assert run(NUMBERS, seed=seed) == run(SQUARES, seed=seed) == DONE
    run(TOTAL)
    folder = folder_of(TOTAL, own_folders)
    before = contents(folder)
    assert run(TOTAL, "seeds=[42, 7]") == DONE
    (aside,) = folder.parent.glob("tiny.*")
    assert contents(aside) == before
    assert f"the earlier results are kept in {aside}" in capsys.readouterr().out
    assert json.loads((folder / "total.json").read_text()) > json.loads((aside / "total.json").read_text())
    assert run(TOTAL, "seeds=[42, 7]", "report.confidence=0.9") == REFUSED
    assert "config.report.confidence: 0.95 -> 0.9" in capsys.readouterr().err


@pytest.mark.parametrize("discard", [False, True])
def test_folder_is_locked_during_the_work_also_after_it_was_moved_aside(discard: bool, own_folders: Path) -> None:
    def look(ctx: Context) -> None:
        with pytest.raises(InputError, match=rf"process {os.getpid()} on .* is at work here"), locked(ctx.folder):
            pass
        TOTAL.run(ctx)

    for seed in (42, 7):
        assert run(NUMBERS, seed=seed) == run(SQUARES, seed=seed) == DONE
    watched = replace(TOTAL, run=look)
    assert run(watched) == DONE
    assert run(watched, "seeds=[7]", *(["report.confidence=0.9"] if discard else []), discard=discard) == DONE
    assert len(list(folder_of(TOTAL, own_folders).parent.glob("tiny.*"))) == 1


def test_other_process_that_slips_in_after_the_move_is_not_trampled(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(NUMBERS)

    def move_and_be_overtaken(folder: Path) -> Path:
        aside = set_aside(folder)
        (folder / "started.json").write_text('{"identity": {"stage": "theirs"}, "starts": []}')
        return aside

    monkeypatch.setattr("utils.run.stage.set_aside", move_and_be_overtaken)
    assert run(replace(NUMBERS, run=must_not_run), "training.steps=13", discard=True) == REFUSED


def test_restarted_job_waits_for_its_first_start_to_end(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM may start a job again while its first process is still alive, on a node that it lost sight of."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    ready, folder = own_folders / "ready", folder_of(NUMBERS, own_folders)
    code = f"""
import time
from pathlib import Path
from utils.run.lock import locked
with locked(Path({str(folder)!r})):
    Path({str(ready)!r}).touch()
    time.sleep(1)
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT):
        while not ready.exists():
            time.sleep(0.01)
        asked = StopAt(10**6)
        asked.reason = "signal SIGUSR1"
        assert run(NUMBERS, stop=asked) == STOPPED  # asked to stop meanwhile: back into the queue, not refused
        assert run(NUMBERS) == DONE
        monkeypatch.delenv("SLURM_RESTART_COUNT")


def test_second_process_is_refused_and_told_who_the_first_is(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(NUMBERS, own_folders)
    code = f"""
import sys
from pathlib import Path
from utils.run.lock import locked
with locked(Path({str(folder)!r})):
    print("held", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        assert run(NUMBERS) == REFUSED
        message = capsys.readouterr().err
        assert f"{folder}: process {first.pid} on " in message
        assert "wait for it to end" in message
        first.kill()
    assert run(NUMBERS) == DONE  # the lock died with its owner


def test_owner_of_a_lock_inside_a_job_is_named_with_it(own_folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with locked(own_folders), pytest.raises(InputError, match=r"process \d+ on .* \(job 17\) is at work here"), locked(own_folders):
        pass


def test_set_aside_finds_a_free_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.run.stage.time.strftime", lambda *_: "20260101T000000")
    folder = tmp_path / "stage"
    folder.mkdir()
    for text in "abc":
        (folder / "file").write_text(text)
        set_aside(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "stage",
        "stage.20260101T000000",
        "stage.20260101T000000-1",
        "stage.20260101T000000-2",
    ]
    assert contents(tmp_path / "stage.20260101T000000-1") == {"file": b"b"}
    assert contents(folder) == {}


def test_changed_code_is_warned_of_on_going_on(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(NUMBERS)
    run(SQUARES, stop=StopAt(3))
    path = folder_of(SQUARES, own_folders) / "started.json"
    notes = read_sealed(path)
    notes["starts"][0]["code_revision"] = "0123abcd"
    write_sealed(path, notes)
    assert run(SQUARES) == DONE
    assert "warning: begun with code revision 0123abcd, going on with" in capsys.readouterr().out


def test_status_tells_complete_begun_damaged_and_not_begun(own_folders: Path) -> None:
    run(NUMBERS)
    run(SQUARES, stop=StopAt(3))
    config = load(TINY, ["seeds=[42, 7]"])
    for step in (5, 10):
        (folder_of(SQUARES, own_folders) / f"state/checkpoints/step_{step:08d}").mkdir(parents=True)
    damaged = folder_of(NUMBERS, own_folders, seed=7)
    damaged.mkdir(parents=True)
    (damaged / "manifest.json").write_text("{")
    (folder_of(SQUARES, own_folders) / "state/checkpoints/step_00000005/manifest.json").write_text('{"files": {}}')
    before = contents(own_folders)
    first, heads, *lines = status_table(PIPELINE, config).splitlines()
    assert first == f"run tiny in {own_folders / 'scratch/foundation_llm_work/tiny'}"
    assert heads.split() == ["stage", "seed", "state", "progress", "checkpoint", "starts"]
    rows = [line.split(maxsplit=4) for line in lines]
    assert [row[:3] for row in rows] == [
        ["0", "numbers", "42"],
        ["0", "numbers", "7"],
        ["1", "squares", "42"],
        ["1", "squares", "7"],
        ["2", "total", "all"],
    ]
    assert rows[0][3] == "complete" and rows[0][4].startswith("20") and rows[0][4].endswith(" 1")
    assert rows[1][3] == "damaged" and rows[1][4].startswith(f"{damaged / 'manifest.json'}: expected a JSON file")
    assert rows[2][3:] == ["begun", "step_00000005  1"]  # the newer folder has no manifest
    assert rows[3][3:] == rows[4][3:] == ["not", "begun"]
    assert contents(own_folders) == before


def test_status_tells_progress_speed_and_time_left(own_folders: Path) -> None:
    def work(ctx: Context) -> None:
        Progress("train", 12, done=2).advance(4, "loss 2.5")
        raise StoppedInTime("the test says so")

    run(NUMBERS)
    assert run(replace(SQUARES, run=work)) == STOPPED
    report = folder_of(SQUARES, own_folders) / "state/progress.json"
    facts = json.loads(report.read_text())
    report.write_text(json.dumps(facts | {"tokens_per_second": 12800.4, "seconds_left": 245.0}))
    _, heads, _, row, _ = status_table(PIPELINE, load(TINY)).splitlines()
    assert heads.split() == ["stage", "seed", "state", "progress", "tokens/s", "left", "starts"]
    assert " ".join(row.split()) == "1 squares 42 begun train 6/12, loss 2.5 12,800 4 min 05 s 1"
    for left, fits, words in ((3600 * 3 + 30, True, "3 h 00 min, enough"), (3600, False, "1 h 00 min, not enough"), (-5, True, "")):
        report.write_text(json.dumps(facts | {"deadline": time.time() + left, "fits": fits}))
        _, heads, _, row, _ = status_table(PIPELINE, load(TINY)).splitlines()
        assert ("in the job" in heads) == bool(words)
        assert words in row
        assert ("enough" in row) == bool(words)
    report.write_text(json.dumps({key: value for key, value in facts.items() if key not in ("deadline", "fits")}))  # an earlier version's
    assert "in the job" not in status_table(PIPELINE, load(TINY))
    report.write_text(json.dumps(facts | {"note": "", "tokens_per_second": None, "seconds_left": None}))
    assert status_table(PIPELINE, load(TINY)).splitlines()[3].split()[3:] == ["begun", "train", "6/12", "1"]
    report.write_text("{}")
    assert status_table(PIPELINE, load(TINY)).splitlines()[3].split()[3] == "damaged"
    assert run(SQUARES) == DONE
    assert not report.exists()


def stands(stage: Stage, *overrides: str, pipeline: tuple[Stage, ...] = PIPELINE) -> tuple[bool, str]:
    config = load(TINY, overrides)
    complete, reason = standing(stage, config, 42, pipeline, Folders.of(config.paths, config.run_name))
    return complete, reason or ""


def test_standing_is_what_a_start_would_find(own_folders: Path) -> None:
    assert stands(NUMBERS) == stands(SQUARES) == stands(TOTAL) == (False, "")
    run(NUMBERS)
    run(SQUARES, stop=StopAt(3))
    assert stands(NUMBERS) == (True, "")
    assert stands(SQUARES) == (False, "")  # begun
    run(SQUARES)
    run(TOTAL)
    before = contents(own_folders)
    assert stands(SQUARES) == stands(TOTAL) == (True, "")
    assert contents(own_folders) == before


@pytest.mark.parametrize("begun", [False, True])
def test_standing_of_another_configuration_or_version_is_refused(begun: bool, own_folders: Path) -> None:
    run(NUMBERS)
    run(SQUARES, stop=StopAt(3) if begun else None)
    complete, reason = stands(SQUARES, "uat.sweeps=1")
    assert not complete
    assert f"{folder_of(SQUARES, own_folders)} holds another experiment" in reason
    assert "config.uat.sweeps: 2 -> 1" in reason and "--discard" in reason
    complete, reason = stands(replace(SQUARES, version=2))
    assert not complete
    assert "version: 1 -> 2" in reason


def test_standing_on_changed_inputs_is_refused_but_a_summary_is_just_made_again(own_folders: Path) -> None:
    run(NUMBERS)
    run(SQUARES)
    run(TOTAL)
    run(NUMBERS, "training.steps=13", discard=True)
    complete, reason = stands(SQUARES, "training.steps=13")
    assert not complete
    assert "inputs.numbers: " in reason
    run(SQUARES, "training.steps=13", discard=True)
    assert stands(TOTAL, "training.steps=13") == (False, "")
    assert stands(TOTAL, "training.steps=13", "seeds=[42, 7]") == (False, "")


def test_standing_on_an_input_that_is_gone_is_open(own_folders: Path) -> None:
    run(NUMBERS)
    run(SQUARES)
    (folder_of(NUMBERS, own_folders) / "manifest.json").unlink()
    assert stands(SQUARES) == (False, "")


def test_standing_on_damaged_files_is_refused(own_folders: Path) -> None:
    run(NUMBERS)
    output, mark = (folder_of(NUMBERS, own_folders) / name for name in ("below/numbers.json", "manifest.json"))
    cut(output)
    complete, reason = stands(NUMBERS)
    assert not complete and f"a complete stage was damaged: {output} has " in reason
    mark.write_text("{")
    complete, reason = stands(NUMBERS)
    assert not complete and f"{mark}: expected a JSON file" in reason and "--discard" in reason


def test_an_input_made_from_older_work_is_refused(own_folders: Path) -> None:
    """A -> B -> C where C reads both: remaking A leaves B out of date, and C must not mix them."""

    def write(text: str) -> Callable[[Context], None]:
        return lambda ctx: write_text(next(ctx.folder / path for path in ctx.writes.values()), text)

    def pipeline(first: str, version: int = 1) -> list[Stage]:
        a = Stage(0, "a", "make a", (), {"a": "a.txt"}, (), write(first), version)
        b = Stage(1, "b", "make b", ("a",), {"b": "b.txt"}, (), write("b"))
        return [a, b, Stage(2, "c", "make c", ("a", "b"), {"c": "c.txt"}, (), write("c"))]

    config = load("mini")
    before, after, newer = pipeline("old"), pipeline("new"), pipeline("old", version=2)
    assert [run_stage(stage, config, 42, before, Stop()) for stage in before[:2]] == [0, 0]
    assert run_stage(newer[2], config, 42, newer, Stop()) == 2
    folder = before[0].folder(Folders.of(config.paths, config.run_name), 42)
    set_aside(folder)
    assert run_stage(after[0], config, 42, after, Stop()) == 0
    assert run_stage(after[2], config, 42, after, Stop()) == 2
    assert run_stage(after[1], config, 42, after, Stop(), discard=True) == 0
    assert run_stage(after[2], config, 42, after, Stop()) == 0
