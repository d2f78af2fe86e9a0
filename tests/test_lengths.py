"""Sequences that are longer than a model takes are refused by its configuration, and before the work of the stage that has them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from configs.schema import Experiment
from stages.pipeline import stages
from tests.architectures import architecture
from utils.data.lengths import of_setup, refuse_longer
from utils.models.loading import save_model
from utils.run.errors import REFUSED, InputError
from utils.run.preemption import Stop
from utils.run.stage import run_stage

KEYS = "uat.trigger_length + uat.text_tokens + 1"


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "opt", "llama", "gemma"])
def test_what_a_model_takes_stands_in_its_configuration(kind: str, tmp_path: Path) -> None:
    """64 positions each, under names of their own."""
    save_model(architecture(kind), tmp_path)
    refuse_longer(tmp_path, {"one": 1, "all": 64})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"^more = 65: expected at most 64, the longest sequence of the base model; lower it$"):
        refuse_longer(tmp_path, {"all": 64, "more": 65})


def test_a_model_without_positions_takes_everything(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bloom"}')
    refuse_longer(tmp_path, {"much": 10**9})


def test_a_configuration_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(InputError, match=r"expected a model whose configuration transformers knows \(.*unheard-of.*\); name another model"):
        refuse_longer(tmp_path, {})


def test_a_disk_that_fails_is_no_fault_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: object, **named: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "config.json")

    monkeypatch.setattr(AutoConfig, "from_pretrained", read)
    with pytest.raises(OSError, match="Input/output error"):
        refuse_longer(tmp_path, {})


def test_setup_leaves_room_for_a_trigger_of_one_token(tiny: Experiment) -> None:
    uat = tiny.uat
    assert of_setup(tiny)["uat.text_tokens + 2"] == uat.text_tokens + 2 == tiny.longest[KEYS] - (uat.trigger_length - 1)
    assert set(tiny.longest) - set(of_setup(tiny)) == {"evaluate.context", KEYS}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("number", "section", "changed", "words"),
    [
        (4, "evaluate", {"context": 65}, "evaluate.context = 65: expected at most 64"),
        (5, "uat", {"trigger_length": 60}, f"{KEYS} = 77: expected at most 64"),
    ],
)
def test_the_stage_that_has_them_refuses_before_its_work(
    number: int,
    section: str,
    changed: dict[str, Any],
    words: str,
    finished_copy: Path,
    stage_folder: Callable[[Path, int], Path],
    tiny: Experiment,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No earlier stage is to be done again for a key of this one. (Of a scratch model the configuration itself would refuse it.)"""
    config = tiny.model_copy(update={section: getattr(tiny, section).model_copy(update=changed)})
    stage = stages()[number]
    assert run_stage(stage, config, 42, stages(), Stop(), discard=True) == REFUSED
    assert words in capsys.readouterr().err
    left = {path.name for path in stage_folder(finished_copy, number).rglob("*") if path.is_file()}
    assert left <= {".lock", "started.json", "progress.json"}
