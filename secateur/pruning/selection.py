"""Which linears a run prunes, and why it leaves the others alone.

Only linears inside the decoder blocks can be planned; embeddings and the output head stay dense. Of those, ``blocks``
chooses decoder layers, ``include`` and ``ignore`` are regular expressions that are searched in a linear's full name
("model.layers.0.self_attn.q_proj"): pruned is what some ``include`` matches (all, where there is none) and no
``ignore`` does. Nothing is left out in silence: every linear that is not planned stands under its reason. Whatever
matches nothing is an error, since it was meant to match something.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

from torch import nn

from secateur.core.pattern import Pattern, tapered
from secateur.core.plan import Plan, Target
from secateur.errors import UsageError
from secateur.models.adapter import DecoderAdapter, Linear

OUTSIDE = "embeddings and the output head, outside the decoder blocks, stay dense"


class Skipped(NamedTuple):
    """Linears that stay as they are for one reason."""

    why: str
    names: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return {"why": self.why, "count": len(self.names), "names": list(self.names)}


@dataclass(frozen=True)
class Selection:
    """What is to be pruned, and what is not."""

    plan: Plan
    skipped: tuple[Skipped, ...]


def select(
    adapter: DecoderAdapter,
    pattern: Pattern,
    blocks: range,
    include: Sequence[str] = (),
    ignore: Sequence[str] = (),
    taper: float = 0.0,
) -> Selection:
    """The linears of these blocks that the expressions leave, all to one pattern, ``tapered`` from the first of these
    blocks to the last.

    UsageError for an expression that matches nothing and where nothing is left; ValueError where a shape cannot carry
    the pattern.
    """
    shapes = linear_shapes(adapter, range(len(adapter.blocks)))
    chosen = linear_shapes(adapter, blocks)
    outside = outside_blocks(adapter)
    for expression in include:
        _check_include(expression, chosen, shapes, outside)
    for expression in ignore:
        _check_ignore(expression, [*shapes, *outside])
    reasons = {name: _reason(name, chosen, blocks, include, ignore) for name in shapes}
    patterns = _patterns(adapter, pattern, blocks, taper)
    targets = {name: Target(shapes[name], patterns[name]) for name, why in reasons.items() if not why}
    skipped = _by_reason({**reasons, **dict.fromkeys(outside, OUTSIDE)})
    if not targets:
        told = ", ".join(f"{len(row.names)} linears: {row.why}" for row in skipped if row.why != OUTSIDE)
        raise UsageError(f"nothing is left to prune ({told}); change include, ignore or blocks")
    return Selection(Plan(targets), skipped)


def linear_shapes(adapter: DecoderAdapter, blocks: Iterable[int]) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear of these blocks by its full name."""
    return {
        f"{adapter.block_names[i]}.{name}": adapter.shape(linear)
        for i in blocks
        for name, linear in adapter.linears(adapter.blocks[i]).items()
    }


def _patterns(adapter: DecoderAdapter, pattern: Pattern, blocks: range, taper: float) -> dict[str, Pattern]:
    """Of every linear of these blocks, by its full name; a single block lies in the middle."""
    depths = [i / (len(blocks) - 1) for i in range(len(blocks))] if len(blocks) != 1 else [0.5]
    return {
        name: tapered(pattern, depth, taper)
        for index, depth in zip(blocks, depths, strict=True)
        for name in linear_shapes(adapter, [index])
    }


def outside_blocks(adapter: DecoderAdapter) -> list[str]:
    """Linears and embeddings of the model that lie in no decoder block."""
    prefixes = tuple(f"{name}." for name in adapter.block_names)
    return [
        name
        for name, module in adapter.model.named_modules()
        if isinstance(module, Linear | nn.Embedding) and not name.startswith(prefixes)
    ]


def _reason(
    name: str, chosen: Iterable[str], blocks: range, include: Sequence[str], ignore: Sequence[str]
) -> str | None:
    """Why a linear is left alone; None where it is pruned."""
    if name not in chosen:
        return f"not in blocks {blocks.start}:{blocks.stop}"
    if include and not any(re.search(expression, name) for expression in include):
        return "no include matches it"
    hit = next((expression for expression in ignore if re.search(expression, name)), None)
    return None if hit is None else f"ignore {hit!r} matches it"


def _by_reason(reasons: dict[str, str | None]) -> tuple[Skipped, ...]:
    rows: dict[str, list[str]] = {}
    for name, why in reasons.items():
        if why:
            rows.setdefault(why, []).append(name)
    return tuple(Skipped(why, tuple(names)) for why, names in rows.items())


def _check_include(expression: str, chosen: Iterable[str], shapes: Iterable[str], outside: Iterable[str]) -> None:
    if _matches(expression, chosen):
        return
    if found := _matches(expression, outside):
        raise UsageError(
            f"include {expression!r} names {found[0]}, but {OUTSIDE}; only linears inside them can be pruned"
        )
    if found := _matches(expression, shapes):
        raise UsageError(f"include {expression!r} matches {len(found)} linears, none of them in the chosen blocks")
    raise UsageError(_nothing("include", expression, [*shapes]))


def _check_ignore(expression: str, names: list[str]) -> None:
    if not _matches(expression, names):
        raise UsageError(_nothing("ignore", expression, names))


def _matches(expression: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if re.search(expression, name)]


def _nothing(kind: str, expression: str, names: list[str]) -> str:
    """An expression in vain, the nearest names, and what names look like."""
    parts = {".".join(name.split(".")[-length:]) for name in names for length in (1, 2)}
    word = re.sub(r"[^\w.]", "", expression.replace("\\", ""))
    near = get_close_matches(word, sorted(parts), n=3, cutoff=0.5)
    hint = f", did you mean {' or '.join(near)}?" if near else ""
    return f"{kind} {expression!r} matches no linear{hint}; they are named like {names[0]}"
