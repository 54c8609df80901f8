"""Silence around transformers: its progress bars, log lines and Python warnings are not ours to show."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import logging as hub_logging
from transformers.utils import logging


@contextmanager
def quiet() -> Iterator[None]:
    """Errors still pass, as exceptions; what was set before is set again afterwards."""
    verbosity, hub_verbosity, bars = (
        logging.get_verbosity(),
        hub_logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
    )
    logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()
