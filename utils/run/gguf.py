"""Where a GGUF file is: a path, or inside an installed Python package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from utils.run.errors import InputError


def gguf_file(name: str) -> Path:
    """The file that model.name means with model.source=gguf. Raises InputError if it is not there, or nothing here can read it."""
    if lacking := [package for package in ("gguf", "accelerate") if find_spec(package) is None]:
        raise InputError(f"model.source='gguf' needs packages that are not installed: pip install {' '.join(lacking)}")
    if Path(name).is_file():
        return Path(name)
    package, _, file = name.partition("/")
    try:
        spec = find_spec(package) if package.isidentifier() else None
    except ValueError:  # a loaded module that no file describes
        spec = None
    for folder in (spec and spec.submodule_search_locations) or ():
        if (found := Path(folder) / file).is_file():
            return found
    raise InputError(
        f"model.name={name!r}: found no such file, expected a GGUF file, or PACKAGE/FILE of an installed package; correct the path"
        + (f", or pip install {package.replace('_', '-')}" if package.isidentifier() and spec is None else "")
    )
