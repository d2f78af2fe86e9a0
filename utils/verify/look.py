"""What the checks of downloads look at, and how closely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.schema import Experiment
from utils.run import hub
from utils.run.folders import Folders
from utils.run.hub import Listing, Repository
from utils.run.preemption import Stop

FETCH_ELSEWHERE = "fetch it where there is a network: python verify_downloads.py --full"


@dataclass(frozen=True)
class Look:
    """What is looked at, and how closely."""

    config: Experiment
    folders: Folders
    mode: Literal["quick", "full", "offline"]
    stop: Stop

    @property
    def root(self) -> Path:
        return hub.root(self.folders.cache)

    @property
    def online(self) -> bool:
        return self.mode != "offline"

    def listing(self, repository: Repository) -> Listing:
        return hub.listing(repository, self.root, ask=self.online)

    @property
    def model(self) -> Repository | None:
        """The base model, if it is on the hub."""
        return next((repository for repository, _ in hub.wanted(self.config) if repository.kind == "model"), None)


def faults(look: Look, repository: Repository, there: Listing, names: Sequence[str]) -> str:
    """Fetch what is missing or damaged (--full), or say what is (--offline)."""
    if look.mode == "full":
        hub.fetch(repository, names, look.root, look.stop)
        return ""
    found = {name: hub.damage(hub.local(repository, there.commit, name, look.root), there.files[name]) for name in names}
    damaged = [f"{name} {fault}" for name, fault in found.items() if fault]
    return f"{repository}: {damaged[0]} ({len(damaged)} of {len(names)} files); {FETCH_ELSEWHERE}" if damaged else ""
