"""Calls that could run what a file or a user says, found in the syntax tree of the sources."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.fake_stages import ROOT

PROGRAM = ("configs", "stages", "utils", "verify_local.py", "verify_downloads.py")
MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "dbm"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
CALLS = {"os.system", "os.popen", "tempfile.mktemp", "torch.hub.load", "pd.read_pickle", "runpy.run_path"}
OBJECTS = {"all_gather_object", "broadcast_object_list", "scatter_object_list", "gather_object"}
LOADERS = {"_Loader", "yaml.SafeLoader"}
ALLOWED = {  # pickles of torch's own, between the processes of one job; nothing is read from a disk
    "utils/training/checkpoint.py: calls dist.all_gather_object",
    "utils/training/distributed.py: calls dist.broadcast_object_list",
}


def unsafe(source: str) -> Iterator[tuple[int, str]]:
    """(line, what is wrong)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from ((node.lineno, f"imports {name}") for name in names if name.split(".")[0] in MODULES)
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, fault) for fault in _of_call(node))


def _of_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    named = {each.arg: each.value for each in node.keywords}
    last = name.rsplit(".", 1)[-1]
    if name in CALLS | BUILTINS or last in OBJECTS:
        yield f"calls {name}"
    if name == "torch.load" and not _is(named.get("weights_only"), True):
        yield "torch.load without weights_only=True"
    loaders = LOADERS.intersection(map(ast.unparse, (*node.args, *named.values())))
    if name in ("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load") and not loaders:
        yield f"{name} without a safe loader"
    if name == "np.load" and not _is(named.get("allow_pickle"), False):
        yield "np.load without allow_pickle=False"
    if not _is(named.get("shell"), False) and "shell" in named:
        yield f"{name} with shell={ast.unparse(named['shell'])}"
    if last == "from_pretrained" and not _is(named.get("trust_remote_code"), False) and "Auto" in name:
        yield f"{name} without trust_remote_code=False"
    if "trust_remote_code" in named and not _is(named["trust_remote_code"], False):
        yield f"{name} with trust_remote_code={ast.unparse(named['trust_remote_code'])}"
    if name == "Environment" and not _is(named.get("autoescape"), True):
        yield "a template without autoescape=True"


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def sources() -> list[Path]:
    """Every Python file of the program."""
    listed = subprocess.run(["git", "ls-files", *PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.splitlines() if name.endswith(".py")]


def scanned(path: Path) -> list[str]:
    """`line: what is wrong` of one file, without what is allowed there."""
    place = path.relative_to(ROOT).as_posix()
    found = unsafe(path.read_text(encoding="utf-8"))
    return [f"line {line}: {fault}" for line, fault in found if f"{place}: {fault}" not in ALLOWED]
