"""What a run tells about itself, block by block: plain values that become lines of records.jsonl."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from secateur.core.moments import Inputs


@dataclass(frozen=True)
class BranchRecord:
    """The low-rank branch beside a pruned linear."""

    rank: int
    numbers: int
    """In both factors."""
    returned: float
    """Of the energy of what the output lacked on the calibration, the share that the branch gives back: 1 is all."""


@dataclass(frozen=True)
class LinearRecord:
    """One pruned linear."""

    name: str
    shape: tuple[int, int]
    pattern: str
    sparsity: float
    """Share of weights that are exactly zero now."""
    relative_error: float | None
    """tr(D H Dᵀ) / tr(W0 H W0ᵀ) on the inputs it was pruned for; None where the method looks at no inputs."""
    note: str = ""
    inputs: Inputs | None = None
    """What is known of the inputs; None where the method looks at none."""
    branch: BranchRecord | None = None
    """None where no branch was asked for."""


@dataclass(frozen=True)
class RoundRecord:
    """One iterate of SparseLLM's alternating rounds on one FFN."""

    iteration: int
    objective: float | None
    error: float
    chosen: bool
    ffn: str = ""
    """Which FFN of the block, where it is an expert's: "mlp.experts.3"."""


@dataclass(frozen=True)
class BlockRecord:
    """One decoder block."""

    index: int
    name: str
    seconds: float
    output_error: float | None
    """|pruned - dense|² / |dense - input|² of the block's output on the same inputs: share of its work that is lost."""
    dropped_rows: int
    """Calibration rows dropped because this block's output was not finite."""
    linears: tuple[LinearRecord, ...] = ()
    rounds: tuple[RoundRecord, ...] = ()
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds by stage; "solve" is also part of the stage around it."""
    refused: tuple[str, ...] = ()
    """What balancing could not fold, by full name."""

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "block", **asdict(self)}


def block_record(data: dict[str, Any]) -> BlockRecord:
    """Inverse of ``BlockRecord.to_dict``, also behind JSON."""
    return TypeAdapter(BlockRecord).validate_python({key: value for key, value in data.items() if key != "kind"})


def short_of_tokens(linears: Sequence[LinearRecord]) -> list[str]:
    """One line where some linears saw fewer tokens than they have inputs, which leaves directions unknown."""
    seen = [linear.inputs for linear in linears if linear.inputs]
    short = [inputs for inputs in seen if inputs.tokens < inputs.columns]
    if not short:
        return []
    worst = min(short, key=lambda inputs: inputs.tokens / inputs.columns)
    return [
        f"{len(short)} of {len(seen)} linears saw fewer tokens than they have inputs, such as {worst.tokens} for "
        f"{worst.columns}: some directions are unknown; use more samples or longer ones"
    ]
