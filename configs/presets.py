"""Load a YAML preset (`extends:` one other), apply `key=value` overrides, and name the nearest key on a typo.

Experiments lie in this folder, descriptions of sites in clusters/.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from configs.cluster import Cluster
from configs.schema import Experiment

PRESETS = Path(__file__).parent
CLUSTERS = PRESETS / "clusters"
Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that is refused: the message names key, value, expectation and the next step."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number, leaves dates as text, and refuses a key given twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own way to be configured
        first: [(tag, form) for tag, form in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice in one section; keep one of them", node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def preset_names(folder: Path = PRESETS) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load(preset: str, overrides: Iterable[str] = ()) -> Experiment:
    """Return the experiment of `preset` (a shipped name, or a path ending in .yaml) with `section.key=value` overrides applied.

    Raises ConfigError for anything that is not exactly understood.
    """
    return _loaded(Experiment, preset, PRESETS, overrides)


def load_cluster(name: str) -> Cluster:
    """Return the description of a site (a shipped name, or a path ending in .yaml). Raises ConfigError."""
    return _loaded(Cluster, name, CLUSTERS)


def _loaded(model: type[Model], name: str, folder: Path, overrides: Iterable[str] = ()) -> Model:
    tree = _read(_locate(name, folder), folder)
    for override in overrides:
        _override(tree, override)
    try:
        return model.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise ConfigError(_explain(name, error, model)) from None
    except (TypeError, ValueError) as error:  # binary data, or a section that contains itself
        raise ConfigError(f"configuration {name!r} is refused: {error}; write plain sections, numbers and text") from None


def _locate(name: str, folder: Path) -> Path:
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, preset_names(folder), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        what = "preset" if folder == PRESETS else "cluster"
        raise ConfigError(f"no {what} {name!r}: found no file {path}{hint} Shipped {what}s: {', '.join(preset_names(folder))}")
    return path


def _read(path: Path, folder: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in below:
        raise ConfigError(f"{path}: extends itself, by way of {', '.join(map(str, below))}; remove one `extends:`")
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: found {type(tree).__name__}, expected sections with keys")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends: found {parent!r}, expected the name or the file of one preset")
    beside = str(path.parent / parent) if parent.endswith((".yaml", ".yml")) else parent
    return _merge(_read(_locate(beside, folder), folder, (*below, path.resolve())), tree)


def _merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """Sections merge key by key; anything else in `top` replaces what `base` has."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override!r}: expected section.key=value, for example training.steps=100")
    *sections, last = key.strip().split(".")
    node = tree
    for section in sections:
        below = node.setdefault(section, {})
        if not isinstance(below, dict):
            below = node[section] = {}
        node = below
    try:
        node[last] = yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from None


def _explain(name: str, error: ValidationError, model: type[BaseModel]) -> str:
    """One line for each mistake: key, found, expected, and the nearest valid key on a typo."""
    lines = [f"configuration {name!r} is refused:"]
    for issue in error.errors():
        place = [str(part) for part in issue["loc"]]
        key = ".".join(place) or "(whole configuration)"
        if issue["type"] == "extra_forbidden":
            lines.append(f"  {key}: unknown key{_nearest(place, model)}")
        elif issue["type"] == "missing":
            lines.append(f"  {key}: missing; add it to the preset or give --set {key}=...")
        else:
            found = "" if isinstance(issue["input"], dict) else f"found {issue['input']!r}, "
            lines.append(f"  {key}: {found}expected: {issue['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines)


def _nearest(place: list[str], model: type[BaseModel]) -> str:
    fields = _fields(place[:-1], model)
    near = difflib.get_close_matches(place[-1], fields, n=1)
    return f"; did you mean {'.'.join([*place[:-1], near[0]])!r}?" if near else f"; valid keys: {', '.join(fields)}"


def _fields(place: list[str], model: type[BaseModel]) -> list[str]:
    for part in place:
        annotation = model.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return list(model.model_fields)
