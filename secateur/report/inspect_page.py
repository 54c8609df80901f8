"""What ``secateur inspect`` prints of any directory: its matrices, and whether every promise is kept."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from secateur.report.tables import facts, low_rank_row, percent

if TYPE_CHECKING:
    from secateur.evaluation.inspect import Inspection


def inspect_tables(found: "Inspection") -> list[RenderableType]:
    """Every matrix, the totals, and each broken promise."""
    table = Table("weight", "shape", "sparsity", "promise", "", box=None, header_style="bold")
    table.columns[2].justify = "right"
    for row in found.rows:
        shape = f"{row.shape[0]} x {row.shape[1]}"
        table.add_row(row.name, shape, percent(row.sparsity), row.pattern, _verdict(row.ok, row.why))
    rows = {
        "tensors": str(found.tensors),
        "weights": f"{found.weights:,} {'promised' if found.promised else 'in matrices'},"
        f" {percent(found.sparsity)} zero",
        "finite": "all" if found.finite else "no",
        "-0.0": str(found.negative_zeros),
        "tied": ", ".join(" = ".join(group) for group in found.tied) or "none recorded",
        **low_rank_row(asdict(found.low_rank) if found.low_rank else None),
        **({"not compared": f"{found.uncompared} tensors that the run changed too"} if found.uncompared else {}),
    }
    return [table, *facts(found.path, rows), *_promises_kept(found)]


def _verdict(ok: bool | None, why: str) -> Text:
    if ok is None:
        return Text("")
    return Text("kept", style="green") if ok else Text(why, style="red")


def _promises_kept(found: "Inspection") -> list[RenderableType]:
    if found.broken:
        count = Text(f"{len(found.broken)} broken", style="bold red")
        return [count, *(Text(f"  {line}", style="red") for line in found.broken)]
    words = "every promise is kept" if found.promised else "nothing was promised: no secateur/promise.json here"
    return [Text(words, style="green" if found.promised else "yellow")]
