"""What pages are made of, and those of eval, inspect and demo: parts, top to bottom; the command line prints them."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from secateur.evaluation.inspect import Inspection
    from secateur.evaluation.perplexity import PerplexityResult
    from secateur.evaluation.tasks import Score, ScorePair
    from secateur.report.comparison import Comparison

EMBEDDED = "CPython's own help text (pydoc_data.topics)"
AFTER_DEMO = shlex.split("secateur prune demo --pattern 2:4 --data embedded --samples 16 --seq-len 512 --out smaller")
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


# ---- eval


def eval_tables(model: str, baseline: str | None, results: Sequence["Comparison"]) -> list[RenderableType]:
    """Perplexities side by side, then every choice behind them."""
    columns = ["text", "perplexity", "bits per byte"]
    if baseline is not None:
        columns += ["baseline perplexity", "baseline bits per byte", "log-perplexity gap"]
    table = Table(*columns, box=None, header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for comparison in results:
        table.add_row(text_name(comparison.result.text), *_numbers(comparison))
    against = f", baseline {baseline}" if baseline is not None else ""
    notes = [Text(f"{c.result.text}: {c.note}", style="yellow") for c in results if c.note]
    protocols = dict.fromkeys(protocol(c.result) for c in results)
    return [Text(f"{model}{against}", style="bold"), table, *notes, *(Text(p, style="dim") for p in protocols)]


def _numbers(comparison: "Comparison") -> list[str]:
    pair = [comparison.result] if comparison.baseline is None else [comparison.result, comparison.baseline]
    numbers = [text for one in pair for text in (f"{one.ppl:.4g}", f"{one.bits_per_byte:.4f}")]
    if comparison.baseline is None:
        return numbers
    return [*numbers, "none" if comparison.log_ppl_gap is None else f"{comparison.log_ppl_gap:+.4f}"]


def task_table(model: str, baseline: str | None, pairs: Sequence["ScorePair"]) -> list[RenderableType]:
    """Scores with their standard errors, the baseline's, and the difference on the same questions."""
    more = ["baseline", "difference"] if baseline is not None else []
    table = Table("task", "metric", "questions", "score", *more, box=None, header_style="bold")
    for column in table.columns[2:]:
        column.justify = "right"
    for pair in pairs:
        row = [pair.score.task, pair.score.metric, str(pair.score.samples), _with_error(pair.score)]
        if pair.baseline is not None and pair.gap is not None:
            error = "" if pair.gap_stderr is None else f" ± {pair.gap_stderr:.4f}"
            row += [_with_error(pair.baseline), f"{pair.gap:+.4f}{error}"]
        table.add_row(*row)
    against = f", baseline {baseline}" if baseline is not None else ""
    errors = Text("± one standard error; of a difference, over the same questions", style="dim")
    return [Text(f"{model}{against}", style="bold"), table, errors]


def _with_error(score: "Score") -> str:
    return f"{score.value:.4f}" + ("" if score.stderr is None else f" ± {score.stderr:.4f}")


def protocol(result: "PerplexityResult") -> str:
    """Every choice that changes a perplexity, in one line."""
    return (
        f"{result.text}: {result.windows} windows of {result.seq_len} tokens, overlap {result.overlap}, documents"
        f" joined by {result.joiner!r}, BOS {result.bos}, weights {result.dtype}, loss {result.loss_dtype}"
    )


# ---- inspect


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


# ---- demo


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
