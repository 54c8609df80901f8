"""The recipe of quantization: one typed config behind flags, a YAML file and Python, as ``config`` is for pruning.

model: pruned
bits: 4
group_size: 64
method: gptq
data: c4
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

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
from secateur.core.grid import Scheme
from secateur.core.pattern import Pattern, Unstructured, make_pattern, tapered
from secateur.core.quantizers import GPTQ, QUANTIZERS, RTN, Joint, Quantizer

QuantizerName = Literal["rtn", "gptq", "joint"]
Balance = Literal["none", "smooth", "awq"]
Activations = Literal["none", "dynamic", "static"]
GROUPS = (128, 64, 32)
"""What ``auto`` tries below 8 bits, in this order."""


def fitting_group(inputs: Iterable[int]) -> int | None:
    """The first of them that divides all these numbers of inputs."""
    widths = set(inputs)
    return next((size for size in GROUPS if all(width % size == 0 for width in widths)), None)


@dataclass(frozen=True)
class QuantizeConfig:
    """How a model is quantized, on which text. ValueError where the fields contradict each other."""

    bits: int = 4
    """Of a weight's code: 8, 4 or 3."""
    group_size: int | Literal["auto", "channel"] = "auto"
    """Consecutive inputs that share a scale: 32, 64 or 128, or channel for whole output rows; auto is channel at 8
    bits, else the largest of these that divides every linear."""
    symmetric: bool = True
    """False gives every scale a zero point, at 4 and 3 bits; zeros are kept either way."""
    activations: Activations = "none"
    """8 bit inputs beside 8 bit weights: dynamic finds a scale for each token when it runs, static takes the largest
    input of the calibration."""
    method: QuantizerName = "gptq"
    """rtn rounds to nearest, gptq lets later columns make up for it, joint prunes a dense model in that same pass."""
    sparsity: float | None = None
    """Share of zeros, of joint alone. Needed by every pattern but N:M."""
    pattern: str | None = None
    """Where zeros may lie, of joint alone: unstructured, row, N:M (N kept of every M) or block:RxC."""
    taper: float = 0.0
    """By how much the sparsity of the last block is above ``sparsity``, and that of the first below it; it rises evenly
    between them (arXiv:2502.14770). Of joint alone, not with N:M."""
    balance: Balance = "none"
    """What is moved between weights and their inputs first, folded into norms: smooth (SmoothQuant) beside 8 bit
    activations, awq beside none. Zeros are kept."""
    strength: float = 0.5
    """How much of the inputs' range ``smooth`` moves: 0 evens out the weights, 1 the inputs."""
    damp: float = 0.01
    """Ridge added to H, as a fraction of mean(diag H), in gptq and joint."""
    data: str = "c4"
    """Calibration text: a name like c4 or wikitext2, ``hf:ID[:config][:split][:column]``, a file, or ``embedded``."""
    samples: int = 128
    """Calibration windows."""
    seq_len: int = 2048
    """Tokens in each window."""
    seed: int = 0
    """Chooses the windows. The same recipe gives the same bytes."""
    blocks: str = "all"
    """Which decoder blocks: all, first-half, or A:B (from A up to but without B, counted from 0)."""
    include: tuple[str, ...] = ()
    """Regular expressions, searched in the full names of the blocks' linears: quantize what one matches; none = all."""
    ignore: tuple[str, ...] = ()
    """The same, of linears to leave as they are; wins over include."""
    device: Device = "auto"
    """Where one block at a time is worked on; auto takes cuda where there is one."""
    dtype: Dtype = "auto"
    """Type that the model is loaded in, and of scales and of all that is not quantized; auto keeps the checkpoint's."""
    batch: int = 1
    """Windows that go through a block together. More is faster and needs more memory."""
    hidden_memory: float = 8.0
    """Host memory for hidden states that wait, in GB; what does not fit waits on disk beside OUT. Changes no weight."""
    precision: Precision = "auto"
    """Of products in forwards and Gram matrices; auto takes bfloat16 where the device multiplies it."""

    def __post_init__(self) -> None:
        self.scheme(self.group_size if self.group_size != "auto" else ("channel" if self.bits == 8 else GROUPS[0]))
        if self.activations != "none" and self.bits != 8:
            raise ValueError(f"{self.activations} activations go with 8 bit weights, got {self.bits}; use --bits 8")
        if self.balance == "smooth" and self.activations == "none":
            raise ValueError(
                "smooth eases the rounding of inputs, and none are rounded; give --activations, or take awq"
            )
        if self.balance == "awq" and self.activations != "none":
            raise ValueError("awq eases the rounding of weights alone; beside 8 bit activations take smooth")
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength is a share, in [0, 1]; got {self.strength}")
        self._check_pattern()
        self._check_used()
        least = {"samples": 1, "seq_len": 2, "seed": 0, "batch": 1, "hidden_memory": 0, "damp": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}")
        check_blocks(self.blocks)
        for name in EXPRESSIONS:
            check_expressions(name, getattr(self, name))

    def _check_pattern(self) -> None:
        asked = self.pattern is not None or self.sparsity is not None or self.taper != 0
        if asked and self.method != "joint":
            raise ValueError(
                f"{self.method} keeps the zeros that are there and makes no pattern; use --method joint, or prune first"
            )
        if self.method == "joint":
            tapered(make_pattern(self.pattern or "unstructured", self.sparsity), 0.0, self.taper)

    def _check_used(self) -> None:
        idle = {
            "damp": (self.method == "rtn", "rtn solves nothing that damp would ease; leave it out, or take gptq"),
            "strength": (
                self.balance != "smooth",
                "strength is smooth's alone; leave it out, or give --balance smooth",
            ),
        }
        for name, (unused, why) in idle.items():
            if unused and getattr(self, name) != getattr(QuantizeConfig, name):
                raise ValueError(why)

    @property
    def target(self) -> Pattern:
        """What is asked of a linear beyond its own zeros."""
        if self.method != "joint":
            return Unstructured(0.0)
        return make_pattern(self.pattern or "unstructured", self.sparsity)

    @property
    def needs_text(self) -> bool:
        """Whether anything but the weights decides."""
        return self.method != "rtn" or self.activations == "static" or self.balance != "none"

    def scheme(self, group_size: int | str, scales: torch.dtype = torch.float32) -> Scheme:
        """How matrices are quantized, once the group size is settled."""
        return Scheme(self.bits, 0 if group_size == "channel" else int(group_size), self.symmetric, scales)

    def quantizer(self, scheme: Scheme) -> Quantizer:
        """The method, ready to solve."""
        solver = QUANTIZERS[self.method]
        return RTN(scheme) if solver is RTN else (GPTQ if solver is GPTQ else Joint)(scheme, self.damp)

    def block_range(self, total: int) -> range:
        """The chosen blocks of a model that has ``total``."""
        return chosen_blocks(self.blocks, total)

    def to_dict(self) -> dict[str, Any]:
        """The form of a recipe file."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, **{name: list(values[name]) for name in EXPRESSIONS}}


def quantize_config_from_dict(data: Mapping[str, Any]) -> QuantizeConfig:
    """A config from the form of a recipe file (without ``model``); UsageError for anything that does not fit."""
    values = dict(data)
    values |= {name: [values[name]] for name in EXPRESSIONS if isinstance(values.get(name), str)}
    return build(QuantizeConfig, values, "")
