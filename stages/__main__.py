"""python -m stages plan | status | run | submit: the whole pipeline, here or on a cluster."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.presets import ConfigError
from stages import slurm
from stages.pipeline import add_experiment_options, depends_on, experiment, run_each, stages
from utils.run.environment import keep_others_from_writing
from utils.run.errors import DONE, FAILED, REFUSED, InputError
from utils.run.folders import Folders
from utils.run.stage import Stage
from utils.run.trouble import explained

UNREAD = 141  # as a shell says of a program that SIGPIPE has ended


def main(arguments: Sequence[str] | None = None) -> int:
    keep_others_from_writing()
    try:
        code = _done(_parser().parse_args(arguments))
        sys.stdout.flush()
    except BrokenPipeError as error:
        if not _reader_left(error):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
        return UNREAD
    return code


def _reader_left(error: OSError) -> bool:
    """Whether `| head` has read enough. Python gives a lost file system (ESHUTDOWN) the same class."""
    return error.errno == errno.EPIPE and error.filename is None


def _done(options: argparse.Namespace) -> int:
    """Carry out a command; returns its exit code."""
    try:
        if options.command == "share":
            return slurm.share(options.stage)
        if options.command in ("job", "requeue"):
            return slurm.work(options.stage, leaving=options.command == "requeue")
        if options.command == "status":
            return slurm.status(options)
        if options.command == "plan":
            experiment(options)
            print(_plan())
            return DONE
        if options.first > options.last:
            raise InputError(f"--from {options.first} comes after --to {options.last}; swap them")
        chosen = stages()[options.first : options.last + 1]
        return slurm.submit(options, chosen) if options.command == "submit" else _run(options, chosen)
    except (ConfigError, InputError) as error:
        print(error, file=sys.stderr)
        return REFUSED
    except OSError as error:
        if _reader_left(error) or (words := explained(error, Path.cwd())) is None:
            raise
        print(words, file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m stages", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="print the stages, what each reads and writes, and what each waits for")
    status = commands.add_parser("status", help="print how far each stage of each seed is, and what to type next")
    run = commands.add_parser("run", help="run the stages here, one after the other; what is complete is passed over")
    submit = commands.add_parser("submit", help="submit to SLURM what is neither complete nor queued")
    for command in (plan, status, run, submit):
        add_experiment_options(command)
    for command in (run, submit):
        command.add_argument("--from", type=int, default=0, dest="first", metavar="N", choices=range(8), help="first stage (default 0)")
        command.add_argument("--to", type=int, default=7, dest="last", metavar="N", choices=range(8), help="last stage (default 7)")
    slurm.add_submit_options(submit)
    status.add_argument("--watch", nargs="?", type=float, const=slurm.WATCH_SECONDS, metavar="SECONDS", help="print it again and again")
    for name, words in (
        ("job", "inside a SLURM job: do its stage"),
        ("share", "inside a task of a SLURM array: do a share of its stage's work"),
        ("requeue", "inside a SLURM job that was stopped in time: queue it again"),
    ):
        commands.add_parser(name, help=words).add_argument("stage", type=int, choices=range(8))
    return parser


def _run(options: argparse.Namespace, chosen: Sequence[Stage]) -> int:
    config = experiment(options)
    code = run_each(chosen, config, config.seeds, options.discard)
    if code == DONE and options.last == 7:
        folder = Folders.of(config.paths, config.run_name).final
        print(f"\nAll stages are complete. Open:\n  {folder / 'report.html'}\n  {folder / 'experiment_summary.txt'}\n  {folder / 'tables'}")
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
