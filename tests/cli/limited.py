"""Runs one command again and again, each time in a fork under another limit of the kernel.

    python limited.py LIMIT VALUES arguments...     LIMIT: FSIZE (bytes of a file), AS (bytes above what is mapped now)

Prints one JSON line for each value: {"value", "code", "err"}; a negative code is the signal that ended it.
"""

import json
import os
import resource
import sys
import tempfile
from pathlib import Path

import torch

import secateur.api  # noqa: F401  (imported before forking)
from secateur.cli import main


def attempt(limit: str, value: int, arguments: list[str]) -> dict[str, object]:
    with tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            read, write = os.pipe()  # a pipe: what is said must not count as a file
            os.dup2(write, 2)
            set_limit(limit, value)
            code = main(arguments)
            sys.stderr.flush()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os.close(write)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            with os.fdopen(read) as said:
                err.write(said.read())
            err.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        err.seek(0)
        return {"value": value, "code": os.waitstatus_to_exitcode(status), "err": err.read()}


def set_limit(limit: str, value: int) -> None:
    if limit == "AS":
        value += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    number = getattr(resource, f"RLIMIT_{limit}")
    resource.setrlimit(number, (value, resource.getrlimit(number)[1]))


if __name__ == "__main__":
    for value in json.loads(sys.argv[2]):
        print(json.dumps(attempt(sys.argv[1], value, sys.argv[3:])), flush=True)
