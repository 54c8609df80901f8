"""A teacher's answers on disk: the k most likely next tokens of every token of a text, and how likely they are.

    CACHE/
      cache.json                    what it is of: teacher, tokens, seq_len, k, temperature
      answers-00000.safetensors     "windows" (w, S), "log_p" (w, S, k) in float16, "tokens" (w, S, k) in int32

A run that learns from a cache loads no teacher and pays nothing for one: 6 k bytes a token on disk, k = 64 for most of
the mass. What is not kept is one bucket (``losses.tail_kl``), so that the loss stays a divergence. Windows are found by
their token ids, in whatever order they come; one that the cache does not hold is an error.

w = windows of a file, B = rows of a batch, S = tokens of a row, k = kept tokens.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from secateur.core.losses import TopK
from secateur.errors import ArtefactError, DataError
from secateur.models.durable import durable
from secateur.models.head import body, head

MANIFEST, VERSION = "cache.json", 1
SHARD = 64
"""Windows in one file; a build that was killed loses at most one."""


@dataclass(frozen=True)
class CacheFacts:
    """What a cache is of."""

    teacher: str
    fingerprint: str
    """Of the teacher."""
    vocabulary: int
    windows: int
    seq_len: int
    k: int
    """Kept tokens."""
    temperature: float
    """Of the kept probabilities; the loss must have the same."""
    version: int = VERSION


def is_cache(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def read_facts(path: Path) -> CacheFacts:
    """ArtefactError where the manifest is damaged or of a later version."""
    try:
        facts = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if facts["version"] != VERSION:
            raise ArtefactError(f"{path} is a cache of version {facts['version']}, this Secateur knows {VERSION}")
        return CacheFacts(**facts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(f"{path}: not a readable teacher's cache ({error}); build it again") from error


@torch.no_grad()
def build(
    teacher: PreTrainedModel, windows: Int[Tensor, "n S"], facts: CacheFacts, folder: Path, autocast: torch.dtype | None
) -> Iterator[int]:
    """Ask the teacher file by file, skipping those that are there; yields how many windows are done."""
    for number, rows in enumerate(windows.split(SHARD)):
        file = folder / _file(number)
        if not file.exists():
            answers = [_answer(teacher, ids[None].long(), facts, autocast) for ids in rows]
            tensors = {
                "windows": rows.int().contiguous(),
                "log_p": torch.stack([answer.log_p for answer in answers]).half(),
                "tokens": torch.stack([answer.tokens for answer in answers]).int(),
            }
            durable(file, lambda new, tensors=tensors: save_file(tensors, new))
        yield min((number + 1) * SHARD, len(windows))
    durable(folder / MANIFEST, lambda new: new.write_text(json.dumps(asdict(facts), indent=1) + "\n", "utf-8"))


def _answer(teacher: PreTrainedModel, ids: Int[Tensor, "1 S"], facts: CacheFacts, autocast: torch.dtype | None) -> TopK:
    with torch.autocast(ids.device.type, autocast, enabled=autocast is not None):
        hidden = body(teacher, ids.to(teacher.device))[0]
        pieces = [TopK.of(head(teacher, some), facts.k, facts.temperature) for some in hidden.split(128)]
    log_p, tokens = (torch.cat(parts).cpu() for parts in zip(*pieces, strict=True))
    return TopK(log_p, tokens)


class CachedTeacher:
    """Answers from a cache, for windows in any order."""

    def __init__(self, path: Path) -> None:
        self.facts, self._path = read_facts(path), path
        self._places: dict[bytes, tuple[Any, int]] = {}
        for number in range(-(-self.facts.windows // SHARD)):
            file = self._opened(path / _file(number))
            for row, window in enumerate(file.get_tensor("windows")):
                self._places[_key(window)] = (file, row)

    def _opened(self, file: Path) -> Any:
        try:
            return safe_open(file, framework="pt").__enter__()  # stays open; rows are read when they are asked for
        except (SafetensorError, OSError) as error:
            raise ArtefactError(f"{file} of a teacher's cache is not readable ({error}); build it again") from error

    def __call__(self, ids: Int[Tensor, "B S"]) -> Callable[[int, int], TopK]:
        found = [self._row(window) for window in ids.cpu()]
        log_p, tokens = (torch.cat(parts).to(ids.device) for parts in zip(*found, strict=True))
        return lambda start, stop: TopK(log_p[start:stop], tokens[start:stop])

    def _row(self, window: Int[Tensor, " S"]) -> TopK:
        if _key(window) not in self._places:
            raise DataError(
                f"the cache {self._path} does not hold a window of this text; build it from the same data with the "
                f"same seq_len ({self.facts.seq_len}) and tokenizer"
            )
        file, row = self._places[_key(window)]
        return TopK(file.get_slice("log_p")[row].float(), file.get_slice("tokens")[row].long())


def _key(window: Int[Tensor, " S"]) -> bytes:
    return window.int().contiguous().numpy().tobytes()


def _file(number: int) -> str:
    return f"answers-{number:05d}.safetensors"
