"""Write a model as a normal Hugging Face directory, all of it or nothing.

``staged`` gives a temporary directory beside the wanted one and renames it when everything has been written; a run that
fails, or is interrupted, leaves what was there before. ``save`` fills such a directory: safetensors (tied embeddings
once), config, generation config, tokenizer and chat template. Low-rank branches lie apart, in ``low_rank/``.
"""

import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import UsageError
from secateur.models.branches import FOLDER, save_branches, set_aside
from secateur.models.linears import stored_transposed
from secateur.models.offload import is_offloaded
from secateur.models.quiet import quiet

OWN = "secateur"
"""The folder inside a saved directory that says it is ours."""
FILES = f"{OWN}/files.json"
"""Names of all files that a run wrote: a directory that holds any other is never replaced."""
SHARD, WHOLE = "400MB", "50GB"
"""Largest file: of a model that is read from disk while it is written (one file in memory at a time), and of others."""
PARTIAL, ASIDE = ".partial", ".old"
"""Suffixes beside OUT: what is being written, and what steps aside while it is replaced."""


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, state: dict[str, Tensor] | None = None
) -> None:
    """Write model and tokenizer into the existing directory `out`, ready for ``from_pretrained``.

    ``state`` stands for the model's own tensors where they are stored in another form.
    """
    forget_gguf(model)
    use_cache, model.config.use_cache = model.config.use_cache, True  # `load` turned it off; who generates wants it
    try:
        with quiet(), set_aside(model) as branches:
            model.save_pretrained(out, state_dict=state, max_shard_size=SHARD if is_offloaded(model) else WHOLE)
            tokenizer.save_pretrained(out)
            if branches:
                first = model.get_submodule(next(iter(branches)))
                save_branches(branches, out / FOLDER, transposed=stored_transposed(first))
    finally:
        model.config.use_cache = use_cache


def forget_gguf(model: PreTrainedModel) -> None:
    """A model read from GGUF has plain weights but is marked as quantized; ``save_pretrained`` would refuse it."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantizer.quantization_config.quant_method == "gguf":
        quantizer.remove_quantization_config(model)


@contextmanager
def staged(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside `out` that becomes `out` when the block ends well, and vanishes when it does not.

    Only an `out` of our own is ever replaced, with `overwrite`, and only once its successor is complete, which then
    lists its files, so that the next one may replace it.
    """
    out = place_of(out)
    refuse_occupied(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = out.with_name(f".{out.name}.{uuid4().hex[:8]}{PARTIAL}")
    stage.mkdir()
    try:
        yield stage
        if overwrite:
            names = sorted(path.relative_to(stage).as_posix() for path in stage.rglob("*") if path.is_file())
            (stage / FILES).write_text(json.dumps([*names, FILES], indent=1) + "\n", encoding="utf-8")
        _settle(stage)
        _replace(out, stage)
        flush(out.parent)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _settle(stage: Path) -> None:
    """Everything is on the disk before it gets its name, readable as other files are: safetensors writes for its owner
    alone."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (*stage.rglob("*"), stage):
        if path.is_file():
            path.chmod(0o666 & ~mask)
        flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_leftovers(out: Path) -> None:
    """Remove what killed runs left beside `out`; call it while nobody else can be writing there.

    What was set aside for a successor that never came stays until there is an `out` again.
    """
    suffixes = (PARTIAL, ASIDE) if out.exists() else (PARTIAL,)
    for suffix in suffixes:
        for old in out.parent.glob(f".{glob.escape(out.name)}.????????{suffix}"):
            old.unlink() if old.is_symlink() else shutil.rmtree(old)


def place_of(out: str | os.PathLike[str]) -> Path:
    """Where `out` is, links followed, so that what is written beside it is on its disk; UsageError for a link to
    nothing."""
    out = Path(out).expanduser()
    if out.is_symlink() and not out.exists():
        raise UsageError(
            f"{out} is a link to {out.readlink()}, where nothing is; make that directory, or remove the link"
        )
    return out.resolve()


def refuse_nested(out: Path, source: Path) -> None:
    """UsageError where `out` lies in what it is made from, or holds it; both with links followed."""
    if source.is_relative_to(out):
        raise UsageError(f"{source} is read by this run, which would replace it at {out}; choose another --out")
    if out.is_relative_to(source):
        raise UsageError(f"{out} lies inside {source}, which this run reads; choose a directory beside it")


def refuse_occupied(out: Path, *, overwrite: bool) -> None:
    """UsageError where `out` holds what must not be replaced: with `overwrite`, any file that no run of ours wrote."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite or not out.is_dir():
        raise UsageError(f"{out} exists; choose a new directory, or move this one away")
    if stranger := _stranger(out):
        raise UsageError(
            f"{out} holds {stranger}, which no run has listed in {FILES} as its own; choose a new directory, or move "
            "it away"
        )


def _stranger(out: Path) -> str | None:
    """A file that no run of ours has listed; any, where there is no list."""
    try:
        own = set(json.loads((out / FILES).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        own = set()
    files = (path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_symlink() or not path.is_dir())
    return next((name for name in files if name not in own), None)


def _replace(out: Path, stage: Path) -> None:
    """Rename `stage` to `out`. A directory cannot be renamed onto a full one, so the old one steps aside first."""
    if not out.exists():
        stage.rename(out)
        return
    aside = stage.with_suffix(ASIDE)
    out.rename(aside)
    try:
        stage.rename(out)
    except OSError:
        aside.rename(out)
        raise
    shutil.rmtree(aside)
