"""Options that several verbs share, and how a verb prints."""

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click
from rich.console import Console, RenderableType
from rich.text import Text

from secateur.report.jsonable import dumps

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
debug_option = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of a failure.")
resume_option = click.option("--resume", is_flag=True, help="Go on with a run to the same OUT that was stopped.")
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="Where to compute; auto takes cuda where there is one.  [default: auto]",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Type of the weights, as loaded and as saved where anything is; auto keeps the checkpoint's.  [default: auto]",
)
DATA_HELP = "wikitext2, c4, ptb, embedded, hf:ID[:config][:split][:column], or a .txt, .jsonl or .parquet file."
PIPE_WIDTH = 140
"""Columns of a table where stdout is no terminal."""


def first_process() -> bool:
    """False in all processes of torchrun but the first, which speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def emit(as_json: bool, data: Any, *parts: RenderableType) -> None:
    """The result on stdout: JSON, or tables and lines, top to bottom. A line is never folded: it may be a command."""
    if not first_process():
        return
    if as_json:
        click.echo(dumps(data))
        return
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, Text))
