"""Work on a hostile input in a process of its own, with a limit of memory and of time."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.presets import ConfigError
from tests.fake_stages import ROOT
from utils.run.errors import InputError

MEGABYTES, SECONDS = 1500, 20.0
Look = Callable[[bytes], object]


@dataclass(frozen=True)
class Verdict:
    """What became of one input. `refused`: one of the project's own errors, with its words; `fault`: anything else that is no result.

    `lines` are those of the project that ran, as file:line.
    """

    refused: str = ""
    fault: str = ""
    lines: frozenset[str] = frozenset()


def judged(look: Look, inputs: Sequence[bytes], megabytes: int = MEGABYTES, seconds: float = SECONDS) -> Iterator[Verdict]:
    """A verdict for each input. One that kills its process, or needs too long, costs the others nothing but a new process."""
    done = 0
    while done < len(inputs):
        reader, child = _started(look, inputs[done:], megabytes)
        try:
            while done < len(inputs):
                verdict = _next(reader, seconds)
                done += 1
                yield verdict or Verdict(fault=_ended(child, seconds))
                if verdict is None:
                    break
        finally:
            os.close(reader)
            _ended(child, seconds)


def one(look: Callable[[], object], megabytes: int = MEGABYTES, seconds: float = SECONDS) -> Verdict:
    """The verdict on one piece of work."""
    return next(judged(lambda _: look(), [b""], megabytes, seconds))


def _started(look: Look, inputs: Sequence[bytes], megabytes: int) -> tuple[int, int]:
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return reader, child
    try:
        os.setsid()
        quiet = os.open(os.devnull, os.O_RDWR)
        for handle in (0, 1, 2):
            os.dup2(quiet, handle)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20),) * 2)
        for each in inputs:
            told = json.dumps(_judge(look, each)).encode()
            os.write(writer, len(told).to_bytes(8, "little") + told)
    finally:
        os._exit(0)


def _judge(look: Look, given: bytes) -> tuple[str, str, list[str]]:
    """(refusal, fault, lines), as in Verdict."""
    lines: set[str] = set()
    sys.settrace(_tracer(lines))
    try:
        look(given)
        return "", "", list(lines)
    except (ConfigError, InputError) as error:
        return str(error), "", list(lines)
    except BaseException as error:
        where = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(ROOT))]
        place = f"{Path(where[-1].filename).name}:{where[-1].lineno}" if where else "?"
        return "", f"{type(error).__name__} at {place}: {str(error)[:200]}", list(lines)
    finally:
        sys.settrace(None)


def _tracer(lines: set[str]) -> Callable[..., object]:
    """Notes lines of configs/ and utils/ alone: others would only cost time."""
    ours = tuple(f"{ROOT}/{top}/" for top in ("configs", "utils"))

    def inside(frame: object, event: str, argument: object) -> object:
        lines.add(f"{frame.f_code.co_filename}:{frame.f_lineno}")  # type: ignore[attr-defined]
        return inside

    return lambda frame, event, argument: inside if frame.f_code.co_filename.startswith(ours) else None


def _next(reader: int, seconds: float) -> Verdict | None:
    """What the child says of its next input; None if it ended, or says nothing in that time."""
    end = time.monotonic() + seconds
    size = _read(reader, 8, end)
    told = size and _read(reader, int.from_bytes(size, "little"), end)
    if not told:
        return None
    refused, fault, lines = json.loads(told)
    return Verdict(refused, fault, frozenset(lines))


def _read(reader: int, size: int, end: float) -> bytes:
    found = b""
    while len(found) < size and select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
        block = os.read(reader, size - len(found))
        if not block:
            return b""
        found += block
    return found if len(found) == size else b""


def _ended(child: int, seconds: float) -> str:
    """How a child ended, in words; it is killed if it has not."""
    try:
        gone, status = os.waitpid(child, os.WNOHANG)
        if not gone:
            time.sleep(0.05)
            gone, status = os.waitpid(child, os.WNOHANG)
        if not gone:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return f"no answer in {seconds:g} s"
    except ChildProcessError:
        return "ended before"
    return f"killed by signal {status & 127}" if status & 127 else "ended without an answer"
