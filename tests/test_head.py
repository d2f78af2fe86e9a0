"""The chunked losses against the plain formulas, for every cut into chunks, and that the logits never exist together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence

from tests.builders import small_model
from utils.models import head as module
from utils.models.head import check_head, mixed_loss, token_nll
from utils.run.errors import InputError

TOKENS, WIDTH, VOCABULARY = 10, 6, 23


@pytest.fixture(params=[1, 3, 4, 10, 4096])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "CHUNK", request.param)
    return request.param


def linear(seed: int, bias: bool = False) -> nn.Linear:
    made = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    random = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=random))
    return made


def numbers(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the teacher's, targets."""
    random = torch.Generator().manual_seed(seed)
    states = [torch.randn(TOKENS, WIDTH, generator=random) for _ in range(2)]
    return states[0].requires_grad_(True), states[1], torch.randint(VOCABULARY, (TOKENS,), generator=random)


def plain(logits: Tensor, targets: Tensor, wanted: Tensor | None, share: float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, cross-entropy, divergence, by PyTorch's own functions in fp32."""
    entropy = F.cross_entropy(logits.float(), targets, reduction="sum")
    if wanted is None:
        return entropy, entropy, torch.zeros(())
    divergence = kl_divergence(Categorical(logits=wanted.float()), Categorical(logits=logits.float())).sum()
    return (1 - share) * entropy + share * divergence, entropy, divergence


def both(dtype: torch.dtype, share: float | None, bias: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Loss, parts and gradients of ours and of the plain formula."""
    results = []
    for ours in (True, False):
        hidden, other, targets = numbers()
        student, teacher = linear(1, bias), linear(2, bias).requires_grad_(False)
        if ours:
            loss, parts = mixed_loss(hidden, student, targets, dtype, None if share is None else (other, teacher), share or 0.0)
            values = [loss, parts[0], parts[1]]
        else:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits, wanted = student(hidden), teacher(other)
            values = list(plain(logits, targets, None if share is None else wanted, share or 0.0))
        (0.25 * values[0]).backward()
        results.append([value.detach() for value in values] + [hidden.grad, *(parameter.grad for parameter in student.parameters())])
    return results[0], results[1]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("share", [None, 0.0, 0.3, 1.0])
def test_losses_and_gradients_are_the_plain_ones(chunk: int, share: float | None, bias: bool) -> None:
    for mine, theirs in zip(*both(torch.float32, share, bias), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("share", [None, 0.5])
def test_in_bf16_they_differ_by_its_rounding(chunk: int, share: float | None) -> None:
    mine, theirs = both(torch.bfloat16, share, bias=False)
    assert {tensor.dtype for tensor in mine} == {torch.float32}
    for number, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        assert float((one - other).norm()) <= (1e-6 if number < 3 else 2**-7) * float(other.norm())


def test_each_token_against_the_plain_formula(chunk: int) -> None:
    hidden, _, targets = numbers()
    losses = token_nll(hidden, linear(1, bias=True), targets, torch.float32)
    torch.testing.assert_close(losses, F.cross_entropy(linear(1, bias=True)(hidden), targets, reduction="none"), rtol=1e-6, atol=1e-6)


def test_tied_embeddings_get_both_gradients() -> None:
    ids = torch.arange(12).reshape(2, 6)
    gradients = []
    for ours in (True, False):
        model = small_model(tied=True)
        if ours:
            hidden = model.base_model(ids[:, :-1]).last_hidden_state.flatten(0, 1)
            loss, _ = mixed_loss(hidden, model.get_output_embeddings(), ids[:, 1:].flatten(), torch.float32)
        else:
            loss = F.cross_entropy(model(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-5, atol=1e-5)


def test_a_frozen_unembedding_gets_no_gradient() -> None:
    hidden, _, targets = numbers()
    frozen = linear(1).requires_grad_(False)
    mixed_loss(hidden, frozen, targets, torch.float32)[0].backward()
    assert hidden.grad is not None
    assert frozen.weight.grad is None


def test_only_one_chunk_of_logits_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither while the losses are computed nor for the backward pass."""
    monkeypatch.setattr(module, "CHUNK", 3)
    made = []

    def spy(states: Tensor, *rest: Any) -> Tensor:
        made.append(len(states))
        return F.linear(states, *rest)

    monkeypatch.setattr(module, "F", SimpleNamespace(linear=spy, cross_entropy=F.cross_entropy))
    hidden, other, targets = numbers()
    loss, _ = mixed_loss(hidden, linear(1), targets, torch.float32, (other, linear(2)), 0.5)
    assert made == [3, 3, 3, 3, 3, 3, 1, 1]
    assert {tuple(tensor.shape) for tensor in loss.grad_fn.saved_tensors[:2]} == {(TOKENS, WIDTH), (VOCABULARY, WIDTH)}


def test_the_compiled_kernel_is_used_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_, asked = torch.compile, []

    def cheap(function: Any, **options: Any) -> Any:
        asked.append(options)
        return compile_(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", cheap)
    module._fused.cache_clear()
    hidden, other, targets = numbers()
    teacher = (other, linear(2))
    fused = mixed_loss(hidden, linear(1), targets, torch.float32, teacher, 0.5, compiled=True)[0]
    assert torch.equal(fused, mixed_loss(hidden, linear(1), targets, torch.float32, teacher, 0.5)[0])
    assert asked == [{"dynamic": False}]
    module._fused.cache_clear()


def test_a_model_that_scales_its_logits_is_refused() -> None:
    model = small_model()
    check_head(model, "fp32")
    check_head(model, "bf16")
    model.forward = lambda *given, **more: SimpleNamespace(logits=2 * type(model).forward(model, *given, **more).logits)
    with pytest.raises(InputError, match="the logits of architecture 'gpt_neox' differ from its unembedding"):
        check_head(model, "fp32")
