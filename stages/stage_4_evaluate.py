"""Stage 4: perplexity of all four models on identical test tokens, benchmarks, greedy text, and how far each preserves the order."""

from stages.pipeline import main
from utils.run.stage import Context, Stage

MODELS = {
    "base": "base_model",
    "converted": "converted_model",
    "baseline": "baseline_model",
    "monotonic": "monotonic_model",
}


def run(ctx: Context) -> None:
    from utils.data.lengths import refuse_longer
    from utils.evaluation.benchmarks import benchmark_stored
    from utils.evaluation.generation import generate_stored
    from utils.evaluation.order import order_stored
    from utils.evaluation.perplexity import evaluate_stored
    from utils.evaluation.published import compared
    from utils.run.artifacts import write_json

    refuse_longer(ctx.read("base_model"), ctx.config.evaluate.longest)
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
    results["benchmarks"] = benchmark_stored(
        ctx.config,
        models=models,
        tokenizer=ctx.read("tokenizer"),
        cache=ctx.folders.cache,
        state=ctx.state / "benchmarks",
        records=ctx.write("benchmark_records"),
        stop=ctx.stop,
    )
    results["generation"] = generate_stored(
        ctx.config,
        models=models,
        tokenizer=ctx.read("tokenizer"),
        test_tokens=ctx.read("test_tokens"),
        records=ctx.write("generation_records"),
        stop=ctx.stop,
    )
    results["order_preservation"] = order_stored(
        ctx.config,
        ctx.seed,
        models=models,
        order=ctx.read("order"),
        tokenizer=ctx.read("tokenizer"),
        test_tokens=ctx.read("test_tokens"),
    )
    results["published_values"] = compared(ctx.config.model.name, results)
    write_json(ctx.write("evaluation_results"), results)


STAGE = Stage(
    number=4,
    name="evaluate",
    purpose="measure perplexity, benchmarks and generated text of all models",
    reads=(*MODELS.values(), "order", "tokenizer", "unigram_counts", "test_tokens"),
    writes={
        "evaluation_records": "records.jsonl",
        "benchmark_records": "benchmark_records.jsonl",
        "generation_records": "generation_records.jsonl",
        "evaluation_results": "evaluation_results.json",
    },
    config_keys=("evaluate", "compute", "model.name", "data.sequence_length"),
    version=3,
    run=run,
)

if __name__ == "__main__":
    main(STAGE)
