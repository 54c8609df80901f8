"""Whom a training run learns from: a model, loaded beside the student, or the answers that one has left in a cache."""

import copy
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from secateur.config import Device, load_recipe
from secateur.core.losses import Distillation
from secateur.data.sources import read_texts
from secateur.data.tokens import check_seq_len
from secateur.errors import UsageError
from secateur.models.adapter import DecoderAdapter
from secateur.models.durable import LOCK, admit, locked, unfinished_of
from secateur.models.load import Loaded
from secateur.models.save import flush, place_of, refuse_occupied
from secateur.report.facts import Stopwatch, versions
from secateur.runs import open_model, resolve_device, resolve_precision
from secateur.training import shards
from secateur.training.batches import windows_of_all
from secateur.training.cache import CachedTeacher, CacheFacts, build, is_cache
from secateur.training.learner import ModelTeacher, Teacher

Named = str | os.PathLike[str] | Loaded
"""A model by name or path, or as ``models.load`` gives it."""
RECIPE = Path("secateur") / "recipe.yaml"


@dataclass(frozen=True)
class Tutor:
    """A teacher, and what the run's report and identity say of it."""

    ask: Teacher
    source: str
    """The model, also where it answers from a cache."""
    place: str
    """What a recipe names to have it again: the model, or the cache."""
    fingerprint: str


def tutor(
    student: Loaded,
    teacher: Named | None,
    loss: Distillation,
    precision: Literal["float32", "bfloat16"],
    device: torch.device,
    watch: Stopwatch,
    *,
    shard: bool = False,
) -> Tutor:
    """Who was asked for, in the type of the products; by default what the student was pruned from, or its dense self.

    ``shard``: each process keeps its share of every block, and gathers a block when it runs. UsageError where student
    and teacher do not speak of the same tokens, or a cache does not fit the loss.
    """
    teacher = dense_original(student.source) if teacher is None else teacher
    if isinstance(teacher, str | os.PathLike) and is_cache(Path(teacher).expanduser()):
        return _cached(student, Path(teacher).expanduser(), loss)
    loaded = _loaded(student, teacher, precision, watch)
    _check_vocabulary(student, loaded.model.config.get_text_config().vocab_size)
    if shard:
        shards.spread_blocks(DecoderAdapter(loaded.model).blocks, device)
    torch.nn.Module.to(loaded.model, device)
    return Tutor(ModelTeacher(loaded.model), loaded.source, loaded.source, loaded.fingerprint)


def _loaded(student: Loaded, teacher: Named, precision: Literal["float32", "bfloat16"], watch: Stopwatch) -> Loaded:
    if isinstance(teacher, Loaded):
        return teacher
    if os.fspath(teacher) != student.source:
        return open_model(teacher, None, precision, watch)
    model = copy.deepcopy(student.model).to(getattr(torch, precision))  # once from the disk is enough
    return Loaded(model, student.tokenizer, student.source, student.fingerprint)


def _cached(student: Loaded, path: Path, loss: Distillation) -> Tutor:
    cached = CachedTeacher(path)
    facts = cached.facts
    _check_vocabulary(student, facts.vocabulary)
    if loss.divergence != "forward":
        raise UsageError(
            f"a cache holds the teacher's {facts.k} likeliest tokens, which gives the forward divergence and not "
            f"{loss.divergence}; set loss.divergence=forward, or learn from the model itself"
        )
    if loss.alpha and loss.temperature != facts.temperature:
        raise UsageError(
            f"the cache was built at temperature {facts.temperature:g} and the loss has {loss.temperature:g}; set "
            f"loss.temperature={facts.temperature:g}, or build it again"
        )
    return Tutor(cached, facts.teacher, str(path), f"{facts.fingerprint}, {facts.k} tokens")


def dense_original(source: str) -> str:
    """What a directory of ours was made from, by its own record; anything else is its own original."""
    recipe = Path(source).expanduser() / RECIPE
    if not recipe.is_file():
        return source
    made = load_recipe(recipe)
    return str(made.get("teacher") or made.get("model") or source)


def _check_vocabulary(student: Loaded, other: int) -> None:
    own = student.model.config.get_text_config().vocab_size
    if own != other:
        raise UsageError(
            f"the student has {own} tokens and the teacher {other}; distillation compares their distributions token by "
            "token, so give a teacher of the same vocabulary: the dense original"
        )


# ------------------------------------------------------------------------------------------------------------ a cache


@dataclass(frozen=True)
class CacheConfig:
    """What is asked of a teacher beforehand. ValueError where a number makes no sense."""

    data: tuple[str, ...]
    """Texts, as in TrainConfig: all of their windows."""
    seq_len: int = 512
    """Tokens in each window."""
    k: int = 64
    """Kept tokens of each distribution."""
    temperature: float = 2.0
    """Of the distributions; that of the loss."""

    def __post_init__(self) -> None:
        if not self.data or self.seq_len < 2 or self.k < 1 or not self.temperature > 0:
            raise ValueError(
                f"wanted some data, seq_len >= 2, k >= 1 and temperature > 0; got {self.data}, {self.seq_len}, "
                f"{self.k}, {self.temperature}"
            )


def cache_teacher(
    teacher: Named,
    config: CacheConfig,
    out: str | os.PathLike[str],
    *,
    resume: bool,
    watch: Stopwatch,
    device: Device = "auto",
) -> dict[str, Any]:
    """Ask a teacher about every window of some texts and keep the answers at ``out``; what was done.

    A build that was killed goes on with ``resume``. Nothing is at ``out`` before all of it is.
    """
    place = place_of(out)
    if is_cache(place):
        raise UsageError(f"{place} is a finished cache; train with it, or delete it to ask again")
    refuse_occupied(place, overwrite=False)
    where = resolve_device(device)
    precision = resolve_precision("auto", where)
    loaded = open_model(teacher, None, precision, watch)
    vocabulary = loaded.model.config.get_text_config().vocab_size
    if config.k > vocabulary:
        raise UsageError(f"top-k {config.k} of a vocabulary of {vocabulary} tokens; keep fewer")
    check_seq_len(config.seq_len, getattr(loaded.model.config, "max_position_embeddings", None))
    texts = [read_texts(name, "calibration") for name in config.data]
    windows = windows_of_all(texts, loaded.tokenizer, config.seq_len)
    facts = CacheFacts(
        loaded.source, loaded.fingerprint, vocabulary, len(windows), config.seq_len, config.k, config.temperature
    )
    folder = unfinished_of(place)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]
    run = {"cache": vars(facts), "tokens": tokens, "versions": versions()}
    kept = len(list(folder.glob("*.safetensors")))
    with locked(folder), watch.stage("ask", f"ask {loaded.source} about {windows.numel():,} tokens"):
        admit(folder, run, resume=resume, kept=lambda: kept, of="files")
        autocast = torch.bfloat16 if precision == "bfloat16" else None
        torch.nn.Module.to(loaded.model, where)
        for done in build(loaded.model, windows, facts, folder, autocast):
            watch.progress.update(done, len(windows))
    (folder / LOCK).unlink()
    folder.replace(place)
    flush(place.parent)
    size = sum(file.stat().st_size for file in place.iterdir())
    told = {"cache": vars(facts), "data": list(config.data), "out": str(place), "bytes": size}
    return told | {"seconds": watch.total}
