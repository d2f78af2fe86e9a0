"""verify_local.py passes here; and for every check a planted fault turns that check, and no other, to `no`."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configs.presets import load
from configs.schema import Compute
from tests.fake_stages import ROOT
from tests.planted_faults import PLANTS, Patch, Plant, some_gpu
from utils.run.errors import WorkFailed
from utils.verify import attack, child, conversion, disk, local, machine, repetition
from verify_local import main

NAMES = [
    "packages",
    "presets",
    "file systems",
    "free space",
    "tokens",
    "determinism",
    "kill and resume",
    "conversion",
    "attack",
    "report",
    "GPU",
    "SLURM",
]


class Killed(Exception):
    """Stands for a process that dies."""


@pytest.fixture
def dies_here(monkeypatch: Patch) -> None:
    """The child that trains is a call in this process, which spares the seconds that importing torch takes."""

    def die() -> None:
        raise Killed

    @contextmanager
    def in_process(dash_m: str, module: str, *arguments: str) -> Iterator[None]:
        assert (dash_m, module) == ("-m", repetition.__name__)
        with suppress(Killed):
            repetition.main(arguments)
        yield

    monkeypatch.setattr(repetition, "wait", die)
    monkeypatch.setattr(repetition, "killed_child", in_process)


def only(name: str, monkeypatch: Patch) -> None:
    """Leave out what does not bear on this check."""
    real = local._looks
    needed = {name, "determinism"} if name == "kill and resume" else {name}
    monkeypatch.setattr(local, "_looks", lambda *given: {one: look for one, look in real(*given).items() if one in needed})


def verdicts(said: str) -> dict[str, str]:
    """{check: verdict} of the lines, not of the table."""
    return {found[2]: found[1] for found in re.finditer(r"^  (ok|warn|no|skip) +([\w ]+): ", said, re.MULTILINE)}


def left_behind(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if "foundation_llm" in path.name or ".verify" in path.name]


@pytest.mark.integration
def test_passes_here(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    found = verdicts(said.out)
    assert list(found) == NAMES
    assert {found[name] for name in NAMES[:10]} == {"ok"}
    for folder in ("scratch/foundation_llm_work", "scratch/foundation_llm_cache", "project/foundation_llm_final_results"):
        assert f" {own_folders / folder} (" in said.out
    table = said.out.split("\n\n")[1].splitlines()
    assert [line[:15].strip() for line in table[1:-2]] == NAMES
    assert table[-1] == "this machine can run it: bash run_all.sh"
    assert left_behind(own_folders) == []


FIRST = {name: plant for name, plant, _ in reversed(PLANTS)}


@pytest.mark.integration
@pytest.mark.usefixtures("dies_here")
@pytest.mark.parametrize(("name", "plant", "words"), PLANTS, ids=[plant.__name__ for _, plant, _ in PLANTS])
def test_a_planted_fault_is_a_no_and_exit_code_1(
    name: str, plant: Plant, words: str, own_folders: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first plant of each check is given to all checks, and no other one says `no`."""
    plant(monkeypatch, own_folders)
    whole = FIRST[name] is plant
    if not whole:
        only(name, monkeypatch)
    assert main(["--set", "compute.threads=1"]) == 1
    said = capsys.readouterr()
    assert verdicts(said.err) == {name: "no"}, said
    assert words in said.err
    assert not whole or {name} | set(verdicts(said.out)) == set(NAMES)
    assert "correct what is marked 'no' above, then run this again" in said.out
    assert left_behind(own_folders) == []


def test_every_check_but_slurm_has_a_plant() -> None:
    assert {name for name, _, _ in PLANTS} == set(NAMES) - {"SLURM"}


# What is around the checks


def test_without_any_package_it_says_what_to_install(own_folders: Path) -> None:
    """`-S` is a Python without its installed packages."""
    done = subprocess.run([sys.executable, "-S", ROOT / "verify_local.py"], cwd=own_folders, capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch is not installed, expected 2.9 or newer; " in done.stderr
    assert done.stderr.count("\n") == 1
    assert "1 checks in" in done.stdout


def test_without_what_the_checks_import_the_first_one_is_all(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "utils.verify.local", None)
    assert main([]) == 1
    said = capsys.readouterr()
    assert verdicts(said.err) == {"packages": "no"} and verdicts(said.out) == {}
    assert "ModuleNotFoundError: import of utils.verify.local halted" in said.err


def test_remedy_names_the_environment_that_is_there(own_folders: Path, monkeypatch: Patch) -> None:
    import verify_local

    monkeypatch.setattr(verify_local, "ENVIRONMENT", own_folders / ".venv" / "bin" / "python")
    assert "bash run_tests.sh" in verify_local._remedy()
    verify_local.ENVIRONMENT.parent.mkdir(parents=True)
    verify_local.ENVIRONMENT.touch()
    assert f"{own_folders}/.venv/bin/python verify_local.py" in verify_local._remedy()
    monkeypatch.setattr(sys, "prefix", str(own_folders / ".venv"))
    assert "bash run_tests.sh" in verify_local._remedy()


def test_a_wrong_configuration_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "minni"]) == 2
    assert "did you mean 'mini'?" in capsys.readouterr().err
    assert main(["--set", "compute.threads=-1"]) == 2
    assert "compute.threads: found -1" in capsys.readouterr().err


def test_ctrl_c_leaves_nothing(own_folders: Path, monkeypatch: Patch) -> None:
    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(repetition, "trained", interrupt)
    assert main([]) == 130
    assert left_behind(own_folders) == []


@pytest.mark.usefixtures("dies_here")
def test_folders_of_the_configuration_are_looked_at_and_kept(own_folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A work folder that cannot be written is one `no`, and the others work elsewhere."""
    (own_folders / "a file").touch()
    cache = own_folders / "cache" / "mine"
    cache.mkdir(parents=True)
    (cache / "kept").touch()
    given = [f"paths.work={own_folders}/a file/work", f"paths.cache={cache}", f"paths.results={own_folders}/new/results"]
    assert main(["--set", "compute.threads=1", *(word for one in given for word in ("--set", one))]) == 1
    said = capsys.readouterr()
    assert verdicts(said.err) == {"file systems": "no"}
    assert "a file/work cannot be written: Not a directory" in said.err
    assert [path.name for path in cache.iterdir()] == ["kept"] and not (own_folders / "new").exists()


def test_names_that_are_merged_are_a_warning(own_folders: Path, monkeypatch: Patch) -> None:
    real = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: real(self.with_name("Case")) if self.name == "case" else real(self))
    config = load("mini")
    verdict, words = disk.files(disk.Folders.of(config.paths, config.run_name))
    assert verdict == "warn" and "differ in case alone are one file in " in words


# The plants rest on these


def test_the_planted_weakness_is_one(own_folders: Path) -> None:
    """By the plain model: of all tokens at the first place POISON raises the loss most; the gradient would take DECOY."""
    model, texts = attack.weak_model(), torch.tensor([[0, *ids] for ids in attack.weak_texts()])
    for ids in texts:
        edited = ids.repeat(attack.VOCABULARY, 1)
        edited[:, 1] = torch.arange(attack.VOCABULARY)
        labels = edited.clone()
        labels[:, : -attack.SPEC.scored_tokens] = -100
        with torch.no_grad():
            losses = [float(model(row[None], labels=label[None]).loss) for row, label in zip(edited, labels, strict=True)]
        order = np.argsort(losses)[::-1].tolist()
        assert order[0] == attack.POISON
        assert losses[attack.POISON] > losses[attack.DECOY] + 0.1
        embedded = model.get_input_embeddings()(ids[None]).detach().requires_grad_(True)
        logits = model(inputs_embeds=embedded).logits[0, -attack.SPEC.scored_tokens - 1 : -1]
        slope = torch.autograd.grad(F.cross_entropy(logits, ids[-attack.SPEC.scored_tokens :]), embedded)[0][0, 1]
        assert int((model.get_input_embeddings().weight.detach() @ slope).argmax()) == attack.DECOY


def test_exhaustive_search_against_a_slow_loop() -> None:
    model, ids = attack.weak_model(), attack.weak_texts()[0]
    slow = []
    for place, token in [(0, attack.POISON), (3, attack.POISON), (7, attack.POISON), (7, attack.DECOY), (5, 100)]:
        edited = torch.tensor([0, *ids])
        edited[1 + place] = token
        with torch.no_grad():
            logits = model(edited[None]).logits[0, -9:-1]
        slow.append(float(F.cross_entropy(logits, edited[-8:])))
    assert attack.best_flip(model, ids) >= max(slow) - 1e-6
    assert attack.best_flip(model, ids) == pytest.approx(max(slow), abs=0.05)


def test_deepest_fall_of_a_model_that_falls() -> None:
    """One negative column makes N fall by about its size times the step of the hidden unit."""
    model = attack.sample_model(seed=0)
    assert conversion.deepest_fall(model) > 0.01


def test_a_child_is_killed_and_one_that_ends_or_hangs_is_named(own_folders: Path) -> None:
    code = f"""
import os
from pathlib import Path
from utils.verify.child import wait
Path({str(own_folders / "process")!r}).write_text(str(os.getpid()))
wait()
"""
    with child.killed_child("-c", code):
        process = int((own_folders / "process").read_text())
        os.kill(process, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    with pytest.raises(WorkFailed, match=r"within 60 s: ZeroDivisionError: division by zero$"), child.killed_child("-c", "1 / 0"):
        pass
    slow = child.killed_child("-c", "import time; time.sleep(30)", seconds=0.2)
    with pytest.raises(WorkFailed, match=r"within 0\.2 s: nothing was said$"), slow:
        pass


def test_a_waiting_child_ends_with_its_parent(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(SystemExit, match="the process that started this one is gone"):
        child.wait()
    assert capsys.readouterr().out == "in the middle\n"


# GPU and SLURM


@pytest.mark.parametrize(("free", "verdict"), [(60.0, "ok"), (20.0, "warn")])
def test_a_gpu_that_works(free: float, verdict: str, monkeypatch: Patch) -> None:
    some_gpu(monkeypatch, free)
    found = machine.gpu(Compute())
    assert found[0] == verdict
    assert found[1].startswith(f"A card, {free:.1f} of 80.0 GiB free; a bf16 product is off by 0.00")


def programs(folder: Path, **answers: str) -> str:
    """A PATH with these shell scripts alone, beside those that shell scripts need."""
    folder.mkdir()
    for name, script in answers.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    ("device", "script", "verdict", "words"),
    [
        ("cuda", "echo 'GPU 0: A100'", "no", "the driver shows GPU 0: A100, but torch "),
        ("auto", "echo 'GPU 0: A100'", "no", "the driver shows GPU 0: A100, but torch "),
        ("cpu", "echo 'GPU 0: A100'", "warn", "the driver shows GPU 0: A100, but torch "),
        ("cuda", "echo 'No devices were found'", "warn", "compute.device=cuda: the stages need a machine that has one"),
        ("auto", "exit 9", "skip", "none here, and the configuration does not need one"),
        ("cuda", None, "warn", "compute.device=cuda"),
    ],
)
def test_a_machine_without_a_gpu_for_torch(
    device: str, script: str | None, verdict: str, words: str, own_folders: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("PATH", programs(own_folders / "bin", **({"nvidia-smi": script} if script else {})))
    found = machine.gpu(Compute(device=device))  # type: ignore[arg-type]
    assert found[0] == verdict and words in found[1]


def test_slurm_is_never_a_no(own_folders: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("PATH", programs(own_folders / "none"))
    assert machine.slurm() == ("skip", "not installed here; run_all.sh runs stage after stage on this machine")
    monkeypatch.setenv("PATH", programs(own_folders / "some", sbatch="", sinfo=""))
    assert machine.slurm()[0] == "warn" and machine.slurm()[1].startswith("squeue, scontrol not on the PATH; ")
    whole = {"sbatch": "", "squeue": "", "scontrol": ""}
    monkeypatch.setenv("PATH", programs(own_folders / "all", **whole, sinfo="echo gpu; echo cpu"))
    assert machine.slurm() == ("ok", "partitions gpu, cpu")
    monkeypatch.setenv("PATH", programs(own_folders / "away", **whole, sinfo="echo 'Unable to contact slurm controller' >&2; exit 1"))
    assert machine.slurm()[0] == "warn" and "Unable to contact slurm controller; submit where it answers" in machine.slurm()[1]
