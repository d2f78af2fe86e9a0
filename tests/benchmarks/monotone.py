"""What the constraint and the certificate cost: python -m tests.benchmarks.monotone [--shape small|42m|1.4b] [--device cpu|cuda].

`step`: forward, backward and AdamW of the unconstrained model, then the same with each constraint, shortest of the rounds (other work
on the machine only adds); and the projection alone. `certificate`: the seconds of a whole certificate, whether it finds one planted
entry, and the seconds with the lifted control and of the falsifiers.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedModel

from configs.schema import Monotone
from utils.models.certificate import certify
from utils.models.constraints import Constraint
from utils.models.falsify import falsify
from utils.models.ffn import feed_forward
from utils.models.loading import autocast
from utils.models.orders import choose_order
from utils.models.starts import input_covariance, start_within

SHAPES = {  # layers, width, hidden units, heads, vocabulary, sequences, tokens
    "small": (4, 256, 1024, 4, 2048, 8, 128),
    "42m": (8, 512, 2048, 8, 16384, 64, 512),
    "1.4b": (24, 2048, 8192, 16, 50304, 8, 2048),
}
ARMS: dict[str, dict[str, object]] = {
    "none": {},
    "all_plus": {},
    "unit_signs": {"order": "unit_signs"},
    "balanced": {"order": "balanced"},
    "directions k = width/2": {"order": "directions"},
    "directions k = 64": {"order": "directions", "directions": 64},
    "balanced, annealing": {"order": "balanced", "parametrisation": "annealed"},
    "softplus": {"parametrisation": "softplus"},
}


def model_of(shape: str, device: str) -> PreTrainedModel:
    layers, width, units, heads, vocabulary, _, tokens = SHAPES[shape]
    config = GPTNeoXConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=units, num_attention_heads=heads, vocab_size=vocabulary
    )
    config.max_position_embeddings, config.use_cache = tokens, False
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def seconds(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def steps(shape: str, device: str, rounds: int) -> None:
    _, width, _, _, vocabulary, sequences, tokens = SHAPES[shape]
    ids = torch.randint(vocabulary, (sequences, tokens), device=device)
    plain = 0.0
    print(f"{'constraint':24} {'step ms':>9} {'more than none':>15} {'projection ms':>14} {'share of step':>14}")
    for name, options in ARMS.items():
        rotated = options.get("order") == "directions"
        spec = Monotone.model_validate(
            {"sign_restarts": 4} | options | ({"directions": options.get("directions", width // 2)} if rotated else {})
        )
        model = model_of(shape, device)
        order, _ = choose_order(model, spec, input_covariance(model, ids[:2]) if rotated else None)
        start_within(model, spec, order, ids[:1], None)
        constraint = None if name == "none" else Constraint(model, spec, order)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step(
            model: PreTrainedModel = model, constraint: Constraint | None = constraint, optimizer: torch.optim.Optimizer = optimizer
        ) -> None:
            with autocast(model.device, "bf16" if device == "cuda" else "fp32"):
                loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if constraint:
                constraint.project(10, 100)  # a tenth of the way: annealing is at its dearest

        step()
        whole = min(seconds(step, device) for _ in range(rounds))
        alone = min(seconds(lambda c=constraint: c.project(10, 100), device) for _ in range(3 * rounds)) if constraint else 0.0  # type: ignore[misc]
        plain = plain or whole
        print(
            f"{name:24} {1e3 * whole:9.1f} {100 * (whole / plain - 1):14.1f}% {1e3 * alone:14.2f} {100 * alone / plain:13.2f}%", flush=True
        )


def certificate(shape: str, device: str, control: bool) -> None:
    model = model_of(shape, device)
    _, width, _, _, vocabulary, _, _ = SHAPES[shape]
    ids = torch.randint(vocabulary, (1, 64), device=device)
    for order_name in ("all_plus", "balanced", "directions"):
        spec = Monotone.model_validate(
            {"order": order_name, "sign_restarts": 1} | ({"directions": 256 if width > 256 else 64} if order_name == "directions" else {})
        )
        order, _ = choose_order(model, spec, input_covariance(model, ids) if order_name == "directions" else None)
        start_within(model, spec, order, ids, None)
        began = time.perf_counter()
        found = certify(model, "mlp_both", torch.bfloat16, order)
        taken = time.perf_counter() - began
        planted = feed_forward(model)[-1].out
        axis = order.cone(torch.eye(order.size, dtype=order.axes.dtype)[0]).to(planted.by_unit)
        with torch.no_grad():
            planted.by_unit[5] -= (planted.by_unit[5] @ axis + 0.01 * order.sign(planted)[5]) * axis
        caught = certify(model, "mlp_both", torch.bfloat16, order)
        print(
            f"{order_name:12} certificate {taken:6.2f} s over {found['entries']:,} entries, holds {found['constraint_holds']}; "
            f"planted: {caught['negative_entries']} found",
            flush=True,
        )
    if control:
        taken = seconds(lambda: certify(model, "mlp_both", torch.bfloat16, order, model), device)
        print(f"with the lifted control {taken:6.2f} s")
        print(f"falsifiers {seconds(lambda: falsify(model, order), device):6.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=("steps", "certificate"))
    parser.add_argument(
        "--no-control", action="store_true", help="leave out the lifted control and the falsifiers (memory of a copy in fp64)"
    )
    options = parser.parse_args()
    if options.only != "certificate":
        steps(options.shape, options.device, options.rounds)
    if options.only != "steps":
        certificate(options.shape, options.device, not options.no_control)


if __name__ == "__main__":
    main()
