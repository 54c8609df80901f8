"""The page that ``secateur plan`` prints: linears, costs by stage, peaks of memory, what the result is good for."""

from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from secateur.report.tables import facts, percent, seconds, size, skipped_lines


def plan_page(told: dict[str, Any]) -> list[RenderableType]:
    """All of ``PlanReport.to_dict()``, top to bottom."""
    model, blocks = told["model"], told["blocks"]
    method = told["recipe"]["method"]["name"]
    title = f"{model['source']} to be pruned with {method}; no weight was read"
    rows = {
        "model": f"{model['class']}, {model['parameters']:,} parameters, {model['dtype']}, {size(model['bytes'])}",
        "pattern": f"{told['recipe']['pattern']}: {told['pattern']['words']}",
        "pruned": f"{sum(row['count'] for row in told['linears'])} linears in {blocks['pruned']} of {blocks['total']}"
        f" blocks, {sum(row['weights'] for row in told['linears']):,} weights",
        "skipped": skipped_lines(told["skipped"]),
        "sparsity": f"{percent(told['sparsity']['planned'])} of these linears,"
        f" {percent(told['sparsity']['model'])} of all parameters",
        "time": _time(told["seconds"], told["rates"]["slowdown"]),
        "peak memory": _peaks(told["memory"]),
        "disk": size(told["memory"]["disk"]["peak"]),
    }
    return [
        *facts(title, rows),
        Text(),
        _linears(told["linears"]),
        Text(),
        _stages(told["stages"]),
        Text(),
        _memory(told["memory"]),
        Text(),
        _result(told["result"]),
        Text(),
        _runtimes(told["runtimes"]),
        *(Text(f"warning: {line}", style="yellow") for line in told["warnings"]),
        *(Text(line, style="dim") for line in told["notes"]),
    ]


def _time(told: dict[str, float], slowdown: float) -> str:
    parts = ", ".join(f"{name} {seconds(told[name])}" for name in ("load", "prune", "keep", "save"))
    busy = f"; with the machine as busy as now about {seconds(told['busy'])}" if slowdown > 1.2 else ""
    return f"about {seconds(told['total'])} ({parts}){busy}"


def _peaks(memory: dict[str, dict[str, float]]) -> str:
    device = memory["device"]["peak"]
    return f"{size(memory['host']['peak'])} host" + (f", {size(device)} device" if device else "")


def _table(*columns: str, right: int) -> Table:
    """Columns from number ``right`` on hold numbers."""
    table = Table(*columns, box=None, header_style="bold")
    for column in table.columns[right:]:
        column.justify = "right"
    return table


def _linears(rows: list[dict[str, Any]]) -> Table:
    table = _table("linear", "pattern", "count", "shape", "weights", right=2)
    for row in rows:
        shape = f"{row['shape'][0]} x {row['shape'][1]}"
        table.add_row(row["role"], row["pattern"], str(row["count"]), shape, f"{row['weights']:,}")
    return table


def _stages(rows: list[dict[str, Any]]) -> Table:
    table = _table("stage", "operations", "bytes streamed", "time", right=1)
    for row in rows:
        table.add_row(row["name"], f"{row['operations']:.2g}", size(row["bytes"]), seconds(row["seconds"]))
    return table


def _memory(memory: dict[str, dict[str, float]]) -> Table:
    table = _table("memory", "where", "bytes", right=2)
    for where, parts in memory.items():
        for name, value in parts.items():
            if name != "peak" and value:
                table.add_row(name, where, size(value))
    return table


def _result(result: dict[str, Any]) -> Table:
    table = _table("stored as", "bits per pruned weight", "whole model", right=1)
    for name, bits in result["bits_per_weight"].items():
        table.add_row(name, f"{bits:.1f}", size(result["bytes"][name]))
    return table


def _runtimes(rows: list[dict[str, str]]) -> Table:
    table = _table("runtime", "what it gains", "needs", right=3)
    for row in rows:
        table.add_row(row["name"], row["gain"], row["needs"])
    return table
