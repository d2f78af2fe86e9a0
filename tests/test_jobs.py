"""The job scripts: what they ask SLURM for, held against golden texts."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.__main__ import main
from stages.pipeline import stages
from tests.fake_slurm import SCRIPTS, FakeSlurm, put
from tests.fake_stages import ROOT

GOLDEN = ROOT / "tests" / "golden"
SHELL = [*sorted((ROOT / "jobs").glob("*.sh")), ROOT / "run_all.sh", ROOT / "run_tests.sh", ROOT / ".ci" / "run"]


def asked_for(script: Path) -> dict[str, str]:
    """{option: value} of the #SBATCH lines."""
    lines = [line.removeprefix("#SBATCH --") for line in script.read_text().splitlines() if line.startswith("#SBATCH ")]
    return {key: value for key, _, value in (line.partition("=") for line in lines)}


def hold_against(name: str, text: str) -> None:
    """Compare with a golden file, or write it if that is asked for."""
    file = GOLDEN / name
    if os.environ.get("ACCEPT_GOLDEN"):
        file.write_text(text)
    diff = difflib.unified_diff(file.read_text().splitlines(), text.splitlines(), f"tests/golden/{name}", "now", lineterm="")
    found = "\n".join(diff)
    if found:
        pytest.fail(
            f"{found}\n\nIf this is meant: ACCEPT_GOLDEN=1 python -m pytest tests/test_jobs.py, then commit the change.", pytrace=False
        )


def test_difference_from_a_golden_file_is_shown_with_the_way_to_accept_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ACCEPT_GOLDEN", raising=False)
    monkeypatch.setitem(globals(), "GOLDEN", tmp_path)
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    with pytest.raises(pytest.fail.Exception) as caught:
        hold_against("a.txt", "one\n2\n")
    for words in ("-two\n+2", "tests/golden/a.txt", "ACCEPT_GOLDEN=1 python -m pytest tests/test_jobs.py"):
        assert words in str(caught.value)
    monkeypatch.setenv("ACCEPT_GOLDEN", "1")
    hold_against("a.txt", "one\n2\n")
    assert (tmp_path / "a.txt").read_text() == "one\n2\n"


def test_sbatch_lines_are_the_golden_ones() -> None:
    blocks = [[f"{path.name}:", *(line for line in path.read_text().splitlines() if line.startswith("#SBATCH"))] for path in SCRIPTS]
    hold_against("sbatch_lines.txt", "\n\n".join("\n".join(block) for block in blocks) + "\n")


def test_scripts_differ_in_their_sbatch_lines_alone() -> None:
    rest = {"\n".join(line for line in path.read_text().splitlines() if not line.startswith("#SBATCH")) for path in SCRIPTS}
    assert len(rest) == 1


def test_names_of_script_job_log_and_stage_fit() -> None:
    assert len(SCRIPTS) == len(stages())
    for stage, path in zip(stages(), SCRIPTS, strict=True):
        options, name = asked_for(path), path.stem
        assert name.startswith(f"job_{stage.number}_")
        assert stage.name.endswith(name.split("_", 2)[2])
        assert options["job-name"] == name
        assert options["output"] == f"logs/{name}_%j.out"


def test_gpu_stages_ask_for_one_a100_and_the_others_for_none() -> None:
    assert [asked_for(path).get("gres") for path in SCRIPTS] == [None, *["gpu:a100:1"] * 6, None]


def test_every_job_can_be_stopped_in_time_and_come_back() -> None:
    for path in SCRIPTS:
        options = asked_for(path)
        assert re.fullmatch(r"B:USR1@\d+", options["signal"])
        assert "requeue" in options
        assert (options["open-mode"], options["nodes"]) == ("append", "1")
        hours, minutes, _ = map(int, options["time"].split(":"))
        assert int(options["signal"].split("@")[1]) < (60 * hours + minutes) * 60 / 10
    assert [asked_for(path)["time"] for path in SCRIPTS[2:4]] == ["24:00:00"] * 2


def frozen_paths(text: str) -> str:
    return re.sub(r"/\S*/submission/code-[0-9a-f]{12}", "<CODE>", text)


def test_dry_run_of_three_seeds_is_the_golden_one(slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--config", "pythia-1.4b", "--seeds", "42,1337,2024", "--dry-run"]) == 0
    hold_against("dry_run_3_seeds.txt", frozen_paths(capsys.readouterr().out))


def test_dry_run_typed_in_a_shell_is_the_golden_one(checkout_copy: Path, own_folders: Path) -> None:
    for name in ("sbatch", "squeue"):
        put(own_folders / "bin" / name, "exit 0")
    path = f"{own_folders}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "run_all.sh", "--config", "pythia-1.4b", "--dry-run"]
    shown = subprocess.run(command, cwd=checkout_copy, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=60)
    assert shown.returncode == 0, shown.stderr
    hold_against("dry_run_1_seed.txt", frozen_paths(shown.stdout))


def test_lines_of_the_dry_run_are_commands_that_a_shell_reads_back() -> None:
    for name, count in (("dry_run_1_seed.txt", 8), ("dry_run_3_seeds.txt", 8)):
        lines = [shlex.split(line) for line in (GOLDEN / name).read_text().splitlines()]
        assert len(lines) == count
        assert [Path(words[-3]).stem for words in lines] == [path.stem for path in SCRIPTS]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shell_scripts_are_clean() -> None:
    checked = subprocess.run(["shellcheck", "-x", *SHELL], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
