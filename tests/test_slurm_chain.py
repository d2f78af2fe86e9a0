"""The jobs of a run: which are its own, what they do, how one is submitted, and what its folders tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.cluster import Cluster, Resources, StageResources
from stages.pipeline import stages
from tests.fake_slurm import FakeSlurm, finish, interrupt, make_chain, small_checkout
from utils.slurm import client, snapshot
from utils.slurm.chain import Chain
from utils.slurm.client import Job, SlurmError
from utils.slurm.plan import Queued, Submission

THREE = "seeds=[42, 7, 1337]"


@pytest.fixture
def root(own_folders: Path) -> Path:
    return small_checkout(own_folders / "checkout")


def job(identifier: str, name: str, comment: str = "", folder: str = "/", state: str = "PENDING", reason: str = "None") -> Job:
    number, _, task = identifier.partition("_")
    return Job(identifier, number, int(task) if task else None, name, state, reason, folder, comment)


# --- one job


def test_every_stage_has_one_script(root: Path) -> None:
    chain = make_chain(root)
    assert [chain.script(stage) for stage in stages()] == sorted(path.relative_to(root) for path in (root / "jobs").glob("job_*.sh"))


def test_script_is_that_of_the_frozen_code_once_it_is_written(root: Path) -> None:
    chain = make_chain(root, cluster=Cluster(resources=Resources(gres="gpu:1")))
    snapshot.Snapshot.of(root, chain.config, chain.cluster, "python").write()
    (chain.code / "jobs").mkdir(parents=True, exist_ok=True)
    (chain.code / "jobs/job_0_frozen.sh").write_text("#SBATCH --gres=gpu:a100:1\n")
    assert chain.script(stages()[0]) == Path("jobs/job_0_frozen.sh")
    assert chain.options(stages()[0]) == ["--gres=gpu:1"]


def test_command_of_a_plain_job(root: Path) -> None:
    chain = make_chain(root)
    assert chain.command(Submission(stages()[0], (42,), (), "")) == [
        "--job-name=job_0_setup",
        f"--comment={chain.code}",
        "--kill-on-invalid-dep=yes",
        str(chain.code / "jobs/job_0_setup.sh"),
        str(chain.code),
        "0",
    ]


def test_command_of_some_tasks_of_an_array_with_the_sites_options(root: Path) -> None:
    shared, own = Resources(partition="gpu", gres="gpu:1"), StageResources(train_baseline=Resources(time="01:00:00"))
    chain = make_chain(root, THREE, cluster=Cluster(resources=shared, stages=own, signal_seconds=30))
    assert chain.command(Submission(stages()[2], (42, 1337), (0, 2), "aftercorr:17"), restarts=3)[3:] == [
        "--array=0,2",
        "--output=logs/job_2_baseline_%A_%a.out",
        "--dependency=aftercorr:17",
        "--partition=gpu",
        "--gres=gpu:1",
        "--time=01:00:00",
        "--signal=B:USR1@30",
        str(chain.code / "jobs/job_2_baseline.sh"),
        str(chain.code),
        "3",
    ]


def test_submitted_job_is_recorded(root: Path, slurm: FakeSlurm) -> None:
    chain = make_chain(root, THREE)
    assert chain.recorded() == []
    assert chain.submit(Submission(stages()[2], (42, 1337), (0, 2), ""), by="run_all") == "100"
    chain.note(stages()[0], "17", [42], [], by="hand")
    first, second = chain.recorded()
    assert json.loads((chain.folder / "jobs.json").read_text()) == [first, second]
    assert {key: first[key] for key in first if key != "at"} == {
        "stage": 2,
        "job": "100",
        "seeds": [42, 1337],
        "tasks": [0, 2],
        "by": "run_all",
        "code": chain.code.name,
    }
    assert (second["stage"], second["job"], second["by"], second["tasks"]) == (0, "17", "hand", [])
    assert slurm.jobs["100_2"].folder == str(root)


def test_refused_job_is_not_recorded(root: Path, slurm: FakeSlurm) -> None:
    slurm.refuses["sbatch"] = "Invalid qos"
    chain = make_chain(root)
    with pytest.raises(SlurmError, match="Invalid qos"):
        chain.submit(Submission(stages()[0], (42,), (), ""), by="run_all")
    assert chain.recorded() == []


# --- the queue


def test_own_jobs_are_those_with_the_runs_comment(root: Path) -> None:
    chain = make_chain(root)
    mine = [
        job("1", "job_0_setup", str(chain.code)),
        job("2", "job_7_aggregate", str(chain.folder / "code-of-last-week")),
    ]
    others = [
        job("3", "job_0_setup", str(chain.folder.parent.with_name("other") / "submission/code-1")),
        job("4", "job_8_more", str(chain.code)),
        job("5", "job_0_setup!", str(chain.code)),
        job("6", "analysis", str(chain.code)),
        job("7", "job_0_setup", str(chain.folder)),
        job("8", "job_0_setup", "", str(root)),
    ]
    assert chain.own([*mine, *others]) == mine


def test_jobs_submitted_by_hand_belong_to_the_newest_run_of_the_checkout(root: Path) -> None:
    chain, other = make_chain(root), make_chain(root, "run_name=other")
    by_hand = [job("1", "job_2_baseline", "", str(root)), job("2", "job_2_baseline", "(null)", str(root))]
    elsewhere = [job("3", "job_2_baseline", "", "/another/checkout"), job("4", "job_2_baseline", "my words", str(root))]
    snapshot.remember(root, chain.code)
    assert chain.own([*by_hand, *elsewhere]) == by_hand
    assert other.own(by_hand) == []


def test_keys_of_plain_jobs_and_tasks(root: Path) -> None:
    chain = make_chain(root, THREE)
    code = str(chain.code)
    assert chain.keys(job("1", "job_2_baseline", code)) == [(2, 42), (2, 7), (2, 1337)]
    assert chain.keys(job("1_1", "job_3_monotonic", code)) == [(3, 7)]
    assert chain.keys(job("1_3", "job_3_monotonic", "(null)")) == []
    assert chain.keys(job("1_2", "job_3_monotonic", "")) == [(3, 1337)]


def test_keys_of_an_older_submission_are_those_of_its_own_seeds(root: Path) -> None:
    """The seeds were given in another order then; if that snapshot is gone, today's have to do."""
    older = make_chain(root, "seeds=[7, 42]")
    snapshot.Snapshot.of(root, older.config, older.cluster, "python").write()
    chain = make_chain(root, THREE)
    written = next(chain.folder.glob("code-*"))
    assert chain.keys(job("1_0", "job_2_baseline", str(written))) == [(2, 7)]
    (written / "cluster.yaml").write_text("nonsense: 1")
    assert chain.keys(job("1_0", "job_2_baseline", str(written))) == [(2, 42)]
    assert chain.keys(job("1_0", "job_2_baseline", str(chain.folder / "code-gone"))) == [(2, 42)]


def test_queued_are_live_jobs_with_the_live_tasks_of_their_array(root: Path) -> None:
    chain = make_chain(root, THREE)
    code = str(chain.code)
    jobs = [
        job("17_0", "job_2_baseline", code, state="COMPLETED"),
        job("17_1", "job_2_baseline", code, state="RUNNING"),
        job("17_2", "job_2_baseline", code),
        job("18", "job_7_aggregate", code),
        job("19_0", "job_3_monotonic", code, reason="DependencyNeverSatisfied"),
        job("20_0", "job_4_evaluate", "somebody's"),
    ]
    both = frozenset({1, 2})
    assert chain.queued(jobs) == {
        (2, 7): Queued("17", 1, both),
        (2, 1337): Queued("17", 2, both),
        **{(7, seed): Queued("18") for seed in (42, 7, 1337)},
    }


def test_first_of_two_jobs_for_the_same_work_counts(root: Path) -> None:
    chain = make_chain(root)
    twice = [job("17", "job_2_baseline", str(chain.code)), job("18", "job_2_baseline", str(chain.code))]
    assert chain.queued(twice) == {(2, 42): Queued("17")}


def test_waiting_jobs_are_pointed_at_the_new_makers_of_their_inputs(root: Path, slurm: FakeSlurm) -> None:
    chain = make_chain(root, THREE)
    code = str(chain.code)
    for identifier, name, state in (
        ("17_0", "job_3_monotonic", "PENDING"),
        ("17_1", "job_3_monotonic", "PENDING"),
        ("18_1", "job_4_evaluate", "RUNNING"),
        ("19", "job_7_aggregate", "PENDING"),
        ("20_1", "job_3_monotonic", "CANCELLED"),
        ("21_1", "job_5_uat", "PENDING"),
        ("23_2", "job_3_monotonic", "RUNNING"),
    ):
        slurm.add(identifier, name, state, comment=code)
    slurm.add("22_1", "job_3_monotonic", comment="/another/run/submission/code-1")
    new = {key: Queued(name, task, frozenset({task})) for key, name, task in [((1, 7), "30", 1), ((4, 7), "31", 1), ((1, 1337), "32", 2)]}
    jobs = client.queue()
    assert chain.repoint(jobs, chain.queued(jobs) | new, new) == ["17_1", "19"]
    assert slurm.waits == {"17_1": "afterok:30_1", "19": "afterany:31_1:21_1"}


def test_arrays_that_share_work_are_pointed_too_and_still_waited_for(root: Path, slurm: FakeSlurm) -> None:
    chain = make_chain(root, THREE, "attack_workers.tasks=2")
    code = str(chain.code)
    for identifier, name, state in (
        ("17_1", "share_5_uat", "PENDING"),
        ("17_2", "share_5_uat", "PENDING"),
        ("17_3", "share_5_uat", "RUNNING"),
        ("17_9", "share_5_uat", "PENDING"),
        ("18_0", "job_5_uat", "PENDING"),
        ("18_1", "job_5_uat", "PENDING"),
        ("19_1", "job_6_hotflip", "PENDING"),
        ("21_2", "share_6_hotflip", "COMPLETED"),
    ):
        slurm.add(identifier, name, state, comment=code)
    slurm.add("22_2", "share_6_hotflip", comment="/another/run/submission/code-1")
    new = {(2, 7): Queued("30", 1, frozenset({1}))}
    jobs = client.queue()
    assert chain.repoint(jobs, chain.queued(jobs) | new, new) == ["17_2", "18_1", "19_1"]
    assert slurm.waits == {"17_2": "afterok:30_1", "18_1": "afterok:30_1,afterany:17", "19_1": "afterok:30_1"}


# --- the folders


def test_survey_finds_what_is_complete_seed_by_seed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = make_chain(root, "seeds=[42, 7]")
    finish(chain, range(4), 42)
    finish(chain, [0], 7)
    interrupt(chain, 2, 7, 3)
    assert chain.survey({}) == ({(0, 42), (1, 42), (2, 42), (3, 42), (0, 7)}, {})
    finish(chain, range(1, 7), 7)
    finish(chain, range(4, 7), 42)
    assert len(chain.survey({})[0]) == 14
    finish(chain, [7])
    assert len(chain.survey({})[0]) == 16


def test_what_was_made_from_an_input_that_is_gone_is_not_complete(root: Path) -> None:
    """Stage 1 may come out the same when it is made again; whether 3 must be redone is for its start to see."""
    chain = make_chain(root)
    finish(chain, range(8))
    (stages()[1].folder(chain.folders, 42) / "manifest.json").unlink()
    assert chain.survey({}) == ({(0, 42), (2, 42)}, {})


def test_folder_of_another_configuration_is_named_unless_a_job_is_at_it(root: Path) -> None:
    finish(make_chain(root), range(3))
    chain = make_chain(root, "training.steps=13")
    complete, unusable = chain.survey({})
    folder = stages()[2].folder(chain.folders, 42)
    assert complete == {(0, 42), (1, 42)}
    assert list(unusable) == [folder]
    assert f"{folder} holds another experiment" in unusable[folder]
    assert "config.training.steps: 12 -> 13" in unusable[folder]
    assert "--discard" in unusable[folder]
    assert chain.survey({(2, 42): Queued("17")}) == (complete, {})


def test_position_differs_if_and_only_if_work_was_gained(root: Path) -> None:
    chain = make_chain(root, "seeds=[42, 7]")
    training = stages()[2]
    finish(chain, [0])
    assert chain.position(training, [42, 7]) == [None, None]
    interrupt(chain, 2, 42, 3)
    first = chain.position(training, [42, 7])
    interrupt(chain, 2, 42, 3)
    assert chain.position(training, [42, 7]) == first == [["train", 3], None]
    interrupt(chain, 2, 42, 4)
    assert chain.position(training, [42]) == [["train", 4]]
    report = training.folder(chain.folders, 42) / "state/progress.json"
    for text in ("{", "[]", '{"label": "train"}'):
        report.write_text(text)
        assert chain.position(training, [42]) == [None]
    finish(chain, [2], 42)
    assert chain.position(training, [42, 7]) == ["complete", None]


def test_folders_follow_the_run(root: Path, own_folders: Path) -> None:
    chain: Chain = make_chain(root, "run_name=own")
    assert chain.folder == own_folders / "scratch/foundation_llm_work/own/submission"
    assert chain.record == chain.folder / "jobs.json"
