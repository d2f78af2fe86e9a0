"""Who may import whom, read from the source; and that looking at the pipeline does not load torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.fake_stages import ROOT

OWN = ("configs", "stages", "utils")
ALLOWED = {
    "configs": {"configs"},
    "utils": set(),
    "utils.run": {"configs", "utils.run"},
    "utils.data": {"configs", "utils.run", "utils.data"},
    "utils.models": {"configs", "utils.run", "utils.data", "utils.models"},
    "utils.training": {"configs", "utils.run", "utils.data", "utils.models", "utils.training"},
    "utils.evaluation": {"configs", "utils.run", "utils.data", "utils.models", "utils.evaluation"},
    "utils.attacks": {"configs", "utils.run", "utils.data", "utils.models", "utils.statistics", "utils.attacks"},
    "utils.slurm": {"configs", "utils.run", "utils.slurm"},
    "utils.statistics": {"utils.statistics"},
    "utils.report": {"configs", "utils.run", "utils.statistics", "utils.report"},
}
ALLOWED["utils.verify"] = {*ALLOWED, "utils.verify"} - {"utils"}  # it looks at all of them, and none of them at it
FILES = sorted(path.relative_to(ROOT) for top in OWN for path in (ROOT / top).rglob("*.py"))
MODULES = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in FILES}


def imported(source: str) -> Iterator[str]:
    """Modules that a source text imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ([name for name in submodules if name in MODULES] or [node.module])


def room(module: str) -> str:
    """configs, stages or utils.<room>."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "utils" else parts[0]


def test_reader_of_imports_sees_every_form() -> None:
    source = "import a.b\nfrom utils.run import manifest, lock\ndef f():\n    from utils.run.stage import Stage\n    import torch as t"
    assert list(imported(source)) == ["a.b", "utils.run.manifest", "utils.run.lock", "utils.run.stage", "torch"]


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] != "stages"], ids=str)
def test_direction_of_imports(path: str) -> None:
    module = ".".join(path.with_suffix("").parts)  # type: ignore[attr-defined]
    own = {name for name in imported((ROOT / path).read_text(encoding="utf-8")) if name.split(".")[0] in OWN}
    home = room(module.removesuffix(".__init__"))
    assert {room(name) for name in own} <= ALLOWED[home]
    if home in ("utils.run", "utils.models", "utils.report"):
        assert not {name for name in own if room(name) == "configs"} - {"configs.schema"}


def test_stages_never_import_each_other() -> None:
    for path in FILES:
        if path.parts[0] == "stages":
            own = {name for name in imported((ROOT / path).read_text(encoding="utf-8")) if name.split(".")[0] == "stages"}
            assert own <= ({"stages.pipeline", "stages.slurm"} if path.name == "__main__.py" else {"stages.pipeline"}), path


LIGHT = ("configs", "utils.run", "utils.slurm")


@pytest.mark.parametrize("path", [path for path in FILES if room(".".join(path.with_suffix("").parts)) in LIGHT], ids=str)
def test_bookkeeping_names_no_heavy_library(path: str) -> None:
    heavy = {"torch", "transformers", "tokenizers", "safetensors", "numpy", "pandas", "scipy", "matplotlib"}
    assert not {name.split(".")[0] for name in imported((ROOT / path).read_text(encoding="utf-8"))} & heavy


@pytest.mark.parametrize(
    "code", ["import stages.pipeline; stages.pipeline.stages()", "import utils.run.status, utils.run.cache, utils.run.records"]
)
def test_looking_at_the_pipeline_loads_no_torch(code: str) -> None:
    report = f"{code}\nimport sys; print(sorted({{name.split('.')[0] for name in sys.modules}} & {{'torch', 'numpy', 'transformers'}}))"
    result = subprocess.run([sys.executable, "-c", report], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
