"""Inputs that are nearly right: valid ones with a few values changed, and with a few bytes changed. Drawn by hypothesis.

What an input made the project do is told back (`learn`): one that ran a line which none before it ran is changed further itself.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from typing import Any, Literal

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

Kind = Literal["json", "lines", "yaml", "bytes"]
HOSTILE: list[Any] = [
    None, True, -1, 0, 2**31, 2**63, 2**64, 10**400, -(10**400), 1.5, 1e308, -0.0, float("nan"), float("inf"), "", "a" * 100_000,
    "\0", "\n", "\ud800", "\u202e", "\x1b[2J", "²", "../../../../etc/passwd", "/etc/passwd", "$(touch CANARY)", "`touch CANARY`",
    "'; touch CANARY #", "%s%n", "{0.__class__}", "=cmd|' /C calc'!A0", "<script>", "!!python/object/apply:os.system [true]",
    [], {}, [[]], {"": ""}, [0] * 10_000,
]  # fmt: skip
BYTES = [
    b"\0",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\n",
    b"{",
    b"}",
    b"[" * 3000,
    b'"',
    b"\\u0000",
    b"9" * 5000,
    b"1e999",
    b"NaN",
    b"&a *a",
    b": ",
]
values = st.one_of(
    st.sampled_from(HOSTILE),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.recursive(
        st.none() | st.integers(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
)


class Corpus:
    """Inputs of one kind to start from; those that led somewhere new are added."""

    def __init__(self, kind: Kind, first: Iterable[bytes]) -> None:
        self.kind, self.inputs = kind, list(first)
        self.seen: set[str] = set()

    def learn(self, given: bytes, lines: frozenset[str]) -> None:
        if lines - self.seen and len(given) < 200_000:
            self.seen |= lines
            self.inputs.append(given)

    def drawn(self, count: int, seed: int) -> list[bytes]:
        """So many changed inputs."""
        found: list[bytes] = []

        @seeded(seed)
        @settings(max_examples=count, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
        @given(st.data())
        def draw(data: st.DataObject) -> None:
            base = self.inputs[data.draw(st.integers(0, 1 << 20)) % len(self.inputs)]
            changes: list[Callable[[bytes, st.DataObject], bytes]] = (
                [self._changed, self._changed, _cut] if self.kind != "bytes" else [_cut]
            )
            for _ in range(data.draw(st.integers(1, 3))):
                base = data.draw(st.sampled_from(changes))(base, data)
            found.append(base)

        draw()
        return found

    def _changed(self, base: bytes, data: st.DataObject) -> bytes:
        """One node of the tree replaced, removed, renamed, doubled or put deeper."""
        try:
            tree = self._tree(base)
        except (ValueError, RecursionError, yaml.YAMLError, KeyError, AttributeError):
            return _cut(base, data)
        places = list(_places(tree))
        if not places:
            return self._text(data.draw(values))
        parent, key = places[data.draw(st.integers(0, 1 << 20)) % len(places)]
        match data.draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "deeper", "double"])):
            case "replace":
                parent[key] = data.draw(values)
            case "remove":
                del parent[key]
            case "rename" if isinstance(parent, dict):
                parent[data.draw(st.text(max_size=5))] = parent.pop(key)
            case "deeper":
                for _ in range(data.draw(st.sampled_from([1, 30, 500]))):
                    parent[key] = [parent[key]]
            case _ if isinstance(parent, list):
                parent.append(parent[key])
        return self._text(tree)

    def _tree(self, base: bytes) -> Any:
        if self.kind == "yaml":
            return yaml.safe_load(base)
        return [json.loads(line) for line in base.splitlines()] if self.kind == "lines" else json.loads(base)

    def _text(self, tree: Any) -> bytes:
        try:
            if self.kind == "lines" and isinstance(tree, list):
                return "".join(json.dumps(row) + "\n" for row in tree).encode()
            return json.dumps(tree).encode()  # YAML reads it too
        except (ValueError, RecursionError, TypeError):
            return b"[" * 5000


def _places(tree: Any) -> Iterable[tuple[Any, Any]]:
    """(list or section, key) of every node but the root, without recursion: a tree may be deep."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (dict, list)):
            for key in node if isinstance(node, dict) else range(len(node)):
                yield node, key
                waiting.append(node[key])


def _cut(base: bytes, data: st.DataObject) -> bytes:
    """Some bytes flipped, left out, put in, doubled, or all behind a place lost."""
    chance = random.Random(data.draw(st.integers(0, 1 << 30)))
    place = chance.randrange(len(base) + 1)
    end = min(len(base), place + chance.choice((1, 1, 4, 100)))
    change = chance.choice(("flip", "remove", "insert", "double", "truncate", "empty"))
    if change == "flip":
        return base[:place] + bytes(byte ^ 1 << chance.randrange(8) for byte in base[place:end]) + base[end:]
    if change == "insert":
        return base[:place] + chance.choice(BYTES) + base[place:]
    middle = {"remove": b"", "double": base[place:end] * 2}
    return (
        base[:place] + middle[change] + base[end:] if change in middle else base[: place if change == "truncate" else chance.randrange(2)]
    )
