"""What setup takes from the hub: complete, intact, once; and what it says when the hub, the way there, or the disk fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from configs.presets import load
from tests.fake_stages import ROOT, TINY
from tests.hub_server import Hub
from utils.run import hub as hub_module
from utils.run import patience
from utils.run.errors import InputError, StoppedInTime
from utils.run.hub import Fetched, Repository, fetch, is_here, listing
from utils.run.patience import Unavailable
from utils.run.preemption import Stop

ROWS = b'{"text": "x"}\n' * 500
FILES = {"README.md": b"rows\n", "data/a.jsonl.zst": ROWS, "data/b.jsonl.zst": ROWS[:-14], "val.jsonl.zst": b"val"}
PILE = Repository("dataset", "org/pile")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run's own place for files of the hub; nobody waits between two attempts."""
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(hub_module, "POLL_SECONDS", 0.01)
    return tmp_path / "cache/hub"


@pytest.fixture
def commit(hub: Hub) -> str:
    return hub.add("dataset", "org/pile", FILES)


def get(folder: Path, *patterns: str, repository: Repository = PILE) -> Fetched:
    return fetch(repository, patterns or ("data",), folder, Stop())


def contents(fetched: Fetched) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in fetched.paths.items()}


WANTED = {name: FILES[name] for name in ("data/a.jsonl.zst", "data/b.jsonl.zst")}


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["data"], ["data/a.jsonl.zst", "data/b.jsonl.zst"]),
        (["data/"], ["data/a.jsonl.zst", "data/b.jsonl.zst"]),
        (["data/[b-z]*.zst"], ["data/b.jsonl.zst"]),
        (["*.zst"], ["val.jsonl.zst"]),
        (["*.md", "val.jsonl.zst"], ["README.md", "val.jsonl.zst"]),
    ],
)
def test_files_folders_and_patterns(hub: Hub, commit: str, folder: Path, patterns: list[str], names: list[str]) -> None:
    fetched = get(folder, *patterns)
    assert fetched.commit == commit
    assert contents(fetched) == {name: FILES[name] for name in names}


def test_a_pinned_commit_is_fetched_once_and_never_asked_for_again(hub: Hub, commit: str, folder: Path) -> None:
    pinned = Repository("dataset", "org/pile", commit)
    assert contents(get(folder, repository=pinned)) == WANTED
    before = len(hub.requests)
    assert contents(get(folder, repository=pinned)) == WANTED
    assert len(hub.requests) == before
    assert is_here(pinned, ("data",), folder.parent)


def test_a_branch_that_moved_is_followed_by_the_next_fetch(hub: Hub, commit: str, folder: Path) -> None:
    get(folder)
    moved = hub.add("dataset", "org/pile", FILES | {"data/a.jsonl.zst": b"new"})
    assert (fetched := get(folder)).commit == moved != commit
    assert contents(fetched)["data/a.jsonl.zst"] == b"new"


def test_without_a_network_the_last_known_state_serves(hub: Hub, commit: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    get(folder)
    hub.down()
    assert contents(get(folder)) == WANTED
    said = capsys.readouterr().out
    assert "the hub cannot be reached" in said and f"going on with commit {commit} of dataset org/pile@main" in said
    with pytest.raises(Unavailable, match=r"val\.jsonl\.zst of dataset org/pile@main: the hub cannot be reached .*check network, proxy"):
        get(folder, "val.jsonl.zst")


def test_what_somebody_fetched_before_serves_too(hub: Hub, commit: str, folder: Path) -> None:
    """A cache that the hub's own client filled, and that was carried to a machine without a network."""
    snapshot_download("org/pile", repo_type="dataset", allow_patterns=["data/*"], cache_dir=folder)
    hub.down()
    assert is_here(PILE, ("data",), folder.parent) and not is_here(PILE, ("data", "val.jsonl.zst"), folder.parent)
    assert contents(get(folder)) == WANTED
    blob = get(folder).paths["data/a.jsonl.zst"].resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    with pytest.raises(Unavailable, match="the hub cannot be reached"):
        get(folder)  # found damaged by the hash in its name


@pytest.mark.parametrize(
    "fault",
    [
        lambda hub: hub.fail("GET *api*", 503, times=2),
        lambda hub: hub.fail("GET *a.jsonl.zst", 503, times=2),
        lambda hub: hub.fail("*", 429, times=2, retry_after=0),
        lambda hub: hub.cut("GET *a.jsonl.zst", 1000, times=1),
        lambda hub: hub.cut("GET *a.jsonl.zst", 1000, times=2, reset=True),
        lambda hub: hub.drop("GET *api*", times=2),
        lambda hub: hub.corrupt("GET *a.jsonl.zst", times=1),
        lambda hub: hub.corrupt("GET *README.md", times=1),
        lambda hub: hub.shorten("GET *a.jsonl.zst", times=1),
    ],
    ids=["busy listing", "busy file", "too many requests", "cut", "reset", "dropped", "wrong bytes", "wrong small file", "short"],
)
def test_a_fault_that_passes_is_waited_for(hub: Hub, commit: str, folder: Path, fault: Callable[[Hub], None]) -> None:
    fault(hub)
    fetched = get(folder, "data", "README.md")
    assert contents(fetched) == WANTED | {"README.md": b"rows\n"}
    assert not list(folder.rglob("*.incomplete"))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (lambda hub: hub.fail("*", 429), r"asked too often from here \(429\); wait some minutes, or give a token in HF_TOKEN"),
        (lambda hub: hub.fail("GET *cdn*", 500), r"a\.jsonl\.zst of dataset org/pile@main: the hub has a fault of its own \(500\)"),
        (lambda hub: hub.fail("*", 403), r"the hub refuses access \(403\)"),
        (lambda hub: hub.fail("*", 418), r"the hub answers with status 418"),
        (lambda hub: hub.remove("dataset", "org/pile"), "the hub has no such repository, or it is private; check the name"),
        (lambda hub: hub.disable("dataset", "org/pile"), "the hub has disabled this repository"),
        (lambda hub: hub.gate("dataset", "org/pile"), "it is gated; accept its terms on its page"),
        (lambda hub: hub.corrupt("GET *a.jsonl.zst"), r"it arrives damaged \(.* differs from the hub's SHA-256\)"),
        (lambda hub: hub.corrupt("GET *README.md"), r"README\.md of .*it arrives damaged \(.* differs from the hub's git hash\)"),
        (lambda hub: hub.shorten("GET *a.jsonl.zst"), r"it arrives incomplete"),
        (lambda hub: hub.cut("GET *a.jsonl.zst", 1000, reset=True), "the hub cannot be reached"),
        (lambda hub: hub.down(), "the hub cannot be reached"),
    ],
    ids=["429", "500", "403", "418", "removed", "disabled", "gated", "wrong bytes", "wrong small file", "short", "reset", "down"],
)
def test_a_fault_that_stays_is_named_with_the_way_out(
    hub: Hub, commit: str, folder: Path, fault: Callable[[Hub], None], words: str
) -> None:
    fault(hub)
    with pytest.raises(Unavailable, match=words):
        get(folder, "data", "README.md")
    found = [path for path in folder.rglob("*") if path.is_symlink()]
    assert all(path.read_bytes() in (*WANTED.values(), b"rows\n") for path in found), "a damaged file was left to be used"


def test_a_revision_and_a_file_that_are_not_there(hub: Hub, commit: str, folder: Path) -> None:
    with pytest.raises(Unavailable, match=r"dataset org/pile@v9: the hub has no such revision of it"):
        get(folder, repository=Repository("dataset", "org/pile", "v9"))
    with pytest.raises(Unavailable, match=r"dataset org/pile@main holds no file like train/\*\.zst; correct the name"):
        get(folder, "train/*.zst")


def test_a_file_that_is_listed_and_not_there(hub: Hub, commit: str, folder: Path) -> None:
    pinned = Repository("dataset", "org/pile", commit)
    listing(pinned, folder)
    del hub.repos["dataset", "org/pile"].commits[commit]["data/a.jsonl.zst"]
    with pytest.raises(Unavailable, match=r"data/a\.jsonl\.zst of dataset org/pile@.*: the hub has no such file in it; check the path"):
        get(folder, repository=pinned)


def test_a_token_is_used_and_never_said(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.tokens.add("hf_mine_secret")
    hub.add("dataset", "org/pile", FILES, private_token="hf_mine_secret")  # noqa: S106 - a made-up one
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_secret")
    with pytest.raises(Unavailable, match=r"the hub does not accept the token \(401\); correct or remove HF_TOKEN") as refused:
        get(folder)
    monkeypatch.setenv("HF_TOKEN", "hf_mine_secret")
    assert contents(get(folder)) == WANTED
    said = str(refused.value) + "".join(capsys.readouterr())
    assert "secret" not in said + "".join(path.read_text(errors="replace") for path in folder.rglob("*.json"))


def test_the_wait_that_the_hub_asks_for_is_granted_within_bounds(hub: Hub, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    waits: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", waits.append)
    hub.add("dataset", "org/pile", FILES)
    hub.fail("GET *api*", 429, retry_after=100_000)
    with pytest.raises(Unavailable):
        get(folder)
    assert waits == [patience.LONGEST_WAIT] * 2


def test_a_damaged_file_is_fetched_again(hub: Hub, commit: str, folder: Path) -> None:
    path = get(folder).paths["data/a.jsonl.zst"]
    for harmed in (ROWS[:-1] + b"?", ROWS[:-1]):
        path.resolve().write_bytes(harmed)
        assert contents(get(folder)) == WANTED


def test_a_disk_without_room_is_refused_before_the_fetch(hub: Hub, commit: str, folder: Path, free: Callable[[float], None]) -> None:
    free(1e-6)
    with pytest.raises(InputError, match=r"hub: 0\.0 GB free, 0\.0 GB are to be fetched; make room or set paths\.cache"):
        get(folder)
    assert not [request for request in hub.requests if request.path.startswith("/cdn")]


def test_a_request_to_stop_ends_the_fetch_and_the_next_start_sweeps(hub: Hub, commit: str, folder: Path) -> None:
    stop = Stop()
    hub.hang("GET *cdn*", 0.5, times=1, after_bytes=3000)
    stop.reason = "the test says so"
    with pytest.raises(StoppedInTime):
        fetch(PILE, ("data",), folder, stop)
    left = folder / "datasets--org--pile/blobs/0123.0a1b2c3d.incomplete"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.touch()
    assert contents(get(folder)) == WANTED and not left.exists()


def test_a_long_fetch_shows_how_far_it_is(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub_module, "LARGE", 1 << 20)
    hub.add("dataset", "org/pile", {"big.jsonl.zst": bytes(3 << 20)})
    get(folder, "big.jsonl.zst")
    assert "fetch big.jsonl.zst (MB): " in capsys.readouterr().out


def test_listing_without_asking_needs_one_that_was_stored(hub: Hub, commit: str, folder: Path) -> None:
    with pytest.raises(Unavailable, match=r"was not fetched before; fetch it where there is a network: bash run_all\.sh --local --to 0"):
        listing(PILE, folder, ask=False)
    listing(PILE, folder)
    assert listing(PILE, folder, ask=False).commit == commit
    (stored,) = (folder / "listings").iterdir()
    stored.write_text("{")
    with pytest.raises(Unavailable):
        listing(PILE, folder, ask=False)


def test_wanted_is_what_the_configuration_names() -> None:
    data = {"train": ["hf://datasets/a/b@refs%2Fpr%2F4/x/*.zst", "hf://datasets/a/b@refs%2Fpr%2F4/y.zst"], "validation": ["here.jsonl"]}
    files = json.dumps(data | {"test": ["hf://datasets/c/d/test.jsonl"]})
    model = "model={source: pretrained, name: o/m, scratch: null}"
    config = load(TINY, ["data.source=files", "data.embedded=null", f"data.files={files}", model])
    assert hub_module.wanted(config) == [
        (Repository("model", "o/m"), hub_module.MODEL_FILES),
        (Repository("dataset", "a/b", "refs/pr/4"), ("x/*.zst", "y.zst")),
        (Repository("dataset", "c/d"), ("test.jsonl",)),
    ]


def test_a_cache_of_the_users_own_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HF_HOME", raising=False)
    assert hub_module.root(tmp_path) == tmp_path / "hub"
    code = "import sys; from pathlib import Path; from utils.run.hub import root; print(root(Path('unused')))"
    mine = {"HF_HOME": str(tmp_path / "mine"), "PATH": ""}
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=mine, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == str(tmp_path / "mine/hub")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "theirs"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "theirs"))
    assert hub_module.root(tmp_path) == tmp_path / "theirs"


def test_what_arrives_may_be_renamed_while_it_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "a.incomplete").write_bytes(bytes(7))
    assert hub_module._arriving(tmp_path) == 7
    (tmp_path / "b.incomplete").symlink_to(tmp_path / "gone")
    assert hub_module._arriving(tmp_path) == 0
