"""Hidden states that wait between two passes over a block: in host memory up to a budget, beyond it in files.

A run has one ``Budget``; every ``Hidden`` made from it draws on it and gives back what is no longer needed. A chunk
that finds no room is written to a file of its own and read again whenever it is asked for; the file goes with it.

B = rows of a chunk, S = tokens of a row, D = width.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload
from uuid import uuid4

from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Size, Tensor

from secateur.core.moments import batch_rows


class Budget:
    """Bytes of host memory for waiting hidden states, and the folder for those that do not fit (None = no limit).

    ``used`` and ``spilled`` are bytes that wait now in memory and in files, the peaks the most that ever did.
    """

    def __init__(self, limit: int = 0, folder: Path | None = None) -> None:
        self.limit, self.folder = limit, folder
        self.used = self.spilled = 0
        self.peak_used = self.peak_spilled = 0

    def place(self, rows: Float[Tensor, "B S D"]) -> "Chunk":
        """The chunk, in memory where there is room, else in a file."""
        size = rows.numel() * rows.element_size()
        if self.folder is None or self.used + size <= self.limit:
            self._count(size, 0)
            chunk = Chunk(rows, rows.shape)
            weakref.finalize(chunk, self._count, -size, 0)
            return chunk
        path = self.folder / f"{uuid4().hex}.safetensors"
        save_file({"rows": rows.contiguous()}, path)
        self._count(0, size)
        chunk = Chunk(path, rows.shape)
        weakref.finalize(chunk, self._remove, path, size)
        return chunk

    def _remove(self, path: Path, size: int) -> None:
        path.unlink(missing_ok=True)
        self._count(0, -size)

    def _count(self, used: int, spilled: int) -> None:
        self.used += used
        self.spilled += spilled
        self.peak_used, self.peak_spilled = max(self.peak_used, self.used), max(self.peak_spilled, self.spilled)


class Chunk:
    """Some rows, wherever they are."""

    def __init__(self, rows: Tensor | Path, shape: Size) -> None:
        self._rows = rows
        self.shape = shape

    def load(self) -> Float[Tensor, "B S D"]:
        return load_file(self._rows)["rows"] if isinstance(self._rows, Path) else self._rows


class Hidden(Sequence[Tensor]):
    """Chunks of hidden states, in order. Slices and ``share`` copy nothing."""

    def __init__(self, budget: Budget, rows: Iterable[Float[Tensor, "B S D"]] = ()) -> None:
        self.budget = budget
        self._chunks: list[Chunk] = []
        for chunk in rows:
            self.append(chunk)

    def append(self, rows: Float[Tensor, "B S D"]) -> None:
        self._chunks.append(self.budget.place(rows))

    def append_each(self, rows: Float[Tensor, "*batch S D"]) -> None:
        """Every row as a chunk of its own, without its leading axis: what is added up chunk by chunk is then added up
        row by row, however many of them came together."""
        for row in batch_rows(rows):
            self.append(row)

    def share(self, other: "Hidden", index: int) -> None:
        """Append a chunk of another one as it is."""
        self._chunks.append(other._chunks[index])

    def parted(self, rows: int) -> tuple["Hidden", "Hidden"]:
        """The first so many rows, and the others; a chunk that has some of both is copied."""
        head, tail = Hidden(self.budget), Hidden(self.budget)
        for index, chunk in enumerate(self._chunks):
            wanted = rows - head.rows
            if wanted <= 0 or wanted >= chunk.shape[0]:
                (head if wanted > 0 else tail).share(self, index)
                continue
            cut = chunk.load()
            head.append(cut[:wanted].clone())
            tail.append(cut[wanted:].clone())
        return head, tail

    @property
    def rows(self) -> int:
        return sum(chunk.shape[0] for chunk in self._chunks)

    @property
    def tokens(self) -> int:
        return sum(chunk.shape[:-1].numel() for chunk in self._chunks)

    def __len__(self) -> int:
        return len(self._chunks)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> "Hidden": ...
    def __getitem__(self, index: int | slice) -> "Tensor | Hidden":
        if isinstance(index, int):
            return self._chunks[index].load()
        part = Hidden(self.budget)
        part._chunks = self._chunks[index]
        return part

    def __iter__(self) -> Iterator[Tensor]:
        return (chunk.load() for chunk in self._chunks)
