"""The whole experiment on hostile text, with tokens in the environment and a lax umask: what it leaves, and what it says."""

from __future__ import annotations

import csv
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from tests.faults.outcome import Outcome
from tests.faults.texts import WORDS, experiment

TOKEN = "hf_CANARYtokenTHATnobodyMAYwrite"  # noqa: S105 - nobody's
FORMULAS = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(1)"]
SUBSETS = [
    *FORMULAS,
    "\\input{/etc/passwd}",
    "100%",
    "$x^2$",
    "</script><script>alert(1)</script>",
    "a_b & c # d ~ {e}",
    '" onmouseover="alert(1)',
]


def whole_run(folder: Path) -> Iterator[Outcome]:
    """The tiny experiment on hostile subsets and texts."""
    (folder / "text").mkdir()
    for split in ("train", "validation", "test"):
        rows = [
            {
                "text": f"{number} {split} <script>alert({number})</script> \u202e\x1b[31m =cmd() & " + " ".join(WORDS * 4),
                "meta": {"pile_set_name": SUBSETS[number % len(SUBSETS)]},
            }
            for number in range(400)
        ]
        (folder / "text" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: [str(folder / "text" / f"{split}.jsonl")] for split in ("train", "validation", "test")}
    (folder / "temporary").mkdir()
    secrets = dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY"), TOKEN)
    before = os.umask(0)
    try:
        done = experiment(folder, {"data.files": json.dumps(files)}, 7, TMPDIR=str(folder / "temporary"), **secrets)
    finally:
        os.umask(before)
    yield Outcome("a run on hostile text", done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-300:]}")
    yield from examined(folder, done.stdout + done.stderr)


def examined(folder: Path, said: str) -> Iterator[Outcome]:
    """What a run has left in `folder`, and said."""
    written = [path for top in ("scratch", "project") for path in (folder / top).rglob("*")]
    open_to_all = [str(path) for path in written if not path.is_symlink() and path.stat().st_mode & stat.S_IWOTH]
    yield Outcome(
        f"umask 000: {len(written)} files and folders",
        bool(written) and not open_to_all,
        ", ".join(open_to_all[:3]) or "none is open to all",
    )
    telling = [str(path) for path in written if path.is_file() and TOKEN.encode() in path.read_bytes()]
    yield Outcome("tokens in the environment", not telling and TOKEN not in said, ", ".join(telling[:3]) or "written nowhere, never said")
    left = [path.name for path in (folder / "temporary").iterdir()]
    yield Outcome("temporary files", not left, ", ".join(left) or "none left")
    final = folder / "project" / "foundation_llm_final_results" / "tiny"
    yield from report_faults(final)


def report_faults(final: Path) -> Iterator[Outcome]:
    """Whether anything in report, tables and summary could run or be taken for a formula, a command or a control of the terminal."""
    page = (final / "report.html").read_text(encoding="utf-8")
    found = [word for word in ("<script>alert", 'onmouseover="alert', "\u202e", "\x1b") if word in page]
    yield Outcome("report.html", page.count("<script") == 1 and not found, f"{page.count('<script')} scripts, {found}")
    for table in sorted((final / "tables").glob("*.csv")):
        with table.open(encoding="utf-8", newline="") as handle:
            cells = [cell for row in csv.reader(handle) for cell in row]
        live = [cell for cell in cells if cell.startswith(("=", "+", "-", "@")) and not _is_number(cell)]
        yield Outcome(table.name, not live, ", ".join(live[:3]) or "no formula")
    for table in sorted((final / "tables").glob("*.tex")):
        text = table.read_text(encoding="utf-8")
        live = re.findall(r"\\input|(?<!\\)%|(?<!\\)\$|(?<!\\)#", text)
        yield Outcome(table.name, not live, ", ".join(live[:3]) or "no command")
    hidden = [each for each in (final / "experiment_summary.txt").read_text(encoding="utf-8") if not each.isprintable() and each != "\n"]
    yield Outcome("experiment_summary.txt", not hidden, f"{len(hidden)} characters that control a terminal")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
