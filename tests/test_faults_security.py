"""The campaign of security, small; and whether each of its looks notices what it looks for."""

from __future__ import annotations

import os
import shlex
from itertools import islice
from pathlib import Path

import pytest

from configs.schema import Paths
from tests.faults import scan, security, shells
from tests.faults.leavings import FORMULAS, TOKEN, examined, report_faults
from tests.faults.outcome import Outcome
from utils.report.table import Table
from utils.run.environment import keep_others_from_writing
from utils.run.errors import InputError
from utils.run.folders import Folders
from utils.slurm import snapshot


def fallen(outcomes: list[Outcome]) -> list[Outcome]:
    assert outcomes
    return [outcome for outcome in outcomes if not outcome.survived]


def test_the_program_calls_nothing_unsafe() -> None:
    assert len(scan.sources()) > 100
    assert {path.name: found for path in scan.sources() if (found := scan.scanned(path))} == {}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import torch\ntorch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("import pickle", "imports pickle"),
        ("from joblib import load", "imports joblib"),
        ("np.load(path)", "np.load without allow_pickle=False"),
        ("np.load(path, allow_pickle=True)", "np.load without allow_pickle=False"),
        ("yaml.load(text, yaml.Loader)", "yaml.load without a safe loader"),
        ("yaml.unsafe_load(text)", "yaml.unsafe_load without a safe loader"),
        ("eval(text)", "calls eval"),
        ("exec(text)", "calls exec"),
        ("os.system(text)", "calls os.system"),
        ("subprocess.run(text, shell=True)", "subprocess.run with shell=True"),
        ("AutoTokenizer.from_pretrained(name)", "AutoTokenizer.from_pretrained without trust_remote_code=False"),
        ("load(name, trust_remote_code=True)", "load with trust_remote_code=True"),
        ("dist.all_gather_object(found, value)", "calls dist.all_gather_object"),
        ("Environment(autoescape=False)", "a template without autoescape=True"),
        ("tempfile.mktemp()", "calls tempfile.mktemp"),
    ],
)
def test_planted_calls_are_found(source: str, words: str) -> None:
    assert words in [fault for _, fault in scan.unsafe(source)]


def test_safe_calls_are_not() -> None:
    safe = ["model.eval()", "re.compile(x)", "torch.load(p, weights_only=True)", "np.load(p, allow_pickle=False)", "yaml.load(t, _Loader)"]
    assert list(scan.unsafe("\n".join([*safe, "run(x, shell=False)"]))) == []


def test_hostile_files_are_not_run(tmp_path: Path) -> None:
    for part, count in ((security.pickles, 2), (security.remote_code, 3), (security.yaml_tags, 3), (security.links_and_paths, 2)):
        (tmp_path / part.__name__).mkdir()
        assert fallen(list(islice(part(tmp_path / part.__name__), count))) == []


def test_a_pickle_that_is_loaded_is_noticed(tmp_path: Path) -> None:
    outcome = security.harmless("planted", tmp_path, (tmp_path / security.CANARY).touch)
    assert not outcome.survived
    assert outcome.found == f"made {tmp_path / security.CANARY}"


@pytest.mark.integration
def test_a_name_that_a_shell_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a job's paths and variables; and without the quotes of the frozen run's shell lines it is noticed."""
    assert fallen(list(islice(shells._as_job("$(touch CANARY)", tmp_path / "quoted"), 2))) == []
    with monkeypatch.context() as patch:
        patch.setattr(snapshot.shlex, "quote", str)
        assert fallen(list(islice(shells._as_job("a; touch CANARY #", tmp_path / "bare"), 1)))
    assert shlex.quote("a b") == "'a b'"


@pytest.mark.parametrize("name", ["a\nb", "a\x1bb", os.fsdecode(b"a\xff")])
def test_folders_that_no_line_can_hold_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", f"/tmp/{name}")
    with pytest.raises(InputError, match=r"paths: found '/tmp/a.*, expected UTF-8 without line ends"):
        Folders.of(Paths(), "a")


def test_what_a_run_leaves_is_looked_at(tmp_path: Path) -> None:
    final = tmp_path / "project/foundation_llm_final_results/tiny"
    (final / "tables").mkdir(parents=True)
    for name in ("scratch", "temporary"):
        (tmp_path / name).mkdir()
    (final / "report.html").write_text("<script></script>")
    (final / "experiment_summary.txt").write_text("fine\n")
    (final / "tables/a.csv").write_text("model,value\nbase,-1.5\n")
    (final / "tables/a.tex").write_text("base & 5\\% \\\\\n")
    assert fallen(list(examined(tmp_path, ""))) == []
    (tmp_path / "scratch/log").write_text(TOKEN)
    (tmp_path / "scratch/log").chmod(0o666)
    (tmp_path / "temporary/left").touch()
    assert {outcome.fault.split(":")[0] for outcome in fallen(list(examined(tmp_path, "")))} == {
        "umask 000",
        "tokens in the environment",
        "temporary files",
    }
    (final / "report.html").write_text("<script></script><script>alert(1)</script>")
    (final / "experiment_summary.txt").write_text("\x1b[2J")
    (final / "tables/a.csv").write_text("model,value\n=cmd(),1\n")
    (final / "tables/a.tex").write_text("\\input{/etc/passwd}")
    assert len(fallen(list(report_faults(final)))) == 4


def test_no_formula_in_csv_and_no_command_in_latex(tmp_path: Path) -> None:
    words = [*FORMULAS, "\\input{/etc/passwd}", "100 %", "fine"]
    table = Table("a", "", "", [{"subset": word} for word in words])
    assert list(table.frame()["subset"]) == [f"'{word}" for word in FORMULAS] + words[len(FORMULAS) :]
    latex = table.latex()
    assert "\\input" not in latex and " 100 %" not in latex and "100 \\%" in latex


@pytest.mark.parametrize(("before", "after"), [(0o000, 0o002), (0o022, 0o022), (0o077, 0o077), (0o070, 0o072)])
def test_a_lax_umask_is_made_stricter_and_a_strict_one_is_kept(before: int, after: int) -> None:
    own = os.umask(before)
    try:
        keep_others_from_writing()
        assert os.umask(own) == after
    finally:
        os.umask(own)
