"""The text of the experiment: is it there, and can it be read?"""

from __future__ import annotations

import tempfile
from pathlib import Path

from configs.schema import Files
from utils.data.formats import TABLE, Item, items
from utils.data.sources import local_files
from utils.run import hub
from utils.run.checks import Finding
from utils.run.errors import InputError
from utils.run.hub import Facts, Repository
from utils.run.patience import patiently
from utils.verify.look import FETCH_ELSEWHERE, Look, faults
from utils.verify.reach import SECONDS

HEAD_BYTES = 4 << 20  # of a file, enough for its first row


def text_files(look: Look) -> Finding:
    return _files(look, look.config.data.files, "data.files")


def fallback(look: Look) -> Finding:
    """Whether there is other text to fall back on; a run does not need it."""
    if look.config.data.fallback is None:
        return "skip", "none configured (data.fallback): without its text a run stops"
    try:
        verdict, words = _files(look, look.config.data.fallback, "data.fallback", fetched=False)
    except InputError as error:
        return "warn", str(error)
    return ("warn" if verdict == "no" else verdict), words


def _files(look: Look, files: Files | None, key: str, fetched: bool = True) -> Finding:
    """Every entry has files; with --full they are fetched and compared, with --offline compared."""
    if files is None:
        return "skip", "the text is that of installed packages"
    local = [path for entry in files.named if not entry.startswith("hf:") for path in local_files(entry)]
    count, size = len(local), sum(path.stat().st_size for path in local)
    damaged: list[str] = []
    for repository, patterns in hub.of_files(files):
        there = look.listing(repository)
        for pattern in patterns:
            if not there.matching([pattern]):
                return "no", f"{key}: {repository} holds no file like {pattern}; correct the name"
        names = there.matching(patterns)
        count, size = count + len(names), size + sum(there.files[name].size for name in names)
        if fetched and look.mode != "quick" and (fault := faults(look, repository, there, names)):
            damaged.append(fault)
    if damaged:
        return "no", "; ".join(damaged)
    return "ok", f"{count} files, {size / 1e9:.2f} GB" + (", all here with the hub's hashes" if fetched and look.mode != "quick" else "")


def first_rows(look: Look) -> Finding:
    """The first row of the first file of every split can be parsed."""
    files = look.config.data.files
    if files is None:
        return "skip", "the text is that of installed packages"
    subsets, passed_over = {}, []
    for split, entries in (("train", files.train), ("validation", files.validation), ("test", files.test)):
        row = _first_row(look, entries[0])
        if row is None:
            passed_over.append(split)
        elif not row.text.strip() and row.ids is None:
            return "no", f"the first row of {entries[0]} has no text; correct the entry"
        else:
            subsets[split] = row.subset
    if not subsets:
        return "skip", "Parquet files are read whole: --full"
    said = ", ".join(f"{split}: {subset}" for split, subset in subsets.items())
    return "ok", f"parsed, subset of the first row {said}" + (
        f"; not looked at: {', '.join(passed_over)} (Parquet, --full)" if passed_over else ""
    )


def _first_row(look: Look, entry: str) -> Item | None:
    if not entry.startswith("hf:"):
        return next(items(local_files(entry)[0]))
    repository, pattern = hub.of_entry(entry)
    there = look.listing(repository)
    name = next(iter(there.matching([pattern])), None)
    if name is None:
        raise InputError(f"{repository} holds no file like {pattern}; correct the name")
    path = hub.local(repository, there.commit, name, look.root)
    if path is not None and not hub.damage(path, Facts(there.files[name].size, None, None)):
        return next(items(path))
    if look.mode != "quick":
        raise InputError(f"{name} of {repository} is not on this machine; {FETCH_ELSEWHERE}")
    return None if name.endswith(TABLE) else _streamed_row(repository, there.commit, name)


def _streamed_row(repository: Repository, commit: str, name: str) -> Item:
    """From the beginning of the file: rows are read as a stream, so the missing end does not matter."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    url = hf_hub_url(repository.name, name, repo_type=repository.kind, revision=commit)

    def head() -> bytes:
        wanted = build_hf_headers() | {"Range": f"bytes=0-{HEAD_BYTES - 1}"}
        answer = get_session().get(url, headers=wanted, timeout=SECONDS, follow_redirects=True)
        hf_raise_for_status(answer)
        return answer.content[:HEAD_BYTES]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(name).name)
        path.write_bytes(patiently(head, f"{name} of {repository}"))
        return next(items(path))
