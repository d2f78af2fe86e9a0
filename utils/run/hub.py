"""Files of Hugging Face hub repositories: fetched once, held against the hub's own hashes, then read without a network."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from threading import Thread
from typing import Literal, TypeVar
from urllib.parse import unquote

from configs.schema import HUB_ENTRY, Experiment, Files, Model
from utils.run.artifacts import file_digest, read_json, write_json
from utils.run.errors import InputError
from utils.run.lock import locked
from utils.run.patience import ArrivedDamagedError, Unavailable, patiently
from utils.run.preemption import Stop
from utils.run.progress import Progress

T = TypeVar("T")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
POLL_SECONDS = 0.5
TIMEOUT = 60.0  # seconds for the answer to a question; the client has none of its own
OWN = "hub"  # folder of the hub's files in the run's cache
LARGE = 64 << 20  # bytes from which a fetch shows how far it is
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class Repository:
    """A repository at a revision: a branch, a tag or a commit."""

    kind: Literal["model", "dataset"]
    name: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"{self.kind} {self.name}@{self.revision}"


@dataclass(frozen=True)
class Facts:
    """What the hub says of a file: bytes, and SHA-256 of a large file or git's SHA-1 of a small one."""

    size: int
    sha256: str | None
    sha1: str | None


@dataclass(frozen=True)
class Listing:
    """All files of a repository at one commit."""

    commit: str
    files: dict[str, Facts]

    def __post_init__(self) -> None:
        for name in self.files:
            if {"", ".", ".."}.intersection(name.split("/")):
                raise InputError(f"found the name {name!r} in a repository's listing, expected files below it; trust it no more")

    def matching(self, patterns: Sequence[str]) -> list[str]:
        """Names that fit a pattern or lie below a folder of that name, in order; a pattern's * does not cross folders."""
        return [name for name in sorted(self.files) if any(_fits(name, pattern) for pattern in patterns)]


@dataclass(frozen=True)
class Fetched:
    """Files of a repository on this machine, complete and intact."""

    commit: str
    paths: dict[str, Path]


def _fits(name: str, pattern: str) -> bool:
    parts, wanted = name.split("/"), pattern.rstrip("/").split("/")
    return len(parts) >= len(wanted) and all(map(fnmatchcase, parts, wanted))


def root(cache: Path) -> Path:
    """Where the hub's files lie: in the run's own cache (a home may have no room), unless the user has a place for them."""
    if os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME"):
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)
    return cache / OWN


def of_entry(entry: str) -> tuple[Repository, str]:
    """(repository, pattern) of an hf:// entry of the configuration."""
    parts = HUB_ENTRY.fullmatch(entry)
    assert parts, entry
    return Repository("dataset", parts["name"], unquote(parts["revision"] or "main")), parts["path"]


def wanted(config: Experiment) -> list[tuple[Repository, tuple[str, ...]]]:
    """(repository, patterns) of all that setup takes from the hub."""
    model = config.model
    found: dict[Repository, tuple[str, ...]] = {}
    if model.source == "pretrained" and not Path(model.name).is_dir():
        found[Repository("model", model.name, model.revision)] = MODEL_FILES
    return [*found.items(), *of_files(config.data.files)]


def of_files(files: Files | None) -> list[tuple[Repository, tuple[str, ...]]]:
    """(repository, patterns) of the hub entries among the files of a configuration."""
    found: dict[Repository, tuple[str, ...]] = {}
    for entry in files.named if files else ():
        if entry.startswith("hf:"):
            repository, pattern = of_entry(entry)
            found[repository] = (*found.get(repository, ()), pattern)
    return list(found.items())


def listing(repository: Repository, folder: Path, ask: bool = True) -> Listing:
    """What the repository holds. A commit never changes and is asked for once; of a branch the last known state serves without a network.

    Without `ask`, and where the hub does not answer, what was stored counts, or what lies in the hub's own cache. Raises Unavailable.
    """
    place = folder / "listings" / f"{repository.kind}s--{repository.name.replace('/', '--')}@{repository.revision.replace('/', '--')}.json"
    stored = _stored(place)
    if stored and (not ask or re.fullmatch(r"[0-9a-f]{40}", repository.revision)):
        return stored
    try:
        if not ask:
            raise Unavailable(f"{repository} was not fetched before; fetch it where there is a network: bash run_all.sh --local --to 0")
        found = patiently(lambda: _ask(repository), str(repository))
    except Unavailable as error:
        held = stored or _in_cache(repository, folder)
        if held is None:
            raise
        if ask:
            print(f"  hub: {error}\n  hub: going on with commit {held.commit} of {repository}, which is on this machine", flush=True)
        return held
    write_json(place, asdict(found))
    return found


def _in_cache(repository: Repository, folder: Path) -> Listing | None:
    """What somebody fetched before us: the cache calls a large file by its SHA-256 and a small one by git's SHA-1."""
    there = _cache_folder(repository, folder)
    ref = there / "refs" / repository.revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else repository.revision
    snapshot = there / "snapshots" / commit
    paths = [path for path in snapshot.rglob("*") if path.is_file()]
    if not paths:
        return None
    names = {path: path.resolve().name for path in paths}
    return Listing(
        commit,
        {
            path.relative_to(snapshot).as_posix(): Facts(
                path.stat().st_size,
                name if re.fullmatch(r"[0-9a-f]{64}", name) else None,
                name if re.fullmatch(r"[0-9a-f]{40}", name) else None,
            )
            for path, name in names.items()
        },
    )


def _cache_folder(repository: Repository, folder: Path) -> Path:
    return folder / f"{repository.kind}s--{repository.name.replace('/', '--')}"


def _stored(place: Path) -> Listing | None:
    try:
        listed: Listing = read_json(place, Listing)
    except InputError:
        return None
    return listed


def _ask(repository: Repository) -> Listing:
    from huggingface_hub import HfApi

    info = HfApi().repo_info(repository.name, repo_type=repository.kind, revision=repository.revision, files_metadata=True, timeout=TIMEOUT)
    files = {
        file.rfilename: Facts(file.size or 0, file.lfs.sha256 if file.lfs else None, None if file.lfs else file.blob_id)
        for file in info.siblings or ()
    }
    return Listing(info.sha or repository.revision, files)


def fetch(repository: Repository, patterns: Sequence[str], folder: Path, stop: Stop) -> Fetched:
    """All files that fit a pattern, fetched where they are not there or damaged; an interrupted fetch goes on with the file it was at.

    Raises Unavailable, InputError if the disk has no room for them, StoppedInTime.
    """
    with locked(_cache_folder(repository, folder), queue=stop):
        return _fetch(repository, patterns, folder, stop)


def _fetch(repository: Repository, patterns: Sequence[str], folder: Path, stop: Stop) -> Fetched:
    there = listing(repository, folder)
    names = there.matching(patterns)
    if not names:
        raise Unavailable(f"{repository} holds no file like {', '.join(patterns)}; correct the name")
    held = {name: local(repository, there.commit, name, folder) for name in names}
    missing = [name for name in names if held[name] is None or damage(held[name], there.files[name])]
    if folder.name == OWN:  # what a killed fetch left is of no use to the client, and nobody else's here
        for leftover in _cache_folder(repository, folder).glob("blobs/*.incomplete"):
            leftover.unlink()
    _room_for(sum(there.files[name].size for name in missing), folder)
    paths = {name: held[name] if name not in missing else _fetch_one(repository, there, name, folder, stop) for name in names}
    return Fetched(there.commit, {name: path for name, path in paths.items() if path})


def is_here(repository: Repository, patterns: Sequence[str], cache: Path) -> bool:
    """Whether every pattern has files on this machine, all of them there by name and size; nothing is asked of the network."""
    folder = root(cache)
    try:
        there = listing(repository, folder, ask=False)
    except Unavailable:
        return False
    if repository.kind == "dataset" and not all(there.matching([pattern]) for pattern in patterns):
        return False
    held = {name: local(repository, there.commit, name, folder) for name in there.matching(patterns)}
    return bool(held) and all(path and path.stat().st_size == there.files[name].size for name, path in held.items())


def model_folder(model: Model, cache: Path, stop: Stop) -> tuple[Path, str]:
    """(folder with the files of a published model, its commit); 'local' for a model that is a folder already."""
    if Path(model.name).is_dir():
        return Path(model.name), "local"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model.name):
        raise InputError(f"model.name={model.name!r}: found no such folder; expected a folder with a model, or OWNER/NAME on the hub")
    fetched = fetch(Repository("model", model.name, model.revision), MODEL_FILES, root(cache), stop)
    return next(iter(fetched.paths.values())).parent, fetched.commit


def local(repository: Repository, commit: str, name: str, folder: Path) -> Path | None:
    """The file on this machine, whole or not; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository.name, name, cache_dir=folder, revision=commit, repo_type=repository.kind)
    return Path(found) if isinstance(found, str) else None


def damage(path: Path | None, facts: Facts) -> str | None:
    """What is wrong with a fetched file, in words; None if size and hash are the hub's."""
    if path is None or not path.is_file():
        return "is missing"
    if (size := path.stat().st_size) != facts.size:
        return f"has {size} bytes, expected {facts.size}"
    if facts.sha256:
        return None if file_digest(path) == facts.sha256 else "differs from the hub's SHA-256"
    if facts.sha1:
        git = hashlib.sha1(b"blob %d\0" % size + path.read_bytes(), usedforsecurity=False)
        return None if git.hexdigest() == facts.sha1 else "differs from the hub's git hash"
    return None


def _room_for(size: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < size:
        raise InputError(f"{folder}: {free / 1e9:.1f} GB free, {size / 1e9:.1f} GB are to be fetched; make room or set paths.cache")


def _fetch_one(repository: Repository, there: Listing, name: str, folder: Path, stop: Stop) -> Path:
    facts = there.files[name]
    blobs = _cache_folder(repository, folder) / "blobs"

    def attempt() -> Path:
        _forget(local(repository, there.commit, name, folder))  # a damaged one: the client would take it for good
        path = _while_listening(lambda: _download(repository, there.commit, name, folder), name, facts.size, blobs, stop)
        if fault := damage(path, facts):
            _forget(path)
            raise ArrivedDamagedError(f"{name} {fault}")
        return path

    return patiently(attempt, f"{name} of {repository}")


def _forget(path: Path | None) -> None:
    """Remove a fetched file and what its name points to."""
    if path is not None:
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def _download(repository: Repository, commit: str, name: str, folder: Path) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    return Path(hf_hub_download(repository.name, name, repo_type=repository.kind, revision=commit, cache_dir=folder))


def _while_listening(work: Callable[[], T], name: str, size: int, blobs: Path, stop: Stop) -> T:
    """Do the work in a thread, show how much has arrived, and leave it when asked to stop."""
    outcome: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # handed to the caller
            errors.append(error)

    progress = Progress(f"fetch {name} (MB)", size >> 20) if size >= LARGE else None
    thread = Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        if progress:
            progress.advance(max(0, min(_arriving(blobs) >> 20, progress.total - 1) - progress.done))
        stop.check()
    if progress:
        progress.close()
    if errors:
        raise errors[0]
    return outcome[0]


def _arriving(blobs: Path) -> int:
    """Bytes of the file that is being fetched."""
    try:
        return max((part.stat().st_size for part in blobs.glob("*.incomplete")), default=0)
    except FileNotFoundError:  # it has just been renamed
        return 0
