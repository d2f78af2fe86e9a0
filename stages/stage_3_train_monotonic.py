"""Stage 3: recovery-train the converted model under its constraint. The same function, data and budget as stage 2."""

from stages.pipeline import main
from utils.run.stage import Context, Stage


def run(ctx: Context) -> None:
    from utils.training.recovery import Files, recover

    files = Files(
        start=ctx.read("converted_model"),
        base=ctx.read("base_model"),
        train_tokens=ctx.read("train_tokens"),
        validation_tokens=ctx.read("validation_tokens"),
        state=ctx.state,
        best=ctx.write("monotonic_model"),
        last=ctx.write("monotonic_last"),
        metrics=ctx.write("monotonic_metrics"),
        history=ctx.write("monotonic_history"),
        certificate=ctx.write("monotonic_certificate"),
        order=ctx.read("order"),
    )
    recover(ctx.config, ctx.seed, ctx.config.monotonic.learning_rate, ctx.config.monotone, files, ctx.stop, "train monotonic")


STAGE = Stage(
    number=3,
    name="train_monotonic",
    purpose="recovery-train the monotone model",
    reads=("converted_model", "order", "base_model", "train_tokens", "validation_tokens"),
    writes={
        "monotonic_model": "best",
        "monotonic_last": "last",
        "monotonic_metrics": "metrics.jsonl",
        "monotonic_history": "monotonic_training_history.json",
        "monotonic_certificate": "certificate.json",
    },
    config_keys=("training", "monotonic", "monotone", "data.sequence_length", "compute"),
    version=2,
    run=run,
)

if __name__ == "__main__":
    main(STAGE)
