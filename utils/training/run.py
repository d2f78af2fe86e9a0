"""What a training run is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel

from configs.schema import Training
from utils.data.tokens import PackedBatches
from utils.models.constraints import Constraint
from utils.run.preemption import Stop
from utils.training.distributed import ALONE, World


@dataclass
class Run:
    """One training run: what is trained, on what, how, and where its files are."""

    model: PreTrainedModel
    spec: Training
    peak_rate: float
    train: PackedBatches
    validation: PackedBatches
    precision: str
    state_folder: Path
    metrics: Path
    stop: Stop
    label: str
    constraint: Constraint | None = None
    teacher: PreTrainedModel | None = None
    compiled: bool = False
    world: World = ALONE
    log_to: str = "none"
    milestones: Mapping[int, Path] = field(default_factory=dict)  # {steps done: folder that the model of then is stored in}

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def tokens_per_step(self) -> int:
        return self.spec.batch_size * self.train.length

    @property
    def models(self) -> list[PreTrainedModel]:
        """The model, and the teacher if a loss needs it."""
        return [self.model, *([self.teacher] if self.teacher is not None and (self.spec.distillation or self.layerwise_steps) else [])]

    @property
    def layerwise_steps(self) -> int:
        """Steps of the layer-wise warm-up."""
        return round(self.constraint.spec.layerwise_share * self.spec.steps) if self.constraint else 0
