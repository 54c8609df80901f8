"""What ``secateur inspect`` says of the room that a pruned directory takes, and of what would take less."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from secateur.core.pattern import VALUE_BITS
from secateur.report.runtimes import ALTERNATIVES
from secateur.report.tables import facts, size, warning_lines

if TYPE_CHECKING:
    from secateur.evaluation.inspect import Inspection

MASKED = "mask and 16 bit values"
FORMS = {
    "dense": "zeros take as much room as any number",
    "sparse-safetensors": "packed, zeros are left out",
    "torch-2:4": "packed, two of every four and where they are",
}
"""What is to be said of the zeros in each form of a directory."""


def room_of(found: "Inspection", form: str, file_bytes: int) -> dict[str, Any]:
    """Bits of a pruned weight and bytes of the whole model: as stored, with a mask, and by what competes with that.

    All that was not pruned is counted at 16 bit, but as stored; low-rank branches with what they belong to.
    """
    branches = found.low_rank.bits_per_weight if found.low_rank else 0.0
    bits = {MASKED: VALUE_BITS * (1 - found.sparsity) + 1 + branches, **ALTERNATIVES}
    rest = 2 * (found.elements - found.weights)
    return {
        "form": form,
        "bytes": file_bytes + (found.low_rank.bytes if found.low_rank else 0),
        "bits_per_weight": bits,
        "whole": {name: rest + found.weights * per / 8 for name, per in bits.items()},
    }


def room_lines(room: Mapping[str, Any], elements: int) -> list[RenderableType]:
    masked, others = room["whole"][MASKED], {name: room["whole"][name] for name in ALTERNATIVES}
    stored = f"{size(room['bytes'])}, {8 * room['bytes'] / max(elements, 1):.2f} bits a weight in all"
    rows = {"stored": f"{stored}: {FORMS[room['form']]}"}
    best, what = room["bytes"], "as stored"
    if room["form"] == "dense":
        best, what = masked, "of a mask and 16 bit values"
        rows[MASKED] = (
            f"{size(masked)}, {room['bits_per_weight'][MASKED]:.2f} bits a pruned weight, all else at 16 "
            "(`secateur export --to sparse-safetensors`)"
        )
    rows["without any zeros"] = ", ".join(f"{name} {size(count)}" for name, count in others.items())
    smaller = [f"{name} {size(count)}" for name, count in others.items() if count < best]
    line = f"smaller than the {size(best)} {what} without any zeros: {', '.join(smaller)}"
    return [*facts("room", rows), *warning_lines([line] if smaller else [])]
