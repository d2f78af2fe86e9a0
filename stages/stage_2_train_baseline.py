"""Stage 2: recovery-train the unconstrained base model. The same function, data and budget as stage 3."""

from stages.pipeline import main
from utils.run.stage import Context, Stage


def run(ctx: Context) -> None:
    from utils.training.recovery import Files, recover

    files = Files(
        start=ctx.read("base_model"),
        base=ctx.read("base_model"),
        train_tokens=ctx.read("train_tokens"),
        validation_tokens=ctx.read("validation_tokens"),
        state=ctx.state,
        best=ctx.write("baseline_model"),
        last=ctx.write("baseline_last"),
        metrics=ctx.write("baseline_metrics"),
        history=ctx.write("baseline_history"),
    )
    recover(ctx.config, ctx.seed, ctx.config.baseline.learning_rate, None, files, ctx.stop, "train baseline")


STAGE = Stage(
    number=2,
    name="train_baseline",
    purpose="recovery-train the unconstrained model",
    reads=("base_model", "train_tokens", "validation_tokens"),
    writes={
        "baseline_model": "best",
        "baseline_last": "last",
        "baseline_metrics": "metrics.jsonl",
        "baseline_history": "baseline_training_history.json",
    },
    config_keys=("training", "baseline", "data.sequence_length", "compute"),
    version=2,
    run=run,
)

if __name__ == "__main__":
    main(STAGE)
