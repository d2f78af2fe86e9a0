"""Models on disk: plain transformers loads them, only safetensors are read, master weights are fp32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from configs.schema import Compute, Experiment, Model, Monotone
from tests.builders import non_negative_start, small_model
from utils.models.constraints import Constraint
from utils.models.convert import convert
from utils.models.ffn import feed_forward
from utils.models.loading import (
    as_teacher,
    autocast,
    compute_dtype,
    device_of,
    fetch_pretrained,
    load_model,
    plain_state,
    product_dtype,
    save_model,
    scratch_model,
)
from utils.run.artifacts import published
from utils.run.errors import InputError
from utils.run.preemption import Stop

IDS = torch.arange(40).reshape(2, 20)
WEIGHT = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


def as_published(folder: Path) -> tuple[PreTrainedModel, str]:
    return fetch_pretrained(Model(source="pretrained", name=str(folder)), folder, Stop())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(small_model(), tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, **changed: Tensor | None) -> None:
    """Replace tensors of the stored weights (None leaves one out)."""
    state = load_file(folder / "model.safetensors") | changed
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("tied", [False, True])
def test_plain_transformers_gives_the_same_logits(tmp_path: Path, tied: bool) -> None:
    model = small_model(tied=tied)
    save_model(model, tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True)
    assert torch.equal(logits(plain.eval()), logits(model))
    assert {path.suffix for path in (tmp_path / "model").iterdir()} == {".json", ".safetensors"}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["architectures"] == ["GPTNeoXForCausalLM"]
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert ("embed_out.weight" in stored) is not tied  # the published name; transformers itself calls it lm_head
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) is tied


@pytest.mark.parametrize("tied", [False, True])
def test_a_softplus_model_is_stored_as_the_weights_that_run(tmp_path: Path, tied: bool) -> None:
    model, spec = small_model(tied=tied), Monotone(parametrisation="softplus", scope="mlp_in_attn_out")
    non_negative_start(model, spec)
    Constraint(model, spec)
    save_model(model, tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True)
    assert torch.equal(logits(plain.eval()), logits(model))
    assert set(plain_state(model)) == set(small_model(tied=tied).state_dict())


def test_a_converted_model_keeps_its_activation(tmp_path: Path) -> None:
    for name in ("relu", "clamped_gelu"):
        model, _, _ = convert(small_model(), Monotone.model_validate({"activation": name}), IDS)
        save_model(model, tmp_path / name)
        assert torch.equal(logits(load_model(tmp_path / name)), logits(model))
        assert json.loads((tmp_path / name / "config.json").read_text())["hidden_act"] == name


def test_saving_replaces_the_folder_and_leaves_nothing_aside(folder: Path) -> None:
    (folder / "old.txt").write_text("old")
    save_model(small_model(seed=1), folder)
    assert torch.equal(logits(load_model(folder)), logits(small_model(seed=1)))
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert not (folder / "old.txt").exists()


def test_masters_are_fp32_and_ready_to_evaluate_whatever_is_stored(folder: Path) -> None:
    save_model(small_model().to(torch.bfloat16), folder)
    assert load_file(folder / "model.safetensors")[WEIGHT].dtype == torch.bfloat16
    for model in (load_model(folder), as_published(folder)[0]):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert not model.training


def test_autocast_changes_products_and_no_parameter() -> None:
    model = small_model()
    with autocast(torch.device("cpu"), "bf16"):
        assert logits(model).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), "fp32"):
        assert torch.equal(logits(model), logits(small_model()))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert compute_dtype(Compute(precision="bf16")) == torch.bfloat16
    assert compute_dtype(Compute(precision="fp32")) == torch.float32


def test_a_pickle_is_never_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(small_model().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"model: expected a model folder with config\.json and safetensors weights: .*model\.safetensors"):
        load_model(folder)
    with pytest.raises(InputError, match="cannot be loaded as a causal LM with safetensors weights"):
        as_published(folder)


def break_truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_truncated, "incomplete metadata"),
        (lambda folder: rewrite(folder, **{WEIGHT: None}), rf"the weights lack {WEIGHT} \(1 in all\)"),
        (lambda folder: rewrite(folder, **{WEIGHT: torch.ones(2, 2)}), "mismatched"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "zork"}'), "zork"),
    ],
)
def test_a_damaged_folder_is_refused_and_not_filled_with_random_weights(folder: Path, damage: object, words: str) -> None:
    damage(folder)
    with pytest.raises(InputError, match=rf"(?s)model: expected a model folder with config\.json and safetensors weights: .*{words}"):
        load_model(folder)
    with pytest.raises(
        InputError, match=r"model\.name='.*model', revision 'main': cannot be loaded .*Name another model, or give a local folder"
    ):
        as_published(folder)


def test_a_folder_that_is_not_there_is_named(folder: Path) -> None:
    shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"model: expected a model folder"):
        load_model(folder)
    with pytest.raises(InputError, match=r"model\.name='.*model': found no such folder; expected a folder with a model, or OWNER/NAME"):
        as_published(folder)


def test_a_local_folder_is_a_published_model(folder: Path) -> None:
    model, commit = as_published(folder)
    assert commit == "local"
    assert torch.equal(logits(model), logits(small_model()))


def test_a_writer_error_is_the_operating_system_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, published(tmp_path / "model") as aside:
        save_file({"a": torch.ones(2)}, aside / "missing" / "a.safetensors")
    assert caught.value.filename == str(tmp_path / "model")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_teacher_computes_what_autocast_computes(precision: str, tied: bool) -> None:
    """Its linear maps are stored in the format of the products, everything else in fp32: not a bit differs."""
    model, teacher = small_model(tied=tied), as_teacher(small_model(tied=tied), precision)
    with torch.no_grad(), autocast(model.device, precision):
        assert torch.equal(model(IDS).logits, teacher(IDS).logits)
    assert teacher.gpt_neox.layers[0].mlp.dense_h_to_4h.weight.dtype == product_dtype(precision)
    assert teacher.get_input_embeddings().weight.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_an_untrained_model_depends_on_its_seed_alone(tiny: Experiment) -> None:
    shape = tiny.model.scratch
    assert shape is not None
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = scratch_model(shape, 7)
    assert torch.equal(torch.rand(3), expected)  # the caller's random state is untouched
    torch.manual_seed(6)
    again, other = scratch_model(shape, 7), scratch_model(shape.model_copy(update={"seed": 1}), 7)
    weight = first.state_dict()[WEIGHT]
    assert torch.equal(weight, again.state_dict()[WEIGHT])
    assert not torch.equal(weight, other.state_dict()[WEIGHT])
    assert weight.shape == (shape.intermediate, shape.hidden) and len(feed_forward(first)) == shape.layers
    assert (first.config.vocab_size, first.config.eos_token_id, first.config.bos_token_id) == (shape.vocabulary, 7, 7)


def test_the_device_and_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(Compute(device="auto", threads=3)) == torch.device("cpu")
    assert device_of(Compute(device="cpu", threads=0)) == torch.device("cpu")
    assert set_to == [3]
    with pytest.raises(InputError, match=r"compute\.device: found no usable GPU, expected one for 'cuda'.*set compute\.device=cpu"):
        device_of(Compute(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of(Compute(device="auto")) == device_of(Compute(device="cuda")) == torch.device("cuda")
    assert device_of(Compute(device="cpu")) == torch.device("cpu")
