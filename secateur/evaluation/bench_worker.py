"""One model in a process of its own, timed on request: what ``bench`` starts for every model.

Requests and answers are lines of JSON on stdin and stdout (whatever else prints goes to stderr):

    {"open": {...}, "runtime": ..., "needed": ...} -> {"memory": bytes, "own_memory": bytes, "open_seconds": seconds}
    {"batch": 8, "prompt": 128, "tokens": 32}      -> {"prefill": seconds, "decode": [seconds of each], "memory": bytes}

    {"facts": true}                                -> what the runner says of itself: kernels are known once they ran

``memory`` is what the process has for itself, ``own_memory`` that without interpreter and libraries: what opening the
model, and running it, added. A failure is answered with {"error": line, "code": exit code}, and ends the process.
"""

import gc
import json
import os
import sys
import time
from itertools import pairwise
from typing import Any, TextIO

import psutil
import torch

from secateur.errors import SecateurError, UsageError
from secateur.models.quiet import quiet
from secateur.models.runners import RUNTIMES, Opened, Runner

SEED = 0


def memory() -> int:
    """Bytes that this process has for itself: no other one shares them."""
    return psutil.Process().memory_full_info().uss


def open_runner(runtime: str, opened: Opened, needed: int) -> tuple[Runner, dict[str, Any]]:
    RUNTIMES[runtime].imports()
    before, start = memory(), time.perf_counter()
    runner = RUNTIMES[runtime].open(opened)
    seconds = time.perf_counter() - start
    context = getattr(runner.config, "max_position_embeddings", None)
    if context is not None and needed > context:
        raise UsageError(f"prompt and tokens are {needed}, the context of {opened.source} is {context}; give fewer")
    gc.collect()
    now = memory()
    return runner, {"memory": now, "own_memory": now - before, "open_seconds": seconds}


def measure(runner: Runner, batch: int, prompt: int, tokens: int) -> dict[str, Any]:
    """One prompt for each row, then so many tokens."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(0, runner.config.vocab_size, (batch, prompt), generator=generator)
    start = time.perf_counter()
    ids = runner.prefill(ids)
    marks = [time.perf_counter()]
    for _ in range(tokens):
        ids = runner.decode(ids)
        marks.append(time.perf_counter())
    steps = [after - before for before, after in pairwise(marks)]
    return {"prefill": marks[0] - start, "decode": steps, "memory": memory()}


def answer(requests: TextIO, answers: TextIO) -> None:
    """Until stdin ends."""
    runner: Runner | None = None
    for line in requests:
        request = json.loads(line)
        if "open" in request:
            runner, told = open_runner(request["runtime"], Opened(**request["open"]), request["needed"])
        else:
            assert runner is not None, "nothing was opened"
            told = runner.facts() if "facts" in request else measure(runner, **request)
        print(json.dumps(told), file=answers, flush=True)


def serve(requests: TextIO, answers: TextIO) -> int:
    """``answer``, and a failure's line as the last answer. The exit code."""
    try:
        answer(requests, answers)
    except Exception as error:  # whatever it is: nobody sees more of it than this line
        code = error.exit_code if isinstance(error, SecateurError) else 1
        line = str(error) if isinstance(error, SecateurError) else f"{type(error).__name__}: {error}"
        print(json.dumps({"error": " ".join(line.split()), "code": code}), file=answers, flush=True)
        return code
    return 0


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with quiet():
        sys.exit(serve(sys.stdin, answers))


if __name__ == "__main__":
    main()
