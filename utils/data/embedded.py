"""Text that every machine has: docstrings (prose) and sources (code) of installed Python packages."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import metadata
from pathlib import Path

from configs.schema import Embedded
from utils.run.errors import InputError

SKIPPED = {"tests", "test", "testing", "site-packages", "dist-packages", "__pycache__", "_vendor", "vendor", "idlelib", "lib2to3"}
SHORTEST = 60  # characters; shorter pieces say nothing


@dataclass(frozen=True)
class Document:
    module: str
    subset: str  # prose or code
    text: str


def package_versions(packages: tuple[str, ...]) -> dict[str, str]:
    return {name: ".".join(map(str, sys.version_info[:3])) if name == "stdlib" else _version(name) for name in packages}


def _version(name: str) -> str:
    distributions = _distributions().get(name)
    if not distributions:
        raise InputError(f"data.embedded.packages: {name!r} is not an installed package; install it or take it off the list")
    return metadata.version(distributions[0])


@cache
def _distributions() -> Mapping[str, list[str]]:
    """{package: what it was installed by}; it takes a look at every installed file."""
    return metadata.packages_distributions()


@lru_cache(maxsize=2)
def documents(source: Embedded) -> tuple[Document, ...]:
    """Documents of both subsets, in the order of a hash of their modules, so that every cut of the list mixes the packages.

    Every package and subset gets an equal share of `source.characters`. A docstring or a top-level definition that stands in
    several modules is taken once: packages repeat themselves much.
    """
    share = source.characters // (2 * len(source.packages))
    seen: set[bytes] = set()
    taken = [document for package in source.packages for document in _harvest(package, share, source.document_characters, seen)]
    return tuple(sorted(taken, key=lambda document: _place(document.module)))


def _harvest(package: str, share: int, longest: int, seen: set[bytes]) -> Iterator[Document]:
    room = {"prose": share, "code": share}
    for module, path in _modules(package):
        if max(room.values()) <= 0:
            return
        for subset, pieces in _pieces(path).items():
            for text in _joined([piece for piece in pieces if _new(piece, seen)], longest):
                if room[subset] > 0:
                    room[subset] -= len(text)
                    yield Document(module, subset, text)


def _place(module: str) -> bytes:
    return hashlib.blake2b(module.encode(), digest_size=8, person=b"order").digest()


def _modules(package: str) -> list[tuple[str, Path]]:
    found = [(f"{package}/{path.relative_to(root).as_posix()}", path) for root, path in _sources(package)]
    return sorted(found, key=lambda item: _place(item[0]))


def _sources(package: str) -> Iterator[tuple[Path, Path]]:
    if package == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
    else:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise InputError(f"data.embedded.packages: {package!r} is a single module, expected a package; take it off the list")
        root = Path(next(iter(spec.submodule_search_locations)))
    for path in root.rglob("*.py"):
        if not SKIPPED.intersection(path.relative_to(root).parts):
            yield root, path


def _pieces(path: Path) -> dict[str, list[str]]:
    """Docstrings, and top-level code with its docstrings taken out."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return {"prose": [], "code": []}
    holders = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
    strings = [node.body[0] for node in holders if _has_docstring(node)]
    prose = [inspect.cleandoc(text) for node in strings if isinstance(text := node.value.value, str)]  # type: ignore[attr-defined]
    hidden = {line for node in strings for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    lines = source.splitlines()
    code = []
    for node in tree.body:
        kept = [lines[number - 1] for number in range(node.lineno, (node.end_lineno or node.lineno) + 1) if number not in hidden]
        code.append("\n".join(kept))
    return {"prose": prose, "code": code}


def _has_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    first = node.body[0] if node.body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


def _new(piece: str, seen: set[bytes]) -> bool:
    """Whether the piece is long enough and stands nowhere else yet, white space apart."""
    if len(piece) < SHORTEST:
        return False
    key = hashlib.blake2b(re.sub(r"\s+", " ", piece).encode(errors="replace"), digest_size=16).digest()
    if key in seen:
        return False
    seen.add(key)
    return True


def _joined(pieces: list[str], longest: int) -> Iterator[str]:
    """Join the pieces of one module, and cut at line ends into texts of at most `longest` characters."""
    lines = "\n\n".join(pieces).splitlines(keepends=True)
    text = ""
    for line in lines:
        if text and len(text) + len(line) > longest:
            yield text
            text = ""
        text += line[:longest]
    if len(text) >= SHORTEST:
        yield text
