"""What can be said about the pruning methods, read from their classes: needs, options, defaults, paper."""

import ast
import inspect
import re
import sys
import textwrap
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from secateur.config import METHODS, method_to_dict

_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_NEEDS = {"gram": "Gram matrix of the inputs", "diag": "norms of the inputs", "nothing": "no text"}


def describe_methods() -> list[dict[str, Any]]:
    """One dictionary per method, in the order of the table METHODS."""
    return [_describe(name, cls) for name, cls in METHODS.items()]


def _describe(name: str, cls: type) -> dict[str, Any]:
    title = (sys.modules[cls.__module__].__doc__ or "").splitlines()[0]  # "Wanda (arXiv:2306.11695): what it does."
    paper = _ARXIV.search(title)
    docs = field_docs(cls)
    options = [{"name": f.name, "default": _plain(f.default), "doc": docs.get(f.name, "")} for f in fields(cls)]
    return {
        "name": name,
        "about": title.partition(": ")[2],
        "needs": _NEEDS[cls.needs],
        "arxiv": paper[1] if paper else None,
        "options": options,
    }


def field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass, on one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    return {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(doc, ast.Expr)
        and isinstance(doc.value, ast.Constant)
        and isinstance(doc.value.value, str)
    }


def _plain(value: Any) -> Any:
    """A default as a recipe would write it; a solver with nothing but defaults is its name."""
    if not is_dataclass(value):
        return value
    return method_to_dict(value)["name"] if value == type(value)() else method_to_dict(value)  # type: ignore[arg-type]


def methods_tables(described: list[dict[str, Any]]) -> list[RenderableType]:
    """Methods first, then each one's options with what they mean."""
    overview = Table("method", "what it does", "needs", "arXiv", box=None, header_style="bold")
    options = Table("method", "option", "default", "meaning", box=None, header_style="bold")
    for method in described:
        overview.add_row(method["name"], method["about"], method["needs"], method["arxiv"] or "")
        for option in method["options"]:
            options.add_row(method["name"], option["name"], str(option["default"]), option["doc"])
    hint = "--method sparsellm --set method.inner=sparsegpt --set method.inner.damp=0.05"
    return [overview, Text(), options, Text(), Text.assemble("Set an option with  ", (hint, "cyan"))]
