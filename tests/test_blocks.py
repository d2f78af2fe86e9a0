"""Compiled and recomputed blocks: same numbers, same names, one graph for all blocks."""

from __future__ import annotations

from functools import partialmethod

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.schema import Compute, Monotone
from tests.builders import non_negative_start, small_model
from utils.models import blocks as module
from utils.models.blocks import blocks, compiles, prepare_blocks
from utils.models.constraints import Constraint

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo looks at it itself
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Compile without generating code; a one for each graph that was made."""
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        made.append(1)
        return graph

    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    return made


def arm(kind: str) -> PreTrainedModel:
    model = small_model()
    if kind != "free":
        spec = Monotone.model_validate({"parametrisation": kind})
        non_negative_start(model, spec)
        Constraint(model, spec)
    return model


def gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    model.zero_grad()
    model.base_model(IDS, use_cache=False).last_hidden_state.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", ["free", "projected", "softplus"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_same_gradients_and_names(graphs: list[int], kind: str, share: float) -> None:
    model = arm(kind)
    names, expected = list(model.state_dict()), gradients(model)
    prepare_blocks(model, compiled=True, recompute=share)
    found = gradients(model)
    assert list(model.state_dict()) == names
    assert len(graphs) == 1  # two blocks, one graph
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6)
    prepare_blocks(model, compiled=False)
    graphs.clear()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(model).items())
    assert graphs == []


@pytest.mark.parametrize(("share", "twice"), [(0.0, []), (0.5, [1]), (1.0, [0, 1])])
def test_a_share_of_the_blocks_is_computed_twice(share: float, twice: list[int]) -> None:
    model = small_model()
    expected = gradients(model)
    seen: list[int] = []
    for number, block in enumerate(blocks(model)):
        block.mlp.register_forward_pre_hook(lambda *given, number=number: seen.append(number))
    prepare_blocks(model, compiled=False, recompute=share)
    found = gradients(model)
    assert sorted(seen) == sorted([0, 1, *twice])
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())


def test_blocks_are_found_bottom_to_top() -> None:
    model = small_model()
    assert blocks(model) == list(model.gpt_neox.layers)


def test_many_versions_of_a_block_are_allowed(graphs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's limit of eight is soon passed by a pipeline in one process; beyond it, blocks would silently run eagerly."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    prepare_blocks(small_model(), compiled=True)
    assert torch._dynamo.config.recompile_limit == module.GRAPHS


def test_compiled_on_a_gpu_unless_told_otherwise() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    found = [(compiles(Compute(compile=how), gpu), compiles(Compute(compile=how), cpu)) for how in ("auto", "on", "off")]
    assert found == [(True, False), (True, True), (False, False)]
