"""Accuracy on tasks, by EleutherAI's lm-eval: its tasks, prompts and scores are the field's, and none is written anew.

What is added is the comparison. Two models answer the same questions, so their difference is judged question by
question, which is sharper than two standard errors side by side. Memory and time are those of the model's forwards.
"""

import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from secateur.errors import DataError, UsageError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INSTALL = "`pip install -e '.[eval]'` in the clone"
Update = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Score:
    """One metric of one task."""

    task: str
    metric: str
    """lm-eval's name; its filter in brackets, where there is one."""
    value: float
    samples: int
    answers: tuple[float, ...] | None
    """Of every question, where ``value`` is their mean."""

    @property
    def stderr(self) -> float | None:
        return None if self.answers is None else standard_error(self.answers)


@dataclass(frozen=True)
class ScorePair:
    """A model's score, and a baseline's where one was given."""

    score: Score
    baseline: Score | None = None

    @property
    def gap(self) -> float | None:
        """Score less the baseline's."""
        return None if self.baseline is None else self.score.value - self.baseline.value

    @property
    def gap_stderr(self) -> float | None:
        """Of the mean difference on the same questions; None where one of the two is no mean over questions."""
        one, other = self.score.answers, self.baseline.answers if self.baseline else None
        if one is None or other is None or len(one) != len(other):
            return None
        return standard_error([a - b for a, b in zip(one, other, strict=True)])

    def to_dict(self) -> dict[str, Any]:
        pair = {"score": self.score, "baseline": self.baseline}
        told = {name: {**asdict(one), "stderr": one.stderr} if one else None for name, one in pair.items()}
        return {**told, "gap": self.gap, "gap_stderr": self.gap_stderr}


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def task_list(names: Sequence[str]) -> list[str | dict[str, Any]]:
    """Names as they are; files ending in .yaml as the task that they describe. UsageError for what is no such file."""
    return [_from_file(Path(name)) if name.endswith((".yaml", ".yml")) else name for name in names]


def _from_file(path: Path) -> dict[str, Any]:
    try:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{path} is no task that can be read ({first_line(error)})") from error
    if not isinstance(told, dict) or "task" not in told:
        raise UsageError(f"{path} is no task: an lm-eval task file has a key `task`, its name")
    return told


def check_tasks(tasks: Sequence[str | dict[str, Any]]) -> None:
    """UsageError where lm-eval is not there, or does not know a name."""
    if find_spec("lm_eval") is None:
        raise UsageError(f"tasks need lm-eval, which is not installed; install it with {INSTALL}")
    if unknown := [name for name in tasks if isinstance(name, str) and not _manager().match_tasks([name])]:
        raise UsageError(
            f"unknown task {unknown[0]!r}; `lm-eval ls tasks` lists all, or give a .yaml file that describes one"
        )


def scores(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str | dict[str, Any]],
    *,
    limit: int | None = None,
    batch: int = 1,
    update: Update | None = None,
) -> list[Score]:
    """Every metric of every task, in lm-eval's order. ``limit`` questions of each task at most.

    UsageError for a task that lm-eval does not know; DataError where its questions cannot be had.
    """
    check_tasks(tasks)
    told = import_module("lm_eval").simple_evaluate(
        _counted(model, tokenizer, batch, update or (lambda *_: None)),
        tasks=list(tasks),
        limit=limit,
        bootstrap_iters=0,
        task_manager=_manager(),
    )
    return list(_scores(told))


@cache
def _manager() -> Any:
    """All tasks that lm-eval brings, which takes seconds to list; what fails to load is told from what fails later."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager: Any = import_module("lm_eval.tasks").TaskManager

    class Manager(manager):
        def load(self, tasks: Any) -> Any:
            try:
                return super().load(tasks)
            except Exception as error:  # whatever a task's own code, datasets or the network raises
                names = ", ".join(task if isinstance(task, str) else task["task"] for task in tasks)
                raise DataError(f"the questions of {names} could not be loaded: {first_line(error)}") from error

    return Manager()


def _counted(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch: int, update: Update) -> Any:
    """lm-eval's adapter, with our progress in place of its own."""
    adapter: Any = import_module("lm_eval.models.huggingface").HFLM

    class Counted(adapter):
        total = done = 0

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            self.total, self.done = len(requests), 0
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def _model_call(self, inps: Any, *args: Any, **kwargs: Any) -> Any:
            found = super()._model_call(inps, *args, **kwargs)
            self.done = min(self.done + len(inps), self.total)
            update(self.done, self.total, "answers")
            return found

    return Counted(pretrained=model, tokenizer=tokenizer, batch_size=batch)


def _scores(told: Any) -> Iterator[Score]:
    for task, found in told["results"].items():
        rows = told["samples"].get(task, [])
        for key, value in found.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            own = [row[metric] for row in rows if row["filter"] == kind and metric in row]
            name = metric if kind == "none" else f"{metric} ({kind})"
            yield Score(task, name, float(value), len(own), _answers(own, value))


def _answers(values: list[Any], value: float) -> tuple[float, ...] | None:
    """As numbers, where the metric is their mean."""
    if not values or not all(isinstance(one, int | float) for one in values):
        return None
    return tuple(map(float, values)) if math.isclose(statistics.fmean(values), value, abs_tol=1e-9) else None
