"""One block on its way through a pruning method: its rows of hidden states, its calls, its linears.

Hidden states wait in chunks of ``batch`` rows (``pruning.hidden``); the block is on the accelerator while it is worked
on, and a chunk visits it. Forwards and Gram products run at ``RunOptions.precision``; solves always run in float32.
"""

import time
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.core.moments import Inputs, Moments, Observed, inputs_of
from secateur.core.pattern import Pattern, Stacked, by_rows
from secateur.core.plan import Target
from secateur.core.solver import LayerSolver, Needs, Pruned, relative_error
from secateur.errors import ModelError, NumericalError, UsageError
from secateur.models.adapter import Call, DecoderAdapter, Linear
from secateur.models.expert_layout import ExpertLayout, observe_experts, watchable
from secateur.models.experts import ExpertLinear
from secateur.models.grids import attach_grid
from secateur.models.hooks import hooked
from secateur.models.layout import FeedForwardForm, Layout, observe
from secateur.pruning.hidden import Budget, Hidden
from secateur.pruning.ranks import ALONE, Ranks, pattern_of_rows
from secateur.pruning.records import BranchRecord, LinearRecord, RoundRecord

PROBE_TOKENS = 64
"""Tokens on which the structure of a block is observed."""
Watcher = Callable[[Tensor], None]


@dataclass(frozen=True)
class RunOptions:
    """How a run uses the machine; nothing here changes what is asked for."""

    device: str = "cpu"
    """Where blocks are worked on."""
    batch: int = 1
    """Rows of a chunk."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of forwards and Grams. "bfloat16" runs forwards under autocast and rounds the inputs of other float32 products
    to 16 bit, adding up in float32: 2 to 4 times faster on processors with AMX or AVX512-BF16. Solves stay float32."""
    budget: Budget = field(default_factory=Budget)
    """Host memory of waiting hidden states."""
    ranks: Ranks = ALONE
    """The processes that share the run."""


@dataclass
class Work:
    """A block, what it is called with, and what is to become of it."""

    adapter: DecoderAdapter
    index: int
    hidden: Hidden
    targets: dict[str, Target]
    """Planned linears by their name inside the block."""
    options: RunOptions
    dropped: int = 0
    """Rows that turned non-finite in this block and are no longer in ``hidden``."""
    seconds: dict[str, float] = field(default_factory=dict)
    records: dict[str, LinearRecord] = field(default_factory=dict)
    """By full name; the last solve of a linear is the one on record."""
    expert_rounds: list[RoundRecord] = field(default_factory=list)
    """Iterates of the experts' FFNs."""
    refused: list[str] = field(default_factory=list)
    """Full names of sources whose fold the block noticed, or whose readers are not all quantized."""

    @cached_property
    def layout(self) -> Layout:
        """The structure of the block, observed on the first tokens of a row; ask before anything is written."""
        probe = self._probe()
        return observe(self.adapter, self.index, probe, self.call(probe))

    @cached_property
    def experts(self) -> tuple[ExpertLayout, ...]:
        """The same of the block's experts; none in an ordinary block."""
        probe = self._probe()
        return observe_experts(self.adapter, self.index, probe, self.call(probe))

    def _probe(self) -> Float[Tensor, "1 S D"]:
        row = next((row for rows in self.hidden for row in rows if torch.isfinite(row).all()), self.hidden[0][0])
        return row[None, :PROBE_TOKENS].to(self.options.device)

    @property
    def has_ffn(self) -> bool:
        """Some linears after the attention see every token; not so where experts are all there is."""
        return not self.experts or any(group.part == "ffn" for group in self.layout.groups)

    @property
    def form(self) -> FeedForwardForm:
        """The form of the block's FFN; ModelError where SparseLLM knows none, UsageError where the plan has a part."""
        return self.whole_form(self.layout.ffn, self.layout.ffn_refusal)

    def whole_form(self, form: FeedForwardForm | None, refusal: str | None) -> FeedForwardForm:
        """The form of one FFN, if SparseLLM can prune it as a whole."""
        name = self.adapter.block_names[self.index]
        if form is None:
            raise ModelError(f"{name}: {refusal}; prune it with a layer solver such as admm instead")
        check_whole(name, {half.linear for half in (form.gate, form.up) if half} | {form.down}, self.targets)
        return form

    @property
    def block(self) -> nn.Module:
        return self.adapter.blocks[self.index]

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """All prunable linears of the block, planned or not."""
        return self.adapter.linears(self.block)

    def linear(self, name: str) -> Linear:
        return self.linears[name]

    def call(self, rows: Float[Tensor, "B S D"]) -> Call:
        return self.adapter.calls(rows.shape[0], rows.shape[1])[self.index].to(self.options.device)

    def run(self, rows: Float[Tensor, "B S D"], block: nn.Module | None = None) -> Float[Tensor, "B S D"]:
        """Output of the block, or of another in its place, for one chunk, back in host memory."""
        rows = rows.to(self.options.device)
        rounded = self.options.precision == "bfloat16" and rows.dtype == torch.float32
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=rounded):
            return self.adapter.replay(block or self.block, rows, self.call(rows)).to("cpu", rows.dtype)

    def combine(self, moments: Moments) -> None:
        """Sums over tokens become those of all processes."""
        self.options.ranks.combine(moments)

    def waiting(self, rows: Iterable[Tensor] = ()) -> Hidden:
        """A place for hidden states."""
        return Hidden(self.options.budget, rows)

    def watched_pass(self, watchers: dict[nn.Module, Watcher]) -> Hidden:
        """Outputs of the block for all rows; each watcher gets its module's inputs, if it is reached."""
        return self.waiting(self.outputs(watchers))

    def outputs(self, watchers: dict[nn.Module, Watcher]) -> Iterator[Float[Tensor, "B S D"]]:
        """The same, a chunk at a time; what is not taken is not kept.

        Rows whose output is not finite are dropped from ``hidden`` first, and their chunk is run again without them, so
        that no watcher ever sees them: not even behind a router, where nothing tells rows apart.
        """
        kept = self.waiting()
        for index, rows in enumerate(self.hidden):
            out, seen = self.watched(rows, watchers)
            finite = torch.isfinite(out).flatten(1).all(dim=1)
            if not finite.any():
                continue
            if finite.all():
                kept.share(self.hidden, index)
            else:
                kept.append(rows[finite])
                out, seen = self.watched(rows[finite], watchers)
            for module, inputs in seen.items():
                watchers[module](inputs)
            yield out
        self.dropped += self.hidden.rows - kept.rows
        self.hidden = kept

    def watched(
        self, rows: Float[Tensor, "B S D"], modules: Collection[nn.Module], block: nn.Module | None = None
    ) -> tuple[Tensor, dict[nn.Module, Tensor]]:
        """Output of one chunk, and what the modules were given."""
        seen: dict[nn.Module, Tensor] = {}
        with (
            watchable(self.experts) if any(isinstance(m, ExpertLinear) for m in modules) else nullcontext(),
            watching({module: partial(seen.__setitem__, module) for module in modules}),
        ):
            out = self.run(rows, block)
            return out, {module: in_rows(X, rows) for module, X in seen.items()}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the seconds of what happens inside to the stage's account."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def forwards(self, name: str = "forward") -> Iterator[None]:
        """A stage of forwards and moments: products at the run's precision, no autograd."""
        with products(self.options.precision), self.stage(name), torch.no_grad():
            yield

    @contextmanager
    def naming(self, *linears: str) -> Iterator[None]:
        """What fails in numbers inside failed at these linears."""
        try:
            yield
        except NumericalError as error:
            names = ", ".join(f"{self.adapter.block_names[self.index]}.{name}" for name in linears)
            raise NumericalError(f"{names}: {error}") from error

    def solved(self, linears: tuple[str, ...], before: Tensor, after: Pruned, observed: Observed | None) -> None:
        """Write stacked solved weights back into their linears and keep a record of each."""
        inputs = inputs_of(observed) if observed else None
        sizes = [self.targets[name].shape[0] for name in linears]
        grids = after.grid.split(sizes) if after.grid else [None] * len(sizes)
        for name, W0, W, grid in zip(linears, before.split(sizes), after.W.split(sizes), grids, strict=True):
            written = self.write(name, W)
            if grid:
                attach_grid(self.linear(name), grid)
            error = relative_error(W0, written, observed.H) if observed else None
            self.record(name, written, after.note, error, inputs)

    def write(self, name: str, W: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
        """Weights into their linear; what it holds then, rounded to its dtype."""
        linear = self.linear(name)
        self.adapter.write(linear, W)
        return self.adapter.read(linear)

    def record(
        self, name: str, written: Float[Tensor, "R C"], note: str, error: float | None, inputs: Inputs | None
    ) -> None:
        """A linear that is solved, as the report shows it."""
        target, full_name = self.targets[name], f"{self.adapter.block_names[self.index]}.{name}"
        sparsity = float(torch.count_nonzero(written == 0)) / written.numel()
        self.records[full_name] = LinearRecord(
            full_name, target.shape, str(target.pattern), sparsity, error, note=note, inputs=inputs
        )

    def add_note(self, linears: Iterable[str], note: str) -> None:
        """One more thing that a reader of these linears' records must know."""
        for name in linears:
            full_name = f"{self.adapter.block_names[self.index]}.{name}"
            record = self.records[full_name]
            self.records[full_name] = replace(record, note="; ".join(filter(None, (record.note, note))))

    def branched(self, name: str, branch: BranchRecord) -> None:
        """A linear that is pruned has got a branch."""
        full_name = f"{self.adapter.block_names[self.index]}.{name}"
        self.records[full_name] = replace(self.records[full_name], branch=branch)

    def stacked(self, linears: tuple[str, ...]) -> tuple[Float[Tensor, "R C"], Stacked]:
        """Weights and patterns of linears that share their input."""
        W = torch.cat([self.adapter.read(self.linear(name)) for name in linears])
        return W, Stacked(tuple((self.targets[name].shape[0], self.targets[name].pattern) for name in linears))


def check_whole(block: str, ffn: Iterable[str], planned: Container[str]) -> None:
    """SparseLLM prunes an FFN as a whole: UsageError where the plan lacks one of its linears."""
    if missing := sorted(name for name in ffn if name not in planned):
        raise UsageError(
            f"{block}: SparseLLM prunes an FFN as a whole, but the plan lacks {', '.join(missing)}; let include and "
            "ignore keep all of it, or choose a layer solver such as admm"
        )


@contextmanager
def products(precision: Literal["float32", "bfloat16"]) -> Iterator[None]:
    """Products inside float32 matrix multiplications, from here to the end of the with-block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "bfloat16" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Precise:
    """A layer solver that computes in full float32 wherever it is called from, its time accounted for."""

    needs: ClassVar[Needs] = "gram"

    def __init__(self, solver: LayerSolver, work: "Work") -> None:
        self._solver, self._work = solver, work

    def solve(self, W: Float[Tensor, "R C"], H: Float[Tensor, "..."], pattern: Pattern | Stacked) -> Pruned:
        with products("float32"), self._work.stage("solve"):
            return solve_together(self._solver, W, H, pattern, self._work.options.ranks)


def solve_together(
    solver: LayerSolver, W: Float[Tensor, "R C"], H: Float[Tensor, "..."], pattern: Pattern | Stacked, ranks: Ranks
) -> Pruned:
    """The same solve in every process: by rows where these are independent of each other, else by the first alone."""
    if ranks.size == 1:
        return solver.solve(W, H, pattern)
    shared = by_rows(pattern)
    own = ranks.share(len(W)) if shared else range(len(W) if ranks.first else 0)
    new, note = W[:0], ""
    if own:
        pruned = solver.solve(W[own.start : own.stop], H, pattern_of_rows(pattern, own))
        new, note = pruned.W, pruned.note
    new = ranks.together(new, len(W)) if shared else ranks.same(new if ranks.first else torch.empty_like(W))
    return Pruned(new, new != 0, note)


def in_rows(X: Float[Tensor, "*batch C"], rows: Float[Tensor, "B S D"]) -> Float[Tensor, "*other C"]:
    """What a linear was given, row by row again where the block had flattened its tokens (OPT does)."""
    every = X.shape[:-1].numel() == rows.shape[:-1].numel()
    return X.reshape(*rows.shape[:-1], X.shape[-1]) if every else X


def watching(inputs: Mapping[nn.Module, Watcher]) -> AbstractContextManager[None]:
    """Hand every input of these modules to their watcher."""

    def see(watcher: Watcher, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        with torch.autocast(args[0].device.type, enabled=False):  # inside it, float32 products run in 16 bit
            watcher(args[0])

    return hooked(module.register_forward_pre_hook(partial(see, watcher)) for module, watcher in inputs.items())
