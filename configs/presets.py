"""Load a YAML preset (`extends:` one other), apply `key=value` overrides, and name the nearest key on a typo.

Experiments lie in this folder, descriptions of sites in clusters/.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from configs.cluster import Cluster
from configs.schema import Experiment

PRESETS = Path(__file__).parent
CLUSTERS = PRESETS / "clusters"
LONGEST = 1 << 20  # bytes of a file
DEEPEST = 20  # sections and lists within each other
SHOWN, LINES = 200, 20  # characters of a value, and mistakes, that a refusal repeats
Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that is refused: the message names key, value, expectation and the next step."""


class _Loader(yaml.SafeLoader):
    """Plain YAML: it reads 1e-3 as a number, leaves dates as text, and refuses a key given twice, aliases, of which some lines can
    stand for gigabytes, tags and depths that no configuration has."""

    depth = 0

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own way to be configured
        first: [(tag, form) for tag, form in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent) or tag is not None or self.depth >= DEEPEST:
            found = f"the tag {tag}" if tag else f"more than {DEEPEST} levels" if self.depth >= DEEPEST else f"the alias *{event.anchor}"
            raise yaml.composer.ComposerError(None, None, f"found {found}; write the value out plainly", event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            counts = Counter(self.construct_object(key, deep=True) for key, _ in node.value)
            words = f"key {counts.most_common(1)[0][0]!r} is given twice in one section; keep one of them"
            raise yaml.constructor.ConstructorError(None, None, words, node.start_mark)
        return mapping


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
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"configuration {name!r} is refused: {error}; write plain sections, numbers and text") from None


def _locate(name: str, folder: Path) -> Path:
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    with suppress(OSError):  # a name that is too long, or a folder that may not be entered
        if path.is_file():
            return path
    near = difflib.get_close_matches(name[:SHOWN], preset_names(folder), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    what = "preset" if folder == PRESETS else "cluster"
    raise ConfigError(
        f"no {what} {_shown(name)}: found no file {_shown(str(path))[1:-1]}{hint} Shipped {what}s: {', '.join(preset_names(folder))}"
    )


def _read(path: Path, folder: Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    if len(below) > DEEPEST:
        raise ConfigError(f"{path}: more than {DEEPEST} files extend each other; write fewer")
    if path.resolve() in below:
        raise ConfigError(f"{path}: extends itself, by way of {', '.join(map(str, below))}; remove one `extends:`")
    try:
        if (size := path.stat().st_size) > LONGEST:
            raise ConfigError(f"{path}: found {size} bytes, expected a configuration of at most {LONGEST}; name another file")
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    tree = _parsed(text, f"{path}: not readable as YAML")
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: found {type(tree).__name__}, expected sections with keys")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends: found {parent!r}, expected the name or the file of one preset")
    beside = str(path.parent / parent) if parent.endswith((".yaml", ".yml")) else parent
    try:
        found = _locate(beside, folder)
    except ConfigError as error:
        raise ConfigError(f"{path}: extends: {error}") from None
    return _merge(_read(found, folder, (*below, path.resolve())), tree)


def _parsed(text: str, refusal: str) -> Any:
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError) as error:  # a number of thousands of digits, or of none
        raise ConfigError(f"{refusal}: {error}") from None


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
        raise ConfigError(f"--set {_shown(override)}: expected section.key=value, for example training.steps=100")
    *sections, last = key.strip().split(".")
    if len(sections) > DEEPEST:
        raise ConfigError(f"--set {_shown(override)}: found {len(sections)} sections within each other, expected section.key=value")
    node = tree
    for section in sections:
        below = node.setdefault(section, {})
        if not isinstance(below, dict):
            below = node[section] = {}
        node = below
    node[last] = _parsed(text, f"--set {_shown(override)}: the value is not valid YAML")


def _explain(name: str, error: ValidationError, model: type[BaseModel]) -> str:
    """One line for each mistake: key, found, expected, and the nearest valid key on a typo."""
    lines, issues = [f"configuration {name!r} is refused:"], error.errors()
    for issue in issues[:LINES]:
        place = [str(part) for part in issue["loc"]]
        key = _shown(".".join(place))[1:-1] or "(whole configuration)"
        if issue["type"] == "extra_forbidden":
            lines.append(f"  {key}: unknown key{_nearest(place, model)}")
        elif issue["type"] == "missing":
            lines.append(f"  {key}: missing; add it to the preset or give --set {key}=...")
        else:
            found = "" if isinstance(issue["input"], dict) else f"found {_shown(issue['input'])}, "
            lines.append(f"  {key}: {found}expected: {issue['msg'].removeprefix('Value error, ')[: 4 * SHOWN]}")
    return "\n".join([*lines, *([f"  and {len(issues) - LINES} more"] if len(issues) > LINES else [])])


def _shown(value: Any) -> str:
    """A value as Python writes it, control characters spelt out, cut if it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _nearest(place: list[str], model: type[BaseModel]) -> str:
    fields = _fields(place[:-1], model)
    near = difflib.get_close_matches(place[-1][:SHOWN], fields, n=1)
    return f"; did you mean {'.'.join([*place[:-1], near[0]])!r}?" if near else f"; valid keys: {', '.join(fields)}"


def _fields(place: list[str], model: type[BaseModel]) -> list[str]:
    for part in place:
        annotation = model.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    return list(model.model_fields)
