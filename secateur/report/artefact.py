"""The files of ``OUT/secateur/``: what was asked for, what happened, and what the weights beside it promise.

    recipe.yaml     what was asked for, all of it; running it again gives the same bytes
    run.json        everything that decides the bytes: the recipe, fingerprints of model and tokens, versions
    records.jsonl   one line per block, or per step of training
    report.json     totals, seconds, memory, versions, provenance
    promise.json    pattern of every pruned weight, names that share one tensor, ranks of branches: ``secateur inspect``
    files.json      names of all files of OUT, by ``models.save``: an OUT that holds any other is never replaced

Only records and report hold what changes from run to run (seconds, memory).
"""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.models.durable import refuse_other
from secateur.report.jsonable import dumps

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from secateur.core.plan import Plan
    from secateur.models.promises import Inherited, Promise
    from secateur.pruning.oneshot import BlockRecord


def write_artefact(
    folder: Path,
    *,
    recipe: str,
    identity: dict[str, Any],
    records: Iterable[dict[str, Any]],
    promises: dict[str, Any],
) -> None:
    """All files but the report, which is written last, by ``write_report``."""
    folder.mkdir()
    (folder / "run.json").write_text(dumps(identity) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    lines = [dumps(record, indent=None) for record in records]
    (folder / "records.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    (folder / "promise.json").write_text(dumps(promises) + "\n", encoding="utf-8")


def write_report(folder: Path, report: dict[str, Any]) -> None:
    (folder / "report.json").write_text(dumps(report) + "\n", encoding="utf-8")


def finished_report(folder: Path, identity: dict[str, Any], *, replace: bool) -> dict[str, Any] | None:
    """The report of a complete directory that the very same run wrote; None where there is none.

    UsageError where another run wrote one that is not to be replaced.
    """
    try:
        then = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if then != (now := json.loads(dumps(identity))) and replace:
        return None
    refuse_other(folder.parent, then, now)
    return report


def read_records(folder: Path) -> list["BlockRecord"]:
    """The lines of ``records.jsonl``."""
    from secateur.pruning.records import block_record

    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return [block_record(json.loads(line)) for line in lines]


def promises_of(
    model: "PreTrainedModel", plan: "Plan", inherited: "Inherited", zeros: int | None = None
) -> dict[str, Any]:
    """What the saved weights will be held to. ``zeros``: of all planned linears, where they are promised together."""
    from secateur.models.branches import attached

    linears = {one.name: one.to_dict() for one in (*promised(model, plan), *inherited.promises)}
    ranks = {name: branch.X.shape[0] for name, branch in attached(model).items()}
    together = {} if zeros is None else {"zeros": zeros + inherited.zeros}
    return {"linears": linears, "tied": _tied(model)} | ({"low_rank": ranks} if ranks else {}) | together


def promised(model: "PreTrainedModel", plan: "Plan") -> list["Promise"]:
    """A plan's promises by the names and parts in which its linears are stored.

    Any linear that is neither an nn.Linear nor a part of fused experts (so a Conv1D) is stored as (in, out).
    """
    from secateur.models.linears import stored_transposed
    from secateur.models.promises import Promise
    from secateur.models.stored import stored

    transposed = {name for name, module in model.named_modules() if stored_transposed(module)}
    return [
        Promise(name if part else tensor, plan[name].pattern, name in transposed, tensor, part)
        for name, (tensor, part) in stored(model, plan).items()
    ]


def _tied(model: "nn.Module") -> list[list[str]]:
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [group for group in names.values() if len(group) > 1]
