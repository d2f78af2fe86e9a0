"""Harvest of text from installed packages, on packages written here and on a real one."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

from configs.schema import Embedded
from utils.data.embedded import documents, package_versions
from utils.run.errors import InputError

FILLER = "a sentence that is long enough to be kept, because sixty characters are the least"
MODULE = f'''"""Module: {FILLER}."""

def add(first, second):
    """Function: {FILLER}."""
    total = first + second  # this line of code stays, with its comment, in the subset of code
    return total
'''


def package(root: Path, name: str, files: dict[str, str]) -> None:
    for file, text in {"__init__.py": "", **files}.items():
        (root / name / file).parent.mkdir(parents=True, exist_ok=True)
        (root / name / file).write_text(text, encoding="utf-8")


def harvest(name: str, characters: int = 100_000, longest: int = 10_000) -> dict[str, list[str]]:
    found = documents(Embedded(packages=(name,), characters=characters, document_characters=longest))
    return {subset: [document.text for document in found if document.subset == subset] for subset in ("prose", "code")}


def test_docstrings_are_prose_and_the_rest_is_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "toy_split", {"one.py": MODULE})
    monkeypatch.syspath_prepend(tmp_path)
    found = harvest("toy_split")
    assert found["prose"] == [f"Module: {FILLER}.\n\nFunction: {FILLER}."]
    assert len(found["code"]) == 1
    assert "total = first + second" in found["code"][0]
    assert FILLER not in found["code"][0]


def test_a_piece_that_several_modules_share_is_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    respaced = MODULE.replace("is long enough", "is  long\n   enough")
    package(tmp_path, "toy_twice", {"one.py": MODULE, "two.py": MODULE, "sub/three.py": respaced})
    monkeypatch.syspath_prepend(tmp_path)
    found = harvest("toy_twice")
    assert [text.count("Function:") for text in found["prose"]] == [1]
    assert [text.count("total =") for text in found["code"]] == [1]


def test_tests_and_files_that_are_no_python_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "toy_skip", {"tests/one.py": MODULE, "broken.py": "def (:\n" + MODULE})
    (tmp_path / "toy_skip" / "latin.py").write_bytes(MODULE.replace("Module", "Mod\xe9l").encode("latin-1"))
    monkeypatch.syspath_prepend(tmp_path)
    assert harvest("toy_skip") == {"prose": [], "code": []}


def test_no_document_is_longer_than_asked_and_none_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "\n".join(f"    value_{number} = {number}" for number in range(300))
    package(tmp_path, "toy_long", {"one.py": f"def many():\n{lines}\n", "two.py": "x = 1\n"})
    monkeypatch.syspath_prepend(tmp_path)
    texts = harvest("toy_long", longest=500)["code"]
    assert len(texts) > 10
    assert all(60 <= len(text) <= 500 for text in texts)
    assert all(f"value_{number} = {number}" in "".join(texts) for number in range(295))


def test_the_share_of_a_package_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"m{number}.py": MODULE.replace("Module", f"Module {number}").replace("add", f"add{number}") for number in range(40)}
    package(tmp_path, "toy_bound", files)
    monkeypatch.syspath_prepend(tmp_path)
    found = harvest("toy_bound", characters=2000)
    longest = max(len(text) for texts in found.values() for text in texts)
    assert all(1000 <= sum(map(len, texts)) < 1000 + longest for texts in found.values())


def test_the_order_in_which_the_disk_lists_files_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "toy_order", {f"m{number}.py": MODULE.replace("Module", f"Module {number}") for number in range(20)})
    monkeypatch.syspath_prepend(tmp_path)
    listed = Path.rglob
    found = []
    for backwards in (False, True):
        monkeypatch.setattr(Path, "rglob", lambda path, pattern, turn=backwards: sorted(listed(path, pattern), reverse=turn))
        documents.cache_clear()
        found.append(harvest("toy_order", characters=2000))
    assert found[0] == found[1]
    assert len(found[0]["prose"]) > 3


def test_a_real_package_gives_its_own_docstrings_in_a_fixed_order() -> None:
    source = Embedded(packages=("pydantic",), characters=40_000, document_characters=600)
    found = documents(source)
    documents.cache_clear()
    assert documents(source) == found
    assert {document.subset for document in found} == {"prose", "code"}
    spec = importlib.util.find_spec("pydantic")
    assert spec is not None and spec.origin is not None
    for document in [document for document in found if document.subset == "prose"][:10]:
        path = Path(spec.origin).parent / document.module.removeprefix("pydantic/")
        holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        strings = "\n".join(ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, holders))
        assert all(line in strings for line in document.text.splitlines())


def test_the_standard_library_is_a_source() -> None:
    found = documents(Embedded(packages=("stdlib",), characters=4000, document_characters=600))
    assert sum(len(document.text) for document in found) >= 4000
    assert all(document.module.startswith("stdlib/") for document in found)
    assert package_versions(("stdlib",)) == {"stdlib": ".".join(map(str, sys.version_info[:3]))}


def test_versions_identify_packages_and_unknown_ones_are_refused() -> None:
    import pydantic

    assert package_versions(("pydantic",)) == {"pydantic": pydantic.VERSION}
    with pytest.raises(InputError, match="'no_such_package' is not an installed package; install it or take it off the list"):
        package_versions(("no_such_package",))
    with pytest.raises(InputError, match="'typing_extensions' is a single module, expected a package"):
        documents(Embedded(packages=("typing_extensions",), characters=1000))
