"""Stage 6: HotFlip, exact greedy flips scored on untouched tokens, beside its controls: random, without gradient, transferred, longer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.pipeline import main
from utils.run.stage import Context, Stage, Task

if TYPE_CHECKING:
    from utils.attacks.flip_study import FlipStudy

MODELS = {"base": "base_model", "baseline": "baseline_model", "monotonic": "monotonic_model"}


def run(ctx: Context) -> None:
    from utils.run.artifacts import write_json

    study = _study(ctx)
    study.work(ctx.stop)
    write_json(ctx.write("hotflip_results"), study.results(ctx.seed, ctx.write("hotflip_records")))


def share(ctx: Context, task: Task) -> None:
    _study(ctx).work(ctx.stop, *task)


def _study(ctx: Context) -> FlipStudy:
    from utils.attacks.flip_study import FlipStudy
    from utils.attacks.study import Files

    files = Files(
        models={name: ctx.read(artefact) for name, artefact in MODELS.items()},
        earlier_models=ctx.read("earlier_models"),
        validation_tokens=ctx.read("validation_tokens"),
        texts=ctx.read("attack_texts"),
        tokenizer=ctx.read("tokenizer"),
        state=ctx.state,
    )
    return FlipStudy(ctx.config, files)


STAGE = Stage(
    number=6,
    name="hotflip",
    purpose="flip tokens greedily and score the untouched ones",
    reads=(*MODELS.values(), "earlier_models", "validation_tokens", "attack_texts", "tokenizer"),
    writes={"hotflip_records": "records.jsonl", "hotflip_results": "hotflip_results.json"},
    config_keys=("hotflip", "compute", "data.sequence_length", "evaluate.batch_size"),
    version=4,
    run=run,
    share=share,
)

if __name__ == "__main__":
    main(STAGE)
