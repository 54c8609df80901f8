"""A saved directory, read tensor by tensor: is every promise of ``secateur/promise.json`` still kept?

Reads the safetensors files themselves and never builds the model: what is checked is what others will load. Memory: one
tensor at a time, two with a baseline. Any Hugging Face directory can be inspected; without promises the rows only tell
the sparsity of every matrix.

Broken means: a promised weight is missing or no longer follows its pattern, a tensor is not finite, a promised weight
holds -0.0 (not a clean zero for every consumer), tied weights differ, or a tensor outside the plan is not the
baseline's, unless it was to be changed.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.core.pattern import check_mask, zeros_in
from secateur.errors import ArtefactError
from secateur.evaluation.branches import LowRank, broken_branches, cost_of, read_branches
from secateur.models.headers import weight_files
from secateur.models.promises import PROMISE, Inherited, Promise, by_tensor, read_json, read_promises

PIECE = 1 << 20
"""Elements that are checked at one time."""


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a directory by name, sharded or not, each read from disk when asked for and not kept."""

    def __init__(self, directory: Path) -> None:
        self._file_of = {name: file for file in weight_files(directory) for name in _names(file)}

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], framework="pt") as file:
            return file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


@dataclass(frozen=True)
class Row:
    """One matrix. ``ok`` is None where nothing was promised; ``why`` says what is wrong."""

    name: str
    shape: tuple[int, int]
    """As stored."""
    inputs: int
    zeros: int
    sparsity: float
    pattern: str
    """The promised pattern in short form, "" outside the plan."""
    ok: bool | None
    why: str
    promised: int = 0
    """Zeros."""


@dataclass
class Inspection:
    """What a directory holds, and every promise it breaks, one line each."""

    path: str
    promised: bool
    """A ``secateur/promise.json`` was there to check against."""
    rows: list[Row] = field(default_factory=list)
    """Every matrix in the order of the files, planned or not."""
    tensors: int = 0
    elements: int = 0
    """Of all tensors."""
    bytes: int = 0
    """Of all tensors."""
    weights: int = 0
    """Elements of the planned matrices; of all matrices where nothing was promised."""
    zeros: int = 0
    """Zeros among them."""
    integers: int = 0
    """Matrices of integers: codes of somebody else, as a rule."""
    finite: bool = True
    negative_zeros: int = 0
    """-0.0 in all tensors, planned or not."""
    tied: list[list[str]] = field(default_factory=list)
    low_rank: LowRank | None = None
    """What the low-rank branches take, where there are any."""
    uncompared: int = 0
    """Tensors outside the plan that no baseline can be held against, since the run changed them on purpose."""
    broken: list[str] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "sparsity": self.sparsity}


def inspect(
    directory: str | Path,
    baseline: str | Path | Mapping[str, Tensor] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    check: Callable[[str, Tensor], None] | None = None,
    factors: Mapping[str, Tensor] | None = None,
) -> Inspection:
    """Read every tensor and check it. ``baseline``: a directory, or a loaded model's ``state_dict()``.

    ``tensors`` stand for the directory's own files where they are stored in another form, ``factors`` for those of its
    low-rank branches. ``check`` sees each of the tensors too, and raises what it finds wrong.
    """
    directory = Path(directory)
    checkpoint = Checkpoint(directory) if tensors is None else tensors
    promises = read_promises(directory)
    base = Checkpoint(Path(baseline)) if isinstance(baseline, str | Path) else baseline
    linears, tied, changed = (promises.linears, promises.tied, promises.changed) if promises else ([], [], ())
    held = by_tensor(linears)
    report = Inspection(str(directory), promised=promises is not None, tied=tied)
    for name, tensor in checkpoint.items():
        if check is not None:
            check(name, tensor)
        _look_at(name, tensor, held.get(name, []), report)
        if base is not None and name in changed:
            report.uncompared += name not in held
        elif base is not None and name in base:
            _compare(name, tensor, base[name], held.get(name, []), report)
    report.broken += [f"{one.name}: promised but not stored" for one in linears if one.tensor not in checkpoint]
    if promises and report.zeros < promises.zeros:
        report.broken.append(f"{report.zeros} zeros in all promised matrices together, {promises.zeros} were promised")
    for group in tied:
        _check_tied(group, checkpoint, directory, report)
    branches, shapes = read_branches(directory, factors), {row.name: row.shape for row in report.rows}
    report.low_rank = cost_of(branches, report.weights, report.zeros)
    report.broken += broken_branches(branches, promises.low_rank if promises else None, shapes)
    if base is not None:
        excused = {name for group in tied for name in group}  # stored once or several times: both are right
        ours, theirs = set(checkpoint), set(base)
        report.broken += [f"{name}: only in the baseline" for name in sorted(theirs - ours - excused)]
        report.broken += [f"{name}: not in the baseline" for name in sorted(ours - theirs - excused)]
    return report


def inherited(directory: Path, changed: Collection[str]) -> Inherited:
    """The promises of all but the ``changed``, by their names; ArtefactError where the directory breaks one itself."""
    promises, checkpoint = read_promises(directory), Checkpoint(directory)
    kept = tuple(one for one in promises.linears if one.name not in changed) if promises else ()
    report = Inspection(str(directory), promised=True)
    for name, held in by_tensor(kept).items():
        if name in checkpoint:
            _look_at(name, checkpoint[name], held, report)
        else:
            report.broken.append(f"{name}: promised but not stored")
    if report.broken:
        raise ArtefactError(
            f"{directory} breaks a promise of its own, {report.broken[0]}; copy it again, or remove its {PROMISE}"
        )
    return Inherited(kept, report.zeros)


class Counts(NamedTuple):
    """What is counted of the elements of a tensor."""

    zeros: int
    negative: int
    """-0.0 among the zeros."""
    bad: int
    """Not finite."""


def _counted(tensor: Tensor) -> Counts:
    """Piece by piece: the checks of a whole embedding at once would take three times its own memory."""
    zeros = negative = bad = 0
    for piece in tensor.flatten().split(PIECE):
        zero = piece == 0
        zeros += int(zero.sum())
        negative += int((zero & piece.signbit()).sum())
        bad += piece.numel() - int(piece.isfinite().sum())
    return Counts(zeros, negative, bad)


def _look_at(name: str, tensor: Tensor, promises: list[Promise], report: Inspection) -> None:
    """Counts and checks of one tensor, added to the report."""
    report.tensors += 1
    report.elements += tensor.numel()
    report.bytes += tensor.numel() * tensor.element_size()
    if not tensor.is_floating_point():
        report.integers += tensor.ndim == 2
        return
    counts = _counted(tensor)
    report.negative_zeros += counts.negative
    if counts.bad:
        report.finite = False
        report.broken.append(f"{name}: {counts.bad} of {tensor.numel()} values are not finite")
    if not promises and tensor.ndim == 2:
        _add_row(name, tensor, counts, None, report)
    for promise in promises:
        if promise.fits(tensor):
            W = promise.cut(tensor)
            _add_row(promise.name, W, counts if W is tensor else _counted(W), promise, report)
            continue
        wanted = f"a part at {list(promise.at)}" if promise.at else "a matrix"
        report.broken.append(f"{promise.name}: stored with shape {tuple(tensor.shape)}, {wanted} was promised")


def _add_row(name: str, W: Tensor, counts: Counts, promise: Promise | None, report: Inspection) -> None:
    """One matrix, checked against its promise if there is one."""
    why = _broken_promise(W, counts.negative, promise) if promise else None
    if why:
        report.broken.append(f"{name}: {why}")
    if promise or not report.promised:
        report.weights += W.numel()
        report.zeros += counts.zeros
    pattern, ok = (str(promise.pattern), why is None) if promise else ("", None)
    shape = (W.shape[0], W.shape[1])
    R, C = shape[::-1] if promise and promise.transposed else shape
    promised = zeros_in((R, C), promise.pattern) if promise else 0
    report.rows.append(Row(name, shape, C, counts.zeros, counts.zeros / W.numel(), pattern, ok, why or "", promised))


def _broken_promise(W: Tensor, negative: int, promise: Promise) -> str | None:
    mask = W != 0
    try:
        broken = check_mask(mask.T if promise.transposed else mask, promise.pattern)  # stored (in, out) -> (out, in)
    except ValueError as error:  # the stored shape cannot carry the pattern at all
        return str(error)
    return broken or (f"{negative} zeros are -0.0; write +0.0" if negative else None)


def _compare(name: str, tensor: Tensor, base: Tensor, promises: list[Promise], report: Inspection) -> None:
    """Outside the plan a tensor must be the baseline's, after the baseline's cast to the stored dtype."""
    base = base.detach().cpu().to(tensor.dtype)
    if any(not promise.at or not promise.fits(tensor) for promise in promises):
        return
    if promises and tensor.shape == base.shape:
        outside = torch.ones_like(tensor[..., :1], dtype=torch.bool)
        for promise in promises:
            promise.cut(outside)[:] = False
        tensor, base = tensor[outside[..., 0]], base[outside[..., 0]]
    if not torch.equal(tensor, base):
        report.broken.append(f"{name}: outside the plan, yet not the baseline's")


def _check_tied(group: list[str], checkpoint: Mapping[str, Tensor], directory: Path, report: Inspection) -> None:
    """Tied weights are stored once (the loader ties them again, if config.json lets it) or several times, equal."""
    stored = [name for name in group if name in checkpoint]
    if not stored:
        report.broken.append(f"tied {' = '.join(group)}: none of them is stored")
    elif len(stored) < len(group) and read_json(directory / "config.json").get("tie_word_embeddings") is False:
        report.broken.append(f"tied {' = '.join(group)}: only {stored[0]} is stored, and config.json unties it")
    elif any(not torch.equal(checkpoint[stored[0]], checkpoint[name]) for name in stored[1:]):
        report.broken.append(f"tied {' = '.join(group)}: they differ")


# ---- files


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{path}: not a readable safetensors file ({error}); save or copy it again") from error
