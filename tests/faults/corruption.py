"""Every file of a finished and of half-finished runs damaged in every way, and then read: noticed and named, or without consequence."""

from __future__ import annotations

import ctypes
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.presets import load
from configs.schema import Experiment
from stages.pipeline import stages
from tests.fake_stages import TINY
from tests.faults.crash import HANGS, Bench, End, made, undisturbed
from tests.faults.outcome import Outcome
from tests.killing import differing, finish, place, start, upto, waited
from utils.run.artifacts import remove
from utils.run.stage import Stage

AMOUNT = 600
FOLLOWED = 0.1  # share of the refusals whose advice is followed to the end
ADVICE = re.compile(r"\[stage (\d).*?(?:run stage (\d) \([^)]*\) again with )?--discard", re.DOTALL)
DAMAGE: dict[str, Callable[[Path, random.Random], object]] = {}


def way(damage: Callable[[Path, random.Random], object]) -> Callable[[Path, random.Random], object]:
    DAMAGE[damage.__name__.replace("_", " ")] = damage
    return damage


@way
def truncated(path: Path, chance: random.Random) -> None:
    os.truncate(path, path.stat().st_size // 2)


@way
def emptied(path: Path, chance: random.Random) -> None:
    os.truncate(path, 0)


@way
def one_bit(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


@way
def a_folder(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.mkdir()


@way
def a_dangling_link(path: Path, chance: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere" / path.name)


@way
def unreadable(path: Path, chance: random.Random) -> None:
    path.chmod(0)


class Rights(ctypes.Structure):
    """Of a process, linux/capability.h: the version, the process, and twice effective, permitted and inheritable bits."""

    _fields_ = [("head", ctypes.c_uint32 * 2), ("bits", ctypes.c_uint32 * 6)]

    OVERRIDE, VERSION = 0b110, 0x20080522  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH; version 3


def like_anybody() -> None:
    """From now on file modes hold for this process, although it is root."""
    libc, rights = ctypes.CDLL(None), Rights((Rights.VERSION, 0))
    head, bits = ctypes.byref(rights, 0), ctypes.byref(rights, Rights.bits.offset)
    libc.capget(head, bits)
    rights.bits[0] &= ~Rights.OVERRIDE
    libc.capset(head, bits)


@dataclass(frozen=True)
class Site:
    """A run to be damaged: `tree`, complete up to `stage`, which `begun` or is complete too. `extent`: the files that are its own."""

    name: str
    tree: Path
    stage: int
    begun: bool
    extent: tuple[str, ...]

    def files(self) -> list[Path]:
        found = [path.relative_to(self.tree) for pattern in self.extent for path in self.tree.glob(pattern) if path.is_file()]
        return sorted(path for path in found if not path.name.startswith(".tmp-"))


@dataclass(frozen=True)
class Fault:
    site: Site
    file: Path
    damage: str

    def __str__(self) -> str:
        return f"{self.site.name}: {self.file} {self.damage}"


class Trial:
    """Tries faults on copies of their sites; `finished` is what must come out."""

    def __init__(self, config: Experiment, finished: Path, folder: Path) -> None:
        self.config, self.finished, self.root, self.output = config, finished, folder / "damaged", folder / "said"

    def tried(self, fault: Fault, chance: random.Random) -> Outcome:
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.copytree(fault.site.tree, self.root)
        victim, reader = self.root / fault.file, chance.choice(self._readers(fault))
        whole = victim.read_bytes()
        DAMAGE[fault.damage](victim, chance)
        code, said = self._run([reader])
        named = f"{fault} (read by stage {reader})"
        if "Traceback" in said or code not in (0, 1, 2):
            return Outcome(named, False, f"ended with {code}: {said[-3000:]}")
        last = max(reader, fault.site.stage) if fault.site.begun else len(stages()) - 1
        if code == 0:
            wrong = self._wrong(last)
            return Outcome(named, not wrong, f"a wrong result without a word: {wrong}" if wrong else "the right result")
        if str(victim) not in said:
            return Outcome(named, False, f"refused without naming the file: {said[-1500:]}")
        advised = ADVICE.search(said)
        if followed := advised is not None and chance.random() < FOLLOWED:
            code, said = self._run([int(advised[2] or advised[1])], discard=True)
        else:
            remove(victim)
            victim.write_bytes(whole)
        code, said = self._run(range(last + 1))
        wrong = f"ended with {code}: {said[-1500:]}" if code else self._wrong(last, aside=followed)
        word = "refused, and its advice followed" if followed else "refused, and the file put back"
        return Outcome(named, not wrong, f"{word}: {wrong}" if wrong else word)

    def _readers(self, fault: Fault) -> list[int]:
        """The stage itself, and after it those that read what it has written."""
        own = stages()[fault.site.stage]
        later = [] if fault.site.begun else [stage.number for stage in stages() if set(stage.reads) & self._artefacts(own, fault.file)]
        return [own.number, *later]

    def _artefacts(self, stage: Stage, file: Path) -> set[str]:
        """The artefact that a file belongs to; a mark of the stage belongs to all."""
        inside = file.as_posix().partition(f"{stage.label}/")[2]
        if inside == "manifest.json":
            return set(stage.writes)
        return {name for name, path in stage.writes.items() if inside == path or inside.startswith(f"{path}/")}

    def _run(self, numbers: Sequence[int], discard: bool = False) -> tuple[int, str]:
        def prepare() -> None:
            place(self.root)
            like_anybody()

        self.output.write_text("")
        code = waited(start(self.config, numbers, self.output, prepare, discard), HANGS)
        return code, self.output.read_text()

    def _wrong(self, stage: int, aside: bool = False) -> str:
        """What differs from an undisturbed run; folders that --discard has moved aside do not count."""
        for folder in list(self.root.rglob("*.20*T*")) if aside else ():
            remove(folder)
        return ", ".join(differing(undisturbed(self.finished, stage)[0], made(self.root))[:5])


def sites(config: Experiment, finished: Path, folder: Path, numbers: Sequence[int]) -> Iterator[Site]:
    """The finished run, the cache alone, and each stage half done and nearly done."""
    for number in numbers:
        own = "project/*/tiny/**/*" if number == 7 else f"scratch/foundation_llm_work/**/{stages()[number].label}/**/*"
        yield Site(f"finished, stage {number}", finished, number, False, (own,))
        bench = Bench(config, finished, folder)
        count = len(bench.operations(number))
        for share in (0.6, 0.85):
            tree = folder / f"begun_{number}_{share}"
            upto(finished, number, bench.root)
            bench.died(number, End(int(share * count)))
            bench.root.rename(tree)
            extent = (own, "scratch/foundation_llm_cache/**/*") if number == 0 else (own,)
            yield Site(f"stage {number} killed after {share:.0%}", tree, number, True, extent)
    if 0 in numbers:
        cache = folder / "cache_alone"
        shutil.copytree(finished / "scratch/foundation_llm_cache", cache / "scratch/foundation_llm_cache")
        yield Site("cache", cache, 0, True, ("scratch/foundation_llm_cache/**/*",))


def planned(found: Sequence[Site], amount: int, chance: random.Random) -> list[Fault]:
    """Every file in turn, in ways that change from turn to turn, until there are enough."""
    files = [(site, file) for site in found for file in site.files()]
    chance.shuffle(files)
    ways = list(DAMAGE)
    turns = ((site, file, ways[(place + turn) % len(ways)]) for turn in range(len(ways)) for place, (site, file) in enumerate(files))
    return [Fault(*each) for each, _ in zip(turns, range(amount), strict=False)]


def campaign(folder: Path, amount: int, seed: int) -> Iterator[Outcome]:
    config, chance, finished = load(TINY), random.Random(seed), folder / "finished"
    finish(config, finished)
    found = list(sites(config, finished, folder, range(len(stages()))))
    trial = Trial(config, finished, folder)
    for fault in planned(found, amount, chance):
        yield trial.tried(fault, chance)
