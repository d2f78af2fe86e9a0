"""AdamW: what is decayed, what moves, and that its state survives the way to named tensors and back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from configs.schema import Monotone, Training
from tests.tiny_models import random_model
from utils.models.constraints import Constraint
from utils.training import optim

SPEC = Training(steps=1, batch_size=1, micro_batch=1, validate_every=1, weight_decay=0.5)


def give_gradients(model: nn.Module, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=random)


def step(optimizer: torch.optim.Optimizer, rate: float = 0.1) -> None:
    optim.set_rate(optimizer, rate)
    optimizer.step()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("parametrisation", ["projected", "softplus", None])
def test_a_step_without_gradient_decays_unconstrained_matrices_alone(parametrisation: str | None) -> None:
    model = random_model()
    constraint = Constraint(model, Monotone(parametrisation=parametrisation)) if parametrisation else None
    optimizer = optim.build(model, constraint.parameters if constraint else [], SPEC)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = snapshot(model)
    step(optimizer)
    for name, after in model.state_dict().items():
        in_ffn = constraint is not None and ".mlp." in name
        factor = 1 - 0.1 * 0.5 if before[name].ndim == 2 and not in_ffn else 1.0
        assert torch.equal(after, before[name] * factor), name


@pytest.mark.parametrize("parametrisation", ["projected", "softplus"])
@pytest.mark.parametrize("outside", [0.1, 0.0])
def test_what_is_outside_the_sublayers_learns_more_slowly(parametrisation: str, outside: float) -> None:
    """Adam's first step is the learning rate for every parameter."""
    model = random_model()
    constraint = Constraint(model, Monotone(parametrisation=parametrisation))
    optimizer = optim.build(model, constraint.parameters, SPEC.model_copy(update={"rate_outside_ffn": outside, "weight_decay": 0.0}))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = snapshot(model)
    step(optimizer, 1e-3)
    for name, after in model.state_dict().items():
        wanted = 1e-3 if ".mlp." in name else 1e-3 * outside
        assert torch.allclose(before[name] - after, torch.full_like(after, wanted), atol=1e-6), name


def test_frozen_parameters_are_left_out() -> None:
    model = random_model()
    model.get_input_embeddings().requires_grad_(False)
    listed = [id(parameter) for group in optim.build(model, [], SPEC).param_groups for parameter in group["params"]]
    assert id(model.get_input_embeddings().weight) not in listed
    assert len(listed) == len(list(model.parameters())) - 1


def test_steps_equal_the_published_formula() -> None:
    """AdamW written out in fp64 for a matrix (decayed) and a bias (not)."""
    model = random_model()
    optimizer = optim.build(model, [], SPEC)
    names = ("gpt_neox.layers.0.mlp.dense_h_to_4h.weight", "gpt_neox.layers.0.mlp.dense_h_to_4h.bias")
    value = {name: model.get_parameter(name).detach().double() for name in names}
    first, second = ({name: torch.zeros_like(value[name]) for name in names} for _ in range(2))
    for count in range(1, 4):
        give_gradients(model, count)
        for name in names:
            gradient = model.get_parameter(name).grad.double()
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            ahead = (first[name] / (1 - 0.9**count)) / ((second[name] / (1 - 0.95**count)).sqrt() + 1e-8)
            value[name] = value[name] * (1 - 0.01 * (0.5 if name.endswith("weight") else 0.0)) - 0.01 * ahead
        step(optimizer, 0.01)
    for name in names:
        torch.testing.assert_close(model.get_parameter(name).detach().double(), value[name], rtol=1e-4, atol=1e-6)


def test_restored_state_equals_torch_own() -> None:
    """Named tensors, torch's state_dict and no interruption at all: the same next steps, bit for bit."""
    model = random_model()
    optimizer = optim.build(model, [], SPEC)
    for count in range(3):
        give_gradients(model, count)
        step(optimizer)
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    by_name, by_torch = optim.build(ours, [], SPEC), optim.build(theirs, [], SPEC)
    optim.restore(by_name, ours, {name: tensor.clone() for name, tensor in optim.state_tensors(optimizer, model).items()}, 3)
    by_torch.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for count in range(3, 6):
        for network, each in ((model, optimizer), (ours, by_name), (theirs, by_torch)):
            give_gradients(network, count)
            step(each)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
        assert torch.equal(tensor, theirs.state_dict()[name]), name
    stored, again = optimizer.state_dict()["state"], by_name.state_dict()["state"]
    assert all(torch.equal(stored[key][moment], again[key][moment]) for key in stored for moment in (*optim.MOMENTS, "step"))


def test_state_holds_both_moments_of_every_parameter() -> None:
    model = random_model()
    optimizer = optim.build(model, [], SPEC)
    assert optim.state_tensors(optimizer, model) == {}
    give_gradients(model, 0)
    step(optimizer)
    names = {name for name, _ in model.named_parameters()}
    assert set(optim.state_tensors(optimizer, model)) == {f"{name}.{moment}" for name in names for moment in optim.MOMENTS}


def test_a_gradient_that_never_comes_leaves_no_state() -> None:
    model = random_model()
    optimizer = optim.build(model, [], SPEC)
    give_gradients(model, 0)
    model.get_input_embeddings().weight.grad = None
    step(optimizer)
    tensors = optim.state_tensors(optimizer, model)
    fresh = optim.build(model, [], SPEC)
    optim.restore(fresh, model, tensors, 1)
    assert model.get_input_embeddings().weight not in fresh.state
    assert len(fresh.state) == len(list(model.parameters())) - 1
