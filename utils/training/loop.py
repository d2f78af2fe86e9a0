"""The training loop, one for both arms and for the base model's pretraining: equal code, equal data, equal budget."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from utils.models.attention import packed_causal
from utils.models.blocks import prepare_blocks
from utils.models.head import check_head
from utils.models.loading import save_model
from utils.run.artifacts import damage, inventory, left_behind, published, write_sealed
from utils.run.errors import InputError, StoppedInTime, WorkFailed
from utils.run.progress import Progress
from utils.training import memory, optim
from utils.training.batches import prefetched
from utils.training.boards import no_board, opened
from utils.training.checkpoint import Checkpoints, TrainState
from utils.training.distributed import spread
from utils.training.metrics import MetricsLog
from utils.training.run import Run
from utils.training.schedule import learning_rate
from utils.training.step import Stepper
from utils.training.telemetry import NAME, Telemetry

FLUSH_EVERY = 25  # steps whose losses wait on the device, so that no step waits for the host


def train(run: Run) -> tuple[TrainState, Checkpoints]:
    """Train to `run.spec.steps`, from the newest intact checkpoint if there is one.

    Returns the final state and the checkpoints, among them the last and the best (lowest validation loss in nats per token).
    Raises StoppedInTime after saving if asked to stop; WorkFailed if too many steps in a row had to be skipped, the validation loss
    diverged, or the device's memory did not suffice; InputError if the processes cannot share a step evenly. On a CPU a run that was
    interrupted any number of times equals an uninterrupted one bit for bit: weights, optimiser state and metrics.
    """
    if fault := run.spec.unshared(run.world.size):
        raise InputError(fault)
    checkpoints = Checkpoints(run.state_folder, run.spec.keep_last, run.world)
    with closing(checkpoints), ready(run):
        stepper = Stepper(run, checkpoints.snapshot.before_update)
        try:
            state = _resume(run, stepper, checkpoints)
            with _watched(run, state) as (log, telemetry):
                _train_on(run, stepper, checkpoints, state, log, telemetry)
        except torch.OutOfMemoryError as error:
            raise memory.out_of_memory(run, (stepper.micro_batch, stepper.recompute), error) from None
        checkpoints.wait()
    return state, checkpoints


@contextmanager
def ready(run: Run) -> Iterator[None]:
    """The models as they are trained: without dropout, since a step must be a function of its tokens alone; attention and blocks fast."""
    if run.compiled:  # a job that is queued again finds the compiled code
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(run.state_folder.parent / "compiled"))
    for model in run.models:
        model.eval()
        check_head(model, run.precision)
    try:
        with packed_causal(*run.models):
            yield
    finally:
        for model in run.models:
            prepare_blocks(model, compiled=False)


def _resume(run: Run, stepper: Stepper, checkpoints: Checkpoints) -> TrainState:
    """Put everything into the state of the newest checkpoint; choose how a step is split, unless it was chosen for as many processes."""
    state: TrainState = run.world.told(_newest(run, stepper, checkpoints) if run.world.first else None) or TrainState()
    if state.step:
        shapes = run.model.state_dict()
        stored = checkpoints.model_tensors(state.step, shapes)
        run.model.load_state_dict({name: spread(tensor, shapes.get(name, tensor)) for name, tensor in stored.items()})
        if run.constraint:
            run.constraint.resume(state.step, run.spec.steps)
        stepper.restore(checkpoints.optimizer_tensors(state.step, optim.shapes(run.model)), state.step - state.skipped)
        state.resumed_at.append(state.step)
        print(f"  going on from step {state.step} of {run.spec.steps}")
    if state.step < run.spec.steps and not _split_here(run, state):
        state.micro_batch, state.recompute = run.world.told(memory.choose(run, stepper))
        state.processes, state.parallel = run.world.size, run.world.parallel
    stepper.split(state.micro_batch, state.recompute)
    return state


def _split_here(run: Run, state: TrainState) -> bool:
    """Whether the split of a step was chosen for processes as they are now: fewer may each have to hold more."""
    return (state.processes, state.parallel) == (run.world.size, run.world.parallel)


def _newest(run: Run, stepper: Stepper, checkpoints: Checkpoints) -> TrainState | None:
    """The newest intact checkpoint; blocks are compiled while threads take the checksums."""
    likely = checkpoints.glimpse()
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(checkpoints.newest)
        if run.compiled and run.world.size == 1 and likely is not None and _split_here(run, likely) and likely.step < run.spec.steps:
            stepper.split(likely.micro_batch, likely.recompute)
            stepper.warm_up(torch.from_numpy(run.train.batch(likely.step, likely.micro_batch)).to(run.device))
        return found.result()


def _train_on(run: Run, stepper: Stepper, checkpoints: Checkpoints, state: TrainState, log: MetricsLog, telemetry: Telemetry) -> None:
    """Steps from `state.step` to the last one. Each validation is followed by a checkpoint, and so is a request to stop."""
    progress = Progress(run.label, run.spec.steps, state.step, tokens_per_unit=run.tokens_per_step)
    own = run.world.own(run.spec.batch_size)
    with closing(prefetched(run.train, run.spec.batch_size, range(state.step, run.spec.steps), run.device, own)) as batches:
        for ids in batches:
            rate = _rate(run, state.step)
            note = ""
            log.add(state.step, rate, stepper(ids, rate, state.step))
            state.step += 1
            last = state.step == run.spec.steps
            validating = last or state.step % run.spec.validate_every == 0
            stopping = run.world.any(run.stop.requested())  # asked once a step: the flag may rise between two looks at it
            checkpoints.check()
            if state.step in run.milestones:
                save_milestone(run.model, run.milestones[state.step])
            if validating or stopping or len(log.waiting) >= FLUSH_EVERY:
                note = log.flush(run.tokens_per_step, state, run.spec.max_bad_steps)
                telemetry.steps(state.step)
            if validating:
                nll = _validated(run, stepper, state, log)
                telemetry.validation(nll)
                note = f"validation {nll:.4f} nats/token"
            if validating or stopping:
                state.seconds = telemetry.seconds
                state.metrics_bytes, state.metrics_sha256 = log.sync()
                with telemetry.saving():
                    checkpoints.save(state, run.model.state_dict(), stepper.tensors())
            progress.advance(1, note)
            if stopping and not last:
                checkpoints.wait()
                raise StoppedInTime(f"{run.stop.reason}, step {state.step} of {run.spec.steps}")
    progress.close()


@contextmanager
def _watched(run: Run, state: TrainState) -> Iterator[tuple[MetricsLog, Telemetry]]:
    """The run's metrics and telemetry; processes other than the first keep metrics beside the checkpoints, of this start alone."""
    with ExitStack() as stack:
        if run.world.first:
            board = stack.enter_context(opened(run.log_to, run.metrics.parent, state.step))
            log = MetricsLog(run.metrics, state.metrics_bytes, board, state.metrics_sha256)
        else:
            board, log = no_board, MetricsLog(run.state_folder.parent / f"metrics_of_process_{run.world.rank}.jsonl", 0)
        stack.callback(log.close)
        path = run.metrics.with_name(NAME) if run.world.first else None
        telemetry = Telemetry(run, path, state.step, state.seconds, board)
        stack.callback(telemetry.close)
        yield log, telemetry


def save_milestone(model: PreTrainedModel, folder: Path) -> None:
    """Write the model as it is now to `folder`/model, with its checksums beside it: no checkpoint vouches for it."""
    with published(folder) as aside:
        save_model(model, aside / "model")
        write_sealed(aside / "manifest.json", {"files": inventory(aside / "model")})


def milestone_fault(folder: Path) -> str | None:
    """What is wrong with a milestone, in words; None if it is there as it was written."""
    mark = left_behind(folder / "manifest.json")
    return damage(folder / "model", mark["files"]) if mark else f"{folder} is missing or damaged"


def _rate(run: Run, step: int) -> float:
    spec = run.spec
    return learning_rate(step, steps=spec.steps, peak=run.peak_rate, warmup_share=spec.warmup_share, final_share=spec.final_share)


def _validated(run: Run, stepper: Stepper, state: TrainState, log: MetricsLog) -> float:
    """Note and return the validation loss (nats per token); raises WorkFailed if it is not finite, or too far above the best."""
    nll = stepper.mean_nll(run.validation.all_sequences())
    if not math.isfinite(nll) or (state.best_nll is not None and nll > state.best_nll + run.spec.max_loss_rise):
        raise WorkFailed(
            f"step {state.step}: the validation loss is {nll} (best so far: {state.best_nll}, at step {state.best_step}); lower "
            f"the learning rate (now {run.peak_rate:g}), or raise training.max_loss_rise (now {run.spec.max_loss_rise:g}), "
            "and run with --discard"
        )
    arrived = run.constraint is None or run.constraint.complete  # an annealed bound on its way is no constraint yet
    if arrived and (state.best_nll is None or nll < state.best_nll):
        state.best_nll, state.best_step = nll, state.step
    log.write({"step": state.step, "validation_nll": nll, "validation_perplexity": math.exp(min(nll, 700.0))})
    return nll
