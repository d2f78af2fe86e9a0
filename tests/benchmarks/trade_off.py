"""What every conversion costs and gives.

python -m tests.benchmarks.trade_off FOLDER [--finalists STEPS [--rate RATE]] [--screen STEPS] [--only ARM] [--set KEY=VALUE]

Setup (text, pretrained base) is the pipeline's; then each arm is converted, recovered, evaluated and
attacked by the pipeline's own functions, beside an unconstrained arm with the same seed, steps, learning rate and losses, and beside
that arm made as bad as the constrained one by noise and by going back in training. Finalists get every seed, screened arms the first.
One JSON file an arm and seed in FOLDER, from which trade_off_table makes the table. Step times are not taken from here: arms share the GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.presets import load
from configs.schema import Experiment
from stages.pipeline import run_each, stages
from tests.benchmarks.trade_off_table import table
from utils.attacks.flip_records import FlipAttacks
from utils.attacks.matched import matched_controls
from utils.attacks.referee import Referee
from utils.attacks.round_trip import RoundTrip
from utils.attacks.trigger_records import TriggerAttacks, text_tensor
from utils.attacks.uat import with_trigger
from utils.data.attack_texts import Alphabet, read_attack_texts
from utils.data.tokenizer import load_tokenizer
from utils.data.tokens import Tokens
from utils.evaluation.order import order_stored
from utils.evaluation.perplexity import by_document, score_windows
from utils.evaluation.windows import windows
from utils.models.convert import convert_stored
from utils.models.loading import device_of, load_model
from utils.run.artifacts import read_json, write_json
from utils.run.folders import Folders
from utils.run.preemption import Stop
from utils.run.records import Row, grouped
from utils.training.recovery import Files, recover

SIGNED = ("monotone.parametrisation=annealed", "monotone.activation=clamped_gelu")
PUBLISHED = ("monotone.parametrisation=softplus", "monotone.activation=keep", "monotone.recentre=false")
SLOW, PLAIN = "lr=5e-5", "training.distillation=0"
UNCONSTRAINED = "unconstrained"
FINALISTS = ("all-plus", "balanced", "256 directions")
ARMS: dict[str, tuple[str, ...]] = {
    UNCONSTRAINED: (),
    "all-plus": (),
    "published": (*PUBLISHED, SLOW, PLAIN),
    "published, lr 1e-3": (*PUBLISHED, PLAIN),
    "published, re-centred": (*PUBLISHED[:2], SLOW, PLAIN),
    "published, ReLU": (PUBLISHED[0], PUBLISHED[2], SLOW, PLAIN),
    "published, projected": (*PUBLISHED[1:], SLOW, PLAIN),
    "published, distilling": (*PUBLISHED, SLOW),
    "all-plus, softplus": ("monotone.parametrisation=softplus",),
    "all-plus, clamped GELU": ("monotone.activation=clamped_gelu",),
    "all-plus, annealed": SIGNED,
    "all-plus, least squares": ("monotone.start=least_squares",),
    "all-plus, layer-wise 10 %": ("monotone.layerwise_share=0.1",),
    "lift (control)": ("monotone.start=lift", "monotone.activation=clamped_gelu"),
    "balanced": ("monotone.order=balanced", *SIGNED, "monotone.norm_gain=positive"),
    "64 directions": ("monotone.order=directions", "monotone.directions=64", *SIGNED),
    "256 directions": ("monotone.order=directions", "monotone.directions=256", *SIGNED),
}


Flips = dict[str, list[float]]  # {text: [clean, attacked, relative rise as the reference counts it]}


@dataclass(frozen=True)
class Task:
    """One arm of one seed. Its label is the name of its files."""

    arm: str
    seed: int
    extra: tuple[str, ...]

    @property
    def settings(self) -> dict[str, str]:
        return dict(item.split("=", 1) for item in ("lr=1e-3", *ARMS[self.arm], *self.extra))

    @property
    def label(self) -> str:
        """Names the arm by what it was trained with."""
        budget = {"training.distillation": "0.5"} | self.settings
        return f"{self.arm}, {budget['training.steps']} steps, lr {budget['lr']}, KD {budget['training.distillation']}"

    @property
    def stem(self) -> str:
        return f"{self.label} seed {self.seed}".replace(" ", "_").replace(",", "")

    @property
    def control(self) -> Task:
        """The unconstrained arm with the same seed, steps, learning rate and losses."""
        shared = {"lr": "1e-3"} | {key: value for key, value in self.settings.items() if not key.startswith("monotone.")}
        return Task(UNCONSTRAINED, self.seed, tuple(f"{key}={value}" for key, value in shared.items()))


def with_controls(tasks: Iterable[Task]) -> list[Task]:
    """Each control once, before the arms that are held against it."""
    wanted = list(tasks)
    return list({task.stem: task for task in (*(task.control for task in wanted), *wanted)}.values())


def plan(seeds: list[int], finalists: int, rate: float, screen: int, only: list[str]) -> list[Task]:
    """Finalists a seed at a time, all with one learning rate, then what is screened; `only` names arms in place of those of each kind."""
    long, short = f"training.steps={finalists}", f"training.steps={screen}"
    chosen = [Task(arm, seed, (long, f"lr={rate:g}")) for seed in seeds for arm in only or FINALISTS if finalists]
    screened = [Task(arm, seeds[0], (short,)) for arm in only or ARMS if screen]
    return [*with_controls(chosen), *with_controls(screened)]


def configured(preset: str, overrides: list[str], task: Task) -> tuple[Experiment, float]:
    settings = task.settings
    rate = float(settings.pop("lr"))
    return load(preset, [*overrides, *(f"{key}={value}" for key, value in settings.items())]), rate


class Bench:
    """One task from the stored base to its JSON file."""

    def __init__(self, preset: str, overrides: list[str], folder: Path, task: Task) -> None:
        self.config, self.rate = configured(preset, overrides, task)
        self.task, self.folder, self.stop = task, folder, Stop()
        self.setup = Folders.of(self.config.paths, self.config.run_name).run / f"seed_{self.config.seeds[0]}" / "stage_0_setup"
        self.place = self.model_folder(task)

    def model_folder(self, task: Task) -> Path:
        return self.setup.parent / "trade_off" / task.stem

    def run(self) -> dict[str, Any]:
        began = time.perf_counter()
        constrained = self.task.arm != UNCONSTRAINED
        facts = self._convert() if constrained else {}
        self._recover(constrained)
        trained = time.perf_counter() - began
        model = load_model(self.place / "best", device_of(self.config.compute))
        found = {
            "arm": self.task.label,
            "seed": self.task.seed,
            "control": self.task.control.label,
            "documents": self._documents(model),
            **self._attacked(model),
            "trigger": self._trigger(model),
            "history": {key: read_json(self.place / "history.json")[key] for key in ("skipped_steps", "best_step", "tokens_per_second")},
            **facts,
        }
        if constrained:
            found |= self._order() | self._controls()
            certificate = read_json(self.place / "certificate.json")
            found["certificate"] = {key: certificate[key] for key in CERTIFICATE}
        return found | {"seconds": {"training": trained, "all": time.perf_counter() - began}}

    def _convert(self) -> dict[str, Any]:
        log, _ = convert_stored(
            self.config,
            self.task.seed,
            base=self.setup / "base_model",
            train_tokens=self.setup / "tokens/train",
            validation_tokens=self.setup / "tokens/validation",
            target=self.place / "converted",
            order_file=self.place / "order.safetensors",
        )
        return {"nll_before": log["validation_nll_before"], "nll_converted": log["validation_nll_after"], "kept_energy": log["kept_energy"]}

    def _recover(self, constrained: bool) -> None:
        files = Files(
            start=self.place / "converted" if constrained else self.setup / "base_model",
            base=self.setup / "base_model",
            train_tokens=self.setup / "tokens/train",
            validation_tokens=self.setup / "tokens/validation",
            state=self.place / "state",
            best=self.place / "best",
            last=self.place / "last",
            metrics=self.place / "metrics.jsonl",
            history=self.place / "history.json",
            certificate=self.place / "certificate.json" if constrained else None,
            order=self.place / "order.safetensors" if constrained else None,
        )
        spec = self.config.monotone if constrained else None
        recover(self.config, self.task.seed, self.rate, spec, files, self.stop, self.task.label)

    def _documents(self, model: Any) -> dict[str, list[float]]:
        test, spec = Tokens(self.setup / "tokens/test"), self.config.evaluate
        precision, path = self.config.compute.precision, self.place / "test.jsonl"
        rows = score_windows(model, windows(test, spec), spec.batch_size, precision, path, self.stop, "test")
        return {str(row["document"]): [row["nll"], row["tokens"]] for row in by_document(test, rows)}

    def _attacked(self, model: Any) -> dict[str, Flips]:
        """Flips on all texts, and with ten times the candidates on the first ones."""
        return {"flips": self._flips("best", model), "longer": self._flips("best", model, "longer")}

    def _flips(self, name: str, model: Any, attack: str = "hotflip") -> Flips:
        texts, spec = self._texts()["hotflip"], self.config.hotflip
        on = FlipAttacks(model, name, texts, *self._words(), spec, self.config.compute.precision)
        groups = enumerate(grouped(texts[: spec.longer_texts] if attack == "longer" else texts, spec.batch_size))
        begun = self.place / f"{name}.{attack}"
        return by_text(
            [row for number, group in groups for row in on.search(attack, group, Path(f"{begun}.{number}.json"), self.stop.check)]
        )

    def _trigger(self, model: Any) -> dict[str, float]:
        """One search, its own for each seed; clean and attacked loss on the held-out texts."""
        spec = self.config.uat.model_copy(update={"seed": self.task.seed, "restarts": 1})
        (alphabet, words), sets = self._words(), self._texts()
        path, precision = self.place / "trigger.json", self.config.compute.precision
        attacks = TriggerAttacks(model, "best", sets, alphabet, words, spec, precision)
        found = attacks.search(0, path, self.stop.check)
        referee, texts = Referee(model), text_tensor(sets["report"], model.device)
        triggers = {"clean": [], "attacked": found["trigger"]}
        ids = {kind: with_trigger(alphabet.end_of_text, trigger, texts) for kind, trigger in triggers.items()}
        return {kind: float(referee.nll(own, texts.shape[1]).mean()) for kind, own in ids.items()}

    def _texts(self) -> dict[str, list[dict[str, Any]]]:
        return read_attack_texts(self.setup / "attack_texts.json")[0]

    def _words(self) -> tuple[Alphabet, RoundTrip]:
        return read_attack_texts(self.setup / "attack_texts.json")[1], RoundTrip(load_tokenizer(self.setup / "tokenizer"))

    def _order(self) -> dict[str, Any]:
        models = {"arm": self.place / "best", "control": self._control()}
        found = order_stored(
            self.config,
            self.task.seed,
            models=models,
            order=self.place / "order.safetensors",
            tokenizer=self.setup / "tokenizer",
            test_tokens=self.setup / "tokens/test",
        )
        shares = {
            name: float(np.mean([block["others"] for block in facts["intervention"]["by_block"].values()])) for name, facts in found.items()
        }
        return {"order": {"kept": shares, "probe": {name: facts["probe"]["accuracy"] for name, facts in found.items()}}}

    def _control(self) -> Path:
        """The trained control, which another worker may still be making."""
        while not (self.folder / f"{self.task.control.stem}.json").exists():
            time.sleep(0.5)
        return self.model_folder(self.task.control) / "best"

    def _controls(self) -> dict[str, Any]:
        models = {"base": self.setup / "base_model", "baseline": self._control(), "monotonic": self.place / "best"}
        folders, facts = matched_controls(
            self.config,
            models=models,
            earlier_models=self.setup / "earlier_models",
            validation_tokens=self.setup / "tokens/validation",
            folder=self.place / "matched",
        )
        device = device_of(self.config.compute)
        return {"matched": facts} | {name: self._flips(name, load_model(folder, device)) for name, folder in folders.items()}


def by_text(rows: list[Row]) -> Flips:
    return {row["text"]: [row["nll"][0], row["nll"][-1], row["reference_attacked"] / row["reference_clean"] - 1] for row in rows}


CERTIFICATE = ("constraint_holds", "ffn_monotone", "vacuous", "monotone_before_gain", "smallest_margin")


def work(options: argparse.Namespace, tasks: list[Task]) -> None:
    """Every task that no other worker has claimed, in order."""
    for task in tasks:
        target = options.folder / f"{task.stem}.json"
        try:
            target.with_suffix(".claimed").touch(exist_ok=False)
        except FileExistsError:
            continue
        try:
            write_json(target, Bench(options.config, options.set, options.folder, task).run())
        except Exception:
            write_json(target, {"arm": task.label, "seed": task.seed, "error": traceback.format_exc()})
        print(f"done: {task.stem}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", default="standin-42m")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--seeds", default="42,1337,2024")
    parser.add_argument("--finalists", type=int, default=0, help="steps; 0: none")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of finalists")
    parser.add_argument("--screen", type=int, default=0, help="steps; 0: none")
    parser.add_argument("--only", action="append", default=[], choices=ARMS, help="arms")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    tasks = plan([int(seed) for seed in options.seeds.split(",")], options.finalists, options.rate, options.screen, options.only)
    if options.worker:
        work(options, tasks)
        return
    config = load(options.config, options.set)
    if run_each(stages()[:1], config, config.seeds[:1], discard=False):
        raise SystemExit("setup failed")
    command = [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--worker"]
    workers = [subprocess.Popen(command) for _ in range(options.workers)]
    for worker in workers:
        worker.wait()
    print(table([json.loads(path.read_text()) for path in sorted(options.folder.glob("*.json"))]))


if __name__ == "__main__":
    main()
