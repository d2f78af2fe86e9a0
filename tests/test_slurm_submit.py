"""The commands submit and status: what is submitted, what is refused, what is said; SLURM is a list of jobs."""

from __future__ import annotations

import errno
import os
import re
import sys
from pathlib import Path

import pytest

from configs.presets import load_cluster
from stages import slurm as commands
from stages.__main__ import main
from stages.pipeline import stages
from tests.fake_slurm import FakeSlurm, finish, interrupt, make_chain, small_checkout
from tests.fake_stages import TINY
from utils.run.errors import DONE, FAILED, REFUSED
from utils.run.lock import locked
from utils.slurm import snapshot, submit
from utils.slurm.preflight import Check

Out = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def root(own_folders: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout that commands are typed in; what is looked at before submitting is found good."""
    checkout = small_checkout(own_folders / "checkout")
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(submit, "checks", lambda chain, stages: [Check("SLURM", "ok", f"{len(stages)} scripts")])
    return checkout


def tiny(*options: str) -> int:
    return main(["submit", "--config", TINY, *options])


def test_one_command_submits_the_chain_and_the_second_finds_nothing_to_do(slurm: FakeSlurm, root: Path, capsys: Out) -> None:
    assert tiny() == DONE
    assert slurm.waits == {
        "100": "",
        "101": "afterok:100",
        "102": "afterok:100",
        "103": "afterok:101",
        **dict.fromkeys(("104", "105", "106"), "afterok:102:103"),
        "107": "afterok:104:105:106",
    }
    out = capsys.readouterr().out
    assert "  job 103: stage 3 train_monotonic, afterok:101\n" in out
    assert "bash run_all.sh --status" in out and "bash run_all.sh --resume" in out
    code = snapshot.newest(root)
    assert code is not None and (code / "utils/a.py").is_file() and (root / "logs").is_dir()
    assert {job.comment for job in slurm.jobs.values()} == {str(code)}
    calls = len(slurm.said("sbatch"))
    assert tiny() == main(["submit", "--resume"]) == DONE
    assert capsys.readouterr().out.count("nothing to submit: 0 complete, 8 queued or running") == 2
    assert len(slurm.said("sbatch")) == calls


def test_several_seeds_are_arrays(slurm: FakeSlurm, capsys: Out) -> None:
    assert tiny("--seeds", "42,7") == DONE
    assert len(slurm.jobs) == 15
    assert slurm.waits["103_1"] == "aftercorr:101"
    assert "  job 104: stage 4 evaluate, seeds 42,7, aftercorr:102,aftercorr:103\n" in capsys.readouterr().out


def test_arrays_share_the_work_of_the_attacks(slurm: FakeSlurm, capsys: Out) -> None:
    """They wait for what the stage waits for, and the stage's own job for their end, whatever it is."""
    assert tiny("--set", "attack_workers.tasks=3") == DONE
    assert {job: slurm.waits[job] for job in slurm.waits if int(job[:3]) > 104} == {
        **dict.fromkeys(("105_0", "105_1", "105_2", "107_0", "107_1", "107_2"), "afterok:102:103"),
        "106": "afterok:102:103,afterany:105",
        "108": "afterok:102:103,afterany:107",
        "109": "afterok:104:106:108",
    }
    assert [slurm.jobs[job].name for job in ("105_0", "106", "107_2", "108")] == [
        "share_5_uat",
        "job_5_uat",
        "share_6_hotflip",
        "job_6_hotflip",
    ]
    assert "  job 105: an array that shares the work of the next one\n  job 106: stage 5 uat" in capsys.readouterr().out
    assert main(["submit", "--resume"]) == DONE
    assert "0 complete, 8 queued or running" in capsys.readouterr().out


def test_an_array_at_work_is_not_sent_again(slurm: FakeSlurm) -> None:
    """The stage's own job was cancelled: another one waits for the array that holds the folder."""
    assert tiny("--set", "attack_workers.tasks=2") == DONE
    for job in ("106", "108", "109"):
        slurm.jobs.pop(job)
    assert main(["submit", "--resume"]) == DONE
    names = [job.name for job in slurm.jobs.values()]
    assert names.count("share_5_uat") == 2 and names.count("share_6_hotflip") == 2
    waits = {slurm.jobs[job].name: slurm.waits[job] for job in slurm.waits if int(job[:3]) > 109}
    assert waits["job_5_uat"] == "afterok:102:103,afterany:105" and waits["job_6_hotflip"] == "afterok:102:103,afterany:107"


def test_arrays_that_share_the_work_of_several_seeds(slurm: FakeSlurm) -> None:
    """A seed's tasks stand together. They cannot wait for tasks of equal number, so they wait for whole arrays."""
    assert tiny("--seeds", "42,7", "--set", "attack_workers.tasks=2") == DONE
    assert {slurm.waits[f"105_{task}"] for task in range(4)} == {"afterok:102,afterok:103"}
    assert {slurm.waits[f"106_{task}"] for task in range(2)} == {"aftercorr:102,aftercorr:103,afterany:105"}


def test_dry_run_shows_the_arrays(slurm: FakeSlurm, capsys: Out) -> None:
    assert tiny("--dry-run", "--set", "attack_workers.tasks=2") == DONE
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and slurm.jobs == {}
    assert "--job-name=share_5_uat" in lines[5] and "--array=0,1" in lines[5] and "--dependency=afterok:JOB2:JOB3" in lines[5]
    assert "--dependency=afterok:JOB2:JOB3,afterany:SHARE5" in lines[6]


def test_dry_run_prints_the_lines_and_leaves_no_trace(slurm: FakeSlurm, own_folders: Path, root: Path, capsys: Out) -> None:
    before = sorted(own_folders.rglob("*"))
    assert tiny("--dry-run") == DONE
    printed = capsys.readouterr()
    assert printed.out.count("sbatch --job-name=job_") == 8
    assert "--dependency=afterok:JOB2:JOB3" in printed.out
    assert printed.err == f"run tiny in {own_folders}/scratch/foundation_llm_work/tiny\n"
    assert slurm.jobs == {} and sorted(own_folders.rglob("*")) == before
    assert tiny("--seeds", "42,7", "--dry-run") == DONE
    assert "JOB2_0:JOB2_1" not in capsys.readouterr().out.splitlines()[4]


def test_only_what_is_missing_is_submitted(slurm: FakeSlurm, root: Path, capsys: Out) -> None:
    chain = make_chain(root)
    finish(chain, range(3))
    interrupt(chain, 3, 42, 5)
    assert tiny("--to", "5") == DONE
    assert [job.name for job in slurm.jobs.values()] == ["job_3_monotonic", "job_4_evaluate", "job_5_uat"]
    finish(chain, range(3, 8))
    slurm.jobs.clear()
    capsys.readouterr()
    assert tiny() == DONE
    assert "nothing to submit: 8 complete, 0 queued or running" in capsys.readouterr().out


def test_stage_whose_inputs_nobody_makes_is_refused(slurm: FakeSlurm, root: Path, capsys: Out) -> None:
    finish(make_chain(root, "seeds=[42, 7]"), range(2), 42)
    capsys.readouterr()
    assert tiny("--seeds", "42,7", "--from", "3") == REFUSED
    assert (
        capsys.readouterr().err
        == "refused: stage 3 (train_monotonic) waits for stage 1, neither complete nor queued for seed 7; begin with it: --from 1\n"
    )
    assert slurm.jobs == {}


def test_another_configurations_folder_is_refused_or_moved_aside(slurm: FakeSlurm, root: Path, capsys: Out) -> None:
    chain = make_chain(root)
    finish(chain, range(3))
    capsys.readouterr()
    assert tiny("--set", "training.steps=13") == REFUSED
    assert "refused: " in (said := capsys.readouterr().err) and "config.training.steps: 12 -> 13" in said
    assert slurm.jobs == {}
    assert tiny("--set", "training.steps=13", "--discard") == DONE
    folder = stages()[2].folder(chain.folders, 42)
    (aside,) = folder.parent.glob("stage_2_train_baseline.*")
    assert f"moved to {aside}" in capsys.readouterr().out
    assert (aside / "manifest.json").exists() and list(folder.iterdir()) == []
    assert next(job.name for job in slurm.jobs.values()) == "job_2_baseline"


def test_failed_check_stops_the_submission(
    slurm: FakeSlurm, own_folders: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    found = [Check("SLURM", "ok", "fine"), Check("folders", "warn", "look here"), Check("disk", "no", "1 GB free")]
    monkeypatch.setattr(submit, "checks", lambda chain, stages: found)
    assert tiny() == REFUSED
    said = capsys.readouterr()
    assert "  ok    SLURM: fine\n  warn  folders: look here\n" in said.out
    assert (
        said.err == "  no    disk: 1 GB free\nnothing was submitted: correct what is marked 'no' above, then type the same command again\n"
    )
    assert slurm.jobs == {} and snapshot.newest(root) is None
    found.pop()
    assert tiny() == DONE


@pytest.mark.parametrize(("answer", "code"), [("n", REFUSED), ("", DONE), ("YES ", DONE), ("what?", REFUSED)])
def test_a_person_is_asked(answer: str, code: int, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    questions: list[str] = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: (questions.append(question), answer)[1])
    assert tiny() == code
    assert questions == ["submit 8 stages of run tiny? [Y/n] "]
    assert len(slurm.jobs) == (8 if code == DONE else 0)
    slurm.jobs.clear()
    assert tiny("--yes") == DONE
    assert len(questions) == 1


def test_refusal_half_way_leaves_the_beginning_and_resume_submits_the_rest(slurm: FakeSlurm, capsys: Out) -> None:
    slurm.refuses["sbatch --parsable --job-name=job_5"] = "Batch job submission failed: Job violates accounting/QOS policy"
    assert tiny() == FAILED
    said = capsys.readouterr().err
    assert said.startswith(
        "SLURM refused: sbatch: Batch job submission failed: Job violates accounting/QOS policy\nWhat is listed above stays"
    )
    assert "bash run_all.sh --resume" in said
    assert sorted(slurm.jobs) == ["100", "101", "102", "103", "104"]
    slurm.refuses.clear()
    assert main(["submit", "--resume"]) == DONE
    assert slurm.waits["107"] == "afterok:104:105:106"


def test_refusal_of_the_first_job_says_that_nothing_was_submitted(slurm: FakeSlurm, capsys: Out) -> None:
    slurm.refuses["sbatch"] = "Invalid qos"
    assert tiny() == FAILED
    assert capsys.readouterr().err.startswith("SLURM refused: sbatch: Invalid qos\nNothing was submitted.\n")


def test_controller_that_is_away_means_that_nothing_is_submitted(slurm: FakeSlurm, root: Path, capsys: Out) -> None:
    slurm.away = True
    assert tiny() == FAILED
    assert capsys.readouterr().err == "nothing was submitted: squeue gave no answer in 60 s\n"
    assert snapshot.newest(root) is None


def test_resume_replaces_a_failed_job_and_those_that_wait_for_ever(slurm: FakeSlurm, root: Path, capsys: Out) -> None:
    """A site that keeps what can never start; a job that waits only for what is still to come stays and is pointed at the new one."""
    tiny()
    finish(make_chain(root), range(2))
    slurm.jobs.pop("100"), slurm.jobs.pop("101")
    slurm.change("102", state="FAILED", reason="NonZeroExitCode")
    slurm.change("103", state="RUNNING", reason="None")
    for job in ("104", "105"):
        slurm.change(job, reason="DependencyNeverSatisfied")
    capsys.readouterr()
    assert main(["submit", "--resume"]) == DONE
    assert slurm.said("scancel") == ["scancel 104", "scancel 105"]
    assert {job.name: job.id for job in slurm.jobs.values() if int(job.id) > 107} == {
        "job_2_baseline": "108",
        "job_4_evaluate": "109",
        "job_5_uat": "110",
    }
    assert slurm.waits["109"] == slurm.waits["110"] == slurm.waits["106"] == "afterok:108:103"
    assert slurm.waits["107"] == "afterok:109:110:106"
    assert "waiting jobs 106, 107 now wait for these" in capsys.readouterr().out


def test_jobs_that_wait_for_what_they_should_are_left_alone(slurm: FakeSlurm, capsys: Out) -> None:
    tiny()
    del slurm.jobs["107"]
    assert main(["submit", "--resume"]) == DONE
    assert slurm.waits["108"] == "afterok:104:105:106"
    assert slurm.said("scontrol") == slurm.said("scancel") == []
    assert "now wait for these" not in capsys.readouterr().out


def test_second_submission_at_the_same_time_is_refused(slurm: FakeSlurm, root: Path, capsys: Out) -> None:
    with locked(make_chain(root).folder):
        assert tiny() == REFUSED
        assert "is at work here; wait for it to end" in capsys.readouterr().err
        assert tiny("--dry-run") == DONE
    assert slurm.jobs == {}


def test_place_that_cannot_be_written_is_named(own_folders: Path, capsys: Out) -> None:
    (own_folders / "file").write_text("")
    assert tiny("--set", f"paths.work={own_folders}/file/work") == FAILED
    assert f"cannot write or read {own_folders}/file/work/tiny/submission: Not a directory. What is" in capsys.readouterr().err


def test_what_cannot_be_read_now_is_not_moved_aside(
    slurm: FakeSlurm, root: Path, own_folders: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = make_chain(root)
    finish(chain, [0])
    before = sorted(chain.folders.run.glob("seed_42/*"))
    real = Path.read_text

    def read(path: Path, *arguments: str, **named: str) -> str:
        if path.name == "manifest.json":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(Path, "read_text", read)
    assert tiny("--discard") == FAILED
    assert "manifest.json: Input/output error" in capsys.readouterr().err
    assert slurm.jobs == {} and sorted(chain.folders.run.glob("seed_42/*")) == before


def test_own_cluster_file_and_unknown_one(slurm: FakeSlurm, own_folders: Path, capsys: Out) -> None:
    (own_folders / "mine.yaml").write_text("resources: {qos: long, gres: 'gpu:h100:1'}")
    assert tiny("--cluster", str(own_folders / "mine.yaml"), "--dry-run") == DONE
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sbatch")]
    assert all("--qos=long" in line for line in lines)
    assert ["--gres=gpu:h100:1" in line for line in lines] == [False, *[True] * 6, False]
    assert tiny("--cluster", "alpin") == REFUSED
    assert "no cluster 'alpin'" in (said := capsys.readouterr().err) and "did you mean 'alpine'?" in said


def test_default_on_a_cluster_is_the_study(capsys: Out) -> None:
    assert main(["submit", "--dry-run"]) == DONE
    assert capsys.readouterr().err.startswith("run pythia-1.4b in ")


# --- resume


def test_resume_takes_what_was_stored(slurm: FakeSlurm, root: Path, own_folders: Path, capsys: Out) -> None:
    assert tiny("--set", "uat.sweeps=1", "--seeds", "7", "--cluster", "cpu") == DONE
    first = snapshot.newest(root)
    assert first is not None
    slurm.jobs.clear()
    assert main(["submit", "--resume"]) == DONE
    second = snapshot.newest(root)
    assert second is not None
    assert snapshot.stored(first) == snapshot.stored(second)
    assert all("--partition" not in line and "--mem=4G" in line for line in slurm.said("sbatch"))
    slurm.jobs.clear()
    assert main(["submit", "--resume", "--cluster", "alpine"]) == DONE
    assert "--partition=aa100" in slurm.said("sbatch")[-2]
    third = snapshot.newest(root)
    assert third is not None and snapshot.stored(third) == (snapshot.stored(first)[0], load_cluster("alpine"))


@pytest.mark.parametrize("option", [["--config", "mini"], ["--set", "uat.sweeps=1"], ["--seeds", "7"]])
def test_resume_takes_no_other_configuration(option: list[str], capsys: Out) -> None:
    assert main(["submit", "--resume", *option]) == REFUSED
    assert "--resume takes the configuration that was submitted; leave out --config, --set and --seeds" in capsys.readouterr().err


def test_resume_without_a_submitted_run_is_refused(root: Path, own_folders: Path, capsys: Out) -> None:
    assert main(["submit", "--resume"]) == REFUSED
    said = capsys.readouterr().err
    assert said.startswith(f"no run was submitted from {root} yet; submit one: bash run_all.sh --config NAME. ")
    assert main(["submit", "--resume", "--run-name", "tiny"]) == REFUSED
    assert f"found no submitted run 'tiny' in {own_folders}/scratch/foundation_llm_work" in capsys.readouterr().err


def test_resume_by_name_finds_a_run_beside_the_last_one(slurm: FakeSlurm, own_folders: Path, capsys: Out) -> None:
    """The newest code of that run, also where paths.work is a place of its own."""
    place = ["--set", f"paths.work={own_folders}/place"]
    assert tiny(*place, "--run-name", "first") == tiny(*place, "--run-name", "second") == DONE
    slurm.jobs.clear()
    assert tiny(*place, "--run-name", "first", "--cluster", "cpu") == tiny(*place, "--run-name", "second") == DONE
    slurm.jobs.clear()
    capsys.readouterr()
    assert main(["submit", "--resume", "--run-name", "first", "--dry-run"]) == DONE
    printed = capsys.readouterr()
    assert printed.err == f"run first in {own_folders}/place/first\n"
    assert printed.out.count("--mem=4G") == 8


# --- status


def test_status_without_a_submission_is_the_plain_table(capsys: Out, own_folders: Path) -> None:
    assert main(["status", "--config", TINY]) == DONE
    out = capsys.readouterr().out
    assert out.count("not begun") == 8 and "Next:" not in out


def test_status_is_of_the_run_submitted_last(slurm: FakeSlurm, capsys: Out) -> None:
    assert tiny("--run-name", "first") == tiny("--run-name", "second") == DONE
    capsys.readouterr()
    assert main(["status"]) == DONE
    assert "/second\n" in (out := capsys.readouterr().out)
    assert "115  PENDING (Dependency)" in out and "Next: nothing to do" in out
    assert main(["status", "--run-name", "first"]) == DONE
    assert "/first\n" in (out := capsys.readouterr().out) and "107  PENDING (Dependency)" in out
    assert main(["status", "--config", TINY, "--run-name", "first"]) == DONE
    assert "107  PENDING (Dependency)" in capsys.readouterr().out


def test_status_of_a_run_that_is_gone_says_so(root: Path, own_folders: Path, capsys: Out) -> None:
    snapshot.remember(root, own_folders / "gone/code-1")
    assert main(["status"]) == DONE
    assert f"the run submitted last is gone: {own_folders}/gone/code-1: found no experiment.yaml" in capsys.readouterr().out
    assert main(["status", "--run-name", "tiny"]) == DONE
    assert "not begun" in capsys.readouterr().out
    assert main(["status", "--run-name", ""]) == REFUSED


def test_watch_goes_on_until_nothing_happens_by_itself(slurm: FakeSlurm, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    tiny()
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        assert len(naps) < 5, "it does not end"
        if len(naps) == 2:
            slurm.jobs.clear()

    monkeypatch.setattr(commands.time, "sleep", sleep)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    capsys.readouterr()
    assert main(["status", "--watch", "5"]) == DONE
    out = capsys.readouterr().out
    assert naps == [5.0, 5.0]
    assert len(re.findall(r"\x1b\[2J\x1b\[Hrun tiny", out)) == 3
    assert "Next: Then submit" not in out and out.rstrip().endswith("bash run_all.sh --resume")
    naps.clear()
    assert main(["status", "--watch"]) == DONE
    assert naps == []


def test_watch_is_left_by_ctrl_c(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    tiny()
    monkeypatch.setattr(commands.time, "sleep", interrupted)
    assert main(["status", "--watch"]) == 130


@pytest.mark.parametrize(("ends", "submitted"), [("CANCELLED", 8), ("COMPLETING", 0)])
def test_job_that_is_just_ending_is_waited_for(
    ends: str, submitted: int, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    """A cancelled job is still COMPLETING for some seconds; only then is it clear that its stage is missing."""
    tiny()
    for job in list(slurm.jobs):
        slurm.change(job, state="CANCELLED" if job != "100" else "COMPLETING")
    monkeypatch.setattr(submit, "ENDING_SECONDS", 5.0)
    clock = iter(range(100))
    monkeypatch.setattr(submit.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(submit.time, "sleep", lambda seconds: slurm.change("100", state=ends))
    before = len(slurm.jobs)
    assert main(["submit", "--resume", "--to", "0" if not submitted else "7"]) == DONE
    assert len(slurm.jobs) - before == submitted
    assert "waiting for the end of job 100" in capsys.readouterr().err


def test_resume_by_name_takes_what_was_submitted_last(slurm: FakeSlurm, root: Path) -> None:
    """A, B, then A again: it is A that goes on."""
    codes = []
    for options in ([], ["--cluster", "cpu"], []):
        slurm.jobs.clear()
        assert tiny(*options) == DONE
        codes.append(snapshot.newest(root))
    assert codes[0] == codes[2] != codes[1]
    slurm.jobs.clear()
    assert main(["submit", "--resume", "--run-name", "tiny"]) == DONE
    assert {Path(job.comment) for job in slurm.jobs.values()} == {codes[0]}
