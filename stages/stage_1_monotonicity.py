"""Stage 1: make the feed-forward sublayers of the base model monotone, and certify it."""

from stages.pipeline import main
from utils.run.stage import Context, Stage


def run(ctx: Context) -> None:
    from utils.models.convert import convert_stored
    from utils.run.artifacts import write_json

    log, certificate = convert_stored(
        ctx.config,
        ctx.seed,
        base=ctx.read("base_model"),
        train_tokens=ctx.read("train_tokens"),
        validation_tokens=ctx.read("validation_tokens"),
        target=ctx.write("converted_model"),
        order_file=ctx.write("order"),
    )
    write_json(ctx.write("converted_certificate"), certificate)
    write_json(ctx.write("application_log"), log)


STAGE = Stage(
    number=1,
    name="monotonicity",
    purpose="make the feed-forward sublayers monotone",
    reads=("base_model", "train_tokens", "validation_tokens"),
    writes={
        "converted_model": "model",
        "order": "order.safetensors",
        "converted_certificate": "certificate.json",
        "application_log": "monotonicity_application_log.json",
    },
    config_keys=("monotone", "data.sequence_length", "compute", "evaluate.batch_size", "model.name"),
    version=2,
    run=run,
)

if __name__ == "__main__":
    main(STAGE)
