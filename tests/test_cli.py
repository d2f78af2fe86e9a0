"""The command line: what it accepts, and exit code 2 with one clear message for what it does not."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from configs.presets import load
from configs.schema import Experiment
from stages import __main__ as whole
from stages import pipeline
from stages.pipeline import MODULES, depends_on, main, stages
from tests.fake_stages import NUMBERS, PIPELINE, ROOT, TINY, TOTAL
from utils.run.errors import DONE, FAILED, REFUSED, STOPPED
from utils.run.preemption import Stop
from utils.run.stage import Stage


@pytest.fixture(autouse=True)
def no_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handlers of the test run stay as they are."""
    monkeypatch.setattr(Stop, "listen", lambda self: None)


class Calls(list[tuple[str, int]]):
    """Stands in for run_stage: notes (stage, seed), and answers with a code."""

    codes: dict[str, int]
    configs: list[Experiment]
    discards: set[bool]

    def __call__(self, stage: Stage, config: Experiment, seed: int, chain: Sequence[Stage], stop: Stop, discard: bool) -> int:
        self.append((stage.name, seed))
        self.configs.append(config)
        self.discards.add(discard)
        return self.codes.get(stage.name, DONE)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    fake = Calls()
    fake.codes, fake.configs, fake.discards = {}, [], set()
    monkeypatch.setattr(pipeline, "run_stage", fake)
    return fake


def one(stage: Stage, *arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as left:
        main(stage, arguments)
    return left.value.code


BAD = [
    (["--config", "minni"], ["no preset 'minni'", "did you mean 'mini'", "Shipped presets: "]),
    (["--config", "nowhere/own.yaml"], ["found no file nowhere/own.yaml"]),
    (["--set", "training.stepz=1"], ["training.stepz: unknown key", "did you mean 'training.steps'"]),
    (["--set", "training.steps=soon"], ["training.steps: found 'soon'", "valid integer"]),
    (["--set", "training.steps=-1"], ["training.steps: found -1", "greater than 0"]),
    (["--set", "training"], ["--set 'training': expected section.key=value"]),
    (["--run-name", "a b"], ["run_name: found 'a b'", "match pattern"]),
    (["--run-name", ""], ["run_name: found ''", "match pattern"]),
    (["--run-name", "it's"], ['run_name: found "it\'s"', "match pattern"]),
    (["--seeds", "1,x"], ["seeds.1: found 'x'", "valid integer"]),
    (["--seeds", "1,1"], ["names a seed twice"]),
    (["--seeds", "-1"], ["seeds.0: found -1"]),
    (["--seeds", ""], ["seeds: found []", "at least 1 item"]),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_bad_experiment_is_refused_by_every_command(
    arguments: list[str], words: list[str], calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"{arguments[0]}={arguments[1]}"]
    for command in ("stage", "plan", "status", "run"):
        assert (one(stages()[2], *given) if command == "stage" else whole.main([command, *given])) == REFUSED
        captured = capsys.readouterr()
        assert captured.out == ""
        for word in words:
            assert word in captured.err
    assert calls == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--from", "9"], ["--from", "9", "0, 1, 2"]),
        (["run", "--to", "x"], ["--to", "'x'", "int"]),
        (["run", "--frm", "1"], ["--frm"]),
        (["walk"], ["'walk'", "plan"]),
        ([], ["command"]),
    ],
)
def test_bad_usage_is_refused(arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        whole.main(arguments)
    assert left.value.code == REFUSED
    message = capsys.readouterr().err
    for word in words:
        assert word in message


def test_from_after_to_is_refused(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert whole.main(["run", "--from", "5", "--to", "2"]) == REFUSED
    assert "--from 5 comes after --to 2" in capsys.readouterr().err
    assert calls == []


@pytest.mark.parametrize(("seed", "words"), [("-5", "seeds.0: found -5"), ("x", "invalid int value: 'x'")])
def test_bad_seed_of_one_stage_is_refused(seed: str, words: str, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert one(stages()[2], f"--seed={seed}") == REFUSED
    assert words in capsys.readouterr().err
    assert calls == []


def test_one_stage_runs_for_every_seed_or_the_one_asked_for(calls: Calls) -> None:
    training, summary = stages()[2], stages()[7]
    assert one(training, "--seeds", "1,2,3") == DONE
    assert one(training, "--seeds", "1,2,3", "--seed", "2") == DONE
    assert one(training, "--seed", "9") == DONE
    assert one(summary, "--seeds", "1,2,3", "--discard") == DONE
    train = training.name
    assert calls == [(train, 1), (train, 2), (train, 3), (train, 2), (train, 9), (summary.name, 1)]
    assert [config.seeds for config in calls.configs[3:]] == [(1, 2, 3), (9,), (1, 2, 3)]
    assert calls.discards == {False, True}


def test_run_goes_in_order_through_the_chosen_stages_and_seeds(calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert whole.main(["run", "--config", TINY, "--seeds", "1,2", "--from", "5", "--run-name", "007"]) == DONE
    assert calls == [("uat", 1), ("uat", 2), ("hotflip", 1), ("hotflip", 2), ("aggregate", 1)]
    assert {config.run_name for config in calls.configs} == {"007"}
    assert "foundation_llm_final_results/007/experiment_summary.txt" in capsys.readouterr().out
    assert whole.main(["run", "--config", TINY, "--to", "1"]) == DONE
    assert calls[5:] == [("setup", 42), ("monotonicity", 42)]
    assert "All stages are complete" not in capsys.readouterr().out


@pytest.mark.parametrize("code", [FAILED, REFUSED, STOPPED])
def test_first_code_that_is_not_0_ends_the_run(code: int, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    calls.codes = {"train_baseline": code}
    assert whole.main(["run", "--config", TINY]) == code
    assert [name for name, _ in calls] == ["setup", "monotonicity", "train_baseline"]
    assert "All stages are complete" not in capsys.readouterr().out


def test_a_reader_who_has_read_enough_ends_a_command() -> None:
    """As `| head` does; without a traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "stages", "plan"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (whole.UNREAD, "")


def test_a_lost_file_system_is_no_reader_who_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Python gives both the class BrokenPipeError."""

    def lost(*arguments: object) -> int:
        raise OSError(errno.ESHUTDOWN, os.strerror(errno.ESHUTDOWN), "manifest.json")

    monkeypatch.setattr(whole, "_run", lost)
    assert whole.main(["run"]) == FAILED
    assert "cannot write or read manifest.json: Cannot send after transport endpoint shutdown" in capsys.readouterr().err


def test_status_starts_nothing(own_folders: Path, calls: Calls, capsys: pytest.CaptureFixture[str]) -> None:
    assert whole.main(["status", "--config", TINY, "--seeds", "1,2"]) == DONE
    assert capsys.readouterr().out.count("not begun") == 15
    assert list(own_folders.iterdir()) == []
    assert calls == []


def test_plan_is_the_drawn_graph(capsys: pytest.CaptureFixture[str]) -> None:
    drawn = {0: [], 1: [0], 2: [0], 3: [1], 4: [2, 3], 5: [2, 3], 6: [2, 3], 7: [4, 5, 6]}
    assert {stage.number: depends_on(stage, stages()) for stage in stages()} == drawn
    assert whole.main(["plan"]) == DONE
    out = capsys.readouterr().out
    assert "7 aggregate: " in out
    assert "waits for 4, 5, 6" in out
    assert "0 setup: " in out
    assert "writes evaluation" not in out
    assert "waits for nothing" in out


def test_declarations_fit_together() -> None:
    chain = stages()
    assert [stage.label for stage in chain] == list(MODULES)
    written = [name for stage in chain for name in stage.writes]
    assert len(set(written)) == len(written)
    settings = load(TINY).model_dump(mode="json")
    for stage in chain:
        earlier = {name for other in chain[: stage.number] for name in other.writes}
        assert set(stage.reads) <= earlier
        for key in stage.config_keys:
            value = settings
            for part in key.split("."):
                value = value[part]
    assert depends_on(TOTAL, PIPELINE) == [1]
    assert depends_on(NUMBERS, PIPELINE) == []


def shell(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | variables
    return subprocess.run([*map(str, command)], cwd="/", env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config", "minni"], "no preset 'minni'"),
        (["--config", TINY, "--set", "uat.stepz=1"], "uat.stepz: unknown key"),
        (["--config", TINY, "--from", "8"], "invalid choice: 8"),
        (["--config", TINY, "--from", "3", "--to", "3"], "run stage 1 (monotonicity, seed 42) first"),
        (["--frob"], "unrecognized arguments: --frob"),
        (["--config"], "--config: expected one argument"),
    ],
)
def test_run_all_passes_refusals_on_without_a_traceback(arguments: list[str], words: str) -> None:
    result = shell("bash", ROOT / "run_all.sh", "--local", *arguments)
    assert result.returncode == REFUSED
    assert words in result.stderr
    assert "Traceback" not in result.stderr + result.stdout


def test_run_all_tells_help_plan_and_status(checkout_copy: Path) -> None:
    assert "--seeds N,N,..." in shell("bash", ROOT / "run_all.sh", "--help").stdout
    assert "7 aggregate" in shell("bash", ROOT / "run_all.sh", "--plan").stdout
    result = shell("bash", checkout_copy / "run_all.sh", "--status", "--config", TINY)
    assert result.returncode == DONE
    assert result.stdout.count("not begun") == 8


def test_run_tests_refuses_an_unknown_kind() -> None:
    result = shell("bash", ROOT / "run_tests.sh", "some")
    assert result.returncode == REFUSED
    assert "unknown kind of test 'some'; expected quick, unit" in result.stderr


def test_stage_script_runs_as_a_module() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "stages.stage_4_evaluate", "--config", TINY], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == REFUSED
    assert "the input 'base_model' is missing" in result.stderr
    assert "run stage 0 (setup, seed 42) first" in result.stderr
