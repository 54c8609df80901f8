"""What ``secateur demo`` prints: the demo model dense and pruned."""

import shlex
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from secateur.report.eval_page import protocol
from secateur.report.tables import EMBEDDED, command, memory_of, percent, seconds, warning_lines

if TYPE_CHECKING:
    from secateur.report.comparison import Comparison

AFTER_DEMO = shlex.split("secateur prune demo --pattern 2:4 --data embedded --samples 16 --seq-len 512 --out smaller")


def demo_tables(report: dict[str, Any], comparison: "Comparison", total: float) -> list[RenderableType]:
    """One table: dense against pruned; then what the text was and what to type next."""
    pruned, dense = comparison.result, comparison.baseline
    assert dense is not None  # demo always compares
    table = Table("", "dense", "pruned", box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("perplexity on held-out text", f"{dense.ppl:.2f}", f"{pruned.ppl:.2f}")
    table.add_row("log-perplexity gap", "", f"{comparison.log_ppl_gap:+.3f}")
    table.add_row("bits per byte", f"{dense.bits_per_byte:.3f}", f"{pruned.bits_per_byte:.3f}")
    table.add_row("sparsity of the pruned linears", percent(0), percent(report["sparsity"]["achieved"]))
    table.add_row("time to prune", "", seconds(report["seconds"]["total"]))
    table.add_row("time of the whole demo", "", seconds(total))
    table.add_row("peak memory", "", memory_of(report))
    return [
        Text("SmolLM2-135M-Instruct, SparseLLM", style="bold"),
        table,
        Text(f"Text: {EMBEDDED}, calibration and held-out parts apart."),
        Text("It says how two models compare, not how good either is.", style="dim"),
        Text(protocol(pruned), style="dim"),
        *warning_lines(report["warnings"]),
        command("Check:", "secateur", "inspect", report["out"]),
        command("Next:", *AFTER_DEMO),
    ]
