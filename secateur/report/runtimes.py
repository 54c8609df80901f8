"""What a pruned model is good for: bits per weight, and which runtimes gain from which zeros.

The table is the state of late 2026. Rows say what was measured or published, where, and what it takes; a runtime that
stores and multiplies zeros like any number is a row too, because that is what most people will meet first.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from secateur.core.pattern import NM, Block, Pattern
from secateur.quantize_config import fitting_group
from secateur.report.tables import size

CLEARLY = 0.02
"""Share by which something must be smaller to be called that."""
BRANCHES, EXPERTS, CONV1D = "low-rank branches", "mixtures of experts", "Conv1D (GPT-2)"
"""What a model may hold that an export has no place for."""
SMALL = 7e9
"""Parameters below which 2:4 in one shot loses so much that it is warned of."""


@dataclass(frozen=True)
class Runtime:
    """One way to make zeros pay, or not."""

    name: str
    gain: str
    needs: str
    least: float = 0.0
    """Share of zeros from which on."""
    kinds: tuple[str, ...] = ("unstructured", "2:4", "n:m", "block")
    refuses: tuple[str, ...] = ()
    """What its export has no place for."""

    def of(self, held: Collection[str]) -> "Runtime":
        """This row for a model that holds such things."""
        why = " and ".join(one for one in self.refuses if one in held)
        return replace(self, gain=f"none: the export refuses {why}", needs="nothing") if why else self

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "gain": self.gain, "needs": self.needs}


RUNTIMES = (
    Runtime("download", "smaller file with bitmask and compression", "`secateur export --to sparse-safetensors`", 0.2),
    Runtime(
        "OpenVINO, AMX Xeon",
        "single layers, against dense int8, in a prototype: 1.5x at 60 %, 1.7x at 70 % and more",
        "`secateur export --to openvino`",
        0.6,
        refuses=(BRANCHES, EXPERTS),
    ),
    Runtime(
        "OpenVINO, AMX Xeon",
        "single layers, against dense int8, in a prototype: 1.2x at 50 %",
        "`secateur export --to openvino`",
        0.5,
        refuses=(BRANCHES, EXPERTS),
    ),
    Runtime(
        "torch.sparse, CUDA sm_80+",
        "weights at 56 %; made for prompts and large batches, speed not measured yet",
        "`secateur export --to torch-2:4`, layer by layer",
        kinds=("2:4",),
        refuses=(BRANCHES, EXPERTS, CONV1D),
    ),
    Runtime(
        "MACKO, consumer NVIDIA", "1.3 to 1.5x at batch 1 and 50 %", "research code, fp16", 0.5, ("unstructured", "n:m")
    ),
    Runtime("vLLM, SGLang, TensorRT-LLM, llama.cpp, ONNX Runtime", "none: zeros cost as much as any weight", "nothing"),
)


def kind_of(pattern: Pattern) -> str:
    """The family a runtime asks for; 1:4 also satisfies 2:4."""
    match pattern:
        case NM(n, 4) if n <= 2:
            return "2:4"
        case NM():
            return "n:m"
        case Block():
            return "block"
        case _:
            return "unstructured"


def runtimes_for(pattern: Pattern, held: Collection[str] = ()) -> list[Runtime]:
    """Rows that fit the pattern, each name once, in the table's order, for a model that holds such things."""
    fitting = [r for r in RUNTIMES if kind_of(pattern) in r.kinds and pattern.sparsity >= r.least]
    return [row.of(held) for row in {row.name: row for row in reversed(fitting)}.values()][::-1]


def warnings_for(pattern: Pattern, parameters: float) -> list[str]:
    """What one should know before paying for this pattern."""
    if kind_of(pattern) != "2:4":
        return []
    small = f"this model has {parameters / 1e9:.2g} B parameters: " if parameters < SMALL else ""
    return [
        f"{pattern}: {small}2:4 in one shot costs small models (below 7 B) and reasoning models most; published: "
        "MMLU of Llama-3-8B 0.67 -> 0.40, reasoning average of a Qwen3 54 -> 15 (6:8: 52); plan for retraining, or "
        "take 4:8, 6:8 or 50 % unstructured"
    ]


def alternatives(inputs: Iterable[int]) -> dict[str, float]:
    """Bits per weight of what a sparse model competes with. ``inputs``: how many its matrices have.

    int4 is as ``quantize --bits 4`` makes it of them, with a 16 bit scale a group; scales of whole rows are left out.
    """
    group = fitting_group(inputs)
    int4 = {f"dense int4, groups of {group}": 4 + 16 / group} if group else {"dense int4, one scale a row": 4.0}
    return {"dense, 16 bit": 16.0, "dense int8": 8.0, **int4}


def competitors(elements: int, weights: int, inputs: Iterable[int]) -> dict[str, float]:
    """Bytes of a model of so many numbers by what else could become of these weights, none of them zero.

    All else is counted at 16 bit, however it is stored.
    """
    rest = 2 * (elements - weights)
    return {name: rest + weights * bits / 8 for name, bits in alternatives(inputs).items()}


def sizes_said(others: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {size(count)}" for name, count in others.items())


def smaller_lines(made: float, others: Mapping[str, float], what: str = "as stored") -> list[str]:
    """One warning where plain numbers in fewer bits would take clearly less, else none."""
    smaller = {name: count for name, count in others.items() if count < (1 - CLEARLY) * made}
    said = f"smaller than the {size(made)} {what} without any zeros: {sizes_said(smaller)}, all else at 16 bit"
    return [said] if smaller else []
