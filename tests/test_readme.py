"""Every command of the README runs. Whole runs take the tiny experiment in place of the default, to be done in seconds."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from stages.__main__ import main
from tests.conftest import COMMANDS_OF_README, RUNS_OF_README
from tests.fake_stages import ROOT, TINY

pytestmark = pytest.mark.integration


def final(root: Path, run: str) -> dict:
    return json.loads((root / "project" / "foundation_llm_final_results" / run / "final_results.json").read_text())


def test_readme_names_the_known_commands() -> None:
    rest = [command for command in COMMANDS_OF_README if command not in RUNS_OF_README]
    stage = ".venv/bin/python -m stages.stage_3_train_monotonic --config mini --seed 42"
    # their own tests call these two, .ci/run starts them
    verify = [".venv/bin/python verify_local.py", ".venv/bin/python verify_downloads.py --quick"]
    assert rest == ["bash run_tests.sh", *verify, stage]


@pytest.mark.parametrize("option", ["--help", "--plan", "--status"])
def test_information(option: str, checkout_copy: Path) -> None:
    assert f"bash run_all.sh {option}" in RUNS_OF_README
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shown = subprocess.run(["bash", "run_all.sh", option], cwd=checkout_copy, env=environment, capture_output=True, text=True, check=True)
    assert {"--help": "--discard", "--plan": "7 aggregate", "--status": "7 aggregate"}[option] in shown.stdout
    assert shown.stderr == ""


def test_first_command_without_sbatch(filled_cache: Path) -> None:
    assert RUNS_OF_README[0] == "bash run_all.sh"
    environment = os.environ | {"PATH": _path_without("sbatch", filled_cache / "bin")}
    shown = subprocess.run(["bash", "run_all.sh", "--config", TINY], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "no sbatch on the PATH" in shown.stdout and "experiment_summary.txt" in shown.stdout


def _path_without(program: str, folder: Path) -> str:
    """A folder with links to all programs of the PATH but one."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for path in Path(place).glob("*"):
            if path.name != program and not (folder / path.name).exists():
                (folder / path.name).symlink_to(path)
    return str(folder)


def test_softplus_run(filled_cache: Path) -> None:
    (command,) = [command for command in RUNS_OF_README if "softplus" in command]
    assert main(["run", "--config", TINY, *shlex.split(command)[2:]]) == 0
    assert final(filled_cache, "softplus")["certificate"]["42"]["ffn_monotone"] is True


def test_run_of_two_seeds(two_seeds: Path) -> None:
    findings = final(two_seeds, "two-seeds")["key_findings"]
    assert set(findings["perplexity_ratio_by_seed"]) == {"42", "1337"}


def test_presets_named_in_the_readme_exist() -> None:
    named = [
        word for command in RUNS_OF_README for flag, word in zip(command.split(), command.split()[1:], strict=False) if flag == "--config"
    ]
    assert all((ROOT / "configs" / f"{name}.yaml").is_file() for name in named)


def test_places_named_in_the_readme_exist() -> None:
    places = [line.split("`")[1] for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
    assert len(places) > 10 and all((ROOT / place).exists() for place in places), places
