"""Runs `secateur VERB ... --resume` again and again and kills it with SIGKILL at random moments.

    python killed.py KILLS SEED OUT VERB arguments...        prints the number of kills and of runs that finished

Every attempt is a fork of this process, which has imported everything and started no thread, so that an attempt costs
about a second. An attempt that ends before its kill is due has finished the run: OUT is moved aside and begun again.
"""

import os
import random
import signal
import sys
import time

import torch

import secateur.api  # noqa: F401  (imported before forking)
from secateur.cli import main


def attempt(arguments: list[str], limit: float) -> int | None:
    """The exit code, or None where the attempt was killed after `limit` seconds."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(arguments))
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def run(kills: int, seed: int, out: str, command: list[str]) -> None:
    arguments = [*command, "--out", out, "--resume"]
    moments = random.Random(seed)
    start = time.monotonic()
    if code := attempt([*arguments[:-2], out + ".first"], 600):
        sys.exit(f"the undisturbed run failed with {code}")
    whole = time.monotonic() - start
    killed = finished = 0
    while killed < kills:
        code = attempt(arguments, moments.uniform(0, 1.1 * whole))
        if code:
            sys.exit(f"a resumed run failed with {code}")
        killed += code is None
        if code == 0:
            os.rename(out, f"{out}.{finished}")
            finished += 1
    if code := attempt(arguments, 600):
        sys.exit(f"the last run failed with {code}")
    print(f"{killed} kills, {finished + 1} runs finished")


if __name__ == "__main__":
    run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
