"""The exception tree. Every message says what came, what was wanted, and what to do.

    SecateurError              exit code 1: something outside us failed
    ├── UsageError             exit code 2: what was asked for cannot be done (also a ValueError)
    ├── DataError              a text or data set is missing, empty, binary, too short or unreachable
    ├── ModelError             a model is missing, corrupt, quantized or has a structure we refuse
    ├── ArtefactError          a saved directory is not ours, incomplete, or breaks a recorded promise
    ├── NumericalError         a matrix would not factor, too many rows turned non-finite
    ├── DeviceError            the device asked for is not here
    └── ProcessError           another process of the run is gone

Arithmetic in ``core`` raises plain ValueError for bad arguments; this tree is for the outside world and for numerics.
"""


def first_line(error: BaseException) -> str:
    """Of an exception's message; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class SecateurError(Exception):
    """Base of all errors that end a command in one line."""

    exit_code = 1


class UsageError(SecateurError, ValueError):
    """The request itself is impossible or contradictory."""

    exit_code = 2


class DataError(SecateurError):
    """A text or data set is missing, empty, binary, too short or unreachable."""


class ModelError(SecateurError):
    """A model is missing, corrupt, already quantized, or has a structure that is refused."""


class ArtefactError(SecateurError):
    """A saved directory is not ours, is incomplete, or breaks a promise recorded in it."""


class NumericalError(SecateurError):
    """A matrix would not factor, or too many calibration rows turned non-finite."""


class DeviceError(SecateurError):
    """The device asked for is not available on this machine."""


class ProcessError(SecateurError):
    """Another process of the same run is gone."""
