"""Training over several GPUs of one host against one of them: speed, memory, losses, and checkpoints that another number goes on from.

`python -m tests.benchmarks.scaling --out FILE` on a host with GPUs; `--quick` shows on a CPU, with two processes, that it works.
Random weights (every block is a copy of one) and tokens, nothing is fetched. Each launch of processes does its jobs one after the
other, through the stages' own launcher, loop and checkpoints. Exit code 1 if a launch fails or a goal is missed (speed: on GPUs).
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.benchmarks.train_step import RATE, SHAPES, Bench, durations, matmul_rate, release
from utils.run.artifacts import write_json
from utils.run.errors import WorkFailed
from utils.run.launch import end_of_several, launch
from utils.run.preemption import Stop
from utils.training.batches import prefetched
from utils.training.distributed import ALONE, World, joined
from utils.training.loop import ready, train
from utils.training.memory import choose
from utils.training.metrics import read_metrics
from utils.training.run import Run
from utils.training.step import Stepper

NOT_TIMED = 2  # first steps of a job
GOALS = {"ddp": 0.95, "fsdp2": 0.90}  # tokens/s of one GPU, times their number
BOUNDS = {"fp32": 1e-4, "bf16": 0.02}  # nats per token that a step's loss may differ by from one process's
STEPS = 12  # of the runs whose losses are compared; a checkpoint is made in the middle
VALIDATED = 16  # sequences


@dataclass(frozen=True)
class Job:
    """What the processes of a launch do: time some steps, or train to the end, if `goes_on_from` from the middle of that other run."""

    name: str
    shape: str
    batch: int
    micro_batch: int | str = "auto"
    recompute: float | str = 0.0
    steps: int = 7
    precision: str = "bf16"
    trains: bool = False
    goes_on_from: str | None = None


class ScalingBench(Bench):
    def __init__(self, shape: str, folder: Path, compile_: str) -> None:
        (folder / shape).mkdir(exist_ok=True)
        super().__init__(shape, folder / shape, compile_, STEPS)

    def model(self, device: str | None = None) -> PreTrainedModel:
        """Random fp32 weights, the same in every process, and soon made."""
        torch.manual_seed(0)
        one = AutoModelForCausalLM.from_config(self.config(layers=1), dtype=torch.float32)
        tensors = dict(one.named_parameters()) | dict(one.named_buffers())
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config(self.shape["layers"]), dtype=torch.float32)
        model.to_empty(device=device or self.device)
        with torch.no_grad():
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                tensor.copy_(tensors[".".join("0" if part.isdigit() else part for part in name.split("."))])
        return model.eval()

    def of(self, job: Job, world: World) -> Run:
        if world.parallel == "fsdp2":
            self.device = torch.device("cpu")  # as a stage does: cut before it is put on the device
        split = {"batch_size": job.batch, "micro_batch": job.micro_batch, "recompute": job.recompute}
        run = self.run("baseline", steps=job.steps, validate_every=max(1, job.steps // 2), max_loss_rise=10.0, **split)
        validation = copy.copy(self.text)
        validation.count = VALIDATED
        run.state_folder, run.metrics = self.state(job.name) / "checkpoints", self.folder / job.name / "metrics.jsonl"
        return replace(run, world=world, precision=job.precision, validation=validation, label=job.name)

    def state(self, name: str) -> Path:
        return self.folder / name / "state"


def work(path: Path) -> None:
    """In one launched process: all jobs, each with a file of what this process found."""
    spec = json.loads(path.read_text())
    with nullcontext(ALONE) if spec["parallel"] == "none" else joined(spec["parallel"]) as world:
        for job in (Job(**given) for given in spec["jobs"]):
            release()
            torch._dynamo.reset()
            bench = ScalingBench(job.shape, path.parent, "off" if job.trains else spec["compile"])
            found = trained(bench, job, world) if job.trains else timed(bench, job, world)
            write_json(path.parent / f"{job.name}.{world.rank}.json", asdict(job) | found)
            if world.first and spec["out"]:
                write_json(Path(spec["out"]), summary(path.parent))  # what is found is not lost if the rest is


def timed(bench: ScalingBench, job: Job, world: World) -> dict[str, Any]:
    """Median step; the peak of memory; the steps' losses, nats per token. One GPU may be too small for a model."""
    losses: list[Tensor] = []
    flops, products = bench.flops_per_token(), matmul_rate(bench.device, bench.shape["matmul"])
    try:
        run = bench.of(job, world)
        with ready(run):
            stepper = Stepper(run)
            split = world.told(choose(run, stepper))
            stepper.split(*split)
            own = world.own(job.batch)
            with closing(prefetched(run.train, job.batch, range(job.steps), run.device, own)) as batches:
                seconds = list(durations(lambda _: losses.append(stepper(next(batches), RATE, 0)[0]), job.steps))
    except (torch.OutOfMemoryError, WorkFailed) as error:
        if world.size > 1:
            raise
        return {"did_not_fit": str(error).splitlines()[0]}
    rate = job.batch * bench.shape["length"] / statistics.median(seconds[NOT_TIMED:])
    found = {"tokens_per_second": rate, "flops_per_second": rate * flops, "matmul_flops_per_second": products}
    found |= {"micro_batch": split[0], "recompute": split[1]}
    if torch.cuda.is_available():
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found | {"seconds": seconds, "losses": torch.stack(losses).tolist()}


def trained(bench: ScalingBench, job: Job, world: World) -> dict[str, Any]:
    """The losses of all steps, nats per token; those before the middle may be another run's."""
    run = bench.of(job, world)
    if job.goes_on_from and world.first:
        shutil.copytree(bench.state(job.goes_on_from).parent, bench.state(job.name).parent)
        shutil.rmtree(run.state_folder / f"step_{STEPS:08d}")
    world.told(None)  # wait for the first one
    state, _ = train(run)
    if job.goes_on_from and state.resumed_at != [STEPS // 2]:
        raise WorkFailed(f"{job.name} went on from {state.resumed_at}, expected [{STEPS // 2}]")
    return {"losses": [row["loss"] for row in read_metrics(run.metrics)[0]]} if world.first else {}


def launches(big: tuple[str, str], small: str, batch: int, processes: int, ways: Sequence[str]) -> list[tuple[str, list[Job]]]:
    """(parallel, jobs) of every launch, in order."""
    run = Job("", small, 16, 4, steps=STEPS, precision="fp32", trains=True)
    one, many = Job("", big[0], batch, 8), Job("", big[1], batch // 4, 4, recompute=1.0, steps=5)
    speed = {"ddp": {"study": one, "unaccumulated": replace(one, batch=8 * processes)}, "fsdp2": {"large": many}}
    alone = {"study": one, "unaccumulated": replace(one, batch=8), "large": many}
    auto = {"large, auto": replace(many, micro_batch="auto", recompute="auto")}
    same = {"fp32": run, "bf16": replace(run, precision="bf16")}
    onward = {"onward": replace(run, goes_on_from="none fp32")}
    jobs = {"none": same | {name: alone[name] for way in ways for name in speed[way]}}
    jobs |= {way: same | onward | speed[way] | (auto if way == "fsdp2" else {}) for way in ways}
    named = [(way, [replace(job, name=f"{way} {name}") for name, job in chosen.items()]) for way, chosen in jobs.items()]
    return [*named, ("none", [replace(run, name=f"{way} back", goes_on_from=f"{way} fp32") for way in ways])]


def judged(results: dict[str, dict[str, Any]], processes: int, ways: Sequence[str]) -> list[tuple[str, float | None, float, bool]]:
    """(what, measured or None, goal, met) for every goal."""
    found: list[tuple[str, float | None, float, bool]] = []
    timed = [pair for pair in (("ddp", "study"), ("ddp", "unaccumulated"), ("fsdp2", "large")) if pair[0] in ways]
    for way, work in timed:
        speeds = [results.get(f"{name} {work}", {}).get("tokens_per_second") for name in (way, "none")]
        share = speeds[0] / speeds[1] / processes if speeds[0] and speeds[1] else None
        found.append((f"{way} {work}: share of perfect scaling", share, GOALS[way], share is not None and share >= GOALS[way]))
    pairs = [(f"{way} {precision}", f"none {precision}") for way in ways for precision in BOUNDS]
    pairs += [(f"{way} {other}", "none fp32") for way in ways for other in ("onward", "back")]
    for one, other in (*pairs, *((f"{way} {work}", f"none {work}") for way, work in timed if work != "unaccumulated")):
        losses = [results.get(name, {}).get("losses") for name in (one, other)]
        apart = max(abs(a - b) for a, b in zip(*losses, strict=True)) if losses[0] and losses[1] else None
        bound = BOUNDS[results[one]["precision"]] if one in results else 0.0
        found.append((f"{one}: losses from one process's", apart, bound, apart is not None and apart <= bound))
    return found


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'job':<24}{'shape':<14}{'batch':>6}{'split':>12}{'tokens/s':>10}{'of products':>12}{'GiB a GPU':>11}"]
    for name, facts in results.items():
        if "did_not_fit" in facts:
            lines.append(f"{name:<24}{facts['shape']:<14}{facts['batch']:>6}   {facts['did_not_fit']}")
        elif "tokens_per_second" in facts:
            share = facts["flops_per_second"] / facts["matmul_flops_per_second"]
            lines.append(
                f"{name:<24}{facts['shape']:<14}{facts['batch']:>6}{facts['micro_batch']:>6} {facts['recompute']:>4.0%}"
                f"{facts['tokens_per_second']:>10.0f}{share:>12.1%}{facts.get('peak_memory_gib', 0.0):>11.1f}"
            )
    return "\n".join(lines)


def gathered(folder: Path) -> dict[str, dict[str, Any]]:
    """What all processes have found, by job: the first one's losses and times, the largest memory, the rate of all matrix products."""
    results = {}
    for first in sorted(folder.glob("*.0.json"), key=lambda path: path.stat().st_mtime_ns):
        name = first.name.removesuffix(".0.json")
        found = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{name}.*.json"))]
        results[name] = found[0] | {"processes": len(found)}
        for key, combine in (("peak_memory_gib", max), ("matmul_flops_per_second", sum)):
            if key in found[0]:
                results[name][key] = combine(each[key] for each in found)
    return results


def summary(folder: Path) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"torch": torch.__version__, "device": name, "jobs": gathered(folder)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs=2, choices=SHAPES, default=["pythia-1.4b", "pythia-6.9b"], help="for ddp and for fsdp2")
    parser.add_argument("--ways", nargs="+", choices=GOALS, default=list(GOALS), help="what is held against one GPU")
    parser.add_argument("--batch", type=int, default=128, help="sequences a step for ddp; a quarter of them for fsdp2")
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count(), help="default: one for each GPU")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", dest="compile_")
    parser.add_argument("--quick", action="store_true", help="two processes and tiny shapes")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    big, small, batch, processes = tuple(options.shapes), "neox-42m", options.batch, options.processes
    if options.quick:
        big, small, batch, processes = ("tiny", "tiny"), "tiny", 32, 2
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shape in {*big, small}:
            ScalingBench(shape, folder, "off")  # its text, for all processes
        for number, (parallel, jobs) in enumerate(launches(big, small, batch, processes, options.ways)):
            spec, out = folder / f"launch_{number}", options.out and str(options.out.absolute())
            write_json(spec, {"parallel": parallel, "compile": options.compile_, "out": out, "jobs": [asdict(job) for job in jobs]})
            try:
                launch("tests.benchmarks.scaling", ["--work", str(spec)], 1 if parallel == "none" else processes, folder / parallel, Stop())
            except WorkFailed as error:
                print(f"{parallel}: {error}", flush=True)
                failed += 1
            found = summary(folder)
            print(table(found["jobs"]), flush=True)
            if options.out:
                write_json(options.out, found)
    missed = 0
    for what, value, goal, met in judged(found["jobs"], processes, options.ways):
        timed_on_cpu = "scaling" in what and not torch.cuda.is_available()
        missed += not met and not timed_on_cpu
        print(f"{what:<48}{'not measured' if value is None else f'{value:12.3g}'}   goal {goal:g}{'' if met else '   MISSED'}")
    return int(bool(failed or missed))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        end_of_several(lambda: work(Path(sys.argv[2])))
    sys.exit(main())
