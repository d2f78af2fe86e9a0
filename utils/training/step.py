"""One optimiser step: micro-batches, loss, gradient, verdict, update. The host never waits for the device in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from utils.models.blocks import blocks, prepare_blocks
from utils.models.head import mixed_loss
from utils.models.likelihood import last_hidden, summed_nll, token_losses
from utils.models.loading import product_dtype
from utils.training import optim
from utils.training.distributed import last_micro_batch, spread_out, total_norm
from utils.training.guard import GOOD, Guard
from utils.training.layerwise import layer_scales, layerwise_loss
from utils.training.run import Run

SCALED = 8  # sequences that the layers' scales are taken from


class Loss(nn.Module):
    """What is computed on a micro-batch, as one module: so it can be spread over processes."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.model, self.run = run.model, run

    def forward(self, ids: Tensor, each_token: bool = False, scales: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """ids (b, T + 1) -> loss and (2,) its two parts, nats summed over b*T tokens; or (b*T,) the nats of each token, and nothing; or
        with the layers' scales the layer-wise loss, which has no such parts (NaN)."""
        run = self.run
        if each_token:
            return token_losses(self.model, ids, run.precision), ids.new_zeros(0)
        if scales is not None:
            loss = layerwise_loss(self.model, run.models[1], ids[:, :-1], run.precision, scales)
            return loss, torch.full((2,), torch.nan, device=ids.device)
        inputs, targets, goal = ids[:, :-1], ids[:, 1:].flatten(), None
        if run.teacher is not None and run.spec.distillation:
            with torch.no_grad():
                goal = (last_hidden(run.teacher, inputs, run.precision), run.teacher.get_output_embeddings())
        hidden = last_hidden(self.model, inputs, run.precision)
        head, dtype = self.model.get_output_embeddings(), product_dtype(run.precision)
        return mixed_loss(hidden, head, targets, dtype, goal, run.spec.distillation if goal else 0.0, run.compiled)


class Stepper:
    """Makes the steps of a run. `before_update` is called when gradients are ready and nothing has changed yet."""

    def __init__(self, run: Run, before_update: Callable[[], None] = lambda: None) -> None:
        self.run, self.before_update = run, before_update
        self.micro_batch, self.recompute = run.spec.batch_size, 0.0
        self.loss = spread_out(Loss(run), blocks(run.model), run.world, run.precision)
        self.parameters = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
        self.optimizer = optim.build(run.model, run.constraint.parameters if run.constraint else [], run.spec)
        self.guard = Guard(run.spec.max_loss_rise, run.device)
        self.scales: list[Tensor] | None = None  # of the layers, while the loss is layer-wise

    def split(self, micro_batch: int, recompute: float) -> None:
        """Set how many sequences go through the model at once, and for which share of the blocks activations are computed twice."""
        self.micro_batch, self.recompute = micro_batch, recompute
        prepare_blocks(self.run.model, self.run.compiled, recompute)
        for teacher in self.run.models[1:]:  # compiled code would not see who watches its parts
            prepare_blocks(teacher, self.run.compiled and not self.layerwise)

    def __call__(self, ids: Tensor, rate: float, step: int) -> Tensor:
        """ids (B, T + 1) on the device, with several processes this one's share of the B sequences -> (5,) there: loss, cross-entropy,
        divergence (nats per token of the whole step), gradient norm, verdict."""
        self.switch(step < self.run.layerwise_steps)
        sums = torch.zeros(3, device=self.run.device)
        parts = ids.split(self.micro_batch)
        for number, part in enumerate(parts, 1):
            last_micro_batch(self.loss, number == len(parts))
            sums += self.gradients(part)
        values = self.run.world.sum(sums) / self.run.tokens_per_step
        norm = total_norm([parameter.grad for parameter in self.parameters if parameter.grad is not None], self.run.world)
        self.before_update()
        verdict = self.guard.judge(values[0], norm, remember=not self.layerwise)
        self._update(norm, verdict, rate, step)
        return torch.cat([values, norm.reshape(1), verdict])

    def switch(self, layerwise: bool) -> None:
        """Go over to the layer-wise loss, or from it to the ordinary one."""
        if layerwise == self.layerwise:
            return
        run, self.scales = self.run, [] if layerwise else None
        self.split(self.micro_batch, self.recompute)
        if layerwise:  # the same for every split of a step, and after every resume
            ids = torch.from_numpy(run.train.batch(0, min(SCALED, run.spec.batch_size))).to(run.device)
            self.scales = layer_scales(run.models[1], ids[:, :-1], run.precision)

    @property
    def layerwise(self) -> bool:
        return self.scales is not None

    def gradients(self, ids: Tensor) -> Tensor:
        """Add the gradient of a micro-batch, ids (b, T + 1); returns (3,) its loss and the two parts, nats summed over b*T tokens."""
        loss, parts = self.loss(ids, scales=self.scales)
        (loss * (self.run.world.size / self.run.tokens_per_step)).backward()  # the mean over the processes is to be their sum
        if self.layerwise:  # all parameters count the same updates, so that a checkpoint need not say how many each had
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return torch.cat([loss.detach().reshape(1), parts])

    def mean_nll(self, sequences: NDArray[np.int64]) -> float:
        """Validation loss over sequences (n, T + 1), which the processes share: nats per token."""
        world = self.run.world
        total = summed_nll(lambda ids: self.loss(ids, True)[0], sequences, self.micro_batch, self.run.device, world.rank, world.size)
        return float(world.sum(total)) / (sequences.shape[0] * (sequences.shape[1] - 1))

    def warm_up(self, ids: Tensor) -> None:
        """Have a micro-batch's code compiled; changes nothing."""
        self.gradients(ids)
        self.optimizer.zero_grad(set_to_none=True)

    def _update(self, norm: Tensor, verdict: Tensor, rate: float, step: int) -> None:
        """AdamW on the clipped gradient. The fused kernel itself divides by the scale, and changes nothing if the flag is set."""
        good = verdict[0] == GOOD
        self.optimizer.grad_scale = torch.where(good, (norm / self.run.spec.max_gradient_norm).clamp(min=1.0), 1.0)  # type: ignore[attr-defined]
        self.optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]
        optim.set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.run.constraint:
            self.run.constraint.project(step, self.run.spec.steps)

    def tensors(self) -> dict[str, Tensor]:
        """Everything beside the weights that the next step depends on."""
        return optim.state_tensors(self.optimizer, self.run.model) | self.guard.tensors()

    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Put back what `tensors` gave after `updates` steps that were not skipped."""
        optim.restore(self.optimizer, self.run.model, tensors, updates)
        self.guard.restore(tensors)
