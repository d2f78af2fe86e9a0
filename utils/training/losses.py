"""The divergence from the base model, and its mixture with the cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def divergence_sum(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || model) over the vocabulary, (B, T, V) each -> scalar, nats summed over tokens (Hinton et al. 2015, T = 1)."""
    log_model = F.log_softmax(logits.float(), dim=-1)
    log_teacher = F.log_softmax(teacher_logits.float(), dim=-1)
    return F.kl_div(log_model, log_teacher, reduction="sum", log_target=True)


def mixed(cross_entropy: Tensor, divergence: Tensor, weight: float) -> Tensor:
    """(1 - weight) * cross-entropy + weight * divergence."""
    return torch.lerp(cross_entropy, divergence, weight)
