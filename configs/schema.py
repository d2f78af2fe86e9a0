"""The configuration of an experiment: one frozen model per concern, unknown keys refused, units in every description."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0, lt=2**63)]  # what a 64-bit number holds
Count = Annotated[int, Field(ge=0, lt=2**63)]
Line = Annotated[str, Field(pattern=r"^\P{Cc}+$")]  # no control characters: it is printed, and may name a file
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, lt=1)]
Switch = BeforeValidator(lambda given: {True: "on", False: "off"}[given] if isinstance(given, bool) else given)  # YAML reads on, off so


# what huggingface_hub's file system calls a path; a slash in a revision (refs/pr/4) is written %2F
HUB_ENTRY = re.compile(r"hf://datasets/(?P<name>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[^/@]+))?/(?P<path>[^/].*)")


class Section(BaseModel):
    """A part of the configuration: immutable, strict about types, without unknown keys, infinity or NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Paths(Section):
    """Where a run lives. `null` takes the default, which honours $SCRATCH and $PROJECT."""

    work: Path | None = Field(None, description="folder of the runs; default ${SCRATCH:-runs}/foundation_llm_work")
    results: Path | None = Field(None, description="folder of the results; default ${PROJECT:-.}/foundation_llm_final_results")
    cache: Path | None = Field(None, description="folder of tokens and models; default ${SCRATCH:-runs}/foundation_llm_cache")


class Compute(Section):
    """How numbers are computed. Master weights are fp32 whatever is chosen here."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes the GPU where there is one")
    precision: Literal["fp32", "bf16"] = Field("bf16", description="format of matrix products (autocast); never of the stored weights")
    compile: Annotated[Literal["auto", "on", "off"], Switch] = Field(
        "auto", description="compile the transformer blocks for training; auto does so on a GPU. The first step then takes up to a minute"
    )
    parallel: Literal["none", "ddp", "fsdp2"] = Field(
        "none",
        description="training on several GPUs: ddp, a whole copy on each; fsdp2, parameters, gradients and moments cut over them",
    )
    processes: Count = Field(0, description="training processes on a node, one a GPU, if parallel; 0 takes all GPUs of the node")
    threads: Count = Field(0, description="CPU threads; 0 takes all cores. Bitwise repeatability on a CPU needs a constant number")


class AttackWorkers(Section):
    """Who does the work of the attacks (stages 5 and 6). No result depends on it, so it is no part of what a folder is held to: it may
    change between two starts of a run."""

    processes: Count = Field(0, description="processes that share the work on a node; 0: one for each GPU, or one where there is none")
    tasks: Positive = Field(
        1,
        description="on a SLURM cluster, tasks of an array that shares the work, before the stage's own job does what is left; 1: no array",
    )


class Scratch(Section):
    """A GPT-NeoX model pretrained at setup, where no pretrained model can be had (or none is wanted)."""

    vocabulary: Positive = Field(description="entries of the byte-level BPE tokenizer, trained at setup")
    hidden: Positive = Field(description="width of the residual stream")
    layers: Positive = Field(description="number of blocks")
    heads: Positive = Field(description="attention heads; divides hidden")
    intermediate: Positive = Field(description="hidden units of one feed-forward sublayer")
    context: Positive = Field(description="longest sequence in tokens")
    steps: Positive = Field(description="optimiser steps of the pretraining")
    batch_size: Positive = Field(description="sequences a step")
    sequence_length: Positive = Field(description="predicted tokens a sequence")
    learning_rate: Rate = Field(description="peak of the cosine schedule")
    seed: Count = Field(0, description="of initialisation and data order; one base serves every seed of a run")
    earlier: tuple[Positive, ...] = Field(
        (), description="steps at which the model is kept, rising, for the attacks' control of equal quality"
    )

    @model_validator(mode="after")
    def _check(self) -> Scratch:
        if self.hidden % self.heads:
            raise ValueError(f"heads={self.heads} does not divide hidden={self.hidden}")
        if self.hidden // self.heads % 8:
            raise ValueError(
                f"hidden/heads={self.hidden // self.heads}, expected a multiple of 8 (a quarter of each head is rotated, in pairs)"
            )
        if list(self.earlier) != sorted({step for step in self.earlier if step < self.steps}):
            raise ValueError(f"earlier={list(self.earlier)}, expected rising steps below steps={self.steps}")
        if self.sequence_length > self.context:
            raise ValueError(f"sequence_length={self.sequence_length} exceeds context={self.context}")
        if self.vocabulary < 257:
            raise ValueError(f"vocabulary={self.vocabulary} is below 257 (256 bytes and the end-of-text token)")
        return self


class Model(Section):
    """The base model."""

    source: Literal["scratch", "pretrained", "gguf"] = Field(
        description="pretrained at setup, a published checkpoint, or a GGUF file, whose weights are unpacked (package gguf)"
    )
    name: Line = Field(
        description="hub name or folder of the checkpoint; for gguf the file, or PACKAGE/FILE if an installed Python package carries it; "
        "for scratch a label"
    )
    revision: Line = Field("main", description="hub revision; setup records the commit it resolved to")
    scratch: Scratch | None = Field(None, description="shape and pretraining, for source=scratch")
    earlier_revisions: tuple[Line, ...] = Field(
        (),
        description="earlier checkpoints of a published model, oldest first. The attacks' control of equal quality is taken from between "
        "them and the base; empty: from the recovery training alone, or left out",
    )

    @model_validator(mode="after")
    def _check(self) -> Model:
        if (self.source == "scratch") != (self.scratch is not None):
            raise ValueError("the section model.scratch is given if and only if model.source is 'scratch'")
        for revision in (self.revision, *self.earlier_revisions):
            if {"", ".", ".."}.intersection(revision.split("/")):
                raise ValueError(f"revision {revision!r} is no branch, tag or commit")
        if self.scratch and self.earlier_revisions:
            raise ValueError(
                f"earlier_revisions={list(self.earlier_revisions)} of a model that is pretrained here; expected scratch.earlier"
            )
        if self.source == "gguf" and self.earlier_revisions:
            raise ValueError(f"earlier_revisions={list(self.earlier_revisions)} of a file, which has none; expected []")
        return self


class Embedded(Section):
    """Text of installed Python packages: docstrings are the subset 'prose', the remaining source is the subset 'code'."""

    packages: tuple[Line, ...] = Field(description="import names; 'stdlib' is the standard library", min_length=1)
    characters: Positive = Field(description="upper bound of the harvested text, over both subsets")
    document_characters: Positive = Field(12_000, description="longest document; a longer one is cut at a line end")


class Files(Section):
    """Files of rows, by split, in the order of reading.

    An entry is a file, a folder, a pattern such as data/*.jsonl.zst, or any of these in a dataset repository of the hub:
    hf://datasets/OWNER/NAME@REVISION/PATH (no @REVISION: main).
    """

    train: tuple[Line, ...] = Field(min_length=1)
    validation: tuple[Line, ...] = Field(min_length=1, description="half of its documents become the attack texts")
    test: tuple[Line, ...] = Field(min_length=1)

    @property
    def named(self) -> tuple[str, ...]:
        return (*self.train, *self.validation, *self.test)

    @model_validator(mode="after")
    def _check(self) -> Files:
        if len(set(self.named)) < len(self.named):
            raise ValueError("a file is named twice; train, validation and test must not share files")
        for entry in self.named:
            if entry.startswith("hf:") and not HUB_ENTRY.fullmatch(entry):
                raise ValueError(f"found {entry!r}, expected hf://datasets/OWNER/NAME@REVISION/PATH")
        return self


class Data(Section):
    """Text: where it is from and how much of it is used."""

    source: Literal["embedded", "files"]
    embedded: Embedded | None = None
    files: Files | None = None
    fallback: Files | None = Field(None, description="read in place of `files` if the hub cannot give those; null: stop instead")
    sequence_length: Positive = Field(description="predicted tokens of one packed training sequence")
    train_tokens: Positive = Field(description="upper bound of the tokens kept for training")
    validation_tokens: Positive = Field(description="upper bound of the tokens of the validation split")
    test_tokens: Positive = Field(description="upper bound of the tokens of the test split")

    @model_validator(mode="after")
    def _check(self) -> Data:
        if (self.source == "embedded") != (self.embedded is not None) or (self.source == "files") != (self.files is not None):
            raise ValueError(f"source={self.source!r} needs the section data.{self.source} and no other")
        if self.fallback and not self.files:
            raise ValueError("fallback stands in for data.files, and there are none")
        for key in ("train_tokens", "validation_tokens"):
            if getattr(self, key) <= self.sequence_length:
                raise ValueError(f"{key}={getattr(self, key)} gives no sequence; expected more than sequence_length={self.sequence_length}")
        return self

    @property
    def longest(self) -> dict[str, int]:
        """{keys: tokens} of the longest sequence that a model reads for this section; so in the others."""
        return {"data.sequence_length": self.sequence_length}


class Monotone(Section):
    """The constraint on the feed-forward sublayers (docs/DETAILS.md). What no combination of keys can mean is refused here, what
    does not fit the model before it is converted."""

    scope: Literal["mlp_in", "mlp_both", "mlp_in_attn_out", "gated_updown", "gated_all"] = Field(
        "mlp_both", description="which matrices are constrained; gated_* for sublayers with a gate (Llama), the others for those without"
    )
    parametrisation: Literal["projected", "softplus", "exp", "abs", "annealed"] = Field(
        "projected",
        description="projected: onto the constraint after each optimiser step; softplus, exp, abs: W is that function of V, with the "
        "order's signs; annealed: projected onto a bound that moves from the pretrained weights to the constraint",
    )
    order: Literal["all_plus", "unit_signs", "balanced", "directions"] = Field(
        "all_plus",
        description="all_plus: W >= 0; unit_signs: a sign for each hidden unit; balanced: also one for each residual coordinate, half of "
        "them minus; directions: along `directions` mean-free directions only",
    )
    directions: Count = Field(0, description="how many, for order=directions; below the width of the residual stream")
    sign_restarts: Positive = Field(64, description="random starts of the sign search of balanced and directions")
    activation: Literal["keep", "relu", "clamped_gelu", "drelu"] = Field(
        "relu", description="keep leaves GELU or SiLU, which is not monotone; drelu: relu(gate) * relu(up), for gated sublayers"
    )
    start: Literal["clamp", "abs", "least_squares", "lift", "base"] = Field(
        description="from the pretrained W: clamp: the nearest W within the constraint, default of projected; abs: |W| with the order's "
        "signs, default of softplus, exp and abs; least_squares: the W within the constraint with the nearest outputs on real inputs; "
        "lift: the same function rewritten; base: W itself, default of annealed and for it alone"
    )
    recentre: bool = Field(True, description="correct the biases so that mean activations equal the base model's (not from start=base)")
    calibration_sequences: Positive = Field(16, description="training sequences for means, least squares and directions")
    layerwise_share: Share = Field(
        0.0,
        description="share of the steps, from the first, in which each sublayer alone imitates the base model's on the base's inputs; the "
        "baseline trains in these steps as in all others",
    )
    anneal_share: Rate = Field(0.4, description="share of the steps until the bound of `annealed` has arrived at the constraint")
    norm_gain: Literal["free", "positive", "fold"] = Field(
        description="gain of the norm in front of each sublayer: free; kept non-negative; or folded into W and frozen at one (default of "
        "directions, whose order is that of the residual stream)"
    )
    margin: Annotated[float, Field(ge=0, le=100)] = Field(
        description="how far inside the constraint directions are kept, in units of the largest error that rounding W to bf16 can cause "
        "(default 1.1 for directions); orders of coordinates survive rounding and take 0"
    )

    @model_validator(mode="before")
    @classmethod
    def _suitable(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        rotated = given.get("order") == "directions"
        start = {"softplus": "abs", "exp": "abs", "abs": "abs", "annealed": "base"}.get(str(given.get("parametrisation")), "clamp")
        return {"start": start, "norm_gain": "fold" if rotated else "free", "margin": 1.1 if rotated else 0.0} | given

    @model_validator(mode="after")
    def _check(self) -> Monotone:
        for refused in self._impossible():
            raise ValueError(refused)
        return self

    def _impossible(self) -> Iterator[str]:
        rotated, smooth = self.order == "directions", self.parametrisation in ("softplus", "exp", "abs")
        if smooth and self.start in ("clamp", "least_squares"):
            why = {"abs": "its gradient is 0 there"}.get(self.parametrisation, "dW/dV is about W")
            yield f"start={self.start!r} freezes every clamped entry under {self.parametrisation} ({why}); expected start='abs' or 'lift'"
        if (self.start == "base") != (self.parametrisation == "annealed"):
            yield (
                f"start={self.start!r} with parametrisation={self.parametrisation!r}; expected start='base' with 'annealed', which moves "
                "from the pretrained weights, and another start with any other"
            )
        if rotated != (self.directions > 0):
            yield f"directions={self.directions} with order={self.order!r}; expected a number above 0 with order='directions', else 0"
        if rotated and smooth:
            yield f"order='directions' with parametrisation={self.parametrisation!r}; expected 'projected' or 'annealed'"
        if self.margin and not rotated:
            yield f"margin={self.margin:g} with order={self.order!r}; expected 0: the signs of entries survive rounding"
        if self.start == "lift" and self.order not in ("all_plus", "unit_signs"):
            yield f"start='lift' with order={self.order!r}, which no rewriting reaches; expected 'all_plus' or 'unit_signs'"
        if self.start == "lift" and self.scope.startswith("gated"):
            yield f"start='lift' with scope={self.scope!r}: RMSNorm removes no mean, so the rewriting would change the function"
        if self.scope == "mlp_in_attn_out" and self.order != "all_plus":
            yield f"scope='mlp_in_attn_out' with order={self.order!r}; expected 'all_plus' (attention's inner coordinates have no order)"
        if self.activation == "drelu" and not self.scope.startswith("gated"):
            yield f"activation='drelu' with scope={self.scope!r}; expected scope='gated_updown' or 'gated_all', or activation='relu'"


class Training(Section):
    """One recovery run; both arms get the same."""

    steps: Positive = Field(description="optimiser steps")
    batch_size: Positive = Field(description="sequences a step, of which each training process takes an equal share")
    micro_batch: Positive | Literal["auto"] = Field(
        "auto",
        description="sequences a forward pass; divides a process's share. auto: on a GPU as many as fit in its memory (measured at "
        "the start), on a CPU as many as have 2048 tokens together",
    )
    recompute: Share | Literal["auto"] = Field(
        "auto",
        description="share of the blocks whose activations are computed again in the backward pass: less memory, up to a third more "
        "time. auto: none where the step fits without, else as few as needed",
    )
    warmup_share: Share = Field(0.1, description="share of the steps with linearly rising learning rate")
    final_share: Share = Field(0.1, description="learning rate at the end of the cosine, as a share of the peak")
    rate_outside_ffn: Share = Field(1.0, description="learning rate of everything but the feed-forward sublayers, as a share of theirs")
    weight_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.01, description="decoupled; on unconstrained matrices only")
    beta2: Rate = Field(0.95, description="second moment's decay of AdamW")
    max_gradient_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="global clipping threshold")
    distillation: Share = Field(0.5, description="weight of KL(base || model) in the loss; the rest is cross-entropy")
    validate_every: Positive = Field(description="steps between validations; each one also saves")
    keep_last: Positive = Field(2, description="complete checkpoints kept beside the best one")
    max_loss_rise: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="nats per token. A step whose loss is so far above the median of the last 64 good ones is skipped (judged from the "
        "20th on); a validation loss so far above the best ends the run",
    )
    max_bad_steps: Positive = Field(10, description="steps skipped in a row (loss not finite, or a spike) that end the run")

    @model_validator(mode="after")
    def _check(self) -> Training:
        if self.micro_batch != "auto" and self.batch_size % self.micro_batch:
            raise ValueError(f"micro_batch={self.micro_batch} does not divide batch_size={self.batch_size}")
        return self

    def unshared(self, processes: int) -> str | None:
        """Why so many processes cannot take equal shares of a step, in words; None if they can."""
        if self.batch_size % processes:
            return (
                f"training.batch_size={self.batch_size} with {processes} training processes; expected a multiple of {processes}, or "
                "another number of them"
            )
        share = self.batch_size // processes
        if self.micro_batch != "auto" and share % self.micro_batch:
            return (
                f"training.micro_batch={self.micro_batch} with {processes} training processes, each of which takes {share} sequences of a "
                f"step; expected a divisor of {share}, auto, or another number of processes"
            )
        return None


class Telemetry(Section):
    """Who watches. No result depends on it, so it is no part of what a folder is held to: it may change between two starts of a run."""

    log_to: Literal["none", "tensorboard", "wandb"] = Field(
        "none", description="where rows of metrics and telemetry are shown beside the files; the package of that name must be installed"
    )

    @model_validator(mode="after")
    def _check(self) -> Telemetry:
        if self.log_to != "none" and find_spec(self.log_to) is None:
            raise ValueError(f"log_to={self.log_to!r} needs a package that is not installed: pip install {self.log_to}; or log_to='none'")
        return self


class Arm(Section):
    """What one arm may set for itself."""

    learning_rate: Rate = Field(description="peak of the schedule")


class Evaluate(Section):
    """Perplexity on the test split: every token scored once, a window sees at least `context - stride` tokens before it."""

    context: Positive = Field(description="window in tokens, the end-of-text prefix included")
    stride: Positive = Field(description="new tokens scored by each further window of a document")
    batch_size: Positive = Field(description="windows a forward pass")
    order_sequences: Positive = Field(16, description="test sequences on which the residual stream is pushed along the order")
    order_push: Annotated[float, Field(gt=0, le=10)] = Field(
        0.1, description="root mean square of the push, as a share of the standard deviation of the residual stream's coordinates"
    )
    order_null_fits: Positive = Field(8, description="probes fitted to shuffled labels")
    precision_windows: Count = Field(32, description="windows that are scored in fp32 too if compute.precision is bf16; 0: none")
    generation_prompts: Count = Field(32, description="beginnings of test documents that every model goes on with, greedily; 0: none")
    benchmarks: tuple[Line, ...] = Field(
        (), description="tasks of the lm-evaluation-harness (package lm_eval), zero-shot: its names, or YAML files of your own"
    )
    benchmark_limit: Count = Field(0, description="at most so many items of each task, the first ones; 0: all")

    @model_validator(mode="after")
    def _check(self) -> Evaluate:
        if self.stride >= self.context:
            raise ValueError(f"stride={self.stride} must be below context={self.context}")
        if len(set(self.benchmarks)) < len(self.benchmarks):
            raise ValueError(f"benchmarks={list(self.benchmarks)} names a task twice")
        if self.benchmarks and find_spec("lm_eval") is None:
            raise ValueError(
                f"benchmarks={list(self.benchmarks)} needs a package that is not installed: pip install 'lm_eval[hf]'; or benchmarks=[]"
            )
        return self

    @property
    def longest(self) -> dict[str, int]:
        return {"evaluate.context": self.context}


class UAT(Section):
    """Universal adversarial trigger, put before the text (Wallace et al. 2019, arXiv 1908.07125)."""

    trigger_length: Positive = Field(description="tokens")
    text_tokens: Positive = Field(description="length of each attacked text, all of it scored")
    search_texts: Positive
    select_texts: Positive = Field(description="texts that choose among the restarts")
    report_texts: Positive = Field(description="texts of the reported numbers")
    candidates: Positive = Field(
        description="first-order candidates raced per position; after a sweep without a gain the next ones in rank are taken"
    )
    sweeps: Positive = Field(description="passes over the positions; all of them are made, so that every search costs the same")
    restarts: Positive = Field(description="searches from different random triggers; one more without gradient is the control")
    gradients: Positive = Field(
        2,
        description="gradients averaged for a position: one at the trigger, the others with random tokens in that position",
    )
    beam: Positive = Field(2, description="triggers kept from position to position")
    race_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5,
        description="successive halving: all candidates are scored on four texts, this share of them on eight, this share of those on "
        "sixteen, and so on up to all search texts; 1 scores all candidates on all texts",
    )
    mode: Literal["ids", "text"] = Field(
        "ids", description="text: only triggers that, in front of every search text, survive decoding and encoding again"
    )
    controls: Positive = Field(4, description="random triggers of the same length")
    seed: Count = Field(0, description="of the attack; separate from the training seed and the same for every model")

    @property
    def longest(self) -> dict[str, int]:
        return {"uat.trigger_length + uat.text_tokens + 1": self.trigger_length + self.text_tokens + 1}


class HotFlip(Section):
    """Greedy exact token flips (Ebrahimi et al. 2018, arXiv 1712.06751), scored on the untouched continuation."""

    texts: Positive
    prefix_tokens: Positive = Field(description="tokens that may be flipped")
    scored_tokens: Positive = Field(description="untouched tokens after the prefix, the only ones scored")
    flips: Positive = Field(description="budget per text")
    candidates: Positive = Field(description="substitutions scored exactly, per flip")
    gradients: Positive = Field(4, description="gradients averaged for a flip: one at the text, the others with random tokens around")
    mode: Literal["ids", "text"] = Field("ids", description="text: only flips whose whole text survives decoding and encoding again")
    longer_texts: Positive = Field(8, description="of the texts the first so many are also attacked with ten times the candidates")
    batch_size: Positive = Field(8, description="texts attacked together")
    random_draws: Positive = Field(4, description="random-flip control: draws per text and number of flips")
    threshold_nats: Annotated[float, Field(gt=0)] = Field(
        0.2857,
        description="success: rise in nats per untouched token, common to all models; 0.2857 = 15 % of Pythia-1.4B's 1.905 on the Pile",
    )
    reference_threshold: Annotated[float, Field(gt=0)] = Field(0.15, description="the reference's criterion: relative rise of the own loss")
    seed: Count = Field(0, description="of the random control; separate from the training seed")

    @model_validator(mode="after")
    def _check(self) -> HotFlip:
        if self.flips > self.prefix_tokens:
            raise ValueError(f"flips={self.flips} exceeds prefix_tokens={self.prefix_tokens}")
        return self

    @property
    def longest(self) -> dict[str, int]:
        return {"hotflip.prefix_tokens + hotflip.scored_tokens + 1": self.prefix_tokens + self.scored_tokens + 1}


class Report(Section):
    """Statistics of the last stage."""

    confidence: Rate = Field(0.95, description="level of the intervals")
    bootstrap_draws: Positive = Field(10_000, description="resamples of documents or texts")
    margin_nats: Annotated[float, Field(gt=0)] = Field(0.0677, description="non-inferiority margin in nats per token; 0.0677 = ln 1.07")
    family: tuple[Literal["worst_case", "noise", "earlier", "hotflip", "success"], ...] = Field(
        ("worst_case", "noise", "earlier", "hotflip", "success"),
        description="secondary comparisons whose p-values Holm's method corrects together: rise of the worst case against the baseline "
        "and against each matched control, rise and success of HotFlip against the baseline. The primary endpoint is the perplexity "
        "ratio monotonic/baseline, always",
    )
    examples: Count = Field(3, description="attacked texts shown for each model, so many of the worst and so many typical ones")


class Experiment(Section):
    """The whole experiment, as resolved from a preset and the overrides."""

    run_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = Field(description="names the run's folders")
    seeds: tuple[Count, ...] = Field((42,), min_length=1, description="training seeds")
    paths: Paths = Paths()
    compute: Compute = Compute()
    model: Model
    data: Data
    monotone: Monotone = Monotone.model_validate({})
    training: Training
    telemetry: Telemetry = Telemetry.model_validate({})
    attack_workers: AttackWorkers = AttackWorkers()
    baseline: Arm
    monotonic: Arm
    evaluate: Evaluate
    uat: UAT
    hotflip: HotFlip
    report: Report = Report()

    @model_validator(mode="after")
    def _check(self) -> Experiment:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} names a seed twice")
        if self.compute.parallel == "fsdp2" and (self.monotone.order != "all_plus" or self.monotone.parametrisation == "annealed"):
            raise ValueError(
                f"compute.parallel='fsdp2' cuts matrices, which monotone.order={self.monotone.order!r} and monotone.parametrisation="
                f"{self.monotone.parametrisation!r} need whole; expected compute.parallel='ddp'"
            )
        if self.compute.parallel != "none" and self.monotone.layerwise_share:
            raise ValueError(
                f"monotone.layerwise_share={self.monotone.layerwise_share:g} with compute.parallel={self.compute.parallel!r}: the "
                "layer-wise warm-up runs in one process; expected 0 or compute.parallel='none'"
            )
        if self.compute.parallel != "none" and self.compute.processes and (fault := self.training.unshared(self.compute.processes)):
            raise ValueError(f"{fault} (compute.processes)")  # on several nodes there are more: the cluster file says how many
        if self.model.scratch:
            self._check_scratch(self.model.scratch)
        return self

    def _check_scratch(self, scratch: Scratch) -> None:
        """What does not suit a model that is pretrained here; of others setup and `convert` find it (utils.models.ffn.check_fits)."""
        for key, tokens in self.longest.items():
            if tokens > scratch.context:
                raise ValueError(f"{key} = {tokens} exceeds model.scratch.context = {scratch.context}")
        if self.monotone.scope.startswith("gated"):
            raise ValueError(
                f"monotone.scope={self.monotone.scope!r} constrains sublayers with a gate, and model.scratch (GPT-NeoX) has none; "
                "expected 'mlp_in', 'mlp_both' or 'mlp_in_attn_out'"
            )
        if self.monotone.directions >= scratch.hidden:
            raise ValueError(f"monotone.directions={self.monotone.directions}, expected fewer than model.scratch.hidden={scratch.hidden}")

    @property
    def longest(self) -> dict[str, int]:
        return self.data.longest | self.evaluate.longest | self.uat.longest | self.hotflip.longest
