"""python -m stages plan | status | run: the whole pipeline on this machine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from configs.presets import ConfigError
from stages.pipeline import add_experiment_options, depends_on, experiment, run_each, stages
from utils.run.errors import REFUSED
from utils.run.folders import Folders
from utils.run.status import status_table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stages", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="print the stages, what each reads and writes, and what each waits for")
    status = commands.add_parser("status", help="print how far each stage of each seed is")
    run = commands.add_parser("run", help="run the stages here, one after the other; what is complete is passed over")
    for command in (plan, status, run):
        add_experiment_options(command)
    run.add_argument("--from", type=int, default=0, dest="first", metavar="N", choices=range(8), help="first stage (default 0)")
    run.add_argument("--to", type=int, default=7, dest="last", metavar="N", choices=range(8), help="last stage (default 7)")
    options = parser.parse_args(arguments)
    try:
        config = experiment(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return REFUSED
    if options.command == "plan":
        print(_plan())
        return 0
    if options.command == "status":
        print(status_table(stages(), config))
        return 0
    if options.first > options.last:
        print(f"--from {options.first} comes after --to {options.last}; swap them", file=sys.stderr)
        return REFUSED
    code = run_each(stages()[options.first : options.last + 1], config, config.seeds, options.discard)
    if code == 0 and options.last == 7:
        folder = Folders.of(config.paths, config.run_name).final
        print(f"\nAll stages are complete. Open:\n  {folder / 'experiment_summary.txt'}\n  {folder / 'figures'}\n  {folder / 'tables'}")
    return code


def _plan() -> str:
    lines = []
    for stage in stages():
        waits = ", ".join(map(str, depends_on(stage, stages()))) or "nothing"
        lines.append(f"{stage.number} {stage.name}: {stage.purpose}; waits for {waits}")
        lines.append(f"    reads {', '.join(stage.reads) or 'nothing'}")
        lines.append(f"    writes {', '.join(stage.writes.values())}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
