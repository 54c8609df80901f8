"""What pages are made of. A page is a list of parts, top to bottom; the command line prints them."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

EMBEDDED = "CPython's own help text (pydoc_data.topics)"
MANY = 8
"""Warnings printed; all of them are in the report."""


def seconds(value: float) -> str:
    """12.3 s, then 4 min 05 s, then 2 h 03 min."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def size(count: float) -> str:
    """Bytes in the unit that leaves few digits."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def command(label: str, *words: str) -> Text:
    """A line that can be copied into a shell."""
    return Text.assemble((f"{label}  ", "bold"), (shlex.join(words), "cyan"))


def facts(title: str, rows: dict[str, str]) -> list[RenderableType]:
    """A title and a column of names beside a column of values."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    for name, value in rows.items():
        grid.add_row(name, value)
    return [Text(title, style="bold"), grid]


def text_name(name: str) -> str:
    """A text's name, and what it is where the name does not say it."""
    return f"embedded: {EMBEDDED}" if name == "embedded" else name


def skipped_lines(skipped: Sequence[dict[str, Any]]) -> str:
    """How many linears stay as they are, a line for each reason."""
    return "\n".join(f"{row['count']}: {row['why']}" for row in skipped) or "none"


def low_rank_row(told: dict[str, Any] | None) -> dict[str, str]:
    """Said only where there are branches; ``returned`` is known of a run, not of a directory."""
    if told is None:
        return {}
    cost = (
        f"{told['branches']} branches, {told['numbers']:,} numbers, {size(told['bytes'])}: {percent(told['share'])} of "
        f"the surviving weights, {told['bits_per_weight']:.2f} bits per weight "
    )
    if "returned" not in told:
        return {"low rank": cost + "more"}
    return {"low rank": f"{cost}with them; {percent(told['returned'])} of what outputs lacked given back"}


def time_of(stages: dict[str, float]) -> str:
    parts = [f"{name} {seconds(value)}" for name, value in stages.items() if name != "total"]
    return f"{seconds(stages['total'])} ({', '.join(parts)})"


def memory_of(report: Mapping[str, Any]) -> str:
    gpu = report.get("peak_gpu_memory_bytes")  # reports of earlier versions do not have it
    return size(report["peak_memory_bytes"]) + (f", {size(gpu)} on the GPU" if gpu else "")


def warning_lines(warnings: Sequence[str]) -> list[RenderableType]:
    shown = [Text(f"warning: {line}", style="yellow") for line in warnings[:MANY]]
    more = len(warnings) - MANY
    return [*shown, Text(f"and {more} more in report.json", style="yellow")] if more > 0 else list(shown)


def eval_command(out: str, source: str, data: dict[str, Any]) -> list[str]:
    """The command that sets a pruned model beside its dense one, on a text that did not calibrate it."""
    name = "embedded" if data["name"] == "embedded" else "wikitext2"
    words = ["secateur", "eval", out, "--baseline", source, "--data", name]
    return words if data["seq_len"] == 2048 else [*words, "--seq-len", str(data["seq_len"])]
