"""The scorer against the referee and plain forwards of transformers, its gradient against fp64, candidates against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests import architectures
from tests.tiny_models import VOCABULARY, blind_model, random_ids, random_model, slow_nll
from utils.attacks import edits as planning
from utils.attacks.referee import Referee
from utils.attacks.scoring import Scorer, allowed_tokens, first_order_candidates, in_format
from utils.data.attack_texts import Alphabet
from utils.models import attention

SCORED = 6
EXACT = {"rtol": 0.0, "atol": 2e-5}  # nats, between the engine in fp32 and the referee


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return random_model()


@pytest.fixture
def scorer(model: PreTrainedModel) -> Scorer:
    return Scorer(model, "fp32")


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return random_ids(5, 14)


@pytest.mark.parametrize("scored", [1, SCORED, 14])
def test_nll_equals_the_plain_forward_of_each_text(scorer: Scorer, model: PreTrainedModel, ids: Tensor, scored: int) -> None:
    assert scorer.nll(ids, scored).tolist() == pytest.approx([slow_nll(model, row, scored) for row in ids.tolist()], rel=1e-5)


def test_token_nll_is_the_loss_of_each_single_token(scorer: Scorer, model: PreTrainedModel, ids: Tensor) -> None:
    losses = scorer.token_nll(ids, SCORED)
    for row, text in enumerate(ids.tolist()):
        expected = [slow_nll(model, text[: len(text) - back], 1) for back in reversed(range(SCORED))]
        assert losses[row].tolist() == pytest.approx(expected, rel=1e-4)


def some_edits(texts: Tensor, count: int, width: int, scored: int, vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """which (count,), places and tokens (count, width): distinct places before the scored tokens, behind the first token."""
    random = torch.Generator().manual_seed(seed)
    places = torch.stack([torch.randperm(texts.shape[1] - scored - 1, generator=random)[:width] + 1 for _ in range(count)])
    which = torch.randint(len(texts), (count,), generator=random)
    return which, places, torch.randint(1, vocabulary, (count, width), generator=random)


def written(texts: Tensor, which: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
    copies = texts[which]
    for row, (where, what) in enumerate(zip(places.tolist(), tokens.tolist(), strict=True)):
        for place, token in zip(where, what, strict=True):
            copies[row, place] = token
    return copies


@pytest.mark.parametrize("least_prefix", [1, 8, 1000])
@pytest.mark.parametrize("kind", [*architectures.PLAIN, *architectures.GATED])
def test_edits_score_as_the_referee_says(kind: str, least_prefix: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the beginning of the texts reused wherever possible, sometimes, and never; in passes of one and of many places."""
    monkeypatch.setattr(planning, "LEAST_PREFIX", least_prefix)
    monkeypatch.setattr(planning, "ENOUGH", 60)
    model = architectures.architecture(kind)
    texts = torch.randint(1, architectures.VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))
    edits = some_edits(texts, 40, 2, SCORED, architectures.VOCABULARY)
    engine = Scorer(model, "fp32")
    expected = Referee(model).nll(written(texts, *edits), SCORED)
    torch.testing.assert_close(engine.edited_nll(texts, *edits, SCORED), expected, **EXACT)
    assert (engine.work.cached_rows == 0) == (least_prefix == 1000)
    engine.gradient(texts, SCORED, slice(1, 18))
    torch.testing.assert_close(engine.edited_nll(texts, *edits, SCORED), expected, **EXACT)


@pytest.mark.parametrize("kind", ["gpt_neox", "llama"])
def test_the_beginning_comes_from_the_gradient_of_the_same_texts_only(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "LEAST_PREFIX", 2)
    model = architectures.architecture(kind)
    engine, referee = Scorer(model, "fp32"), Referee(model)
    texts = torch.randint(1, architectures.VOCABULARY, (2, 50), generator=torch.Generator().manual_seed(2))
    other = texts.clone()
    other[:, 3] = (other[:, 3] + 1) % architectures.VOCABULARY
    edits = some_edits(texts, 20, 1, SCORED, architectures.VOCABULARY)
    engine.gradient(texts, SCORED, slice(1, 44))
    begun = []
    for each in (texts, other):
        before = engine.work
        torch.testing.assert_close(engine.edited_nll(each, *edits, SCORED), referee.nll(written(each, *edits), SCORED), **EXACT)
        work = engine.work - before
        begun.append(work.forward_rows + work.cached_rows - 20 * 49)
    first = int(edits[1].max())
    assert begun == [0, 2 * min(first, 49 - SCORED)]


def test_equal_edits_are_scored_once(scorer: Scorer, ids: Tensor) -> None:
    which, places, tokens = some_edits(ids, 6, 1, SCORED, VOCABULARY)
    twice = [torch.cat([part, part.flip(0)]) for part in (which, places, tokens)]
    once = scorer.edited_nll(ids, which, places, tokens, SCORED)
    assert scorer.work.forwards == 6
    assert torch.equal(scorer.edited_nll(ids, *twice, SCORED), torch.cat([once, once.flip(0)]))
    assert scorer.work.forwards == 12


def test_no_edit_gives_no_loss(scorer: Scorer, ids: Tensor) -> None:
    none = torch.zeros(0, 1, dtype=torch.int64)
    assert scorer.edited_nll(ids, none[:, 0], none, none, SCORED).shape == (0,)


def test_an_edit_of_a_scored_token_is_scored_as_written(
    scorer: Scorer, model: PreTrainedModel, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "LEAST_PREFIX", 1)
    edits = torch.tensor([1, 2, 0]), torch.tensor([[12], [14], [9]]), torch.tensor([[5], [9], [2]])
    expected = Referee(model).nll(written(ids, *edits), SCORED)
    torch.testing.assert_close(scorer.edited_nll(ids, *edits, SCORED), expected, **EXACT)


@pytest.mark.parametrize("rows", [1, 30, 45])
def test_results_do_not_depend_on_the_budget(scorer: Scorer, ids: Tensor, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "LEAST_PREFIX", 3)
    edits = some_edits(ids, 30, 2, SCORED, VOCABULARY)
    whole = scorer.nll(ids, SCORED), scorer.edited_nll(ids, *edits, SCORED), scorer.gradient(ids, SCORED, slice(1, 9))
    scorer.budget.rows = rows
    parts = scorer.nll(ids, SCORED), scorer.edited_nll(ids, *edits, SCORED), scorer.gradient(ids, SCORED, slice(1, 9))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_memory_that_runs_out_makes_passes_smaller(scorer: Scorer, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that holds 50 rows: the same losses, nothing charged twice, and the second call knows from the start."""
    monkeypatch.setattr(planning, "LEAST_PREFIX", 3)
    edits = some_edits(ids, 30, 1, SCORED, VOCABULARY)
    scorer.gradient(ids, SCORED, slice(1, 2))
    expected, before = scorer.edited_nll(ids, *edits, SCORED), scorer.work
    real, failed = scorer._body, []

    def small(embedded: Tensor, cache: object) -> Tensor:
        if embedded.shape[0] * embedded.shape[1] > 50:
            failed.append(embedded.shape)
            raise torch.OutOfMemoryError
        return real(embedded, cache)  # type: ignore[arg-type]

    monkeypatch.setattr(scorer, "_body", small)
    torch.testing.assert_close(scorer.edited_nll(ids, *edits, SCORED), expected, **EXACT)
    assert failed
    assert scorer.budget.rows <= 50
    assert (scorer.work - before).forwards == before.forwards
    failed.clear()
    scorer.nll(ids, SCORED)
    assert not failed
    with pytest.raises(torch.OutOfMemoryError):
        scorer.nll(random_ids(1, 60), SCORED)


@pytest.mark.parametrize("least_prefix", [3, 10**6])
def test_memory_that_suffices_for_nothing_is_an_error_not_a_loop(
    least_prefix: int, scorer: Scorer, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "LEAST_PREFIX", least_prefix)
    tries = 0

    def none(*given: object) -> Tensor:
        nonlocal tries
        tries += 1
        assert tries < 1000, "it goes on for ever"
        raise torch.OutOfMemoryError

    monkeypatch.setattr(scorer, "_body", none)
    with pytest.raises(torch.OutOfMemoryError):
        scorer.edited_nll(ids, *some_edits(ids, 30, 1, SCORED, VOCABULARY), SCORED)


def test_losses_in_bf16_are_near_and_in_fp32(model: PreTrainedModel, scorer: Scorer, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    rough = Scorer(model, "bf16")
    exact = scorer.nll(ids, SCORED)
    assert rough.nll(ids, SCORED).dtype == torch.float32
    torch.testing.assert_close(rough.nll(ids, SCORED), exact, rtol=0.0, atol=0.03)
    assert not torch.equal(rough.nll(ids, SCORED), exact)
    monkeypatch.setattr(planning, "LEAST_PREFIX", 3)
    edits = some_edits(ids, 30, 1, SCORED, VOCABULARY)
    torch.testing.assert_close(rough.edited_nll(ids, *edits, SCORED), scorer.edited_nll(ids, *edits, SCORED), rtol=0.0, atol=0.03)
    slopes = rough.gradient(ids, SCORED, slice(1, 9)), scorer.gradient(ids, SCORED, slice(1, 9))
    assert slopes[0].dtype == torch.float32
    assert float(torch.cosine_similarity(*(slope.flatten() for slope in slopes), dim=0)) > 0.99


def test_the_model_itself_stays_fp32(model: PreTrainedModel) -> None:
    """Angles of rotary positions stay fp32 in the copy too: bf16 counts only to 256."""
    rough = Scorer(model, "bf16")
    assert rough.model is model
    assert model.dtype == torch.float32
    assert {parameter.dtype for parameter in rough.network.parameters()} == {torch.bfloat16}
    assert rough.network.gpt_neox.rotary_emb.inv_freq.dtype == torch.float32
    assert in_format(model, torch.float32) is model


def test_tied_embeddings_stay_tied() -> None:
    tied = architectures.architecture("gpt2", tie_word_embeddings=True)
    copy = in_format(tied, torch.bfloat16)
    assert copy.get_output_embeddings().weight is copy.get_input_embeddings().weight


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "gemma"])
def test_gradient_equals_that_of_fp64(kind: str) -> None:
    """Of the plain model's logits; Gemma scales its embeddings on the way in."""
    model = architectures.architecture(kind)
    texts = torch.randint(1, architectures.VOCABULARY, (2, 15), generator=torch.Generator().manual_seed(3))
    slope = Scorer(model, "fp32").gradient(texts, SCORED, slice(1, 9))
    plain = architectures.architecture(kind).double()
    embedded = plain.get_input_embeddings()(texts).detach().requires_grad_(True)
    logits = plain(inputs_embeds=embedded).logits[:, -SCORED - 1 : -1]
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), texts[:, -SCORED:], reduction="none").mean(dim=1).sum()
    expected = torch.autograd.grad(loss, embedded)[0][:, 1:9]
    torch.testing.assert_close(slope.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt_neox", "gemma"])
def test_gradient_foretells_a_small_step(kind: str) -> None:
    """Along the difference of two rows of `embeddings`, which the first-order gain is computed with."""
    model = architectures.architecture(kind)
    scorer = Scorer(model, "fp32")
    texts = torch.randint(1, architectures.VOCABULARY, (1, 15), generator=torch.Generator().manual_seed(4))
    slope = scorer.gradient(texts, SCORED, slice(3, 4))[0, 0]
    plain = architectures.architecture(kind).double()
    change = (scorer.embeddings[7] - scorer.embeddings[int(texts[0, 3])]).double()

    @torch.no_grad()
    def loss(step: float) -> float:
        embedded = plain.get_input_embeddings()(texts).clone()
        embedded[0, 3] += step * change
        logits = plain(inputs_embeds=embedded).logits[:, -SCORED - 1 : -1]
        return float(torch.nn.functional.cross_entropy(logits.transpose(1, 2), texts[:, -SCORED:]))

    assert float(slope.double() @ change) == pytest.approx((loss(1e-3) - loss(-1e-3)) / 2e-3, rel=5e-3)


def test_gradient_of_a_text_does_not_depend_on_its_neighbours(scorer: Scorer, ids: Tensor) -> None:
    together = scorer.gradient(ids, SCORED, slice(1, 9))
    for row in range(len(ids)):
        torch.testing.assert_close(scorer.gradient(ids[row : row + 1], SCORED, slice(1, 9))[0], together[row], rtol=1e-4, atol=1e-6)


def test_tokens_before_an_edit_lose_nothing(scorer: Scorer, ids: Tensor) -> None:
    """A causal model: exactly zero, not nearly. After the edit there is an effect."""
    for place in (3, 7, 10):
        edited = ids.clone()
        edited[:, place] = (edited[:, place] + 1) % VOCABULARY
        before, after = scorer.token_nll(ids, 14), scorer.token_nll(edited, 14)
        assert torch.equal(before[:, : place - 1], after[:, : place - 1])  # column t is the loss of token t + 1
        assert bool((before[:, place:] != after[:, place:]).any(dim=1).all())


def test_a_blind_model_feels_an_edit_only_where_it_is(ids: Tensor) -> None:
    """Its edit shows in the edited token's own loss and in the next one's; everything else is exactly equal."""
    scorer = Scorer(blind_model(), "fp32")
    edited = ids.clone()
    edited[:, 6] = (edited[:, 6] + 1) % VOCABULARY
    changed = scorer.token_nll(ids, 14) != scorer.token_nll(edited, 14)
    assert changed.any(dim=0).nonzero().flatten().tolist() == [5, 6]
    assert float(scorer.gradient(ids, SCORED, slice(1, 8)).abs().max()) == 0.0


def slow_candidates(scorer: Scorer, slope: Tensor, current: Tensor, allowed: Tensor, count: int) -> list[tuple[float, int, int]]:
    gains = [
        (float(slope[place] @ (scorer.embeddings[token] - scorer.embeddings[int(current[place])])), place, token)
        for place in range(len(current))
        for token in range(VOCABULARY)
        if bool(allowed[place, token]) and token != int(current[place])
    ]
    return sorted(gains, reverse=True)[:count]


@pytest.mark.parametrize("count", [1, 7, 60])
def test_candidates_are_the_best_of_all_substitutions(scorer: Scorer, ids: Tensor, count: int) -> None:
    slope = scorer.gradient(ids[:1], SCORED, slice(1, 9))[0]
    allowed = torch.rand(8, VOCABULARY, generator=torch.Generator().manual_seed(1)) < 0.7
    current = ids[0, 1:9]
    found = first_order_candidates(scorer, slope, current, allowed, count).tolist()
    assert found == [[place, token] for _, place, token in slow_candidates(scorer, slope, current, allowed, count)]


def test_fewer_candidates_than_asked_for(scorer: Scorer) -> None:
    """The current token and what is not allowed are never proposed; a plain (V,) mask holds for all places."""
    slope, current = torch.ones(2, 16), torch.tensor([3, 9])
    allowed = torch.zeros(VOCABULARY, dtype=torch.bool)
    assert first_order_candidates(scorer, slope, current, allowed, 5).shape == (0, 2)
    allowed[[3, 4]] = True
    found = {tuple(pair) for pair in first_order_candidates(scorer, slope, current, allowed, 5).tolist()}
    assert found == {(0, 4), (1, 3), (1, 4)}


def test_special_tokens_are_not_allowed() -> None:
    mask = allowed_tokens(8, Alphabet(0, 6, (0, 3)).writable(), torch.device("cpu"))
    assert mask.tolist() == [False, True, True, False, True, True, False, False]  # the model has two rows without a token


def test_work_is_counted(scorer: Scorer, ids: Tensor) -> None:
    scorer.nll(ids, SCORED)
    scorer.token_nll(ids[:2], SCORED)
    scorer.gradient(ids[:3], SCORED, slice(1, 3))
    assert (scorer.forwards, scorer.backwards) == (scorer.work.forwards, scorer.work.backwards) == (7, 3)
    assert (scorer.work.forward_rows, scorer.work.backward_rows, scorer.work.scored_rows) == (10 * 14, 3 * 14, 10 * SCORED)
    body, unembedding = scorer.prices.body, scorer.prices.unembedding
    assert scorer.work.flops == (7 + 3 * 3) * (14 * body + SCORED * unembedding)
    assert len(scorer.by_text) == 3


def test_work_of_edits_is_what_the_blocks_saw(model: PreTrainedModel, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows counted by a hook on a block; texts' shares add up; a text without edits costs its beginning only."""
    monkeypatch.setattr(planning, "LEAST_PREFIX", 3)
    monkeypatch.setattr(planning, "ENOUGH", 20)
    scorer, rows = Scorer(model, "fp32"), []
    hook = model.gpt_neox.layers[1].register_forward_hook(lambda module, args, output: rows.append(args[0].shape[0] * args[0].shape[1]))
    which, places, tokens = some_edits(ids, 30, 1, SCORED, VOCABULARY)
    scorer.edited_nll(ids, which.clamp(max=3), places, tokens, SCORED)
    hook.remove()
    assert scorer.work.forward_rows == sum(rows)
    total = scorer.by_text[0]
    for part in scorer.by_text[1:]:
        total += part
    assert total == scorer.work
    assert scorer.work.cached_rows > 0
    assert scorer.by_text[4].forwards == scorer.by_text[4].scored_rows == 0


def test_weights_get_no_gradient(scorer: Scorer, model: PreTrainedModel, ids: Tensor) -> None:
    scorer.gradient(ids, SCORED, slice(1, 3))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())


def test_attention_builds_no_mask_for_whole_texts(monkeypatch: pytest.MonkeyPatch, scorer: Scorer, ids: Tensor) -> None:
    """So that a GPU takes its fast kernels; behind a prefix the mask is a name for them, not a matrix."""
    monkeypatch.setattr(planning, "LEAST_PREFIX", 3)
    monkeypatch.setattr(planning, "ENOUGH", 1)
    masks: list[Tensor | None] = []
    real = attention.sdpa_attention_forward
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *args, **options: masks.append(args[4]) or real(*args, **options))
    scorer.nll(ids, SCORED)
    assert masks == [None] * 2
    scorer.edited_nll(ids, *some_edits(ids, 9, 1, SCORED, VOCABULARY), SCORED)
    assert {type(mask).__name__ for mask in masks} == {"NoneType", "CausalBias"}


def test_the_model_attends_as_before_afterwards(scorer: Scorer, model: PreTrainedModel, ids: Tensor) -> None:
    before = model.config._attn_implementation
    scorer.nll(ids, SCORED)
    assert model.config._attn_implementation == before
