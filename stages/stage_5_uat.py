"""Stage 5: universal adversarial triggers, searched on one text set, chosen on a second, reported on a third."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.pipeline import main
from utils.run.stage import Context, Stage, Task

if TYPE_CHECKING:
    from utils.attacks.trigger_study import TriggerStudy

MODELS = {"base": "base_model", "baseline": "baseline_model", "monotonic": "monotonic_model"}


def run(ctx: Context) -> None:
    from utils.run.artifacts import write_json, write_text

    study = _study(ctx)
    study.work(ctx.stop)
    results, table = study.results(ctx.seed, ctx.write("uat_records"))
    write_json(ctx.write("uat_results"), results)
    write_text(ctx.write("learned_triggers"), table)


def share(ctx: Context, task: Task) -> None:
    _study(ctx).work(ctx.stop, *task)


def _study(ctx: Context) -> TriggerStudy:
    from utils.attacks.study import Files
    from utils.attacks.trigger_study import TriggerStudy
    from utils.data.lengths import refuse_longer

    refuse_longer(ctx.read("base_model"), ctx.config.uat.longest)
    files = Files(
        models={name: ctx.read(artefact) for name, artefact in MODELS.items()},
        earlier_models=ctx.read("earlier_models"),
        validation_tokens=ctx.read("validation_tokens"),
        texts=ctx.read("attack_texts"),
        tokenizer=ctx.read("tokenizer"),
        state=ctx.state,
    )
    return TriggerStudy(ctx.config, files)


STAGE = Stage(
    number=5,
    name="uat",
    purpose="search universal adversarial triggers and report them on held-out texts",
    reads=(*MODELS.values(), "earlier_models", "validation_tokens", "attack_texts", "tokenizer"),
    writes={"uat_records": "records.jsonl", "uat_results": "uat_results.json", "learned_triggers": "learned_triggers.csv"},
    config_keys=("uat", "compute", "hotflip.seed", "data.sequence_length", "evaluate.batch_size"),
    version=3,
    run=run,
    share=share,
)

if __name__ == "__main__":
    main(STAGE)
