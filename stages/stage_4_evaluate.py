"""Stage 4: perplexity of all four models on identical test tokens, and how far each preserves the order."""

from stages.pipeline import main
from utils.run.stage import Context, Stage

MODELS = {
    "base": "base_model",
    "converted": "converted_model",
    "baseline": "baseline_model",
    "monotonic": "monotonic_model",
}


def run(ctx: Context) -> None:
    from utils.evaluation.order import order_stored
    from utils.evaluation.perplexity import evaluate_stored
    from utils.run.artifacts import write_json

    models = {name: ctx.read(artefact) for name, artefact in MODELS.items()}
    results = evaluate_stored(
        ctx.config,
        ctx.seed,
        models=models,
        unigram_counts=ctx.read("unigram_counts"),
        test_tokens=ctx.read("test_tokens"),
        state=ctx.state,
        records=ctx.write("evaluation_records"),
        stop=ctx.stop,
    )
    preserved = order_stored(
        ctx.config,
        ctx.seed,
        models=models,
        order=ctx.read("order"),
        tokenizer=ctx.read("tokenizer"),
        test_tokens=ctx.read("test_tokens"),
    )
    write_json(ctx.write("evaluation_results"), results | {"order_preservation": preserved})


STAGE = Stage(
    number=4,
    name="evaluate",
    purpose="measure the perplexity of all models on the same tokens",
    reads=(*MODELS.values(), "order", "tokenizer", "unigram_counts", "test_tokens"),
    writes={"evaluation_records": "records.jsonl", "evaluation_results": "evaluation_results.json"},
    config_keys=("evaluate", "compute", "model.name", "data.sequence_length"),
    version=2,
    run=run,
)

if __name__ == "__main__":
    main(STAGE)
