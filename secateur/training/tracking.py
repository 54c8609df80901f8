"""Curves of a run in somebody's tool: accelerate's trackers (TensorBoard, Weights & Biases, MLflow and others).

    accelerator = Accelerator(log_with=checked_tracker("tensorboard"), project_dir=folder)
    with tracked(accelerator, recipe) as tell:
        for record in loop.run():
            tell(record)

The first process alone tells. Tools that write files write them below ``project_dir``; others go where their own
environment variables say. A run that goes on tells the steps after its last state once more.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import LoggerType

from secateur.errors import UsageError
from secateur.training.loop import StepRecord

PROJECT = "secateur"


def checked_tracker(name: str | None) -> str | None:
    """The name of a tracker that can be used; UsageError for an unknown one and where its package is missing."""
    if name is None:
        return None
    packaged = [str(one.value) for one in LoggerType if one is not LoggerType.ALL]
    known = sorted({*packaged, *map(str, LOGGER_TYPE_TO_CLASS)})
    if name not in known:
        raise UsageError(f"tracker {name!r} is unknown; use one of {', '.join(known)}")
    if name in packaged and name not in {str(one.value) for one in get_available_trackers()}:
        raise UsageError(f"tracker {name} needs a package that is not here: pip install {name}, or leave tracker out")
    return name


@contextmanager
def tracked(accelerator: Accelerator, recipe: Mapping[str, Any]) -> Iterator[Callable[[StepRecord], None]]:
    """Tell whatever the accelerator logs with, if anything, the recipe and then every step. In all processes."""
    if accelerator.log_with:
        plain = {key: value if isinstance(value, str | int | float) else str(value) for key, value in recipe.items()}
        accelerator.init_trackers(PROJECT, plain)
    try:
        yield lambda record: accelerator.log(_values(record), step=record.step)
    finally:
        for tracker in accelerator.trackers:  # not end_training, which ends the processes' group too
            tracker.finish()


def _values(record: StepRecord) -> dict[str, float]:
    return {key: float(value) for key, value in asdict(record).items() if key != "step"}
