"""What ``secateur train`` prints: what was done, what it brought, and the command that measures it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from secateur.core.losses import Distillation
from secateur.report.stored_page import room_rows
from secateur.report.tables import (
    command,
    eval_command,
    facts,
    low_rank_row,
    memory_of,
    percent,
    seconds,
    size,
    skipped_lines,
    time_of,
    warning_lines,
)

if TYPE_CHECKING:
    from secateur.evaluation.perplexity import PerplexityResult
    from secateur.training.loop import StepRecord

DIVERGENCES = {"forward": "forward KL", "reverse": "reverse KL", "jensen-shannon": "Jensen-Shannon"}
"""What each ``loss.divergence`` is called; no alpha and no T² is in what is told."""


def demo_tables(
    report: dict[str, Any], records: "Sequence[StepRecord]", told: "dict[str, PerplexityResult]", total: float
) -> list[RenderableType]:
    """Two tables: perplexity of the dense, the pruned and the trained model; some steps on the way."""
    table = Table("perplexity on held-out text", *told, box=None, header_style="bold")
    table.add_row("", *(f"{result.ppl:.2f}" for result in told.values()))
    steps = Table("step", "forward KL at temperature 2", "masks moved", box=None, header_style="bold")
    for record in [*records[:-1:4], records[-1]]:
        steps.add_row(str(record.step), f"{record.divergence:.3f}", f"{record.flip_rate:.1e}")
    for column in (*table.columns[1:], *steps.columns):
        column.justify = "right"
    return [
        Text("SmolLM2-135M-Instruct at 2:4: one shot by Wanda, then trained with AST", style="bold"),
        table,
        steps,
        Text(f"{report['tokens']:,} tokens, {report['tokens_per_second']:.0f} a second; {seconds(total)} in all."),
        Text("Text: CPython's own help text; what is learnt from and what is measured on are apart.", style="dim"),
        command("Check:", "secateur", "inspect", report["out"]),
        command("Next:", "secateur", "train", "demo", "--data", "c4", "--tokens", "300000", "--out", "trained"),
    ]


def cache_summary(told: dict[str, Any]) -> list[RenderableType]:
    """What was kept, and the command that learns from it."""
    cache, data = told["cache"], [flag for name in told["data"] for flag in ("--data", name)]
    heat = cache["temperature"]
    loss = [] if heat == Distillation.temperature else ["--set", f"loss.temperature={heat:g}"]
    tokens = cache["windows"] * cache["seq_len"]
    rows = {
        "text": f"{cache['windows']} windows of {cache['seq_len']} tokens",
        "kept": f"{cache['k']} tokens of each distribution at temperature {cache['temperature']:g}",
        "size": f"{size(told['bytes'])}, {told['bytes'] / tokens:.0f} bytes a token",
        "time": seconds(told["seconds"]),
    }
    return [
        *facts(f"answers of {cache['teacher']}", rows),
        command(
            "Next:",
            "secateur",
            "train",
            cache["teacher"],
            "--teacher",
            told["out"],
            *data,
            "--seq-len",
            str(cache["seq_len"]),
            *loss,
            "--tokens",
            str(tokens),
            "--out",
            "trained",
        ),
    ]


def train_summary(report: dict[str, Any]) -> list[RenderableType]:
    """A dozen lines."""
    before, after = report["held_out"]["before"], report["held_out"]["after"]
    words, sparse, loss = report["pattern"]["words"], report["weights"] > 0, report["recipe"]["loss"]
    rows = {
        "pattern": f"{report['recipe']['pattern']}: {words}" if sparse else words,
        "sparse": f"{report['linears']} linears, {report['weights']:,} weights, {percent(report['sparsity'])}",
        "skipped": skipped_lines(report["skipped"]),
        "teacher": report["teacher"]["source"],
        "trained": f"{report['steps']} steps, {report['tokens']:,} tokens ({report['epochs']:.2f} epochs), "
        f"{report['tokens_per_second']:.0f} tokens/s",
        "from the teacher": f"{before['divergence']:.4f} -> {after['divergence']:.4f} nats on held-out windows, "
        f"{DIVERGENCES[loss['divergence']]} at temperature {loss['temperature']:g}{_cached(report['teacher'])}",
        "text": f"{before['cross_entropy']:.4f} -> {after['cross_entropy']:.4f} nats on the same",
        **({"masks": f"{report['flip_rate']:.2e} of them changed at the last refresh"} if sparse else {}),
        **low_rank_row(report["low_rank"]),
        **room_rows(report.get("room")),
        "time": time_of(report["seconds"]),
        "peak memory": memory_of(report),
    }
    return [
        *facts(f"{report['student']['source']} trained with {report['recipe']['method']}", rows),
        *warning_lines(report["warnings"]),
        Text(f"saved to {report['out']}, opened again{': every promise is kept' if sparse else ''}", style="green"),
        command("Next:", *eval_command(report["out"], report["teacher"]["source"], _measured(report))),
    ]


def _cached(teacher: dict[str, Any]) -> str:
    return " between the tokens of the cache, the rest as one" if teacher.get("cached") else ""


def _measured(report: dict[str, Any]) -> dict[str, Any]:
    return {"name": report["data"][0]["name"], "seq_len": report["recipe"]["seq_len"]}
