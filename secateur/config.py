"""The recipe: one typed config behind flags, a YAML file and Python.

A recipe file is a YAML mapping with the fields of ``PruneConfig`` and ``model``. What is left out takes its default; a
key that nobody knows is an error that names its nearest neighbours. A method is a name, or a mapping with its options,
and so is the solver inside it:

    model: HuggingFaceTB/SmolLM2-135M-Instruct
    method: {name: sparsellm, mode: closed, inner: {name: admm, iterations: 40}}
    pattern: 2:4

``apply_sets`` changes one leaf from the command line: ``--set method.inner.iterations=40``.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from secateur.core.pattern import Pattern, make_pattern, tapered, tapered_words
from secateur.core.solvers import SOLVERS, Solver
from secateur.core.sparsellm import SparseLLM
from secateur.errors import UsageError

Method = SparseLLM | Solver
METHODS: dict[str, type[Method]] = {"sparsellm": SparseLLM, **SOLVERS}
DEFAULT_METHOD = SparseLLM()

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bfloat16"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]

_BLOCKS = re.compile(r"(\d+):(\d+)")
EXPRESSIONS = ("include", "ignore")
"""Fields that hold regular expressions; in a recipe, a list of them or a single one."""


@dataclass(frozen=True)
class PruneConfig:
    """What to prune, how far, on which text. ValueError where the fields contradict each other."""

    method: Method = DEFAULT_METHOD
    """The method and its options, see ``secateur methods``."""
    sparsity: float | None = None
    """Share of zeros in [0, 1). Needed by every pattern but N:M, which says it itself."""
    pattern: str = "unstructured"
    """Where zeros may lie: unstructured, row, N:M (N kept of every M) or block:RxC."""
    taper: float = 0.0
    """By how much the sparsity of the last block is above ``sparsity``, and that of the first below it; it rises evenly
    between them (arXiv:2502.14770). Not with N:M."""
    data: str = "c4"
    """Calibration text: a name like c4 or wikitext2, ``hf:ID[:config][:split][:column]``, a file, or ``embedded``."""
    samples: int = 128
    """Calibration windows."""
    seq_len: int = 2048
    """Tokens in each window."""
    seed: int = 0
    """Chooses the windows. The same recipe gives the same bytes."""
    low_rank: int = 0
    """Rank of a branch beside every pruned linear, fitted to what its output lacks and never trained; 0 = none. Saved
    apart from the weights, in ``low_rank/``."""
    blocks: str = "all"
    """Which decoder blocks: all, first-half, or A:B (from A up to but without B, counted from 0)."""
    include: tuple[str, ...] = ()
    """Regular expressions, searched in the full names of the blocks' linears: prune what one matches; none = all."""
    ignore: tuple[str, ...] = ()
    """The same, of linears to leave as they are; wins over include."""
    device: Device = "auto"
    """Where one block at a time is worked on; auto takes cuda where there is one."""
    dtype: Dtype = "auto"
    """Type that the model is loaded and saved in; auto keeps the checkpoint's."""
    batch: int = 1
    """Windows that go through a block together. More is faster and needs more memory."""
    offload: Literal["auto", "on", "off"] = "auto"
    """Leave the blocks of a model directory in their files and read them one at a time; auto where they exceed half of
    the free memory. Needs ``out``. Changes no weight."""
    hidden_memory: float = 8.0
    """Host memory for hidden states that wait, in GB; what does not fit waits on disk beside OUT. Changes no weight."""
    precision: Precision = "auto"
    """Of products in forwards and Gram matrices; auto takes bfloat16 where the device multiplies it."""

    def __post_init__(self) -> None:
        tapered(make_pattern(self.pattern, self.sparsity), 0.0, self.taper)
        least = {"samples": 1, "seq_len": 2, "seed": 0, "batch": 1, "hidden_memory": 0, "low_rank": 0}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)}")
        check_blocks(self.blocks)
        for name in EXPRESSIONS:
            check_expressions(name, getattr(self, name))

    @property
    def target(self) -> Pattern:
        """The pattern asked for, as a value."""
        return make_pattern(self.pattern, self.sparsity)

    @property
    def words(self) -> str:
        return tapered_words(self.target, self.taper)

    @property
    def needs_text(self) -> bool:
        """Whether anything but the weights decides: the method, or branches that are fitted to outputs."""
        return self.method.needs != "nothing" or self.low_rank > 0

    def block_range(self, total: int) -> range:
        """The chosen blocks of a model that has ``total``."""
        return chosen_blocks(self.blocks, total)

    def to_dict(self) -> dict[str, Any]:
        """The form of a recipe file."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        lists = {name: list(values[name]) for name in EXPRESSIONS}
        return {**values, **lists, "method": method_to_dict(self.method)}


def check_blocks(blocks: str) -> None:
    """ValueError for what names no blocks."""
    if blocks not in ("all", "first-half") and not _BLOCKS.fullmatch(blocks):
        raise ValueError(f"blocks must be 'all', 'first-half' or 'A:B' like 0:15, got {blocks!r}")


def chosen_blocks(blocks: str, total: int) -> range:
    """The blocks meant, of a model that has ``total``; first-half of an odd number leaves the middle one out."""
    if found := _BLOCKS.fullmatch(blocks):
        start, stop = int(found[1]), int(found[2])
        if not start < stop <= total:
            raise UsageError(f"blocks {blocks} do not lie in this model; it has {total}, so at most 0:{total}")
        return range(start, stop)
    return range(total if blocks == "all" else total // 2)


def check_expressions(name: str, expressions: tuple[str, ...]) -> None:
    """ValueError for what is no tuple of regular expressions."""
    if isinstance(expressions, str):
        raise ValueError(f"{name} wants a tuple of regular expressions, got the string {expressions!r}; add a comma")
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            raise ValueError(f"{name} {expression!r} is no regular expression: {error}; escape it or fix it") from None


def method_to_dict(method: Method) -> dict[str, Any]:
    """Name and options of a method; solvers inside it likewise."""
    name = next(name for name, cls in METHODS.items() if type(method) is cls)
    values = {f.name: getattr(method, f.name) for f in fields(method)}
    return {"name": name, **{k: method_to_dict(v) if isinstance(v, Method) else v for k, v in values.items()}}


def method_from_dict(data: Any, where: str = "method", default: Method = DEFAULT_METHOD) -> Method:
    """The method that a recipe means: a name, or a mapping whose ``name`` may be left out for ``default``'s."""
    known = METHODS if where == "method" else SOLVERS
    options: dict[str, Any] = {"name": data} if isinstance(data, str) else dict(_mapping(data, where))
    name = options.pop("name", method_to_dict(default)["name"])
    if not isinstance(name, str) or name not in known:
        raise UsageError(f"unknown {where} {name!r}{_nearest(str(name), known)}; known: {', '.join(known)}")
    inside = {f.name: f.default for f in fields(METHODS[name]) if isinstance(f.default, Method)}
    for key in inside.keys() & options.keys():
        options[key] = method_from_dict(options[key], f"{where}.{key}", inside[key])
    return build(METHODS[name], options, where)


def config_from_dict(data: Mapping[str, Any]) -> PruneConfig:
    """A config from the form of a recipe file (without ``model``); UsageError for anything that does not fit."""
    values = dict(data)
    if "method" in values:
        values["method"] = method_from_dict(values["method"])
    values |= {name: [values[name]] for name in EXPRESSIONS if isinstance(values.get(name), str)}
    return build(PruneConfig, values, "")


def build(cls: type, values: Any, where: str) -> Any:
    """An instance of a dataclass with unknown keys refused and values checked and converted by pydantic."""
    known = [f.name for f in fields(cls)]
    for key in _mapping(values, where):
        if key not in known:
            path = f"{where}.{key}" if where else key
            raise UsageError(f"unknown recipe key {path!r}{_nearest(str(key), known)}; known: {', '.join(known)}")
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise UsageError(_one_line(error, where)) from None


def _one_line(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    own = first.get("ctx", {}).get("error")
    if isinstance(own, ValueError):  # raised by a __post_init__, it says everything itself
        return str(own)
    path = ".".join([*filter(None, [where]), str(first["loc"][0])])
    return f"{path}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"


def _nearest(word: str, known: Iterable[str]) -> str:
    near = get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


def _mapping(data: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise UsageError(f"{where} must be a mapping of keys to values, got {data!r}")
    return data


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are those of version 1.2: in 1.1, ``2:4`` is the number 124 and ``1e-3`` a string."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (the base class's own form)
        first: [(tag, rule) for tag, rule in rules if not tag.endswith((":int", ":float"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """Puts quotes around strings that would be read as numbers by either version."""


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9]\d*)$"), list("-+0123456789"))
    _yaml.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$"), list("-+.0123456789")
    )


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a 40th of May
        reason = " ".join(str(error).split())
        raise UsageError(f"{where} is not YAML: {reason}") from None


def load_recipe(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the recipe {path}: {error.strerror}; give a YAML file") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"the recipe {path} is not YAML: {error}") from None
    return dict(_mapping(_parse_yaml(text, f"the recipe {path}"), f"the recipe {path}"))


def dump_recipe(recipe: Mapping[str, Any]) -> str:
    """A recipe file's text; ``load_recipe`` reads it back to the same mapping."""
    return yaml.dump(dict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def apply_sets(data: dict[str, Any], sets: Iterable[str]) -> dict[str, Any]:
    """A copy of a recipe with ``a.b=c`` applied one after the other; c is read as YAML."""
    result = dict(data)
    for text in sets:
        path, equals, value = text.partition("=")
        if not equals or not all(path.split(".")):
            raise UsageError(f"--set wants key=value like method.inner=admm, got {text!r}")
        _set(result, path.split("."), _parse_yaml(value, f"the value of --set {text}"))
    return result


def _set(node: dict[str, Any], keys: list[str], value: Any) -> None:
    head, *rest = keys
    if not rest:
        node[head] = value
        return
    child = node.get(head, {})
    node[head] = {"name": child} if isinstance(child, str) else dict(_mapping(child, head))
    _set(node[head], rest, value)
