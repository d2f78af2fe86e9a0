"""Can this machine get the model and the text of an experiment? `python verify_downloads.py` on a login node, before a study is submitted.

--quick (the default) asks for names, sizes and the first rows. --full fetches everything into the cache and holds it against the hub's
hashes, so that setup needs no network afterwards. --offline looks at the cache alone. One line a check, a table at the end; exit code 0
only if no check says `no`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from configs.presets import ConfigError, load
from utils.run.checks import concluded
from utils.run.environment import keep_others_from_writing
from utils.run.errors import REFUSED, InputError
from utils.run.folders import Folders
from utils.run.preemption import Stop
from utils.verify.downloads import download_checks
from utils.verify.look import Look


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    keep_others_from_writing()
    try:
        config = load(options.config, options.overrides)
        look = Look(config, Folders.of(config.paths, config.run_name), options.mode, Stop())
        return concluded(download_checks(look), f"setup can get what it needs: bash run_all.sh --config {options.config}")
    except (ConfigError, InputError) as error:
        print(error, file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python verify_downloads.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = parser.add_mutually_exclusive_group()
    for mode in ("quick", "full", "offline"):
        modes.add_argument(f"--{mode}", action="store_const", const=mode, dest="mode")
    parser.set_defaults(mode="quick")
    parser.add_argument("--config", default="pythia-1.4b", metavar="NAME|FILE", help="a preset, or a YAML file (default: pythia-1.4b)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override one key; repeatable")
    return parser


if __name__ == "__main__":
    sys.exit(main())
