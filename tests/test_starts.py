"""Starts: within the constraint, and least squares as good as a solver's."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor, nn

from configs.schema import Monotone
from tests.architectures import VOCABULARY, architecture
from tests.test_orders import ORDERS, an_order, drawn
from utils.models.convert import convert
from utils.models.ffn import constrained_weights, feed_forward
from utils.models.orders import choose_order
from utils.models.starts import input_covariance, nearest, start_within, visit_inputs

IDS = torch.randint(0, VOCABULARY, (6, 32), generator=torch.Generator().manual_seed(0))
PLUS = an_order("all_plus")


def spec(order: str, **settings: object) -> Monotone:
    return Monotone.model_validate({"order": order, **({"directions": 5} if order == "directions" else {}), **settings})


def test_least_squares_into_the_hidden_layer_is_nnls() -> None:
    x, weight = drawn(200, 6, seed=1) @ drawn(6, 6, seed=2), drawn(4, 6, seed=3)
    inner = x.T @ x / 200
    found = nearest(inner, inner @ weight.T, PLUS, torch.ones(4, 1), weight)
    expected = torch.stack([torch.as_tensor(nnls(x.numpy(), (x @ row).numpy())[0]) for row in weight])
    assert torch.allclose(found, expected, atol=1e-6)
    assert bool((found >= 0).all())


@pytest.mark.parametrize("size", [1e-8, 1e-14, 1e-24])
def test_least_squares_does_not_depend_on_the_size_of_the_inputs(size: float) -> None:
    x, weight = drawn(200, 6, seed=1) @ drawn(6, 6, seed=2), drawn(4, 6, seed=3)
    inner = x.T @ x / 200
    expected = nearest(inner, inner @ weight.T, PLUS, torch.ones(4, 1), weight)
    found = nearest(size * inner, size * inner @ weight.T, PLUS, torch.ones(4, 1), weight)
    assert torch.allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("size", [0.0, 1e-34])
def test_least_squares_on_inputs_that_do_not_vary_is_the_projected_start(size: float) -> None:
    x, weight = drawn(200, 6, seed=1), drawn(4, 6, seed=3)
    inner = size * x.T @ x / 200
    assert torch.equal(nearest(inner, inner @ (weight + 1).T, PLUS, torch.ones(4, 1), weight), weight.clamp(min=0))


def test_least_squares_out_of_the_hidden_layer_is_nnls_and_ignores_the_mean_if_told() -> None:
    hidden, weight = (drawn(300, 4, seed=1) + drawn(300, 1, seed=2)).relu(), drawn(4, 6, seed=3)
    target = hidden @ weight
    inner, cross = hidden.T @ hidden / 300, hidden.T @ target / 300
    found = nearest(inner, cross, PLUS, torch.ones(4, 1), weight, to_outputs=True)
    expected = torch.stack([torch.as_tensor(nnls(hidden.numpy(), column.numpy())[0]) for column in target.T], dim=1)
    assert torch.allclose(found, expected, atol=1e-6)
    free = nearest(inner, cross, PLUS, torch.ones(4, 1), weight, to_outputs=True, centred=True)
    assert bool((free >= 0).all())

    def centred_error(candidate: Tensor) -> float:
        error = hidden @ candidate - target
        return float((error - error.mean(dim=1, keepdim=True)).square().mean())

    assert centred_error(free) < 1e-12 < 1e-3 < centred_error(found)  # it finds the gauge lift by itself


@pytest.mark.parametrize("order_name", ["balanced", "directions"])
def test_least_squares_within_other_orders_meets_the_kkt_conditions(order_name: str) -> None:
    order, weight = an_order(order_name), drawn(4, 6, seed=3)
    x = drawn(200, 6, seed=1) @ (torch.eye(6) + 0.6 * drawn(6, 6, seed=2)).double()
    inner, sign = x.T @ x / 200, order.units["layer"][:, None].double()
    found = nearest(inner, inner @ weight.T, order, sign, weight)
    axes = order.axes.double() if order.rotated else torch.diag(order.axes.double())
    entries, gradient = sign * (found @ axes), (found - weight) @ inner
    multipliers = sign * (gradient @ axes)
    assert bool((entries > -1e-12).all()) and bool((multipliers > -1e-4).all())
    assert float((multipliers * entries).abs().max()) < 1e-4
    assert float((gradient - gradient @ axes @ axes.T).abs().max()) < 1e-4
    clipped = nearest(torch.eye(6, dtype=torch.float64), weight.T, order, sign, weight)
    error = ((found - weight) @ x.T).square().mean(), ((clipped - weight) @ x.T).square().mean()
    assert error[0] < 0.9 * error[1]


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "llama"])
@pytest.mark.parametrize("order_name", ORDERS)
def test_every_start_is_within_and_least_squares_is_nearest(kind: str, order_name: str) -> None:
    base, distance = architecture(kind), {}
    options = {"scope": "gated_all", "activation": "drelu", "recentre": False} if kind == "llama" else {}
    with torch.no_grad():
        goal = base(IDS).logits.log_softmax(dim=-1)
    for start in ("clamp", "abs", "least_squares", "lift"):
        if start == "lift" and (kind == "llama" or order_name in ("balanced", "directions")):
            continue
        settings = spec(order_name, start=start, **options)
        model, order, log = convert(base, settings, IDS)
        entries = [order.constrained(chosen) for chosen in constrained_weights(model, settings.scope).values()]
        assert min(float(entry.detach().min()) for entry in entries) >= (1e-4 if order.rotated else 0.0)
        assert all(0.1 < share < 0.9 for share in log["negative_share_before"].values())
        with torch.no_grad():
            distance[start] = float((goal.exp() * (goal - model(IDS).logits.log_softmax(dim=-1))).sum(dim=-1).mean())
    if kind != "llama":
        assert distance["least_squares"] < 0.5 * distance["clamp"] < distance["abs"]
    if "lift" in distance:
        assert distance["lift"] < 0.1 * distance["clamp"]


def test_abs_keeps_every_size() -> None:
    base = architecture("gpt_neox")
    for name in ORDERS:
        settings = spec(name, start="abs", margin=0.0, norm_gain="free")
        model = architecture("gpt_neox")
        order, _ = choose_order(model, settings, input_covariance(model, IDS) if name == "directions" else None)
        start_within(model, settings, order, IDS, None)
        pairs = zip(constrained_weights(model, "mlp_both").values(), constrained_weights(base, "mlp_both").values(), strict=True)
        for chosen, before in pairs:
            expected = order.constrained(before).abs()
            assert torch.allclose(order.constrained(chosen), expected, atol=1e-6)


def test_visitors_see_what_the_sublayers_read() -> None:
    model, seen = architecture("opt"), {}
    visit_inputs(model, IDS, lambda ffn, x: seen.update({ffn.name + ffn.out.name: x}))
    for ffn in feed_forward(model):
        heard: list[Tensor] = []
        handle = ffn.into[0].module.register_forward_pre_hook(lambda module, inputs, heard=heard: heard.append(inputs[0]))
        with torch.no_grad():
            model(IDS)
        handle.remove()
        assert torch.equal(seen[ffn.name + ffn.out.name], heard[0])
    assert not any(module._forward_hooks for module in model.modules() if isinstance(module, nn.Module))
    covariance = torch.stack([torch.cov(x.double().T, correction=0) for x in seen.values()]).sum(dim=0)
    assert torch.allclose(input_covariance(model, IDS), covariance, atol=1e-9)
