"""A run that outlives its process: every finished block is durable before the next one begins.

    OUT.unfinished/
      run.json                     what is being done: recipe, fingerprints of model and tokens, versions
      blocks/00007.safetensors     the block's parameters that hold planned linears, its low-rank branches, and the
                                   grids of quantized linears; its record in the header
      hidden/00008-000-00000.safetensors ...    hidden states before the next block, by process and in parts
      state.json                   the next block, and how many parts of each process its hidden states have
      spill/                       hidden states that wait and find no room in memory
      lock                         held by the process at work

A file is written under another name, flushed to the disk and renamed, the state last: whatever moment a run is killed
at, the state and what it names belong together, and going on from there gives the bytes of an undisturbed run. The
dense model is read again. Disk: the pruned weights, and the hidden states twice while they are replaced.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.core.plan import Plan
from secateur.models.adapter import DecoderAdapter
from secateur.models.branches import attach, attached, branches_of, tensors_of
from secateur.models.durable import at_work, durable, read_state, unfinished_of, unreadable, write_state
from secateur.models.grids import grid_tensors, is_grid, restore_grids
from secateur.models.offload import is_offloaded, relocate
from secateur.pruning.hidden import Budget, Hidden
from secateur.pruning.oneshot import Finished, State, block_targets
from secateur.pruning.ranks import ALONE, Ranks
from secateur.pruning.records import BlockRecord, block_record

PART = 256 * 2**20
"""Bytes of hidden states in one file; they are in memory together while it is written."""


class Workdir:
    """The directory of one run. Make it with ``opened``, which holds its lock.

    Of several processes the first writes the blocks and the state, and each its own hidden states.
    """

    def __init__(self, path: Path, ranks: Ranks = ALONE) -> None:
        self.path, self.ranks = path, ranks

    @property
    def kept(self) -> int:
        """Finished blocks on disk; 0 where no state was ever written."""
        return self._state()["next"]

    def keep(self, adapter: DecoderAdapter, plan: Plan, finished: Finished) -> None:
        """Make one finished block durable, then the state behind it."""
        record = finished.record
        holders = adapter.holders(adapter.blocks[record.index], block_targets(plan, record.name))
        weights = {name: parameter.detach().contiguous() for name, parameter in holders.items()}
        if self.ranks.first:
            block = adapter.blocks[record.index]
            beside = tensors_of(attached(block)) | grid_tensors(block)
            self._write(_block_file(record.index), weights | beside, {"record": json.dumps(record.to_dict())})
        number = record.index + 1
        parts = 0
        for parts, rows in enumerate(_parts(finished.hidden), 1):
            self._write(_hidden_file(number, self.ranks.rank, parts - 1), rows, {})
        state = {"next": number, "parts": self.ranks.each(parts)}  # all have written
        if self.ranks.first:
            write_state(self.path, state)
        self.ranks.each(number)  # the state is there
        self._relocate(adapter, record.index, weights)
        for old in (self.path / "hidden").glob(f"?????-{self.ranks.rank:03d}-*"):
            if not old.name.startswith(f"{number:05d}-"):
                old.unlink()

    def restore(self, adapter: DecoderAdapter, budget: Budget) -> tuple[list[BlockRecord], State | None]:
        """Put the finished blocks' weights into a freshly loaded model; their records, and where to go on."""
        state, records = self._state(), []
        for index in range(state["next"]):
            stored, header = self._read(_block_file(index))
            restore_grids(adapter.blocks[index], stored)
            branches = branches_of(stored)
            beside = {*tensors_of(branches), *filter(is_grid, stored)}
            weights = {name: tensor for name, tensor in stored.items() if name not in beside}
            if not self._relocate(adapter, index, weights):
                for name, weight in weights.items():
                    adapter.blocks[index].get_parameter(name).detach().copy_(weight)
            attach(adapter.blocks[index], branches)
            records.append(block_record(json.loads(header["record"])))
        if not records:
            return [], None
        hidden = Hidden(budget)
        for part in range(state["parts"][self.ranks.rank]):
            rows, _ = self._read(_hidden_file(state["next"], self.ranks.rank, part))
            for name in sorted(rows):
                hidden.append(rows[name])
        return records, State(len(records), hidden)

    def budget(self, limit: int) -> Budget:
        """Host memory for waiting hidden states, with an empty folder for what does not fit."""
        folder = self.path / "spill" / f"{self.ranks.rank:03d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return Budget(limit, folder)

    def _state(self) -> dict[str, Any]:
        return read_state(self.path, {"next": 0, "parts": []})

    def _relocate(self, adapter: DecoderAdapter, index: int, names: Iterable[str]) -> bool:
        """Have a model that lies on disk read this block's new weights from here; False for a model in memory."""
        if not is_offloaded(adapter.model):
            return False
        block = adapter.block_names[index]
        relocate(adapter.model, self.path / _block_file(index), {f"{block}.{name}": name for name in names})
        return True

    def _write(self, name: str, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        (self.path / name).parent.mkdir(exist_ok=True)
        durable(self.path / name, lambda path: save_file(tensors, path, header))

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        path = self.path / name
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise unreadable(path, error) from error


@contextmanager
def opened(out: Path, run: Mapping[str, Any], *, resume: bool, ranks: Ranks = ALONE) -> Iterator[Workdir]:
    """The run's directory beside `out`, as ``models.durable.at_work`` has it: kept once a block is finished.

    `run` is what decides the bytes. UsageError where an unfinished run is there and `resume` was not asked for, where
    it is a run of something else (the keys that differ are named), or where another process is at work on it.
    """
    work = Workdir(unfinished_of(out), ranks)
    with at_work(
        work.path,
        run,
        resume=resume,
        kept=lambda: work.kept,
        of="finished blocks",
        first=ranks.first,
        wait=lambda: ranks.each(0),
    ):
        yield work


def _block_file(index: int) -> str:
    return f"blocks/{index:05d}.safetensors"


def _hidden_file(number: int, rank: int, part: int) -> str:
    return f"hidden/{number:05d}-{rank:03d}-{part:05d}.safetensors"


def _parts(hidden: Hidden) -> Iterator[dict[str, Tensor]]:
    """The chunks in groups that stay below PART, named in order."""
    group: dict[str, Tensor] = {}
    size = 0
    for index, rows in enumerate(hidden):
        if group and size + rows.numel() * rows.element_size() > PART:
            yield group
            group, size = {}, 0
        group[f"{index:06d}"] = rows.contiguous()
        size += rows.numel() * rows.element_size()
    yield group
