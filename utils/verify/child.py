"""A process of its own that is killed in the middle of its work."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from utils.run.errors import WorkFailed
from utils.verify.packages import ROOT

READY = "in the middle"


@contextmanager
def killed_child(*arguments: str, seconds: float = 60.0) -> Iterator[None]:
    """Start Python with these arguments, enter the block when it calls `wait`, and kill it (SIGKILL) at the end of the block.

    Raises WorkFailed with its last words if it ends, or says nothing for so long, before that.
    """
    command = [sys.executable, *arguments]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        late = threading.Timer(seconds, child.kill)
        late.start()
        assert child.stdout is not None
        try:
            said = "nothing was said"
            for line in child.stdout:
                said = line.strip() or said
                if said == READY:
                    break
            else:
                raise WorkFailed(f"{' '.join(command[:3])} did not get to the middle of its work within {seconds:g} s: {said}")
            late.cancel()
            yield
        finally:
            late.cancel()
            child.kill()


def wait() -> None:
    """In the child: say so, then wait to be killed. Ends the process if the one that would kill it is gone."""
    print(READY, flush=True)
    sys.stdin.read()
    sys.exit("the process that started this one is gone")
