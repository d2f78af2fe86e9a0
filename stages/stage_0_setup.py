"""Stage 0: text to tokens, the base model, the attack texts. The only stage that may use the network."""

from functools import partial

from stages.pipeline import main
from utils.run.stage import Context, Stage


def run(ctx: Context) -> None:
    from utils.data.attack_texts import write_attack_texts
    from utils.data.tokenise import token_cache
    from utils.data.tokenizer import load_tokenizer
    from utils.data.tokens import Tokens
    from utils.evaluation.benchmarks import fetch_benchmarks
    from utils.models.facts import refuse_unsuitable, setup_facts
    from utils.models.loading import device_of
    from utils.run.artifacts import link_or_copy, read_json, write_json
    from utils.training.base import base_cache

    device_of(ctx.config.compute)  # refuses a missing GPU before hours of work
    fetch_benchmarks(ctx.config, ctx.folders.cache)
    tokens = token_cache(ctx.config, ctx.folders.cache, ctx.stop, partial(refuse_unsuitable, ctx.config))
    words = load_tokenizer(tokens / "tokenizer")
    sets = write_attack_texts(Tokens(tokens / "tokens" / "attack"), words, ctx.config, ctx.write("attack_texts"))
    base = base_cache(ctx.config, ctx.folders.cache, tokens, ctx.stop)
    link_or_copy(tokens / "tokenizer", ctx.write("tokenizer"))
    for split in ("train", "validation", "test"):
        link_or_copy(tokens / "tokens" / split, ctx.write(f"{split}_tokens"))
    link_or_copy(tokens / "unigram_counts.npy", ctx.write("unigram_counts"))
    link_or_copy(base / "model", ctx.write("base_model"))
    link_or_copy(base / "earlier", ctx.write("earlier_models"))
    facts = setup_facts(ctx.config, ctx.seed, ctx.write("base_model"))
    origin = {"base_model_origin": read_json(base / "origin.json"), "source": read_json(tokens / "source.json")}
    counts = {"splits": read_json(tokens / "counts.json"), "attack_sets": sets}
    write_json(ctx.write("setup"), facts | origin | counts)


STAGE = Stage(
    number=0,
    name="setup",
    purpose="tokenise the text, get the base model, choose the attack texts",
    reads=(),
    writes={
        "tokenizer": "tokenizer",
        "base_model": "base_model",
        "earlier_models": "earlier_models",
        "train_tokens": "tokens/train",
        "validation_tokens": "tokens/validation",
        "test_tokens": "tokens/test",
        "unigram_counts": "unigram_counts.npy",
        "attack_texts": "attack_texts.json",
        "setup": "setup_complete.json",
    },
    config_keys=(
        "model",
        "data",
        "compute",
        "uat.text_tokens",
        "uat.search_texts",
        "uat.select_texts",
        "uat.report_texts",
        "evaluate.benchmarks",
        "hotflip.texts",
        "hotflip.prefix_tokens",
        "hotflip.scored_tokens",
    ),
    version=4,
    run=run,
)

if __name__ == "__main__":
    main(STAGE)
