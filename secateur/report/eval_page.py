"""What ``secateur eval`` prints: perplexities and scores of tasks, the baseline's beside them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from secateur.report.tables import text_name

if TYPE_CHECKING:
    from secateur.evaluation.perplexity import PerplexityResult
    from secateur.evaluation.tasks import Score, ScorePair
    from secateur.report.comparison import Comparison


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
