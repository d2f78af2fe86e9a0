"""The training step against its alternatives, in one run on one device.

`python -m tests.benchmarks.train_step --shape pythia-1.4b --out FILE` on a GPU; `--shape tiny` shows on a CPU that it works.
Random weights and tokens, made on the device: nothing is fetched. Exit code 1 if a goal is missed (on a GPU).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedModel

from configs.schema import Compute, Monotone, Training
from tests.builders import non_negative_start
from utils.data.tokens import PackedBatches, Tokens
from utils.models.blocks import compiles
from utils.models.constraints import Constraint
from utils.models.ffn import set_activation
from utils.models.loading import as_teacher, autocast, load_model, save_model
from utils.run.preemption import Stop
from utils.training import loop
from utils.training.batches import prefetched
from utils.training.checkpoint import Checkpoints, TrainState
from utils.training.loop import ready
from utils.training.memory import choose
from utils.training.run import Run
from utils.training.step import Stepper
from utils.training.throughput import flops_per_token

SHAPES = {
    "pythia-6.9b": {"vocab": 50432, "hidden": 4096, "layers": 32, "heads": 32, "length": 2048, "batch": 8, "matmul": 8192},
    "pythia-1.4b": {"vocab": 50304, "hidden": 2048, "layers": 24, "heads": 16, "length": 2048, "batch": 8, "matmul": 8192},
    "pythia-410m": {"vocab": 50304, "hidden": 1024, "layers": 24, "heads": 16, "length": 2048, "batch": 8, "matmul": 8192},
    "neox-42m": {"vocab": 16384, "hidden": 512, "layers": 8, "heads": 8, "length": 512, "batch": 8, "matmul": 8192},
    "tiny": {"vocab": 512, "hidden": 64, "layers": 2, "heads": 2, "length": 64, "batch": 4, "matmul": 256},
}
ARMS = ("baseline", "monotone", "softplus", "distilling", "plain", "trainer", "trainer compiled")
RATE = 1e-4
STUDY_SEQUENCES, STUDY_SAVES = 128 * 100, 8  # sequences between two checkpoints of configs/pythia-1.4b.yaml, and their number


class Bench:
    """One shape on one device, with text of random tokens on disk."""

    def __init__(self, shape: str, folder: Path, compile_: str, steps: int) -> None:
        self.name, self.shape, self.folder, self.steps = shape, SHAPES[shape], folder, steps
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.compile_, self.compiled = compile_, compiles(Compute.model_validate({"compile": compile_}), self.device)
        if not (folder / "index.json").exists():
            self._write_text()
        self.text = PackedBatches(Tokens(folder), self.shape["length"], seed=0)

    def _write_text(self) -> None:
        ids = np.random.default_rng(0).integers(0, self.shape["vocab"], 200 * self.shape["batch"] * self.shape["length"])
        ids.astype("<u2").tofile(self.folder / "tokens.bin")
        index = {"dtype": "<u2", "end_of_text": 0, "subsets": [], "duplicates": 0, "complete": True, "shards": []}
        (self.folder / "index.json").write_text(json.dumps(index | {"documents": 1, "tokens": len(ids)}))

    @property
    def tokens(self) -> int:
        return self.shape["batch"] * self.shape["length"]

    def model(self, device: str | None = None) -> PreTrainedModel:
        """Random fp32 weights."""
        torch.manual_seed(0)
        with torch.device(device or self.device):
            return AutoModelForCausalLM.from_config(self.config(self.shape["layers"]), dtype=torch.float32).eval()

    def config(self, layers: int) -> GPTNeoXConfig:
        return GPTNeoXConfig(
            vocab_size=self.shape["vocab"],
            hidden_size=self.shape["hidden"],
            num_hidden_layers=layers,
            num_attention_heads=self.shape["heads"],
            intermediate_size=4 * self.shape["hidden"],
            max_position_embeddings=self.shape["length"],
            use_cache=False,
        )

    def run(self, arm: str, **settings: Any) -> Run:
        model, constraint, teacher = self.model(), None, None
        if arm in ("monotone", "softplus"):
            spec = Monotone.model_validate({"parametrisation": "softplus" if arm == "softplus" else "projected"})
            non_negative_start(model, spec)
            set_activation(model, "relu")
            constraint = Constraint(model, spec)
        if arm == "distilling":
            teacher = as_teacher(self.model(), "bf16")
        usual = {"steps": self.steps, "validate_every": self.steps, "batch_size": self.shape["batch"]}
        training = Training.model_validate(usual | {"distillation": 0.5 if teacher is not None else 0.0} | settings)
        return Run(
            model=model,
            spec=training,
            peak_rate=RATE,
            train=self.text,
            validation=self.text,
            precision="bf16",
            state_folder=self.folder / arm / "checkpoints",
            metrics=self.folder / arm / "metrics.jsonl",
            stop=Stop(),
            label=arm,
            constraint=constraint,
            teacher=teacher,
            compiled=self.compiled,
        )

    def flops_per_token(self, whole_square: bool = False) -> float:
        """Floating-point operations of a token, from a model without memory."""
        return flops_per_token(self.model("meta"), self.shape["length"], whole_square)


def sync() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul_rate(device: torch.device, size: int) -> float:
    """FLOP/s of one large bf16 product of random matrices, median of 30."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / statistics.median(list(durations(lambda _: a @ b, 40))[10:])


def durations(act: Callable[[int], Any], count: int) -> Iterator[float]:
    """Seconds of each call: by events on a GPU, where the host runs ahead as it does in training."""
    if torch.cuda.is_available():
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for number in range(count):
            act(number)
            events[number + 1].record()
        torch.cuda.synchronize()
        yield from (before.elapsed_time(after) / 1e3 for before, after in pairwise(events))
        return
    for number in range(count):
        began = time.perf_counter()
        act(number)
        yield time.perf_counter() - began


def measure(bench: Bench, arm: str) -> dict[str, Any]:
    """First step's seconds (compilation), then the others' median, and the peak of memory."""
    release()
    torch._dynamo.reset()
    alternatives = {"plain": plain, "trainer": trainer, "trainer compiled": trainer}
    losses: list[Tensor] = []
    seconds = alternatives.get(arm, engine)(bench, arm, losses)
    usual = statistics.median(seconds[3:])
    found = {
        "ms_per_step": 1e3 * usual,
        "ms_slowest": 1e3 * max(seconds[3:]),
        "tokens_per_second": bench.tokens / usual,
        "flops_per_second": bench.flops_per_token() * bench.tokens / usual,
        "flops_per_second_whole_square": bench.flops_per_token(whole_square=True) * bench.tokens / usual,
        "first_step_seconds": seconds[0],
        "steps": len(seconds) - 3,
        "losses": torch.stack(losses).tolist() if losses else [],
    }
    if torch.cuda.is_available():
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def engine(bench: Bench, arm: str, losses: list[Tensor]) -> list[float]:
    run = bench.run(arm)
    with ready(run):
        stepper = Stepper(run)
        stepper.split(bench.shape["batch"], 0.0)
        with closing(prefetched(run.train, run.spec.batch_size, range(bench.steps), run.device)) as batches:
            return list(durations(lambda _: losses.append(stepper(next(batches), RATE, 0)[1]), bench.steps))


def plain(bench: Bench, arm: str, losses: list[Tensor]) -> list[float]:
    """What one writes first: autocast, cross-entropy on all logits, fused AdamW, clipping."""
    model = bench.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, fused=True)

    def step(number: int) -> None:
        ids = torch.from_numpy(bench.text.batch(number, bench.shape["batch"])).to(bench.device)
        with autocast(bench.device, "bf16"):
            logits = model(ids[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        losses.append(loss.detach())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return list(durations(step, bench.steps))


def trainer(bench: Bench, arm: str, losses: list[Tensor]) -> list[float]:
    """transformers' Trainer in bf16 with its normal settings and the fused AdamW, which is its default. It keeps its losses to itself."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    marks: list[Any] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *given: Any, **more: Any) -> None:
            if not marks:
                self._mark()

        def on_step_end(self, *given: Any, **more: Any) -> None:
            self._mark()

        def _mark(self) -> None:
            marks.append(torch.cuda.Event(enable_timing=True) if torch.cuda.is_available() else time.perf_counter())
            if torch.cuda.is_available():
                marks[-1].record()

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return bench.text.count

        def __getitem__(self, number: int) -> dict[str, Tensor]:
            ids = torch.from_numpy(bench.text.sequences(np.array([number]))[0, :-1])
            return {"input_ids": ids, "labels": ids.clone()}

    arguments = TrainingArguments(
        output_dir=str(bench.folder / "trainer"),
        per_device_train_batch_size=bench.shape["batch"],
        max_steps=bench.steps,
        bf16=True,
        optim="adamw_torch_fused",
        learning_rate=RATE,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        torch_compile=arm == "trainer compiled",
    )
    Trainer(model=bench.model(), args=arguments, train_dataset=Rows(), callbacks=[Clock()]).train()
    sync()
    return [(b - a) if isinstance(a, float) else a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def saving(bench: Bench, usual: float) -> dict[str, Any]:
    """What saves cost the steps around them, and how long a thread then writes. Leaves a checkpoint and a start model behind."""
    run, found = bench.run("baseline"), {}
    with ready(run), closing(Checkpoints(run.state_folder, 1)) as checkpoints:
        stepper = Stepper(run, checkpoints.snapshot.before_update)
        stepper.split(bench.shape["batch"], 0.0)
        batches = [torch.from_numpy(bench.text.batch(number, bench.shape["batch"])).to(bench.device) for number in range(4)]
        for ids in batches:
            stepper(ids, RATE, 0)
        for number, turn in enumerate(("first", "second"), 1):  # the first save also allocates the locked memory
            sync()
            began = time.perf_counter()
            state = TrainState(step=number, micro_batch=bench.shape["batch"])
            checkpoints.save(state, run.model.state_dict(), stepper.tensors())
            found[f"{turn} save, host seconds"] = time.perf_counter() - began
            for ids in batches * 2:
                stepper(ids, RATE, 0)
            sync()
            found[f"{turn} save, stall in seconds"] = time.perf_counter() - began - 8 * usual
            checkpoints.wait()
            found[f"{turn} save, seconds until it is on disk"] = time.perf_counter() - began
        study = STUDY_SEQUENCES / bench.shape["batch"] * usual
        stalls = found["first save, stall in seconds"] + (STUDY_SAVES - 1) * found["second save, stall in seconds"]
        found["stall as a share of the study's training time"] = stalls / (STUDY_SAVES * study)
    found["bytes"] = sum(file.stat().st_size for file in run.state_folder.rglob("*") if file.is_file())
    save_model(run.model, bench.folder / "start")
    return found


def resuming(bench: Bench) -> dict[str, Any]:
    """How long a new process takes to its first step, from the checkpoint of `saving`."""
    release()
    command = [sys.executable, "-m", "tests.benchmarks.train_step", "--shape", bench.name, "--compile", bench.compile_]
    text = subprocess.run(
        [*command, "--resume", str(bench.folder), "--since", str(time.time())], check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    print(text, flush=True)
    return json.loads(text.splitlines()[-1])


class FirstStep(Stop):
    """Ends a run after its first step."""

    def requested(self) -> bool:
        sync()
        raise KeyboardInterrupt


def resume(bench: Bench, since: float) -> None:
    """In a process of its own: from nothing to the end of the first step, by the loop that trains."""
    marks = {}

    def mark(what: str) -> None:
        sync()
        marks[f"resume, seconds to: {what}"] = time.time() - since

    class Marked(Checkpoints):
        def newest(self) -> TrainState | None:
            found = super().newest()
            marks["resume, seconds to: checksums taken"] = time.time() - since
            return found

        def model_tensors(self, step: int, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
            mark("blocks compiled")
            return super().model_tensors(step, like)

    class Restored(Stepper):
        def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
            super().restore(tensors, updates)
            mark("state on the device")

    mark("libraries loaded")
    run = bench.run("baseline")
    run.model = load_model(bench.folder / "start", bench.device)
    run.stop = FirstStep()
    mark("start model loaded")
    with suppress(KeyboardInterrupt), mock.patch.multiple(loop, Checkpoints=Marked, Stepper=Restored):
        loop.train(run)
    mark("first step done")
    print(json.dumps(marks))


def fitting(bench: Bench, gigabytes: int) -> dict[str, Any]:
    """What `auto` chooses on a card of this size for a step of the study (distilling, 128 sequences), and what such steps take."""
    release()
    torch._dynamo.reset()
    torch.cuda.set_per_process_memory_fraction(gigabytes * 1e9 / torch.cuda.get_device_properties(0).total_memory)
    run = bench.run("distilling", batch_size=128)
    with ready(run):
        stepper = Stepper(run)
        began = time.perf_counter()
        chosen = choose(run, stepper)
        found = {"seconds to choose": time.perf_counter() - began, "micro_batch": chosen[0], "recompute": chosen[1]}
        stepper.split(*chosen)
        batches = [torch.from_numpy(bench.text.batch(number, 128)).to(bench.device) for number in range(2)]
        torch.cuda.reset_peak_memory_stats()
        seconds = list(durations(lambda number: stepper(batches[number % 2], RATE, number), 3))
    torch.cuda.set_per_process_memory_fraction(1.0)
    return found | {
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "reserved_memory_gib": torch.cuda.max_memory_reserved() / 2**30,
        "tokens_per_second": 128 * bench.shape["length"] / seconds[-1],
    }


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def table(results: dict[str, Any]) -> str:
    rate = results["matmul_flops_per_second"]
    lines = [
        f"matrix products: {rate / 1e12:.0f} TFLOP/s on {results['device']}",
        f"{'arm':<18}{'ms':>8}{'tokens/s':>10}{'TFLOP/s':>9}{'of matmul':>10}{'(square)':>9}{'GiB':>7}{'first s':>9}",
    ]
    for arm, facts in results["arms"].items():
        lines.append(
            f"{arm:<18}{facts['ms_per_step']:>8.1f}{facts['tokens_per_second']:>10.0f}{facts['flops_per_second'] / 1e12:>9.1f}"
            f"{facts['flops_per_second'] / rate:>10.1%}{facts['flops_per_second_whole_square'] / rate:>9.1%}"
            f"{facts.get('peak_memory_gib', 0):>7.1f}{facts['first_step_seconds']:>9.1f}"
        )
    return "\n".join(lines)


def goals(results: dict[str, Any]) -> list[tuple[str, float, float, bool]]:
    """(what, measured, goal, met) for every goal whose arms were run."""
    arms, rate = results["arms"], results["matmul_flops_per_second"]
    step = {arm: facts["ms_per_step"] for arm, facts in arms.items()}
    shares = [arm for arm in ("baseline", "monotone") if arm in arms]
    found = [(f"{arm}: share of the matmul rate", arms[arm]["flops_per_second"] / rate, 0.6, False) for arm in shares]
    pairs = {("monotone", "baseline"): 1.02, ("distilling", "baseline"): 1.45}
    found += [(f"{a} / {b}, step", step[a] / step[b], goal, True) for (a, b), goal in pairs.items() if a in step and b in step]
    if "trainer" in step and "baseline" in step:
        found.append(("tokens/s over Trainer's", step["trainer"] / step["baseline"], 1.2, False))
    if "plain" in arms and "baseline" in arms:
        pairs_of_losses = zip(arms["plain"]["losses"], arms["baseline"]["losses"], strict=True)
        found.append(("loss, largest difference from plain's", max(abs(a - b) for a, b in pairs_of_losses), 0.01, True))
    if saving := results.get("checkpoint"):
        found.append(("stall, share of training time", saving["stall as a share of the study's training time"], 0.01, True))
        found.append(("resume, seconds to first step", saving["resume, seconds to: first step done"], 30.0, True))
    return [(what, value, goal, value <= goal if at_most else value >= goal) for what, value, goal, at_most in found]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.train_step", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="pythia-1.4b")
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=["baseline", "monotone", "distilling", "plain", "trainer"])
    parser.add_argument("--steps", type=int, default=23, help="steps an arm; the first three are not counted")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", dest="compile_")
    parser.add_argument("--checkpoint", action="store_true", help="also measure saving and resuming")
    parser.add_argument("--cards", nargs="*", type=int, default=[], metavar="GB", help="also choose micro-batches on cards of these sizes")
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--since", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if options.resume:
        resume(Bench(options.shape, options.resume, options.compile_, options.steps), options.since)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options.shape, Path(folder), options.compile_, options.steps)
        name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
        results: dict[str, Any] = {"device": name, "torch": torch.__version__, "shape": options.shape, "tokens_per_step": bench.tokens}
        results["matmul_flops_per_second"] = matmul_rate(bench.device, bench.shape["matmul"])
        results["arms"] = {}
        for arm in options.arms:
            results["arms"][arm] = measure(bench, arm)
            print(table(results).splitlines()[-1], flush=True)
        if options.checkpoint:
            usual = results["arms"].get("baseline", {"ms_per_step": 0.0})["ms_per_step"] / 1e3
            results["checkpoint"] = saving(bench, usual) | resuming(bench)
        results["cards"] = {f"{size} GB": fitting(bench, size) for size in options.cards}
    judged = goals(results)
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    print(json.dumps({key: results.get(key) for key in ("checkpoint", "cards")}, indent=2))
    for what, value, goal, met in judged:
        print(f"{what:<40}{value:8.3f}   goal {goal:g}{'' if met else '   MISSED'}")
    return int(bench.device.type == "cuda" and not all(met for *_, met in judged))


if __name__ == "__main__":
    sys.exit(main())
