"""Configuration: every shipped preset loads, and anything not exactly understood is refused with key, found and expected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from configs.presets import ConfigError, load, preset_names
from tests.fake_stages import TINY

SHIPPED = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.yaml"))


def preset(tmp_path: Path, text: str, name: str = "own.yaml") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_preset_loads_and_survives_being_stored(name: str, tmp_path: Path) -> None:
    config = load(name)
    assert name in preset_names()
    assert config.run_name == name
    stored = preset(tmp_path, json.dumps(config.model_dump(mode="json")))
    assert load(stored) == config


def test_values_are_those_of_the_file() -> None:
    config, plain = load(TINY), yaml.safe_load(Path(TINY).read_text())
    assert config.data.embedded is not None
    assert list(config.data.embedded.packages) == plain["data"]["embedded"]["packages"]
    assert config.training.steps == plain["training"]["steps"] == 12
    assert config.baseline.learning_rate == 3e-3  # PyYAML alone reads 3e-3 as text
    assert config.uat.controls == 2


def test_overrides_are_yaml_and_the_last_one_wins() -> None:
    config = load(TINY, ["training.steps=5", "training.steps=7", "seeds=[1, 2]", "monotonic.learning_rate=1e-4", "paths.work=/somewhere"])
    assert (config.training.steps, config.seeds, config.monotonic.learning_rate) == (7, (1, 2), 0.0001)
    assert config.paths.work == Path("/somewhere")


@pytest.mark.parametrize("word", ["off", '"off"', "on", "auto"])
def test_words_that_yaml_takes_for_truth_values_switch_all_the_same(word: str) -> None:
    assert load(TINY, [f"compute.compile={word}"]).compute.compile == word.strip('"')


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load(TINY).training.steps = 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.stepz=5", ["training.stepz: unknown key", "did you mean 'training.steps'?"]),
        ("trainin.steps=5", ["trainin: unknown key", "did you mean 'training'?"]),
        ("model.scratch.hiden=5", ["model.scratch.hiden: unknown key", "'model.scratch.hidden'"]),
        ("compute.qqq=5", ["compute.qqq: unknown key; valid keys: device, precision, compile, parallel, processes, threads"]),
        ("training.steps=many", ["training.steps: found 'many'", "valid integer"]),
        ("training.steps=1e3", ["training.steps: found 1000.0", "valid integer"]),
        ("training.steps=true", ["training.steps: found True", "valid integer"]),
        ("training.steps=", ["training.steps: found None", "valid integer"]),
        ("training.steps=0", ["training.steps: found 0", "greater than 0"]),
        ("training=5", ["training: found 5, expected"]),
        ("model.name.x=1", ["model.name: expected: Input should be a valid string"]),
        ("model.name=5", ["model.name: found 5", "valid string"]),
        ("monotone.recentre=1", ["monotone.recentre: found 1", "valid boolean"]),
        (
            "monotone.scope=everything",
            ["monotone.scope: found 'everything'", "'mlp_in', 'mlp_both', 'mlp_in_attn_out', 'gated_updown' or 'gated_all'"],
        ),
        ("training.distillation=1.5", ["training.distillation: found 1.5", "less than or equal to 1"]),
        ("training.max_gradient_norm=.inf", ["training.max_gradient_norm: found inf", "finite number"]),
        ("report.margin_nats=.nan", ["report.margin_nats: found nan", "finite number"]),
        ("baseline.learning_rate=0", ["baseline.learning_rate: found 0", "greater than 0"]),
        ("training.micro_batch=3", ["training: expected: micro_batch=3 does not divide batch_size=8"]),
        ("evaluate.stride=33", ["evaluate: expected: stride=33 must be below context=33"]),
        ("evaluate.context=65", ["evaluate.context = 65 exceeds model.scratch.context = 64"]),
        ("data.sequence_length=65", ["data.sequence_length = 65 exceeds"]),
        ("monotone.scope=gated_all", ["monotone.scope='gated_all'", "expected 'mlp_in', 'mlp_both' or 'mlp_in_attn_out'"]),
        ("monotone={order: directions, directions: 32}", ["monotone.directions=32, expected fewer than model.scratch.hidden=32"]),
        ("uat.text_tokens=62", ["uat.trigger_length + uat.text_tokens + 1 = 65 exceeds"]),
        ("hotflip.scored_tokens=56", ["hotflip.prefix_tokens + hotflip.scored_tokens + 1 = 65 exceeds"]),
        ("hotflip.flips=9", ["hotflip: expected: flips=9 exceeds prefix_tokens=8"]),
        ("model.scratch.heads=5", ["heads=5 does not divide hidden=32"]),
        ("model.scratch.sequence_length=65", ["sequence_length=65 exceeds context=64"]),
        ("model.scratch.vocabulary=256", ["vocabulary=256 is below 257"]),
        ("model.source=pretrained", ["model: expected: the section model.scratch is given if and only if"]),
        ("data.source=files", ["data: expected: source='files' needs the section data.files and no other"]),
        ("data.files={train: [a], validation: [b], test: [a]}", ["data.files: expected: a file is named twice"]),
        (
            "data.files={train: ['hf://datasets/a'], validation: [b], test: [c]}",
            ["expected hf://datasets/OWNER/NAME"],
        ),
        (
            "data.fallback={train: [a], validation: [b], test: [c]}",
            ["data: expected: fallback stands in for data.files, and there are none"],
        ),
        ("data.embedded.packages=[]", ["data.embedded.packages: found []", "at least 1 item"]),
        ("seeds=[1, 1]", ["seeds=[1, 1] names a seed twice"]),
        ("seeds=[-1]", ["seeds.0: found -1"]),
        ("seeds=[]", ["seeds: found []", "at least 1 item"]),
        ("run_name=a/b", ["run_name: found 'a/b'", "match pattern"]),
        ("run_name=..", ["run_name: found '..'", "match pattern"]),
        ("run_name=2026-13-77", None),
        ("training.steps", ["--set 'training.steps': expected section.key=value"]),
        ("=5", ["--set '=5': expected section.key=value"]),
        ("seeds=[1", ["--set 'seeds=[1': the value is not valid YAML"]),
        ("model={a: 1, a: 2}", ["key 'a' is given twice"]),
        ("model.name=!!binary aGk=", ["the tag tag:yaml.org,2002:binary; write the value out plainly"]),
        ("model=&again {name: *again}", ["the alias *again; write the value out plainly"]),
        ("extends=mini", ["extends: unknown key"]),
        ("seeds=" + "[" * 30 + "]" * 30, ["found more than 20 levels; write the value out plainly"]),
        (".".join("a" * 30) + "=1", ["found 29 sections within each other"]),
        ("seeds=[" + "9" * 5000 + "]", ["the value is not valid YAML: Exceeds the limit"]),
        ("training.steps=9223372036854775808", ["training.steps: found 9223372036854775808", "less than 9223372036854775808"]),
        ('model.name="a\\nb"', ["model.name: found 'a\\nb'", "match pattern"]),
        ("model.revision=../../main", ["revision '../../main' is no branch, tag or commit"]),
        ("run_name=" + "a" * 9000, ["run_name: found '" + "a" * 199 + "..., expected"]),
    ],
)
def test_bad_override_is_refused_in_words(override: str, words: list[str] | None) -> None:
    if words is None:  # a date is text, also an impossible one
        assert load(TINY, [override]).run_name == override.partition("=")[2]
        return
    with pytest.raises(ConfigError) as caught:
        load(TINY, [override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["compute.processes=3"],
            "training.batch_size=8 with 3 training processes; expected a multiple of 3, or another number of them (compute.processes)",
        ),
        (
            ["compute.processes=2", "training.micro_batch=8"],
            "each of which takes 4 sequences of a step; expected a divisor of 4, auto, or another number of processes",
        ),
        (["compute.processes=2", "training.micro_batch=4"], None),
        (["compute.processes=3", "compute.parallel=none"], None),
        (["compute.processes=0"], None),
    ],
)
def test_processes_take_equal_shares_of_a_step(overrides: list[str], words: str | None) -> None:
    overrides = ["compute.parallel=ddp", *overrides]
    if words is None:
        assert load(TINY, overrides).training.batch_size == 8
        return
    with pytest.raises(ConfigError) as caught:
        load(TINY, overrides)
    assert words in str(caught.value)


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(preset(tmp_path, "run_name: x\ntraining: {steps: 0, stepz: 1}"))
    lines = str(caught.value).splitlines()
    assert {line.strip().split(":")[0] for line in lines[1:]} > {"training.steps", "training.stepz", "model", "data", "training.batch_size"}
    assert "  model: missing; add it to the preset or give --set model=..." in lines


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training: [", "not readable as YAML"),
        ("", "found NoneType, expected sections with keys"),
        ("- a", "found list, expected sections with keys"),
        ("seeds: [1]\nseeds: [2]", "key 'seeds' is given twice in one section; keep one of them"),
        ("name: !!python/object:os.system {}", "not readable as YAML"),
        ("? [a]\n: 1", "not readable as YAML"),
        ("extends: nosuch.yaml", "found no file"),
        ("extends: minni", "did you mean 'mini'?"),
        ("extends: [mini, tiny]", "expected the name or the file of one preset"),
        ("extends: own.yaml", "extends itself"),
        ("? !!timestamp 2026-01-01\n: 1", "the tag tag:yaml.org,2002:timestamp; write the value out plainly"),
    ],
)
def test_bad_file_is_refused_by_its_path(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(preset(tmp_path, text))
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value) or "preset 'minni'" in str(caught.value)


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_bytes(b"run_name: \xff\xfe")
    with pytest.raises(ConfigError, match=r"own\.yaml: not readable as YAML: .*utf-8"):
        load(str(tmp_path / "own.yaml"))


def test_a_file_of_another_size_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"own\.yaml: found 1048577 bytes, expected a configuration of at most 1048576"):
        load(preset(tmp_path, "#" * (2**20 + 1)))


def test_a_chain_of_files_ends(tmp_path: Path) -> None:
    for number in range(30):
        preset(tmp_path, f"extends: link{number + 1}.yaml", f"link{number}.yaml")
    with pytest.raises(ConfigError, match=r"link21\.yaml: more than 20 files extend each other"):
        load(str(tmp_path / "link0.yaml"))


def test_many_mistakes_are_counted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="and 80 more"):
        load(preset(tmp_path, f"extends: {TINY}\n" + "\n".join(f"k{number}: 1" for number in range(100))))


def test_a_name_that_is_too_long_for_a_file() -> None:
    with pytest.raises(ConfigError, match=r"no preset 'aaa.*\.\.\.: found no file"):
        load("a" * 5000)


def test_extends_merges_key_by_key_also_over_two_files(tmp_path: Path) -> None:
    preset(tmp_path, f"extends: {TINY}\ntraining: {{steps: 3}}\nseeds: [5]", "middle.yaml")
    config = load(preset(tmp_path, "extends: middle.yaml\nrun_name: own\ntraining: {keep_last: 9}"))
    plain = load(TINY)
    assert (config.run_name, config.seeds, config.training.steps, config.training.keep_last) == ("own", (5,), 3, 9)
    assert config.training.batch_size == plain.training.batch_size
    assert config.uat == plain.uat
    named = load(preset(tmp_path, "extends: mini\nrun_name: own", "named.yaml"))
    assert named == load("mini").model_copy(update={"run_name": "own"})


def test_unknown_preset_names_the_nearest_and_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load("minni")
    assert "no preset 'minni'" in str(caught.value)
    assert "did you mean 'mini'?" in str(caught.value)
    assert ", ".join(SHIPPED) in str(caught.value)
    with pytest.raises(ConfigError, match=r"found no file .*zzzzzz\.yaml\. Shipped presets"):
        load("zzzzzz")
