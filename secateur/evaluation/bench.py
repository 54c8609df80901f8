"""Two models beside one another: time to the first token, tokens a second, memory, file size.

Each model runs in a process of its own, so that its memory is its own. They take turns: in every round each batch size
with each length of prompt is measured on one model and at once on the other, the order changing from round to round, so
that what the machine does meanwhile hits both. Told are medians over rounds with the quartiles; the speed-up is the
median of the rounds' ratios. The first round warms up and does not count. The process that waits does not spin.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil

from secateur.errors import ProcessError, SecateurError, UsageError
from secateur.models.runners import RUNTIMES, Opened, file_bytes, runtime_of

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
BUSY = 0.3
"""Load average, before anything is measured, from which on numbers are said to be taken under load."""


class Shape(NamedTuple):
    """So many rows of so many tokens."""

    batch: int
    prompt: int


@dataclass(frozen=True)
class BenchOptions:
    """What is measured."""

    runtime: str = "auto"
    """Of both models; auto goes by what lies in each directory, which may differ."""
    prompts: tuple[int, ...] = (128,)
    """Tokens of each row before the first new one."""
    tokens: int = 32
    """New tokens after the first, each timed."""
    batches: tuple[int, ...] = (1, 8)
    """Rows at once; each is measured with each prompt."""
    rounds: int = 5
    """Rounds that count."""
    threads: int = 0
    """Of each process; 0 takes OMP_NUM_THREADS, or else the machine's cores."""
    dtype: str = "auto"
    """Of transformers' models; auto keeps the checkpoint's."""
    device: str = "cpu"
    """Of transformers' models."""

    def __post_init__(self) -> None:
        for name in ("tokens", "rounds"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)}; wanted at least 1")
        for name in ("prompts", "batches"):
            if min(getattr(self, name), default=0) < 1:
                raise UsageError(f"{name} {getattr(self, name)}; wanted at least one, all of them 1 or more")

    @property
    def shapes(self) -> list["Shape"]:
        return [Shape(batch, prompt) for batch in self.batches for prompt in self.prompts]

    @property
    def used_threads(self) -> int:
        given = os.environ.get("OMP_NUM_THREADS", "")
        return self.threads or (int(given) if given.isdigit() else 0) or psutil.cpu_count(logical=False) or 1


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Cell:
    """One phase at one batch size and length of prompt. Seconds of a prompt, or of one token of every row."""

    phase: Phase
    batch: int
    prompt: int
    seconds: tuple[Spread, Spread]
    """Dense, pruned."""
    tokens_per_second: tuple[float, float]
    speedup: Spread
    """How many times as fast the second model is."""


def bench(dense: str, pruned: str, options: BenchOptions, update: Callable[[int, int, str], None]) -> dict[str, Any]:
    """All of it. ``update(done, total, what)`` is called after every measurement.

    UsageError, DeviceError, ArtefactError or ModelError for a model that cannot be run here, in its own line.
    """
    sources = (dense, pruned)
    runtimes = [runtime_of(source, options.runtime) for source in sources]
    if "transformers" not in runtimes:
        _refuse_unused(options, runtimes)
    for source, runtime in zip(sources, runtimes, strict=True):
        RUNTIMES[runtime].check(source, options.device)
    load = os.getloadavg()[0]
    with ExitStack() as stack:
        workers = [stack.enter_context(_worker(options.used_threads)) for _ in sources]
        opened = [
            _ask(worker, _opening(source, runtime, options))
            for worker, source, runtime in zip(workers, sources, runtimes, strict=True)
        ]
        taken = _rounds(workers, options, update)
        facts = [{**told, **_ask(worker, {"facts": True})} for told, worker in zip(opened, workers, strict=True)]
    models = [
        {
            "source": source,
            "runtime": runtime,
            "file_bytes": file_bytes(source, runtime),
            **fact,
            **_peaks(fact, answers),
        }
        for source, runtime, fact, answers in zip(sources, runtimes, facts, _by_model(taken), strict=True)
    ]
    cells = [asdict(_cell(phase, shape, taken[shape])) for phase in PHASES for shape in options.shapes]
    used = {**asdict(options), "threads": options.used_threads}
    return {"dense": models[0], "pruned": models[1], "cells": cells, "options": used, "machine": _machine(load)}


def _refuse_unused(options: BenchOptions, runtimes: Sequence[str]) -> None:
    others = " and ".join(sorted({*runtimes}))
    for name in ("device", "dtype"):
        if (value := getattr(options, name)) != getattr(BenchOptions, name):
            raise UsageError(
                f"--{name} {value} is for models that transformers runs; here it is up to {others}, leave it out"
            )


Rounds = list[tuple[dict[str, Any], dict[str, Any]]]
"""What both models answered in each round that counts."""
Taken = dict[Shape, Rounds]


def _rounds(workers: Sequence[subprocess.Popen[str]], options: BenchOptions, update: Callable[..., None]) -> Taken:
    taken: Taken = {shape: [] for shape in options.shapes}
    total, done = (options.rounds + 1) * len(taken) * len(workers), 0
    for turn in range(options.rounds + 1):
        for shape, answered in taken.items():
            request = {**shape._asdict(), "tokens": options.tokens}
            answers: dict[int, dict[str, Any]] = {}
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                answers[which] = _ask(workers[which], request)
                done += 1
                update(done, total, f"batch {shape.batch}, prompt {shape.prompt}")
            if turn:
                answered.append((answers[0], answers[1]))
    return taken


def _peaks(fact: dict[str, Any], answers: list[dict[str, Any]]) -> dict[str, int]:
    """The most memory after a measurement, in all and what the model adds to the libraries."""
    peak = max(answer["memory"] for answer in answers)
    return {"peak_memory": peak, "own_peak_memory": peak - fact["memory"] + fact["own_memory"]}


def _by_model(taken: Taken) -> list[list[dict[str, Any]]]:
    rounds = [pair for pairs in taken.values() for pair in pairs]
    return [[pair[which] for pair in rounds] for which in (0, 1)]


def _cell(phase: Phase, shape: Shape, rounds: Rounds) -> Cell:
    dense, pruned = ([_seconds(pair[which], phase) for pair in rounds] for which in (0, 1))
    spreads = (Spread.of(dense), Spread.of(pruned))
    tokens = shape.batch * (shape.prompt if phase == "prefill" else 1)
    rates = (tokens / spreads[0].median, tokens / spreads[1].median)
    ratios = [one / other for one, other in zip(dense, pruned, strict=True)]
    return Cell(phase, *shape, spreads, rates, Spread.of(ratios))


def _seconds(answer: dict[str, Any], phase: Phase) -> float:
    """Of one step: a round's steps differ by what disturbed them, so their median."""
    return answer["prefill"] if phase == "prefill" else statistics.median(answer["decode"])


def _machine(load: float) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=True),
        "load_before": load,
        "busy": load > BUSY,
    }


# ---- processes


@contextmanager
def _worker(threads: int) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "secateur.evaluation.bench_worker"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _opening(source: str, runtime: str, options: BenchOptions) -> dict[str, Any]:
    longest = max(options.prompts)
    opened = Opened(source, options.used_threads, options.dtype, options.device, longest * max(options.batches))
    return {"open": opened._asdict(), "runtime": runtime, "needed": longest + options.tokens}


def _ask(worker: subprocess.Popen[str], request: dict[str, Any]) -> dict[str, Any]:
    """An answer, or the worker's failure as an error of its own."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    with suppress(BrokenPipeError):  # then there is no answer either
        worker.stdin.write(json.dumps(request) + "\n")
        worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise ProcessError(
            f"a measured process ended with {worker.wait()} and no word; is there memory for both models?"
        )
    answer = json.loads(line)
    if "error" in answer:
        raise (UsageError if answer["code"] == UsageError.exit_code else SecateurError)(answer["error"])
    return answer
