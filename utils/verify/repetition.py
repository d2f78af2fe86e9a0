"""Training gives the same bits twice, and the same bits again when it was killed on the way.

`python -m utils.verify.repetition TOKENS FOLDER THREADS` is the run that gets killed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from configs.schema import Monotone, Training
from utils.data.tokens import PackedBatches, Tokens
from utils.models.constraints import Constraint
from utils.run.checks import Finding
from utils.run.preemption import Stop
from utils.training.loop import Run, train
from utils.verify.child import killed_child, wait
from utils.verify.sample import sample_model, sample_texts, sample_tokenizer, write_tokens

STEPS, SAVE_EVERY, KILL_AT = 8, 3, 5  # killed after step 5, hence goes on from step 3
LENGTH = 32
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Outcome:
    """What a run gave."""

    weights: dict[str, Tensor]
    metrics: bytes
    resumed_at: list[int]

    def differs(self, other: Outcome) -> str | None:
        """In what the other run's bits differ, in words."""
        names = [name for name, tensor in self.weights.items() if not torch.equal(tensor, other.weights[name])]
        if names:
            return f"{len(names)} of {len(self.weights)} weight tensors differ, {names[0]} among them"
        return None if self.metrics == other.metrics else "the weights are equal, the logged losses differ"


class Repetition:
    """Both checks train the same small model under the default constraint, beside a teacher, on the same tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.tokens = folder, folder / "tokens"
        self.straight: Outcome | None = None

    def twice(self) -> Finding:
        """The same steps with the same number of threads."""
        self._write_tokens()
        first, second = (trained(self.tokens, self.folder / name, Stop()) for name in ("first", "second"))
        if fault := first.differs(second):
            return "no", f"two equal runs of {STEPS} steps on {torch.get_num_threads()} threads: {fault}"
        self.straight = first
        return "ok", f"two runs of {STEPS} steps on {torch.get_num_threads()} threads agree to the last bit"

    def killed(self) -> Finding:
        """A process that trains is killed between two checkpoints; what goes on from there must equal the uninterrupted run."""
        if self.straight is None:
            return "skip", "training does not repeat itself here, so there is nothing to compare with"
        folder = self.folder / "killed"
        with killed_child("-m", __name__, str(self.tokens), str(folder), str(torch.get_num_threads())):
            pass
        resumed = trained(self.tokens, folder, Stop())
        if resumed.resumed_at != [SAVE_EVERY]:
            return "no", f"a run killed after step {KILL_AT} went on from {resumed.resumed_at or 'the start'}, expected step {SAVE_EVERY}"
        if fault := self.straight.differs(resumed):
            return "no", f"a run killed after step {KILL_AT} and resumed is not the uninterrupted one: {fault}"
        return "ok", f"kill -9 after step {KILL_AT}, resumed at step {SAVE_EVERY}: equal to the uninterrupted run to the last bit"

    def _write_tokens(self) -> None:
        words = sample_tokenizer()
        for number, split in enumerate(("train", "validation")):
            write_tokens(self.tokens / split, sample_texts(10, seed=number), words)


def trained(tokens: Path, folder: Path, stop: Stop) -> Outcome:
    """Train to the end, or go on with what is in the folder."""
    model = sample_model(seed=0)
    packed = [PackedBatches(Tokens(tokens / split), LENGTH, seed=1) for split in ("train", "validation")]
    run = Run(
        model=model,
        spec=Training(steps=STEPS, batch_size=8, micro_batch=4, validate_every=SAVE_EVERY),
        peak_rate=1e-2,
        train=packed[0],
        validation=packed[1],
        precision="fp32",
        state_folder=folder / "checkpoints",
        metrics=folder / "metrics.jsonl",
        stop=stop,
        label="train",
        constraint=Constraint(model, Monotone.model_validate({})),
        teacher=sample_model(seed=1).requires_grad_(False),
    )
    state, _ = train(run)
    return Outcome(model.state_dict(), run.metrics.read_bytes(), state.resumed_at)


class WaitsInTheMiddle(Stop):
    """Waits to be killed when it is asked for the flag at the end of step KILL_AT, once the checkpoint before it is there."""

    def __init__(self, checkpoints: Path) -> None:
        super().__init__()
        self.checkpoints, self.asked = checkpoints, 0

    def requested(self) -> bool:
        self.asked += 1
        if self.asked == KILL_AT:
            while not any(self.checkpoints.glob("step_*")):  # a thread writes it
                time.sleep(POLL_SECONDS)
            wait()
        return super().requested()


def main(arguments: Sequence[str]) -> None:
    tokens, folder, threads = arguments
    torch.set_num_threads(int(threads))
    trained(Path(tokens), Path(folder), WaitsInTheMiddle(Path(folder) / "checkpoints"))


if __name__ == "__main__":
    main(sys.argv[1:])
