"""Two processes on a CPU (gloo) against one: the same tokens, losses and weights, and checkpoints that either can go on from."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.schema import Monotone, Training
from tests.builders import non_negative_start
from tests.tiny_models import random_model, write_tokens
from utils.data.tokens import PackedBatches, Tokens
from utils.models.constraints import Constraint
from utils.models.head import _rows
from utils.run.errors import InputError, StoppedInTime
from utils.run.launch import _free_port, place
from utils.run.preemption import Stop
from utils.training import distributed, memory
from utils.training.checkpoint import Checkpoints
from utils.training.distributed import ALONE, World, joined
from utils.training.loop import train
from utils.training.metrics import read_metrics
from utils.training.run import Run
from utils.training.step import Stepper

LENGTH = 8


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokens, Tokens]:
    folder = tmp_path_factory.mktemp("tokens")
    return write_tokens(folder / "train", 300), write_tokens(folder / "validation", 60, seed=1)


def make(text: tuple[Tokens, Tokens], folder: Path, arm: str, world: World = ALONE, stop: Stop | None = None, **settings: Any) -> Run:
    model = random_model()
    limit = None
    if arm != "baseline":
        spec = Monotone.model_validate({"parametrisation": arm})
        non_negative_start(model, spec)
        limit = Constraint(model, spec)
    packed = [PackedBatches(tokens, LENGTH, seed=5) for tokens in text]
    return Run(
        model=model,
        spec=Training(**{"steps": 6, "batch_size": 8, "micro_batch": 2, "validate_every": 3} | settings),
        peak_rate=1e-2,
        train=packed[0],
        validation=packed[1],
        precision="fp32",
        state_folder=folder / "state" / "checkpoints",
        metrics=folder / "metrics.jsonl",
        stop=stop or Stop(),
        label="train",
        constraint=limit,
        teacher=random_model(seed=1),
        world=world,
    )


def together(parallel: str, act: Callable[[World], None], size: int = 2) -> None:
    """Run `act` in so many processes that have joined; an error of one of them is the test's."""
    port = str(_free_port())

    def work(rank: int) -> None:
        torch.cuda.is_available = lambda: False  # where there is a GPU, a forked process could not use it
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
        code = 1
        try:
            with joined(parallel) as world:
                act(world)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    children = [multiprocessing.get_context("fork").Process(target=work, args=(rank,)) for rank in range(size)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0] * size


def outcome(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, list[float]]:
    checkpoints = Checkpoints(folder / "state" / "checkpoints", 2)
    steps, validations = read_metrics(folder / "metrics.jsonl")
    columns = ("loss", "cross_entropy", "divergence", "gradient_norm", "learning_rate")
    rows = torch.tensor([[row[name] for name in columns] for row in steps])
    return checkpoints.model_tensors(6), checkpoints.optimizer_tensors(6), rows, [row["validation_nll"] for row in validations]


def assert_close(one: Path, other: Path) -> None:
    """Bound: sums in another order. 1e-5 nats and 2e-5 in the weights after six steps of fp32.

    Without the biases of attention: softmax does not see the key's, so its gradient is rounding alone, of which AdamW makes full steps.
    """
    mine, theirs = outcome(one), outcome(other)
    for found, expected in zip(mine[:2], theirs[:2], strict=True):
        assert found.keys() == expected.keys()
        for name in expected.keys() - {name for name in expected if name.endswith("query_key_value.bias")}:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(mine[2], theirs[2], rtol=1e-4, atol=1e-5)
    assert mine[3] == pytest.approx(theirs[3], abs=1e-5)


@pytest.fixture(scope="module")
def alone(text: tuple[Tokens, Tokens], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {arm: tmp_path_factory.mktemp(arm) for arm in ("baseline", "projected", "softplus")}
    for arm, folder in folders.items():
        train(make(text, folder, arm))
    return folders


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("arm", ["baseline", "projected", "softplus"])
def test_two_processes_do_what_one_does(
    text: tuple[Tokens, Tokens], alone: dict[str, Path], tmp_path: Path, parallel: str, arm: str
) -> None:
    together(parallel, lambda world: train(make(text, tmp_path, arm, world)) and None)
    assert_close(tmp_path, alone[arm])


@pytest.mark.parametrize(("first", "then"), [("ddp", None), (None, "ddp"), ("fsdp2", None), (None, "fsdp2"), ("ddp", "fsdp2")])
def test_another_number_of_processes_goes_on(
    text: tuple[Tokens, Tokens], alone: dict[str, Path], tmp_path: Path, first: str | None, then: str | None
) -> None:
    """A checkpoint holds whole tensors, and a batch does not depend on who computes it."""
    asked = Stop()

    class Third(Stop):
        count = 0

        def requested(self) -> bool:
            self.count += 1
            self.reason = "signal SIGUSR1" if self.count == 2 and self.first else None
            return super().requested()

    def part(parallel: str | None, stop: Callable[[World], Stop]) -> None:
        def act(world: World) -> None:
            try:
                train(make(text, tmp_path, "projected", world, stop(world)))
            except StoppedInTime as reason:
                assert "step 2 of 6" in str(reason)

        act(ALONE) if parallel is None else together(parallel, act)

    def third(world: World) -> Stop:
        stop = Third()
        stop.first = world.first  # the request reaches one process; all must stop at the same step
        return stop

    part(first, third)
    state = Checkpoints(tmp_path / "state" / "checkpoints", 2).newest()
    assert state is not None
    assert state.step == 2
    part(then, lambda world: asked)
    assert_close(tmp_path, alone["projected"])


@pytest.mark.parametrize(("first", "then", "sizes"), [("ddp", None, [4, 8]), (None, "fsdp2", [8, 4]), ("ddp", "fsdp2", [4, 4])])
def test_auto_is_chosen_again_for_another_number_of_processes(
    text: tuple[Tokens, Tokens], alone: dict[str, Path], tmp_path: Path, first: str | None, then: str | None, sizes: list[int]
) -> None:
    """What fits beside others need not fit alone. The losses do not depend on it."""

    def part(parallel: str | None, stop: Stop, done: int) -> tuple[int, int, str]:
        def act(world: World) -> None:
            with suppress(StoppedInTime):
                train(make(text, tmp_path, "baseline", world, stop, micro_batch="auto"))

        act(ALONE) if parallel is None else together(parallel, act)
        state = Checkpoints(tmp_path / "state" / "checkpoints", 2).newest()
        assert state is not None and state.step == done
        return state.micro_batch, state.processes, state.parallel

    asked = Stop()
    asked.reason = "signal SIGUSR1"
    kinds = [(1, "none") if parallel is None else (2, parallel) for parallel in (first, then)]
    assert part(first, asked, 1) == (sizes[0], *kinds[0])
    assert part(then, Stop(), 6) == (sizes[1], *kinds[1])
    assert part(first, Stop(), 6) == (sizes[1], *kinds[1])  # no step is left to be made
    assert_close(tmp_path, alone["baseline"])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_compiled_and_recomputed_blocks(
    text: tuple[Tokens, Tokens], alone: dict[str, Path], tmp_path: Path, parallel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without code generation."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    monkeypatch.setattr("utils.models.head._fused", lambda: _rows)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))

    def act(world: World) -> None:
        import warnings

        warnings.simplefilter("ignore")
        train(replace(make(text, tmp_path, "projected", world, recompute=0.5), compiled=True))
        assert not torch._dynamo.config.optimize_ddp  # or blocks are cut where the exchange of gradients is

    together(parallel, act)
    assert_close(tmp_path, alone["projected"])


@pytest.fixture
def company(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place for this process in a group of one."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(_free_port()))


@pytest.mark.usefixtures("company")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_one_process_in_company_does_what_it_does_alone(
    text: tuple[Tokens, Tokens], alone: dict[str, Path], tmp_path: Path, parallel: str
) -> None:
    with joined(parallel) as world:
        train(make(text, tmp_path, "softplus", world))
    assert_close(tmp_path, alone["softplus"])


@pytest.mark.usefixtures("company")
def test_what_processes_tell_each_other() -> None:
    """The messages of a process that believes in two, in a group of one. That two understand each other is tested above."""
    with joined("ddp"):
        world = World(0, 2, "fsdp2")
        assert torch.equal(world.sum(torch.tensor([2.0, 3.0])), torch.tensor([2.0, 3.0]))
        assert world.any(True)
        assert not world.any(False)
        assert world.told({"step": 3}) == {"step": 3}
        found = distributed.total_norm([torch.tensor([3.0]), torch.tensor([4.0])], world)
        assert float(found) == pytest.approx(5.0)


def test_a_process_that_is_not_the_first_writes_nothing(
    text: tuple[Tokens, Tokens], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither checkpoints nor the run's metrics; and it leaves what the first is writing."""
    monkeypatch.setattr(World, "first", property(lambda self: False))
    checkpoints = Checkpoints(tmp_path / "state" / "checkpoints", 2)
    (checkpoints.folder / ".tmp-step_00000006-1").mkdir(parents=True)
    run = make(text, tmp_path, "baseline", World())
    train(run)
    assert [path.name for path in run.state_folder.iterdir()] == [".tmp-step_00000006-1"]
    assert not run.metrics.exists()
    assert (tmp_path / "state" / "metrics_of_process_0.jsonl").is_file()


def test_shards_are_cut_over_the_processes(text: tuple[Tokens, Tokens], tmp_path: Path) -> None:
    """Each process holds half of the weights and of the moments."""

    def act(world: World) -> None:
        run = make(text, tmp_path, "projected", world)
        count = sum(parameter.numel() for parameter in run.model.parameters())
        train(run)
        held = sum(distributed.local(parameter).numel() for parameter in run.model.parameters())
        assert abs(held - count / 2) < 0.02 * count

    together("fsdp2", act)


def test_memory_is_counted_by_what_a_process_holds(text: tuple[Tokens, Tokens], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fsdp2: half of the moments; and half of the gradients, between two micro-batches too."""
    for name, value in {"empty_cache": None, "reset_peak_memory_stats": None, "max_memory_allocated": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)

    def act(world: World) -> None:
        run = make(text, tmp_path, "baseline", world)
        count = sum(parameter.numel() for parameter in run.model.parameters())
        stepper, ids = Stepper(run), torch.from_numpy(run.train.batch(0, 2))
        found = memory._peak(stepper, ids, 0.0)
        assert found is not None and abs(found * 2**30 - 8 * count / 2) < 0.02 * 8 * count
        distributed.last_micro_batch(stepper.loss, False)
        stepper.gradients(ids)
        held = sum(distributed.local(parameter.grad).numel() for parameter in stepper.parameters)
        assert abs(held - count / 2) < 0.02 * count

    together("fsdp2", act)


def test_products_in_bf16_on_a_cpu(text: tuple[Tokens, Tokens], tmp_path: Path) -> None:
    """Blocks are gathered in fp32 there, for norms that take no mixture of formats; so the losses are as with ddp."""
    losses = []
    for parallel in ("ddp", "fsdp2"):
        folder = tmp_path / parallel
        together(parallel, lambda world, folder=folder: train(replace(make(text, folder, "baseline", world), precision="bf16")) and None)
        losses.append(outcome(folder)[2][:, 0])
    torch.testing.assert_close(*losses, rtol=0.0, atol=1e-3)


def test_shares_of_a_batch() -> None:
    assert [list(range(12))[World(rank, 3, "ddp").own(12)] for rank in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (3, r"training.batch_size=8 with 3 training processes; expected a multiple of 3, or another number"),
        (2, r"training.micro_batch=8 with 2 training processes, each of which takes 4 sequences of a step; expected a divisor of 4"),
    ],
)
def test_shares_that_are_not_equal_are_refused(text: tuple[Tokens, Tokens], tmp_path: Path, size: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        train(make(text, tmp_path, "baseline", World(1, size, "ddp"), micro_batch=8))


def test_places(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="found neither RANK, WORLD_SIZE, LOCAL_RANK nor SLURM_PROCID"):
        place()
    for name, value in (("SLURM_PROCID", "5"), ("SLURM_NTASKS", "8"), ("SLURM_LOCALID", "1")):
        monkeypatch.setenv(name, value)
    assert place() == (5, 8, 1)
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    assert place() == (2, 4, 2)


def test_each_process_takes_its_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes on a node of two cards, told by srun: the third shares the first card, and tensors on cards go by NCCL."""
    said: list[Any] = []
    for name, value in (("SLURM_PROCID", "5"), ("SLURM_NTASKS", "6"), ("SLURM_LOCALID", "2")):
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", said.append)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, rank, world_size: said.append((backend, rank, world_size)))
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: said.append("left"))
    with joined("ddp") as world:
        assert (world.rank, world.size, world.first, world.parallel) == (5, 6, False, "ddp")
    assert said == [0, ("cpu:gloo,cuda:nccl", 5, 6), "left"]
    with pytest.raises(StoppedInTime), joined("ddp"):
        raise StoppedInTime("signal")
    assert said[3:] == [0, ("cpu:gloo,cuda:nccl", 5, 6), "left"]
    with pytest.raises(ZeroDivisionError), joined("ddp"):
        raise ZeroDivisionError  # the others are not there to leave with it
    assert said[6:] == [0, ("cpu:gloo,cuda:nccl", 5, 6)]
