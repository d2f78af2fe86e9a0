"""Stage 7: tables, figures, the summary and the report over all seeds, from records alone."""

from stages.pipeline import main
from utils.run.stage import Context, Stage

RECORDS = (
    "setup",
    "tokenizer",
    "attack_texts",
    "application_log",
    "monotonic_certificate",
    "baseline_metrics",
    "baseline_history",
    "monotonic_metrics",
    "monotonic_history",
    "evaluation_records",
    "benchmark_records",
    "evaluation_results",
    "uat_records",
    "uat_results",
    "hotflip_records",
    "hotflip_results",
)


def run(ctx: Context) -> None:
    from utils.report.attack_figures import figures
    from utils.report.figures import write_figures
    from utils.report.page import write_page
    from utils.report.study import Study
    from utils.report.summary import final_results, summary_text
    from utils.report.table import write_numbers, write_tables
    from utils.report.tables import tables
    from utils.run.artifacts import write_json, write_text

    study = Study.load(ctx.config, ctx.inputs)
    made = tables(study)
    write_tables(made, ctx.write("tables"))
    write_numbers(made, study.traces, ctx.write("numbers"))
    write_figures(figures(study), ctx.write("figures"))
    write_page(study, made, ctx.write("figures"), ctx.write("report"))
    write_json(ctx.write("resolved_config"), ctx.config.model_dump(mode="json"))
    write_json(ctx.write("final_results"), final_results(study))
    summary = summary_text(study)
    write_text(ctx.write("summary"), summary)
    write_text(ctx.folders.summary, summary, near=ctx.folder)  # several runs may write it at once


STAGE = Stage(
    number=7,
    name="aggregate",
    purpose="write tables, figures and the report",
    reads=RECORDS,
    writes={
        "final_results": "final_results.json",
        "summary": "experiment_summary.txt",
        "report": "report.html",
        "numbers": "numbers.json",
        "tables": "tables",
        "figures": "figures",
        "resolved_config": "resolved_config.json",
    },
    config_keys=("report", "hotflip", "model.name"),
    version=4,
    run=run,
    every_seed=False,
)

if __name__ == "__main__":
    main(STAGE)
