"""What ``prune``, ``train`` and ``inspect`` say of the room that a pruned directory takes, and what would take less."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from secateur.core.pattern import VALUE_BITS
from secateur.export.directory import file_bytes
from secateur.report.runtimes import CLEARLY, alternatives, competitors, sizes_said, smaller_lines
from secateur.report.tables import facts, size, warning_lines

if TYPE_CHECKING:
    from secateur.evaluation.inspect import Inspection

MASKED = "mask and 16 bit values"
BLOCK = re.compile(r"(^|\.)\d+\.")
"""In the names of what lies in a list, as blocks do."""
FORMS = {
    "dense": "zeros take as much room as any number",
    "sparse-safetensors": "packed, zeros are left out",
    "torch-2:4": "packed, two of every four and where they are",
}
"""What is to be said of the zeros in each form of a directory."""


def room_of(found: "Inspection", form: str, taken: int) -> dict[str, Any]:
    """Bits of a pruned weight and bytes of the whole model: as stored, with a mask, and by what competes with that.

    All that was not pruned is counted at 16 bit, but as stored; low-rank branches with what they belong to. Where
    nothing was promised, what could be pruned stands for what was: the matrices in blocks. Without zeros there is no
    mask.
    """
    rows = [row for row in found.rows if (row.ok is not None if found.promised else BLOCK.search(row.name))]
    inputs, weights = {row.inputs for row in rows}, sum(math.prod(row.shape) for row in rows)
    zeros, numbers = sum(row.zeros for row in rows), found.low_rank.numbers if found.low_rank else 0
    bits, whole = {}, {}
    if zeros > CLEARLY * weights:
        bits[MASKED] = 1 + VALUE_BITS * (weights - zeros + numbers) / weights
        whole[MASKED] = 2 * (found.elements - weights) + weights * bits[MASKED] / 8
    return {
        "form": form,
        "bytes": taken,
        "elements": found.elements,
        "weights": weights,
        "bits_per_weight": bits | alternatives(inputs),
        "whole": whole | competitors(found.elements, weights, inputs),
    }


def told_room(folder: Path, found: "Inspection", warnings: Sequence[str]) -> dict[str, Any]:
    """What a run's report says of the directory that it saved, and its warnings with those of that."""
    room = room_of(found, "dense", file_bytes(folder))
    return {"room": room, "warnings": [*room_warnings(room), *warnings]}


def room_rows(room: Mapping[str, Any] | None) -> dict[str, str]:
    """Bits and bytes, line by line; of a directory without weights that could be pruned only what it takes."""
    if room is None:  # nothing was saved, or by an earlier version
        return {}
    stored = f"{size(room['bytes'])}, {8 * room['bytes'] / max(room['elements'], 1):.2f} bits a weight in all"
    if not room["weights"]:
        return {"stored": stored}
    if MASKED not in room["whole"]:
        return {"stored": stored, "instead": sizes_said(room_others(room))}
    rows = {"stored": f"{stored}: {FORMS[room['form']]}"}
    if room["form"] == "dense":
        rows[MASKED] = (
            f"{size(room['whole'][MASKED])}, {room['bits_per_weight'][MASKED]:.2f} bits a pruned weight, all else at "
            "16 (`secateur export --to sparse-safetensors`)"
        )
    return {**rows, "without any zeros": sizes_said(room_others(room))}


def room_warnings(room: Mapping[str, Any]) -> list[str]:
    """What makes zeros a poor bargain: a dense directory is taken for what its masks would make of it."""
    if MASKED not in room["whole"]:
        return []
    if room["form"] == "dense":
        return smaller_lines(room["whole"][MASKED], room_others(room), "of a mask and 16 bit values")
    return smaller_lines(room["bytes"], room_others(room))


def room_others(room: Mapping[str, Any]) -> dict[str, float]:
    """Bytes of the whole model by what competes."""
    return {name: count for name, count in room["whole"].items() if name != MASKED}


def room_lines(room: Mapping[str, Any]) -> list[RenderableType]:
    """What ``secateur inspect`` adds."""
    return [*facts("room", room_rows(room)), *warning_lines(room_warnings(room))]
