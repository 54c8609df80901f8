"""The command line: one file per verb, and this file, which turns every failure into one line and an exit code.

0 done, 1 failed (something outside, or a broken promise), 2 the request was wrong, 130 interrupted, 143 terminated.
``--debug`` shows the traceback. Verbs import torch and the rest of the library when they run, so that ``--help`` is
instant.
"""

import os
import signal
import sys
import threading
import traceback
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import click

from secateur.cli import bench, cache, demo, eval, export, inspect, methods, plan, prune, quantize, train, unpack
from secateur.cli.options import debug_option, first_process
from secateur.errors import SecateurError

INTERRUPTED, TERMINATED = 130, 143
FREE_SPACE = "check the path, its permissions and the disk's free space"
LESS_MEMORY = (
    "see `secateur plan` for what is needed; less with --offload on, --set batch=1, a smaller hidden_memory, or fewer "
    "or shorter samples"
)
MEMORY_WORDS = ("allocate memory", "out of memory", "bad_alloc", "could not create a primitive", "start new thread")
"""What torch, its kernels and the interpreter say when an allocation fails."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="secateur", message="secateur %(version)s")
@debug_option
def cli() -> None:
    """Prune language models, measure what it cost, and check what was saved.

    Begin with `secateur demo`: it needs no network, no GPU and no data.
    """


for verb in (prune, train, quantize, cache, plan, eval, inspect, export, unpack, bench, methods, demo):
    cli.add_command(verb.command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; nothing that happens inside is raised."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when the libraries are imported; one progress bar is enough
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: huge pages, a fifth of an evaluation was page faults
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where somebody ignores it, as nohup does
        signal.signal(signal.SIGINT, _stop)
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if args[:2] == ["train", "cache"] and not Path("cache").exists():  # no student
        args = args[1:]
    try:
        return cli.main(args=args, prog_name="secateur", standalone_mode=False) or 0
    except (KeyboardInterrupt, click.Abort) as stop:
        said, code = _stopped(stop)
    except Exception as error:
        if "--debug" in args:
            traceback.print_exc()
        said, code = _told(error)
        said = "; ".join([said, *getattr(error, "__notes__", ())])
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends; torchrun stops those that still do
    return _fail(said, code)


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, handled as an interrupt: what is half written is cleared away, what can be resumed is kept."""


def _stop(number: int, frame: FrameType | None) -> None:
    """Raise what stops the run; a little later where Python would print and forget it, inside a weak reference's
    callback."""
    if _inside_callback(frame):
        threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
        return
    raise _TerminatedError if number == signal.SIGTERM else KeyboardInterrupt


def _inside_callback(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == weakref.__file__:
            return True
        frame = frame.f_back
    return False


def _stopped(stop: BaseException) -> tuple[str, int]:
    cause = stop.__cause__ if isinstance(stop.__cause__, KeyboardInterrupt) else stop  # click turns one into an Abort
    what, code = ("terminated", TERMINATED) if isinstance(cause, _TerminatedError) else ("interrupted", INTERRUPTED)
    return "; ".join([what, *getattr(cause, "__notes__", ())]), code


def _told(error: Exception) -> tuple[str, int]:
    """One line that says what happened, and the exit code."""
    if out_of_memory(error):
        return f"memory ran out ({str(error).strip() or 'MemoryError'}); {LESS_MEMORY}", 1
    match error:
        case SecateurError():
            return str(error), error.exit_code
        case click.ClickException():
            return error.format_message(), error.exit_code
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            return f"{where}{error.strerror or error}; {FREE_SPACE}", 1
        case _ if "I/O error" in str(error):  # of safetensors, which knows no OSError
            return f"{error}; {FREE_SPACE}", 1
        case _:
            return f"{type(error).__name__}: {error}; run again with --debug to see where", 1


def out_of_memory(error: BaseException | None) -> bool:
    """Whether this, or what it came from, is an allocation that failed."""
    while error is not None:
        spoken = isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in MEMORY_WORDS)
        if spoken or isinstance(error, MemoryError):
            return True
        error = error.__cause__
    return False


def _fail(message: str, code: int) -> int:
    if not first_process():
        if code == TERMINATED:  # because another one failed, which says so itself
            return code
        message = f"process {os.environ['RANK']}: {message}"
    click.echo(f"secateur: {' '.join(message.split())}", err=True)
    return code
