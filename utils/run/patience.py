"""Trying again what may pass, for a bounded time, and saying why the hub does not give something and what to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from utils.run.errors import InputError

T = TypeVar("T")
WAITS = (2.0, 5.0, 15.0, 40.0)  # seconds between the attempts at what may pass; the client itself waits and retries within each
LONGEST_WAIT = 300.0  # seconds that a hub that is asked too often may ask us to wait


class Unavailable(InputError):
    """The hub cannot give something. The message says why, and what to do."""


class ArrivedDamagedError(OSError):
    """A file is not what the hub says it is."""


def patiently(work: Callable[[], T], what: str, waits: Sequence[float] | None = None) -> T:
    """Do it, and do it again after a while where the cause may pass. Raises Unavailable with the cause and the way out."""
    waits = WAITS if waits is None else waits
    try:
        return work()
    except Exception as error:
        cause = _cause(error)
        if cause is None:
            raise
        if not waits or not cause.passing:
            raise Unavailable(f"{what}: {cause.words}") from None
    wait = min(max(waits[0], cause.wait), LONGEST_WAIT)
    print(f"  hub: {what}: {cause.words.split(';')[0]}; trying again in {wait:.0f} s", flush=True)
    time.sleep(wait)
    return patiently(work, what, waits[1:])


@dataclass(frozen=True)
class Cause:
    """Why something failed, whether that may pass by itself, and how many seconds the hub asks to wait."""

    words: str
    passing: bool = False
    wait: float = 0.0


def _cause(error: Exception) -> Cause | None:
    """What an exception of the hub's client means; None if it is none of the hub's (a full disk, a fault of ours)."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return Cause(
            "not in the cache, and the network is off (HF_HUB_OFFLINE); fetch it where there is one: bash run_all.sh --local --to 0"
        )
    if isinstance(error, errors.GatedRepoError):
        return Cause("it is gated; accept its terms on its page on the hub, then give your token in HF_TOKEN")
    if isinstance(error, errors.RepositoryNotFoundError):
        return Cause("the hub has no such repository, or it is private; check the name, give your token in HF_TOKEN if it is private")
    if isinstance(error, errors.DisabledRepoError):
        return Cause("the hub has disabled this repository; name another source")
    if isinstance(error, errors.RevisionNotFoundError):
        return Cause("the hub has no such revision of it; check the revision")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return Cause("the hub has no such file in it; check the path")
    if isinstance(error, UnicodeEncodeError):
        return Cause("the token holds a character that no token has; correct or remove HF_TOKEN")
    if isinstance(error, errors.HfHubHTTPError):
        return _of_status(error.response.status_code, error.response.headers.get("retry-after", ""))
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _cause(error.__cause__) if isinstance(error.__cause__, Exception) else _unreachable(error)
    if isinstance(error, ArrivedDamagedError):
        return Cause(f"it arrives damaged ({error}); something between here and the hub changes files, try another network", passing=True)
    if isinstance(error, (errors.HTTPError, ConnectionError, TimeoutError)):
        return _unreachable(error)
    if type(error) is OSError and error.errno is None:  # the client's own words for a file of another size than announced
        return Cause(f"it arrives incomplete ({str(error).splitlines()[0]}); check the network", passing=True)
    return None


def _of_status(status: int, retry_after: str) -> Cause:
    if status == 401:
        return Cause("the hub does not accept the token (401); correct or remove HF_TOKEN")
    if status == 403:
        return Cause("the hub refuses access (403); check the rights of your token")
    if status == 429:
        wait = float(retry_after) if retry_after.isdecimal() else 0.0
        return Cause("the hub is asked too often from here (429); wait some minutes, or give a token in HF_TOKEN", True, wait)
    if status >= 500:
        return Cause(f"the hub has a fault of its own ({status}); try again later", passing=True)
    return Cause(f"the hub answers with status {status}; check name and revision")


def _unreachable(error: Exception) -> Cause:
    said = (str(error).splitlines() or [""])[0][:120]
    return Cause(f"the hub cannot be reached ({said or type(error).__name__}); check network, proxy and HF_ENDPOINT", passing=True)
