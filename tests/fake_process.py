"""Stands for one launched process: `python -m tests.fake_process HOW STATE` ends as HOW says of it, without loading torch."""

import os
import sys
import time
from pathlib import Path


def main(how: str, state: str) -> int:
    rank, folder = os.environ["RANK"], Path(state)
    act = dict(part.split("=") for part in how.split(",")).get(rank, "0")
    (folder / f"seen_{rank}").write_text(" ".join(os.environ[name] for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")))
    if act == "wait":
        while not (folder / "stop").exists():
            time.sleep(0.01)
        print((folder / "stop").read_text())
        return 75
    if act == "write":
        time.sleep(1)
        (folder / "written").touch()
        return 0
    if act == "hang":
        time.sleep(600)
    print(f"process {rank} says why", file=sys.stderr)
    return int(act)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
