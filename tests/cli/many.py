"""``many.py PROCESSES DEATH arguments...``: the command in several processes, as torchrun would start them.

They are forks of this process, which has imported everything: a second instead of ten. DEATH is "none", or
"RANK:N": that process is killed once it has finished N blocks, or steps. When one fails the others are terminated.
"""

import os
import signal
import socket
import sys

import torch

import secateur.api  # noqa: F401  (imported before forking)
import secateur.pruning.workdir as workdir
from secateur.cli import main
from secateur.training.loop import Loop


def die_after(number: int) -> None:
    keep, step = workdir.Workdir.keep, Loop._step

    def keep_and_die(self, adapter, plan, finished):
        keep(self, adapter, plan, finished)
        if finished.record.index + 1 == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def step_or_die(self):
        if self.step == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    workdir.Workdir.keep, Loop._step = keep_and_die, step_or_die


def process(rank: int, size: int, port: int, death: str, arguments: list[str]) -> int:
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    if death.startswith(f"{rank}:"):
        die_after(int(death.partition(":")[2]))
    code = main(arguments)
    sys.stdout.flush()
    os._exit(code)


def run(size: int, death: str, arguments: list[str]) -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = {process(rank, size, port, death, arguments) for rank in range(size)}
    worst = 0
    while children:
        child, status = os.wait()
        children.remove(child)
        if code := os.waitstatus_to_exitcode(status):
            worst = worst or abs(code)
            for other in children:
                os.kill(other, signal.SIGTERM)
    return worst


if __name__ == "__main__":
    raise SystemExit(run(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
