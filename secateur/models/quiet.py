"""Silence around transformers: its progress bars, log lines and Python warnings are not ours to show."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from logging import CRITICAL, getLogger
from typing import Any

import tqdm
from huggingface_hub import logging as hub_logging
from transformers.utils import logging


@contextmanager
def quiet() -> Iterator[None]:
    """Errors still pass, as exceptions; what was set before is set again afterwards."""
    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    accelerate = getLogger("accelerate")
    level = accelerate.level
    logging.set_verbosity(CRITICAL)
    hub_logging.set_verbosity(CRITICAL)
    accelerate.setLevel(CRITICAL)
    try:
        with _no_bars(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        accelerate.setLevel(level)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Every bar of these libraries is a tqdm; the switches of transformers do not reach its GGUF reader's."""
    start = tqdm.tqdm.__init__

    @wraps(start)
    def start_disabled(self: tqdm.tqdm, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs | {"disable": True})

    tqdm.tqdm.__init__ = start_disabled
    try:
        yield
    finally:
        tqdm.tqdm.__init__ = start
