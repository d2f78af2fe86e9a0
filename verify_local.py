"""Can this machine run the experiment? `python verify_local.py` tries every part small, in less than a minute: no GPU, no network.

One line a check, a table at the end. Exit code 0 only if no check says `no`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from utils.run.checks import Check, concluded, examined
from utils.run.errors import REFUSED, InputError
from utils.verify.packages import packages

ENVIRONMENT = Path(__file__).parent / ".venv" / "bin" / "python"


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return concluded(_checks(options), "this machine can run it: bash run_all.sh")
    except InputError as error:
        print(error, file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python verify_local.py", description=__doc__)
    parser.add_argument("--config", default="mini", metavar="NAME|FILE", help="a preset, or a YAML file (default: mini)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override one key; repeatable")
    return parser


def _checks(options: argparse.Namespace) -> Iterator[Check]:
    """The packages first, by plain Python alone: without them nothing else can be imported."""
    yield examined("packages", _remedy(), packages)
    try:
        from configs.presets import ConfigError, load
        from utils.run.folders import Folders
        from utils.verify.local import local_checks
    except Exception:  # whatever a package that is too old does; the check has said it
        return
    try:
        config = load(options.config, options.overrides)
    except ConfigError as error:
        raise InputError(error) from None
    yield from local_checks(config, Folders.of(config.paths, config.run_name))


def _remedy() -> str:
    if ENVIRONMENT.exists() and Path(sys.prefix) != ENVIRONMENT.parents[1]:
        return f"use the environment of this project: {ENVIRONMENT} verify_local.py"
    return "install requirements.txt: bash run_tests.sh does it on first use"


if __name__ == "__main__":
    sys.exit(main())
