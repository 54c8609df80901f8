"""The recipe of sparse training: one typed config behind flags, a YAML file and Python, as ``config`` is for pruning.

A recipe file is a YAML mapping with the fields of ``TrainConfig``, ``student`` and, as it likes, ``teacher``:

    student: pruned
    teacher: HuggingFaceTB/SmolLM2-135M-Instruct
    pattern: 2:4
    data: [train/openwebtext.jsonl, train/wikipedia.jsonl]
    tokens: 300000
    loss: {alpha: 0.67, temperature: 2}
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from secateur.config import (
    EXPRESSIONS,
    Device,
    Dtype,
    Precision,
    build,
    check_blocks,
    check_expressions,
    chosen_blocks,
)
from secateur.core.allotment import MOST
from secateur.core.losses import Distillation
from secateur.core.pattern import Pattern, make_pattern, tapered, tapered_words
from secateur.core.sparse_adamw import DENSE_UNTIL_FROZEN, Absolute, Decay, MethodName, MetricName, Relative, Schedule

DEFAULT_LOSS = Distillation()
PUBLISHED_SCALES = {"cast": 2}
"""Scales of a row, of the methods whose papers have them."""
LISTS = (*EXPRESSIONS, "data")
"""Fields that are lists in a recipe, or a single one of their items."""


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained sparse, on which text and for how long. ValueError where the fields contradict each other.

    A step sees ``batch`` windows of ``seq_len`` tokens; there are ``tokens // (batch * seq_len)`` steps.
    """

    tokens: int
    """Tokens of training, counted again in every epoch."""
    method: MethodName = "ast"
    """Where the decay of pruned weights enters: ast, ast_g, srste, cast; admm draws dense weights towards sparse ones
    (ELSA); fixed keeps the mask, none prunes nothing."""
    sparsity: float | None = None
    """Share of zeros in [0, 1). Needed by every pattern but N:M, which says it itself."""
    pattern: str = "2:4"
    """Where zeros may lie: unstructured, row, N:M (N kept of every M) or block:RxC; global is unstructured with one
    threshold for all matrices, at most 95 % zeros in each."""
    taper: float = 0.0
    """By how much the sparsity of the last block is above ``sparsity``, and that of the first below it; it rises evenly
    between them (arXiv:2502.14770). Not with N:M or global."""
    metric: MetricName = "magnitude"
    """What a weight is worth when the mask is chosen: magnitude; fisher, its square times the mean squared gradient;
    taylor, it times the first moment; wanda, it times the size of its inputs in the last ten steps or so."""
    data: tuple[str, ...] = ("c4",)
    """Texts, each a name, ``hf:ID[:config][:split][:column]`` or a file; windows of all are shuffled together."""
    seq_len: int = 512
    """Tokens in each window."""
    batch: int = 8
    """Windows of one optimizer step, over all processes."""
    micro_batch: int = 1
    """Windows whose activations exist at one time, in each process. Changes the result by rounding only."""
    holdout: int = 8
    """Windows that are never trained on; the loss on them is measured before and after."""
    seed: int = 0
    """Orders the windows. The same recipe gives the same bytes."""
    lr: float = 2e-4
    """Highest learning rate. See docs/training.md before comparing methods at equal rates."""
    warmup: float = 0.05
    """Share of the steps in which the rate rises from zero."""
    final_lr: float = 0.1
    """Share of ``lr`` to which it falls along a cosine."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of Adam's moments."""
    weight_decay: float = 0.0
    """Decoupled, on every weight."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    decay: float | None = None
    """lambda, the pull of pruned weights to zero (of all to the sparse ones, for admm), as one number for all matrices;
    none measures it with ``c``."""
    c: float = 3.0
    """That pull on a pruned weight of average size, in averaged gradients. Too small lets masks oscillate."""
    refresh: int = 10
    """Steps between two choices of the mask; ELSA has 32."""
    anneal: float = 0.25
    """Share of the steps in which the decay rises from zero."""
    ramp: Literal["linear", "cosine"] = "linear"
    """How it rises."""
    sparsify: float = 0.0
    """Share in which the sparsity rises to the pattern's own; N:M is at once always."""
    freeze: float = 0.8
    """Share after which the mask stays."""
    loss: Distillation = DEFAULT_LOSS
    """What is learnt from the teacher and what from the text."""
    scales: int | None = None
    """Learned scales of every row of a sparse matrix, one for each of so many groups of its inputs; they are multiplied
    into the weights at the end. None takes what the method's paper has: 2 for cast, 0 for others."""
    slorb: int = 0
    """k of a trainable low-rank branch of rank in_features / k beside every sparse linear; 0 = none."""
    slorb_train_X: bool = True
    """Train its projection too; false leaves that the sums over k inputs."""
    slorb_follow: bool = False
    """When a mask moves, what it takes away enters the branch and what comes back leaves it; as published, nothing."""
    lora: int = 0
    """Rank of an adapter for every sparse linear: they alone are trained, under the mask as it is, and merged at the
    end; needs method fixed. 0 trains the weights."""
    lora_scale: float = 1.0
    """What the adapters' product is multiplied with, LoRA's alpha / rank."""
    blocks: str = "all"
    """Which decoder blocks become sparse: all, first-half, or A:B. Everything is trained."""
    include: tuple[str, ...] = ()
    """Regular expressions, searched in the full names of the blocks' linears: sparse is what one matches."""
    ignore: tuple[str, ...] = ()
    """The same, of linears that stay dense; wins over include."""
    gradient_checkpointing: bool = False
    """Compute activations again in backward instead of keeping them. Less memory, a third more work."""
    shard: bool = False
    """Of several processes each holds some rows of everything (FSDP2), instead of everything (DDP)."""
    device: Device = "auto"
    """Where to compute; auto takes cuda where there is one."""
    teacher_device: Device = "auto"
    """Where the teacher lies and computes; auto is beside the student."""
    dtype: Dtype = "auto"
    """Type that the student is loaded and saved in; masters are float32 always."""
    precision: Precision = "auto"
    """Of products (autocast), and of the teacher's weights; auto takes bfloat16 where the device multiplies it. A
    student of 16 bit multiplies in its own type."""
    checkpoint: int = 50
    """Steps between two states on disk. Changes no weight."""
    tracker: str | None = None
    """Who is told every step, beside the records: tensorboard, wandb, mlflow or another of accelerate's trackers; files
    go to OUT.logs. Changes no weight."""
    tolerated: int = 10
    """Steps without a finite loss that are left out before the run ends."""

    def __post_init__(self) -> None:
        self._check_pattern()
        self._check_numbers()
        if not self.data:
            raise ValueError("data is empty; give at least one text")
        if self.scales is not None and self.scales < 0:
            raise ValueError(f"scales must be at least 0, got {self.scales}")
        if self.sparsify and self.method == "fixed":
            raise ValueError("sparsify lets the mask move, and method fixed keeps it; leave out one of them")
        self._check_slorb()
        self._check_lora()
        self.schedule()  # refuses shares that do not fit
        check_blocks(self.blocks)
        for name in EXPRESSIONS:
            check_expressions(name, getattr(self, name))

    def _check_numbers(self) -> None:
        least = {
            "slorb": 0,
            "lora": 0,
            "tolerated": 0,
            "seq_len": 2,
            "batch": 1,
            "micro_batch": 1,
            "holdout": 1,
            "seed": 0,
            "checkpoint": 1,
        }
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}")
        if self.tokens < self.step_tokens:
            raise ValueError(
                f"{self.tokens} tokens are less than one step of batch x seq_len = {self.step_tokens}; give more "
                "tokens, or a smaller batch or seq_len"
            )
        for name in ("lr", "clip", "c", "lora_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name in ("decay", "weight_decay"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {value}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are two numbers in [0, 1), got {self.betas}")
        for name in ("warmup", "final_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share, in [0, 1]; got {getattr(self, name)}")

    def _check_pattern(self) -> None:
        if self.scope == "matrix":
            tapered(make_pattern(self.pattern, self.sparsity), 0.0, self.taper)
        elif self.sparsity is None or not 0 <= self.sparsity <= MOST:
            raise ValueError(
                f"pattern 'global' needs a sparsity, the share of zeros over all matrices, in [0, {MOST}]; got "
                f"{self.sparsity}"
            )
        elif self.taper:
            raise ValueError(
                "taper says how many zeros a block has; with pattern global one threshold does, leave it 0"
            )

    def _check_slorb(self) -> None:
        if self.slorb and self.scope == "global":
            raise ValueError("slorb starts from masks of single matrices, and global has none; use unstructured")
        if self.slorb and (self.sparsify or self.method in ("none", *DENSE_UNTIL_FROZEN)):
            raise ValueError(
                "slorb makes up for what a whole mask takes away from the first step on; leave out sparsify, and use "
                f"ast, ast_g, srste or fixed instead of {self.method}"
            )
        if not self.slorb and (self.slorb_follow or not self.slorb_train_X):
            raise ValueError("slorb_train_X and slorb_follow are of branches, and there are none; set slorb")

    def _check_lora(self) -> None:
        if self.lora and self.method != "fixed":
            raise ValueError(
                f"lora trains adapters under a mask that stays, and method {self.method} does not keep it; use method "
                "fixed"
            )
        others = {"slorb": self.slorb, "scales": self.row_scales, "shard": self.shard, "pattern global": self.scope}
        clash = [name for name, there in others.items() if there and there != "matrix"]
        if self.lora and clash:
            raise ValueError(f"lora trains its adapters and nothing else, in whole matrices; leave out {clash[0]}")

    @property
    def step_tokens(self) -> int:
        return self.batch * self.seq_len

    @property
    def steps(self) -> int:
        return self.tokens // self.step_tokens

    @property
    def scope(self) -> Literal["matrix", "global"]:
        """Over what the sparsity is counted."""
        return "global" if self.pattern == "global" else "matrix"

    @property
    def target(self) -> Pattern:
        """The pattern asked for, as a value; of a global one what a matrix has on the average."""
        return make_pattern("unstructured" if self.scope == "global" else self.pattern, self.sparsity)

    @property
    def words(self) -> str:
        if self.method == "none":
            return "method none prunes nothing and keeps no zero"
        if self.scope == "matrix":
            return tapered_words(self.target, self.taper)
        return f"{self.target} of the weights of all matrices together are zero, at most {MOST:.0%} of one"

    @property
    def pull(self) -> Decay:
        return Relative(self.c) if self.decay is None else Absolute(self.decay)

    @property
    def row_scales(self) -> int:
        """Scales of a row."""
        return PUBLISHED_SCALES.get(self.method, 0) if self.scales is None else self.scales

    def schedule(self) -> Schedule:
        return Schedule(self.steps, self.refresh, self.anneal, self.sparsify, self.freeze, self.ramp)

    def block_range(self, total: int) -> range:
        """The chosen blocks of a model that has ``total``."""
        return chosen_blocks(self.blocks, total)

    def to_dict(self) -> dict[str, Any]:
        """The form of a recipe file."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        lists = {name: list(values[name]) for name in (*LISTS, "betas")}
        return {**values, **lists, "loss": asdict(self.loss)}


def train_config_from_dict(data: Mapping[str, Any]) -> TrainConfig:
    """A config from the form of a recipe file (without ``student``, ``teacher``); UsageError for what does not fit."""
    values = dict(data)
    if "loss" in values:
        values["loss"] = build(Distillation, values["loss"], "loss")
    values |= {name: [values[name]] for name in LISTS if isinstance(values.get(name), str)}
    return build(TrainConfig, values, "")
