"""What ``secateur prune`` prints: what was done, what it takes, and the command that measures it."""

from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from secateur.report.stored_page import room_rows
from secateur.report.tables import (
    command,
    eval_command,
    facts,
    low_rank_row,
    memory_of,
    percent,
    skipped_lines,
    text_name,
    time_of,
    warning_lines,
)


def prune_summary(report: dict[str, Any]) -> list[RenderableType]:
    """What was done, in ten lines, and the command that measures it."""
    blocks = report["blocks"]
    rows = {
        "pattern": f"{report['recipe']['pattern']}: {report['pattern']['words']}",
        "pruned": f"{report['linears']} linears in {blocks['pruned']} of {blocks['total']} blocks,"
        f" {report['weights']:,} weights",
        "sparsity": _sparsity(report),
        **room_rows(report.get("room")),
        **low_rank_row(report["low_rank"]),
        **_left_alone(report["left_alone"]),
        "text": _text(report),
        "output error": _output_error(report["output_error"]),
        "dropped rows": str(report["dropped_rows"]),
        "skipped": skipped_lines(report["skipped"]),
        "time": time_of(report["seconds"]),
        "peak memory": memory_of(report),
    }
    method = report["recipe"]["method"]["name"]
    return [
        *facts(f"{report['model']['source']} pruned with {method}", rows),
        *warning_lines(report["warnings"]),
        *_after_pruning(report),
    ]


def _text(report: dict[str, Any]) -> str:
    data, method = report["data"], report["recipe"]["method"]["name"]
    if not data["needed"]:
        return f"none: {method} looks at the weights alone"
    return f"{text_name(data['name'])}, {data['samples']} x {data['seq_len']} tokens, seed {report['seed']}"


def _sparsity(report: dict[str, Any]) -> str:
    asked, got = report["sparsity"]["requested"], report["sparsity"]["achieved"]
    return f"{percent(asked)} asked, {percent(got)} achieved"


def _left_alone(names: Sequence[str]) -> dict[str, str]:
    """Said only of models that have a router."""
    return {"left alone": f"{len(names)} routers and gates of experts, the first {names[0]}"} if names else {}


def _output_error(error: dict[str, float] | None) -> str:
    if error is None:
        return "not measured"
    return f"{error['mean']:.4f} mean over blocks, {error['last']:.4f} last block (share of a block's work lost)"


def _after_pruning(report: dict[str, Any]) -> list[RenderableType]:
    """OUT and the next command; nothing where nothing was saved."""
    out = report["out"]
    if out is None:
        return []
    return [
        Text(f"saved to {out}, opened again: every promise is kept", style="green"),
        command("Next:", *eval_command(out, report["model"]["source"], report["data"])),
    ]
