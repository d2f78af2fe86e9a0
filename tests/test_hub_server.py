"""The real hub client against the hub on loopback: what it makes of each fault, what it tries again, and what it does not notice.

These are facts about huggingface_hub that our own downloads rest on; a version that breaks one should be met here first.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi, HfFileSystem, errors, hf_hub_download, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.hub_server import Hub, set_timeouts
from tests.tiny_models import random_model
from utils.data.tokenizer import save_tokenizer, train_tokenizer

ROWS = bytes(range(256)) * 160  # 40960 bytes
FILES = {"README.md": b"rows\n", "data/train.jsonl.zst": ROWS}
ROWS_SHA256, README_OID = hashlib.sha256(ROWS).hexdigest(), hashlib.sha1(b"blob 5\0rows\n").hexdigest()  # noqa: S324
SIX, SEVEN = [1, 2, 4, 8, 8], [8.0] * 5  # waits between six tries; after Retry-After: 7
MINE, OTHER, BAD = "hf_mine", "hf_other", "hf_bad"  # the owner's token, another reader's, and one that the hub does not know


def fetch(name: str = "data/train.jsonl.zst", **options: Any) -> bytes:
    return Path(hf_hub_download("org/pile", name, repo_type="dataset", **options)).read_bytes()


def info(**options: Any) -> Any:
    return HfApi().dataset_info("org/pile", **options)


def asked(hub: Hub) -> list[tuple[str, int | None]]:
    return [(request.method, request.status) for request in hub.requests]


@pytest.fixture
def commit(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    """Id of the commit of a dataset of two files; the client reads in steps of 4 KiB, not 10 MiB."""
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    set_timeouts(monkeypatch, 5.0)
    return hub.add("dataset", "org/pile", FILES)


def test_sizes_and_hashes_are_listed_as_git_and_lfs_know_them(hub: Hub, commit: str) -> None:
    found = info(files_metadata=True)
    assert found.sha == commit
    listed = {line.path: line for line in HfApi().list_repo_tree("org/pile", recursive=True, repo_type="dataset")}
    assert set(listed) == {*FILES, "data"}
    pathwise = HfApi().get_paths_info("org/pile", list(FILES), repo_type="dataset")
    assert [listed[line.path] for line in pathwise] == pathwise
    assert (listed["README.md"].blob_id, listed["README.md"].size, listed["README.md"].lfs) == (README_OID, 5, None)
    rows = listed["data/train.jsonl.zst"]
    assert (rows.lfs.sha256, rows.lfs.size, rows.size) == (ROWS_SHA256, len(ROWS), len(ROWS))
    assert {(line.rfilename, line.blob_id, line.lfs and line.lfs.sha256) for line in found.siblings} == {
        ("README.md", README_OID, None),
        ("data/train.jsonl.zst", rows.blob_id, ROWS_SHA256),
    }


def test_files_come_once_and_lie_under_their_hashes(hub: Hub, commit: str, tmp_path: Path) -> None:
    assert fetch() == ROWS
    assert asked(hub) == [("HEAD", 302), ("GET", 200)]
    assert hub.requests[1].path == f"/cdn/{ROWS_SHA256}/data/train.jsonl.zst"
    assert fetch("README.md") == b"rows\n"
    assert asked(hub)[2:] == [("HEAD", 200), ("GET", 200)]
    store = tmp_path / "hub_cache/datasets--org--pile"
    assert sorted(path.name for path in (store / "blobs").iterdir()) == sorted([ROWS_SHA256, README_OID])
    assert (store / "snapshots" / commit / "README.md").resolve() == store / "blobs" / README_OID
    assert (store / "refs/main").read_text() == commit
    assert fetch() == ROWS
    assert asked(hub)[4:] == [("HEAD", 302)]
    assert fetch(revision=commit) == ROWS
    assert len(hub.requests) == 5


def test_branches_point_to_commits(hub: Hub, commit: str) -> None:
    second = hub.add("dataset", "org/pile", {"README.md": b"better\n"}, commit="c" * 40, branches=("main", "v2"))
    assert (info().sha, info(revision="v2").sha, info(revision=commit).sha) == (second, second, commit)
    refs = HfApi().list_repo_refs("org/pile", repo_type="dataset").branches
    assert {(ref.name, ref.target_commit) for ref in refs} == {("main", second), ("v2", second)}
    assert fetch("README.md", revision="v2") == b"better\n"
    assert fetch("README.md", revision=commit) == b"rows\n"


def test_model_and_tokenizer_load_from_a_snapshot(hub: Hub, tmp_path: Path) -> None:
    model = random_model()
    model.save_pretrained(tmp_path / "saved")
    save_tokenizer(train_tokenizer(["some words and some more"] * 9, 300), tmp_path / "saved")
    hub.add("model", "org/tiny", {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()})
    snapshot = snapshot_download("org/tiny")
    loaded = AutoModelForCausalLM.from_pretrained(snapshot, local_files_only=True)
    assert all(ours.equal(theirs) for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(snapshot, local_files_only=True).eos_token_id == 0
    before = len(hub.requests)
    assert AutoTokenizer.from_pretrained("org/tiny").eos_token_id == 0
    assert len(hub.requests) > before


def test_file_system_reads_ranges(hub: Hub, commit: str) -> None:
    with HfFileSystem(endpoint=hub.endpoint).open("datasets/org/pile/data/train.jsonl.zst", "rb", block_size=100) as rows:
        rows.seek(500)
        assert rows.read(10) == ROWS[500:510]
    assert (hub.requests[-1].range, hub.requests[-1].status) == ("bytes=500-609", 206)


def test_range_behind_the_end_is_refused(hub: Hub, commit: str) -> None:
    session = huggingface_hub.get_session()
    place = f"{hub.endpoint}/datasets/org/pile/resolve/main/README.md"
    answers = [session.get(place, headers={"Range": f"bytes={wanted}"}) for wanted in ("1-2", "3-", "-2", "5-")]
    assert [(answer.status_code, answer.content) for answer in answers] == [(206, b"ow"), (206, b"s\n"), (206, b"s\n"), (416, b"")]
    assert [answer.headers["Content-Range"] for answer in answers] == ["bytes 1-2/5", "bytes 3-4/5", "bytes 3-4/5", "bytes */5"]


REFUSALS: dict[str, tuple[Callable[[Hub], object], Callable[[], object], type[Exception], int]] = {
    "removed": (lambda hub: hub.remove("dataset", "org/pile"), fetch, errors.RepositoryNotFoundError, 401),
    "removed, info": (lambda hub: hub.remove("dataset", "org/pile"), info, errors.RepositoryNotFoundError, 401),
    "removed, token": (lambda hub: hub.remove("dataset", "org/pile"), lambda: info(token=OTHER), errors.RepositoryNotFoundError, 404),
    "revision": (lambda hub: None, lambda: fetch(revision="v9"), errors.RevisionNotFoundError, 404),
    "entry": (lambda hub: None, lambda: fetch("test.txt"), errors.RemoteEntryNotFoundError, 404),
    "gated": (lambda hub: hub.gate("dataset", "org/pile"), fetch, errors.GatedRepoError, 401),
    "gated, token": (lambda hub: hub.gate("dataset", "org/pile"), lambda: fetch(token=OTHER), errors.GatedRepoError, 403),
    "bad token": (lambda hub: None, lambda: fetch(token=BAD), errors.HfHubHTTPError, 401),
    "bad token, info": (lambda hub: None, lambda: info(token=BAD), errors.HfHubHTTPError, 401),
    "bad token, whoami": (lambda hub: None, lambda: HfApi().whoami(token=BAD), errors.HfHubHTTPError, 401),
    "disabled, info": (lambda hub: hub.disable("dataset", "org/pile"), info, errors.DisabledRepoError, 403),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals_are_told_apart_and_never_tried_again(hub: Hub, commit: str, case: str) -> None:
    prepare, call, expected, status = REFUSALS[case]
    hub.tokens.add(OTHER)
    prepare(hub)
    with pytest.raises(expected) as caught:
        call()
    assert type(caught.value) is expected
    assert caught.value.response.status_code == status
    assert (len(hub.requests), hub.waits) == (1, [])


def test_gate_shows_the_list_but_not_the_files(hub: Hub, commit: str) -> None:
    hub.gate("dataset", "org/pile")
    assert info().gated == "manual"
    with pytest.raises(errors.GatedRepoError):
        HfApi().auth_check("org/pile", repo_type="dataset")


def test_disabled_dataset_looks_like_a_network_problem_to_a_download(hub: Hub, commit: str) -> None:
    hub.disable("dataset", "org/pile")
    with pytest.raises(errors.LocalEntryNotFoundError, match="check your connection") as caught:
        fetch()
    assert type(caught.value.__cause__) is errors.DisabledRepoError


def test_token_opens_a_private_dataset_and_stays_with_the_hub(hub: Hub) -> None:
    hub.add("dataset", "org/pile", FILES, private_token=MINE)
    with pytest.raises(errors.RepositoryNotFoundError):
        fetch()
    hub.requests.clear()
    assert fetch(token=MINE) == ROWS
    assert [(request.method, request.authorized) for request in hub.requests] == [("HEAD", True), ("GET", False)]
    HfApi().auth_check("org/pile", repo_type="dataset", token=MINE)
    assert HfApi().whoami(token=MINE)["name"] == "reader"
    assert MINE not in repr(hub.requests)


@pytest.mark.parametrize(("status", "retry_after", "waits"), [(429, 7, SEVEN), (429, None, SIX), (500, None, SIX), (503, None, SIX)])
def test_busy_hub_is_asked_seven_times_for_the_facts_of_a_file(
    hub: Hub, commit: str, status: int, retry_after: int | None, waits: list[float]
) -> None:
    hub.fail("HEAD *", status, retry_after=retry_after)
    with pytest.raises(errors.LocalEntryNotFoundError) as caught:
        fetch()
    assert isinstance(caught.value.__cause__, errors.HfHubHTTPError)
    assert caught.value.__cause__.response.status_code == status
    assert (asked(hub), hub.waits) == ([("HEAD", status)] * 7, waits)


@pytest.mark.parametrize(("status", "tries", "waits"), [(429, 6, SEVEN), (500, 1, []), (503, 1, [])])
def test_content_is_asked_for_again_after_429_only(hub: Hub, commit: str, status: int, tries: int, waits: list[float]) -> None:
    hub.fail("GET *", status, retry_after=7)
    with pytest.raises(errors.HfHubHTTPError) as caught:
        fetch()
    assert caught.value.response.status_code == status
    assert (asked(hub)[1:], hub.waits) == ([("GET", status)] * tries, waits)


@pytest.mark.parametrize("status", [429, 503])
def test_info_is_never_tried_again(hub: Hub, commit: str, status: int) -> None:
    hub.fail("*", status)
    for call in (info, lambda: HfApi().get_paths_info("org/pile", ["README.md"], repo_type="dataset")):
        hub.requests.clear()
        with pytest.raises(errors.HfHubHTTPError):
            call()
        assert len(hub.requests) == 1


def test_download_gets_over_a_passing_fault_of_each_kind(hub: Hub, commit: str) -> None:
    hub.fail("HEAD *", 503, times=2)
    hub.fail("GET *", 429, times=1)
    hub.cut("GET *", 9000, times=1)
    hub.drop("GET *", times=1)
    assert fetch() == ROWS
    assert asked(hub) == [("HEAD", 503)] * 2 + [("HEAD", 302), ("GET", 429), ("GET", 200), ("GET", None), ("GET", 206)]


def test_slow_hub_is_a_timeout_and_asked_again(hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_timeouts(monkeypatch, 0.05)
    hub.hang("HEAD *", 60)
    with pytest.raises(errors.LocalEntryNotFoundError) as caught:
        fetch()
    assert type(caught.value.__cause__).__name__ == "ReadTimeout"
    assert hub.waits == SIX


@pytest.mark.parametrize("after_bytes", [None, 0])
def test_slow_content_is_a_timeout_and_asked_for_again(
    hub: Hub, commit: str, after_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.05)
    hub.hang("GET *", 60, after_bytes=after_bytes)
    with pytest.raises(errors.HTTPError) as caught:
        fetch()
    assert type(caught.value).__name__ == "ReadTimeout"
    assert not isinstance(caught.value, OSError)
    assert hub.waits == [1] * 5


def test_info_waits_for_ever_unless_told_otherwise(hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_timeouts(monkeypatch, 0.05)
    hub.hang("*", 0.3)
    assert info().sha == commit
    with pytest.raises(errors.HTTPError) as caught:
        info(timeout=0.05)
    assert type(caught.value).__name__ == "ReadTimeout"


def test_cut_download_goes_on_where_it_was(hub: Hub, commit: str) -> None:
    hub.cut("GET *", after_bytes=10000)
    assert fetch() == ROWS
    assert [request.range for request in hub.requests[1:]] == [None, *(f"bytes={8192 * part}-" for part in range(1, 5))]
    assert hub.waits == [1] * 4


def test_less_than_one_step_of_a_cut_download_is_lost(hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is 10 MiB: a connection that never holds so long never gets on."""
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10 * 2**20)
    hub.cut("GET *", after_bytes=10000)
    with pytest.raises(errors.HTTPError, match="peer closed connection") as caught:
        fetch()
    assert type(caught.value).__name__ == "RemoteProtocolError"
    assert not isinstance(caught.value, OSError)
    assert [request.range for request in hub.requests[1:]] == [None] * 6
    assert hub.waits == [1] * 5


def test_failed_download_leaves_nothing_to_go_on_from(hub: Hub, commit: str, tmp_path: Path) -> None:
    hub.cut("GET *", after_bytes=10000, times=1)
    hub.fail("GET *", 503, times=1)
    with pytest.raises(errors.HfHubHTTPError):
        fetch()
    assert not list(tmp_path.rglob("*.incomplete"))
    assert fetch() == ROWS
    assert hub.requests[-1].range is None


def test_reset_connection_is_not_tried_again(hub: Hub, commit: str) -> None:
    hub.cut("GET *", after_bytes=10000, times=1, reset=True)
    with pytest.raises(errors.HTTPError) as caught:
        fetch()
    assert type(caught.value).__name__ == "ReadError"
    assert (len(hub.requests), hub.waits) == (2, [])


def test_dropped_question_is_not_asked_again_even_if_the_file_is_here(hub: Hub, commit: str) -> None:
    fetch()
    hub.drop("HEAD *", times=1)
    with pytest.raises(errors.HTTPError) as caught:
        fetch()
    assert type(caught.value).__name__ == "RemoteProtocolError"
    assert hub.waits == []


def test_wrong_length_is_noticed(hub: Hub, commit: str, tmp_path: Path) -> None:
    hub.shorten("GET *")
    with pytest.raises(OSError, match="should be of size 40960 but has size 40959"):
        fetch()
    assert not list(tmp_path.rglob("snapshots/*/data/*"))


def test_wrong_bytes_are_not_noticed_until_somebody_compares_hashes(hub: Hub, commit: str) -> None:
    hub.corrupt("GET *", times=1)
    wrong = fetch()
    assert len(wrong) == len(ROWS)
    assert hashlib.sha256(wrong).hexdigest() != ROWS_SHA256
    assert fetch() == wrong
    check = HfApi().verify_repo_checksums("org/pile", repo_type="dataset")
    assert [(line["path"], line["expected"], line["algorithm"]) for line in check.mismatches] == [
        ("data/train.jsonl.zst", ROWS_SHA256, "sha256")
    ]
    assert fetch(force_download=True) == ROWS


def test_damaged_cache_is_not_noticed(hub: Hub, commit: str) -> None:
    path = Path(hf_hub_download("org/pile", "data/train.jsonl.zst", repo_type="dataset"))
    path.resolve().write_bytes(ROWS[:7])
    assert fetch() == ROWS[:7]
    assert snapshot_download("org/pile", repo_type="dataset", allow_patterns="*.zst") == str(path.parents[1])
    assert path.read_bytes() == ROWS[:7]


def test_refused_connection(hub: Hub, commit: str) -> None:
    hub.down()
    with pytest.raises(errors.LocalEntryNotFoundError) as caught:
        fetch()
    assert type(caught.value.__cause__).__name__ == "ConnectError"
    assert hub.waits == SIX
    with pytest.raises(errors.HTTPError) as direct:
        info()
    assert type(direct.value).__name__ == "ConnectError"
    assert hub.requests == []
    hub.up()
    assert fetch() == ROWS


@pytest.mark.parametrize("trouble", ["down", "offline", "busy", "removed", "gated"])
def test_cached_file_is_given_out_whatever_the_hub_says(hub: Hub, commit: str, trouble: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch()
    if trouble == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    spoil = {"down": hub.down, "busy": lambda: hub.fail("*", 503), "offline": lambda: None}
    spoil |= {"removed": lambda: hub.remove("dataset", "org/pile"), "gated": lambda: hub.gate("dataset", "org/pile")}
    spoil[trouble]()
    before = len(hub.requests)
    assert fetch() == ROWS
    assert len(hub.requests) - before == (trouble not in ("down", "offline"))
    assert hub.waits == []


def test_offline_mode_asks_nobody(hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(errors.LocalEntryNotFoundError):
        fetch()
    with pytest.raises(errors.OfflineModeIsEnabled):
        info()
    assert (hub.requests, hub.waits) == ([], [])


def test_incomplete_snapshot_is_not_given_out(hub: Hub, commit: str) -> None:
    folder = Path(snapshot_download("org/pile", repo_type="dataset"))
    (folder / "README.md").unlink()
    hub.down()
    with pytest.raises(errors.IncompleteSnapshotError, match=r"README\.md"):
        snapshot_download("org/pile", repo_type="dataset")


def test_killed_download_in_another_process_starts_again_from_nothing(hub: Hub, commit: str, tmp_path: Path) -> None:
    """The partial file stays for ever under a name of its own and is never used."""
    hub.hang("GET *", 60, times=1, after_bytes=20000)
    code = "import huggingface_hub.constants as c, huggingface_hub as h; c.DOWNLOAD_CHUNK_SIZE = 4096; "
    code += "h.hf_hub_download('org/pile', 'data/train.jsonl.zst', repo_type='dataset')"
    place = {**os.environ, **hub.environment, "HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "hub_cache")}
    child = subprocess.Popen([sys.executable, "-c", code], env=place)
    deadline = time.monotonic() + 60
    while not (partial := [path for path in tmp_path.rglob("*.incomplete") if path.stat().st_size]):
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.kill()
    child.wait()
    assert fetch() == ROWS
    assert hub.requests[-1].range is None
    assert list(tmp_path.rglob("*.incomplete")) == partial
