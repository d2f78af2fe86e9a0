"""Descriptions of sites: those shipped load, every key becomes its option of sbatch, and typos are refused by the nearest key."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.cluster import Cluster, Resources, StageResources
from configs.presets import CLUSTERS, ConfigError, load_cluster, preset_names
from stages.pipeline import stages

FULL = Resources(partition="p", qos="q", account="a", constraint="c", gres="gpu:a100:1", memory="80G", cpus=8, time="24:00:00")


def site(folder: Path, text: str) -> str:
    (folder / "site.yaml").write_text(text)
    return str(folder / "site.yaml")


@pytest.mark.parametrize("name", sorted(path.stem for path in CLUSTERS.glob("*.yaml")))
def test_every_shipped_cluster_loads_and_survives_being_stored(name: str, tmp_path: Path) -> None:
    cluster = load_cluster(name)
    assert name in preset_names(CLUSTERS)
    assert load_cluster(site(tmp_path, cluster.model_dump_json())) == cluster


def test_stages_of_a_site_are_those_of_the_pipeline() -> None:
    assert list(StageResources.model_fields) == [stage.name for stage in stages()]


def test_generic_site_asks_for_nothing_of_its_own() -> None:
    for stage in stages():
        assert load_cluster("generic").options(stage.name, wants_gpu=True) == []


def test_alpine_asks_for_a_gpu_where_one_is_used() -> None:
    alpine = load_cluster("alpine")
    assert alpine.options("hotflip", wants_gpu=True) == ["--partition=aa100", "--qos=normal", "--gres=gpu:a100:1"]
    assert alpine.options("setup", wants_gpu=False) == ["--partition=amilan", "--qos=normal"]


def test_every_key_is_an_option() -> None:
    cluster = Cluster(resources=FULL, signal_seconds=120)
    assert cluster.options("uat", wants_gpu=True) == [
        "--partition=p",
        "--qos=q",
        "--account=a",
        "--constraint=c",
        "--gres=gpu:a100:1",
        "--mem=80G",
        "--cpus-per-task=8",
        "--time=24:00:00",
        "--signal=B:USR1@120",
    ]


def test_gpu_of_all_is_only_for_scripts_that_ask_for_one() -> None:
    own = StageResources(evaluate=Resources(gres="gpu:2"), aggregate=Resources(gres="gpu:1"))
    cluster = Cluster(resources=Resources(gres="gpu:a100:1"), stages=own)
    assert cluster.options("uat", wants_gpu=True) == ["--gres=gpu:a100:1"]
    assert cluster.options("evaluate", wants_gpu=True) == ["--gres=gpu:2"]
    assert cluster.options("setup", wants_gpu=False) == []
    assert cluster.options("aggregate", wants_gpu=False) == ["--gres=gpu:1"]  # asked for by name
    assert Cluster(resources=Resources(gres="none")).options("uat", wants_gpu=True) == ["--gres=none"]


def test_stage_overrides_key_by_key() -> None:
    cluster = Cluster(resources=FULL, stages=StageResources(setup=Resources(partition="cpu", memory="1G")))
    assert cluster.options("setup", wants_gpu=False) == [
        "--partition=cpu",
        "--qos=q",
        "--account=a",
        "--constraint=c",
        "--mem=1G",
        "--cpus-per-task=8",
        "--time=24:00:00",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("resources: {partion: a}", ["resources.partion: unknown key", "did you mean 'resources.partition'?"]),
        ("stages: {setp: {}}", ["stages.setp: unknown key", "did you mean 'stages.setup'?"]),
        ("stages: {setup: {gress: a}}", ["stages.setup.gress: unknown key", "did you mean 'stages.setup.gres'?"]),
        ("max_restart: 1", ["max_restart: unknown key", "did you mean 'max_restarts'?"]),
        ("max_restarts: -1", ["max_restarts: found -1"]),
        ("network: some", ["network: found 'some', expected: Input should be 'none', 'setup' or 'all'"]),
        ("resources: {time: 24:00:00}", ["resources.time: found 86400", "valid string"]),  # YAML 1.1 reads base 60: quote it
        ("resources: {qos: 'a b'}", ["resources.qos: found 'a b'", "match pattern"]),
        ("resources: {account: ''}", ["resources.account: found ''"]),
        ("signal_seconds: 0", ["signal_seconds: found 0", "greater than 0"]),
        ("environment: module purge", ["environment: found 'module purge'"]),
        ("extends: alpin", ["no cluster 'alpin'", "did you mean 'alpine'?", "Shipped clusters: alpine, cpu, generic"]),
    ],
)
def test_bad_site_is_refused_in_words(text: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_cluster(site(tmp_path, text))
    for word in words:
        assert word in str(caught.value)


def test_site_extends_a_shipped_one(tmp_path: Path) -> None:
    cluster = load_cluster(site(tmp_path, "extends: alpine\nresources: {account: mine}"))
    assert cluster.options("uat", wants_gpu=True) == ["--partition=aa100", "--qos=normal", "--account=mine", "--gres=gpu:a100:1"]
    assert cluster.network == "all"
