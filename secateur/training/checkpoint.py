"""A training run that outlives its process: from time to time everything that the next step needs is made durable.

    OUT.unfinished/
      run.json                       what is being done: recipe, fingerprints of models and tokens, versions
      state-00000150.safetensors     masters, moments, masks, other parameters, random states; numbers in its header
      records.jsonl                  one line a step, up to that state
      state.json                     which of them is valid
      lock                           held by the process at work

A file is written under another name, flushed and renamed, ``state.json`` last: whatever moment a run is killed at, it
goes on from the last state, and since the order of the text and the rate follow from a step's number, to the same
bytes. Masks are kept, not chosen again. Disk: 13 bytes for each sparse weight, twice while a state is replaced.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.models.durable import at_work, durable, read_state, unfinished_of, unreadable, write_state
from secateur.training import shards
from secateur.training.loop import Loop, StepRecord
from secateur.training.named_state import deal_state, gather_state

RECORDS = "records.jsonl"
RANDOM, RANDOM_THERE = "random state", "random state of the device"
"""Names of the generators' states among the tensors; no parameter has a space in its name."""


class Checkpoints:
    """The directory of one run. Make it with ``opened``, which holds its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def kept(self) -> int:
        """Steps behind the last state; 0 where none was written."""
        return self._state()["step"]

    def keep(self, loop: Loop, records: list[StepRecord], noted: dict[str, Any]) -> None:
        """Make the state after the last step durable, with whatever else was noted, then forget the one before."""
        tensors, numbers = loop_state(loop)
        if not shards.is_first():
            return
        file = self._file(loop.step)
        durable(file, lambda new: save_file(tensors, new, {"numbers": json.dumps(numbers)}))
        lines = "".join(json.dumps(asdict(record)) + "\n" for record in records)
        durable(self.path / RECORDS, lambda new: new.write_text(lines, encoding="utf-8"))
        write_state(self.path, {"step": loop.step, "records": len(records), "noted": noted})
        for old in self.path.glob("state-*.safetensors"):
            if old != file:
                old.unlink()

    def restore(self, loop: Loop) -> tuple[list[StepRecord], dict[str, Any]]:
        """Bring a freshly made loop to where the last state stands; the records up to there, and what was noted.

        In all processes; the first one reads.
        """
        state = shards.told(self._state())
        if not state["step"]:
            return [], {}
        tensors, numbers, records = self._read(state) if shards.is_first() else ({}, {}, [])
        restore_loop(loop, tensors, shards.told(numbers))
        return shards.told(records), state["noted"]

    def _read(self, state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any], list[StepRecord]]:
        file = self._file(state["step"])
        try:
            with safe_open(file, framework="pt") as opened_file:
                tensors = {name: opened_file.get_tensor(name) for name in opened_file.keys()}  # noqa: SIM118
                numbers = json.loads(opened_file.metadata()["numbers"])
            return tensors, numbers, read_steps(self.path / RECORDS)[: state["records"]]
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise unreadable(file, error) from error

    def _file(self, step: int) -> Path:
        return self.path / f"state-{step:08d}.safetensors"

    def _state(self) -> dict[str, Any]:
        return read_state(self.path, {"step": 0})


def read_steps(path: Path) -> list[StepRecord]:
    """The lines of ``records.jsonl``."""
    return [StepRecord(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def loop_state(loop: Loop) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that the next step depends on: tensors, and numbers. In all processes; the first one's are whole."""
    tensors, trained = gather_state(loop.optimizer, loop.learner.student.named_parameters())
    numbers = {"step": loop.step, "skipped": loop.skipped, "optimizer": trained}
    return {**tensors, **_random_states(loop.accelerator.device)}, numbers


def _random_states(device: torch.device) -> dict[str, Tensor]:
    """Of dropout."""
    there = {RANDOM_THERE: torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return {RANDOM: torch.get_rng_state(), **there}


def restore_loop(loop: Loop, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Take a ``loop_state`` back. In all processes; what the first one passes counts."""
    trained = {name: tensor for name, tensor in tensors.items() if name not in (RANDOM, RANDOM_THERE)}
    deal_state(loop.optimizer, loop.learner.student.named_parameters(), trained, numbers["optimizer"])
    torch.set_rng_state(shards.told(tensors.get(RANDOM)))
    if (there := shards.told(tensors.get(RANDOM_THERE))) is not None and loop.accelerator.device.type == "cuda":
        torch.cuda.set_rng_state(there, loop.accelerator.device)
    loop.step, loop.skipped = numbers["step"], numbers["skipped"]


@contextmanager
def opened(out: Path, run: Mapping[str, Any], *, resume: bool) -> Iterator[Checkpoints]:
    """The run's directory beside ``out``, as ``models.durable.at_work`` has it: kept once there is a state in it.

    ``run`` is what decides the bytes; UsageError as ``models.durable.admit`` and ``locked`` say.
    """
    work = Checkpoints(unfinished_of(out))
    with at_work(
        work.path, run, resume=resume, kept=lambda: work.kept, of="steps", first=shards.is_first(), wait=shards.wait
    ):
        yield work
