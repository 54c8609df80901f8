"""Secateur from Python: ``prune``, ``train``, ``quantize``, ``evaluate``; the command line is a thin skin over them.

    result = prune("HuggingFaceTB/SmolLM2-135M-Instruct", PruneConfig(sparsity=0.5), data="c4", out="smaller")
    result.model, result.records, result.report

``prune`` changes the model it works on. With ``out`` it saves, opens what it has saved again, and fails unless every
promise is kept; nothing appears at ``out`` before that. Memory: the model once, in host memory, plus what
``pruning/oneshot.py`` and ``evaluation/perplexity.py`` state.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from secateur.config import Device, Dtype, PruneConfig
from secateur.data.sources import Texts, read_texts
from secateur.errors import UsageError
from secateur.evaluation.perplexity import PerplexityResult, evaluate_text
from secateur.evaluation.tasks import Score, ScorePair, check_tasks, scores, task_list
from secateur.models.durable import STATE, unfinished_of
from secateur.models.load import Loaded, check_source, load
from secateur.models.offload import moved
from secateur.models.save import OWN, place_of, refuse_nested, refuse_occupied
from secateur.pruning.ranks import launched
from secateur.report.artefact import finished_report
from secateur.report.comparison import Comparison, compare
from secateur.report.facts import Stopwatch
from secateur.report.progress import Progress
from secateur.runs import PruneRun, Result, lasting, open_model, resolve_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from secateur.pruning.oneshot import BlockRecord
    from secateur.quantize_config import QuantizeConfig
    from secateur.runs import Source
    from secateur.train_config import TrainConfig
    from secateur.training.loop import StepRecord

Record = TypeVar("Record")


class Prepared(Protocol[Record]):
    """A run with everything settled."""

    @property
    def identity(self) -> dict[str, Any]: ...
    @property
    def watch(self) -> Stopwatch: ...
    def into(self, out: Path, resume: bool) -> Result[Record]: ...
    def reopened(self, out: Path, report: dict[str, Any]) -> Result[Record]: ...


def _written(
    place: Path, resume: bool, prepare: Callable[[], Prepared[Record]], *sources: "Source | None"
) -> Result[Record]:
    """The run to a directory; nothing is done where it is complete and to be gone on with.

    UsageError where it lies in one of ``sources``, or one of them in it, where a file there is not ours, and where
    another run is to be gone on with.
    """
    for source in sources:
        if isinstance(source, str | os.PathLike):
            refuse_nested(place, Path(lasting(os.fspath(source))))
    refuse_occupied(place, overwrite=True)
    unfinished = unfinished_of(place)
    if not resume and (unfinished / STATE).exists():
        raise UsageError(f"{unfinished} holds an unfinished run; repeat its command with --resume, or delete it first")
    run = prepare()
    if resume and (report := finished_report(place / OWN, run.identity, replace=unfinished.exists())) is not None:
        run.watch.progress.stage(f"{place} is complete: nothing was left to do")
        return run.reopened(place, report)
    if (place / OWN).exists():
        run.watch.progress.note(f"{place} holds an earlier result, which this run will replace")
    return run.into(place, resume)


def prune(
    model: "Source",
    config: PruneConfig,
    data: str | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> "Result[BlockRecord]":
    """Prune a model, given by its source or as an object (then with its tokenizer), which is changed in place.

    ``data`` overrides ``config.data``. ``out`` is a directory that does not exist yet or that an earlier run wrote;
    while the run lasts, its finished blocks are kept beside it, and ``resume`` goes on with them. Processes that
    torchrun started prune together.
    """
    config = replace(config, data=data or config.data)
    watch = Stopwatch(progress)
    with launched() as ranks:
        if out is None:
            return PruneRun.prepare(model, tokenizer, config, watch, ranks).in_memory()
        return _written(place_of(out), resume, lambda: PruneRun.prepare(model, tokenizer, config, watch, ranks), model)


def load_pruned(
    directory: str | os.PathLike[str], *, dtype: Dtype = "auto"
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The model and tokenizer that ``prune`` saved, ready to generate, low-rank branches attached where there are any.

    ``from_pretrained`` opens the same directory without its branches. ModelError where nothing usable lies there.
    """
    loaded = load(os.fspath(directory), dtype=dtype)
    loaded.model.config.use_cache = True
    return loaded.model, loaded.tokenizer


# ---- training


def train(
    student: "str | os.PathLike[str] | Loaded",
    config: "TrainConfig",
    *,
    teacher: "str | os.PathLike[str] | Loaded | None" = None,
    out: str | os.PathLike[str],
    resume: bool = False,
    progress: Progress | None = None,
) -> "Result[StepRecord]":
    """Train a model sparse by distilling a teacher: by default what the student was pruned from, or the student itself.

    ``out`` is a directory that does not exist yet or that an earlier run wrote; ``resume`` goes on with a run to it
    that was stopped. A student that is given loaded is changed in place. A tracker's files go beside it, ``OUT.logs``.
    """
    from secateur.train_runs import TrainRun

    place, watch = place_of(out), Stopwatch(progress)
    logs = place.with_name(place.name + ".logs")
    return _written(place, resume, lambda: TrainRun.prepare(student, teacher, config, watch, logs), student, teacher)


# ---- quantization


def quantize(
    model: "Source",
    config: "QuantizeConfig",
    *,
    out: str | os.PathLike[str],
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> "Result[BlockRecord]":
    """Quantize a model, given by its source or as an object (then with its tokenizer), which is changed in place.

    ``out`` is a directory that does not exist yet or that an earlier run wrote; it is in the compressed-tensors form.
    ``resume`` goes on with a run to it that was stopped. Needs the extra ``quantize``, and one process.
    """
    from secateur.quantize_runs import QuantizeRun

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("quantize runs in one process; start it without torchrun")
    watch = Stopwatch(progress)
    return _written(place_of(out), resume, lambda: QuantizeRun.prepare(model, tokenizer, config, watch), model)


# ---- evaluation


def evaluate(
    model: "Source",
    data: str | Sequence[str],
    *,
    baseline: "Source | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    seq_len: int = 2048,
    limit: int | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch: int = 1,
    progress: Progress | None = None,
) -> list[Comparison]:
    """Perplexity of a model, and of a baseline beside it, on each text. ``limit`` windows of ``seq_len`` at most."""
    texts = [data] if isinstance(data, str) else data
    return measure(
        model, texts, [], baseline=baseline, tokenizer=tokenizer, seq_len=seq_len, limit=limit, device=device,
        dtype=dtype, batch=batch, progress=progress,
    )[0]  # fmt: skip


def evaluate_tasks(
    model: "Source",
    tasks: str | Sequence[str],
    *,
    baseline: "Source | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    limit: int | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch: int = 1,
    progress: Progress | None = None,
) -> list[ScorePair]:
    """Scores on lm-eval's tasks, by name or as .yaml files, and a baseline's beside them. ``limit`` questions of each.

    Needs the extra ``eval``. UsageError for an unknown task; DataError where its questions cannot be had.
    """
    asked = [tasks] if isinstance(tasks, str) else tasks
    return measure(
        model, [], asked, baseline=baseline, tokenizer=tokenizer, limit=limit, device=device, dtype=dtype, batch=batch,
        progress=progress,
    )[1]  # fmt: skip


def measure(
    model: "Source",
    data: Sequence[str],
    tasks: Sequence[str],
    *,
    baseline: "Source | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    seq_len: int = 2048,
    limit: int | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch: int = 1,
    progress: Progress | None = None,
) -> tuple[list[Comparison], list[ScorePair]]:
    """``evaluate`` on the texts and ``evaluate_tasks`` on the tasks, each model opened once."""
    watch, wanted = Stopwatch(progress), task_list(tasks)
    if wanted:
        check_tasks(wanted)  # before the texts are measured, which takes a while
    texts = [read_texts(name, "evaluation") for name in data]
    if isinstance(baseline, str | os.PathLike):
        check_source(os.fspath(baseline))

    def measured(which: "Source") -> tuple[list[PerplexityResult], list[Score]]:
        with _opened(which, tokenizer, device, dtype, watch) as loaded:
            results = [_perplexity(loaded, text, seq_len, limit, batch, watch.progress) for text in texts]
            return results, _scores(loaded, wanted, limit, batch, watch.progress) if wanted else []

    results, found = measured(model)
    if baseline is None:
        return [Comparison(result) for result in results], [ScorePair(score) for score in found]
    others, theirs = measured(baseline)
    return (
        [compare(result, other) for result, other in zip(results, others, strict=True)],
        [ScorePair(score, other) for score, other in zip(found, theirs, strict=True)],
    )


@contextmanager
def _opened(
    which: "Source", tokenizer: "PreTrainedTokenizerBase | None", device: Device, dtype: Dtype, watch: Stopwatch
) -> "Iterator[Loaded]":
    """A model on its device; one that was given as an object goes back to where it was."""
    place = resolve_device(device)
    loaded = open_model(which, tokenizer, dtype, watch, codes=True)
    with moved(loaded.model, place):
        yield loaded


def _perplexity(
    loaded: Loaded, texts: Texts, seq_len: int, limit: int | None, batch: int, progress: Progress
) -> PerplexityResult:
    progress.stage(f"perplexity of {loaded.source} on {texts.name}")
    return evaluate_text(
        loaded.model, loaded.tokenizer, texts, seq_len=seq_len, limit=limit, batch=batch, progress=progress.update
    )


def _scores(
    loaded: Loaded, tasks: Sequence[str | dict[str, Any]], limit: int | None, batch: int, progress: Progress
) -> list[Score]:
    progress.stage(f"tasks of {loaded.source}")
    return scores(loaded.model, loaded.tokenizer, tasks, limit=limit, batch=batch, update=progress.update)
