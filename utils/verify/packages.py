"""The packages that jobs/environment.sh names: there, new enough, importable. This file needs nothing but Python itself."""

from __future__ import annotations

import importlib
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

from utils.run.checks import Finding
from utils.run.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / "jobs" / "environment.sh"
PROJECT = ROOT / "pyproject.toml"
MODULES = {"PyYAML": "yaml", "pytest-xdist": "xdist", "Jinja2": "jinja2"}  # other packages are imported under their own name


def packages() -> Finding:
    """Every needed package at its least version or a newer one. All are imported, and the other checks too: breakage shows only then."""
    if sys.version_info[:2] < (least := _pair(_first(r'requires-python = ">=(.+)"', PROJECT))):
        return "no", f"this Python is {platform.python_version()}, expected {least[0]}.{least[1]} or newer"
    wanted = needed()
    faults = [fault for name, version in wanted.items() if (fault := _fault(name, version))]
    if faults:
        return "no", "; ".join(faults)
    importlib.import_module("utils.verify.local")
    return "ok", f"{len(wanted)} packages, Python {platform.python_version()}"


def needed() -> dict[str, str]:
    """{package: least version}."""
    return dict(requirement.split(">=") for requirement in _first(r'^needed="([^"]+)"', ENVIRONMENT).split())


def _fault(name: str, least: str) -> str | None:
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is not installed, expected {least} or newer"
    if _pair(found) < _pair(least):
        return f"{name} is {found}, expected {least} or newer"
    try:
        importlib.import_module(MODULES.get(name, name.replace("-", "_")))
    except Exception as error:  # whatever a library does when one of its own is missing
        return f"{name} {found} cannot be imported ({type(error).__name__}: {error})"
    return None


def _pair(version: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    first, second, *_ = (*re.findall(r"\d+", version), "0")
    return int(first), int(second)


def _first(pattern: str, path: Path) -> str:
    found = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    if not found:
        raise InputError(f"{path}: found no line {pattern}, expected what the project needs")
    return found[1]
