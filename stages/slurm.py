"""The command line of a run on a SLURM cluster: submit, resume, look, and what a job calls."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.cluster import Cluster
from configs.presets import load_cluster
from configs.schema import Experiment, Paths
from stages.pipeline import depends_on, experiment, run_each, stages
from utils.run.errors import DONE, InputError
from utils.run.folders import Folders
from utils.run.preemption import Stop
from utils.run.stage import Stage, run_stage
from utils.run.status import status_table
from utils.slurm import job, snapshot
from utils.slurm.chain import Chain
from utils.slurm.status import report
from utils.slurm.submit import Order, submit_run

WATCH_SECONDS = 30.0


def add_submit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", metavar="NAME|FILE", help="the site: a name in configs/clusters/, or a YAML file (default: generic)")
    parser.add_argument("--resume", action="store_true", help="go on with the last submitted run (or --run-name), as it was configured")
    parser.add_argument("--dry-run", action="store_true", help="print every sbatch line and submit nothing")
    parser.add_argument("--yes", action="store_true", help="do not ask")


def _root() -> Path:
    return Path.cwd()


def _graph() -> Mapping[int, Sequence[int]]:
    return {stage.number: depends_on(stage, stages()) for stage in stages()}


def submit(options: argparse.Namespace, chosen: Sequence[Stage]) -> int:
    """Submit what is missing of a run. Raises ConfigError or InputError before anything is done."""
    config, cluster = _asked(options)
    frozen = snapshot.Snapshot.of(_root(), config, cluster, sys.executable)
    chain = Chain(stages(), _graph(), config, cluster, frozen.folder, _root())
    print(f"run {config.run_name} in {chain.folders.run}", file=sys.stderr if options.dry_run else sys.stdout)
    order = Order(chosen, options.discard, options.dry_run, lambda question: options.yes or _confirm(question))
    return submit_run(chain, frozen, order)


def _asked(options: argparse.Namespace) -> tuple[Experiment, Cluster]:
    """What the options describe; with --resume what was stored, which only --cluster may change."""
    if not options.resume:
        return experiment(options, default="pythia-1.4b"), load_cluster(options.cluster or "generic")
    if _described(options):
        raise InputError("--resume takes the configuration that was submitted; leave out --config, --set and --seeds (or --resume)")
    config, cluster = snapshot.stored(_submitted(options.run_name))
    return config, load_cluster(options.cluster) if options.cluster else cluster


def _submitted(run_name: str | None) -> Path:
    """Snapshot of the named run, or of the one submitted last."""
    last = snapshot.newest(_root())
    if run_name is None:
        if last is None:
            raise InputError(_no_newest())
        return last
    here = Folders.of(Paths(), run_name)
    runs = [here.run, *([last.parents[2] / run_name] if last else [])]  # beside the last one, if that has a place of its own
    found = [path for run in runs for path in (run / "submission").glob("code-*/experiment.yaml")]
    if not found:
        words = f"submit it: bash run_all.sh --config NAME --run-name {run_name}"
        raise InputError(f"found no submitted run {run_name!r} in {here.work}; {words}")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def _no_newest() -> str:
    return (
        f"no run was submitted from {_root()} yet; submit one: bash run_all.sh --config NAME. "
        f"(If one was, {snapshot.NEWEST} was removed since: name the run by --run-name NAME)"
    )


def _described(options: argparse.Namespace) -> bool:
    """Whether the options describe an experiment, rather than leave it to what was submitted."""
    return options.config is not None or options.seeds is not None or bool(options.overrides)


def _confirm(question: str) -> bool:
    """Ask only a person. Without a terminal the answer is yes."""
    return not sys.stdin.isatty() or input(f"{question} [Y/n] ").strip().lower() in ("", "y", "yes")


def status(options: argparse.Namespace) -> int:
    """Print the table of a run once, or again and again until nothing happens by itself any more."""
    while True:
        text, going = _status(options)
        if options.watch and sys.stdout.isatty():
            print("\033[2J\033[H", end="")
        print(text, flush=True)
        if not (options.watch and going):
            return DONE
        time.sleep(options.watch)


def _status(options: argparse.Namespace) -> tuple[str, bool]:
    """Of the experiment that the options describe; without any, of the run submitted last."""
    last = snapshot.newest(_root())
    if not _described(options) and (options.run_name is not None or last):
        try:
            code = _submitted(options.run_name)
            return report(Chain(stages(), _graph(), *snapshot.stored(code), code, _root()))
        except InputError as error:
            if options.run_name is None:
                return f"the run submitted last is gone: {error}", False
    config = experiment(options)
    code = snapshot.submission_folder(Folders.of(config.paths, config.run_name))
    if code.is_dir():
        return report(Chain(stages(), _graph(), config, load_cluster("generic"), code / "code-none", _root()))
    hint = f"{_no_newest()}\n" if shutil.which("sbatch") and not _described(options) else ""
    return hint + status_table(stages(), config), False


def _frozen() -> Chain:
    """The run whose frozen code this is."""
    code = Path(__file__).resolve().parents[1]
    return Chain(stages(), _graph(), *snapshot.stored(code), code, _root())


def share(number: int) -> int:
    """What a task of an array calls: do its share of a stage's work. What it leaves undone, the stage's own job does."""
    config, stop = _frozen().config, Stop()
    stop.listen()
    seed, task = job.own_share(config)
    return run_stage(stages()[number], config, seed, stages(), stop, task=task)


def work(number: int, leaving: bool) -> int:
    """What a job calls: do its stage for its seeds, or, after exit code 75, see to its own return."""
    chain, stage = _frozen(), stages()[number]
    seeds = job.own_seeds(chain, stage)
    if leaving:
        return job.leave(chain, stage, seeds)
    job.arrive(chain, stage, seeds)
    result = run_each([stage], chain.config, seeds, discard=False)
    if result == DONE:
        job.forget(chain, stage, seeds)
    return result
