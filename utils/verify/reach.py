"""Is there a place for what is fetched, and a way to where it is?"""

from __future__ import annotations

import shutil
import socket
from urllib.parse import urlsplit

from utils.run import hub
from utils.run.checks import Finding
from utils.run.patience import patiently
from utils.run.places import needed_gigabytes, unwritable
from utils.verify.look import Look

SECONDS = 10.0  # for an answer


def cache_folder(look: Look) -> Finding:
    if fault := unwritable("paths.cache", look.folders.cache):
        return "no", fault
    return "ok", f"{look.folders.cache}; files of the hub in {look.root}"


def network(look: Look) -> Finding:
    """A plain connection. None may be needed: behind a proxy there is none, and the next check tells."""
    if not look.online:
        return "skip", "--offline"
    from huggingface_hub import constants

    place = urlsplit(constants.ENDPOINT)
    port = place.port or (443 if place.scheme == "https" else 80)
    try:
        socket.create_connection((place.hostname or "", port), timeout=SECONDS).close()
    except OSError as error:
        return "warn", f"no direct connection to {place.hostname}:{port} ({error}); fine behind a proxy (HTTPS_PROXY)"
    return "ok", f"{place.hostname}:{port} can be connected to"


def hub_answers(look: Look) -> Finding:
    if not look.online:
        return "skip", "--offline"
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return "no", "the network is switched off (HF_HUB_OFFLINE); unset it, or look at the cache alone: --offline"
    patiently(lambda: get_session().head(constants.ENDPOINT, timeout=SECONDS), "the hub")
    return "ok", f"{constants.ENDPOINT} answers"


def token(look: Look) -> Finding:
    """Needed only where something is gated or private; never shown."""
    if not look.online:
        return "skip", "--offline"
    from huggingface_hub import HfApi, get_token

    given = get_token() is not None
    if given:
        patiently(lambda: HfApi().whoami(), "your token")
    for repository, _ in hub.wanted(look.config):
        patiently(lambda one=repository: HfApi().auth_check(one.name, repo_type=one.kind), str(repository))  # type: ignore[misc]
    return "ok", f"{'valid' if given else 'none given, none needed'}; everything may be read"


def disk(look: Look) -> Finding:
    """Free space for what is still to be fetched, and for the run."""
    size = 0
    for repository, patterns in hub.wanted(look.config):
        there = look.listing(repository)
        held = {name: hub.local(repository, there.commit, name, look.root) for name in there.matching(patterns)}
        size += sum(there.files[name].size for name, path in held.items() if path is None)
    free, run = shutil.disk_usage(look.folders.cache).free / 1e9, needed_gigabytes(look.config)
    need = size / 1e9 + (run or 0.0)
    told = f"about {run:.0f} GB" if run else "an unknown amount"
    words = f"{free:.0f} GB free in {look.folders.cache}, {size / 1e9:.1f} GB to be fetched, {told} for the run"
    if free < need:
        return "no", f"{words}; make room, or set paths.cache and paths.work"
    return ("ok" if run else "warn"), words


def offline_use(look: Look) -> Finding:
    """Whether setup could run with the network switched off."""
    lacking = [
        str(repository) for repository, patterns in hub.wanted(look.config) if not hub.is_here(repository, patterns, look.folders.cache)
    ]
    if not lacking:
        return "ok", "everything that setup reads is on this machine"
    words = f"not on this machine: {', '.join(lacking)}; --full or setup fetches it"
    return ("no" if look.mode == "offline" else "warn"), words
