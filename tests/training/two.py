"""``two.py FOLDER``: trains the same small models in one process, and in two by DDP, FSDP2 and accelerate's FSDP2.

Each run leaves its whole state, FOLDER/WORLD/CASE.safetensors and .json, for test_sharded.py to compare. Models are in
float64, so that the order of sums over the batch all but never shows in the float32 masters: masks are then compared
to the bit, though a tie within rounding could turn one in principle. The processes are forks of this one, which has
imported everything.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.core.pattern import NM, Block, Unstructured, make_pattern
from secateur.core.sparse_adamw import Schedule
from secateur.training import SparseAdamW, deal_state, gather_state
from secateur.training.shards import is_first

STEPS, HALF = 8, 5
CASES = [
    *((method, "2:4") for method in ("ast", "ast_g", "srste", "cast", "admm", "fixed", "none")),
    ("ast", "unstructured"),
    ("ast", "row"),
    ("ast", "global"),
    ("cast", "scales"),
    ("admm", "unstructured"),
]


class Odd(nn.Module):
    """Matrices whose rows do not divide by two, down to one row; and what a pattern cannot choose in shards."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in (
            ("uneven", (7, 16)), ("one_row", (1, 16)), ("matrix", (5, 16)), ("tiles", (6, 16)),
            ("stored_over", (16, 5)), ("stack", (3, 2, 16)), ("one_expert", (1, 4, 16)), ("bias", (1,)),
        ):  # fmt: skip
            parameter = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
            self.register_parameter(name, parameter)

    def forward(self, x):
        rows = [self.uneven, self.one_row, self.matrix, self.tiles, self.stored_over.T, self.stack.flatten(0, 1)]
        return torch.tanh(x @ torch.cat([*rows, self.one_expert[0]]).T) + self.bias


def odd_groups(model):
    return [
        {"params": [model.uneven, model.one_row], "pattern": NM(2, 4)},
        {"params": [model.matrix, model.stack, model.one_expert], "pattern": Unstructured(0.6)},
        {"params": [model.tiles], "pattern": Block(0.5, 2, 4)},
        {"params": [model.stored_over], "pattern": NM(6, 16), "transposed": True},  # no process holds a whole group
        {"params": [model.bias]},
    ]


def llama():
    config = LlamaConfig(
        vocab_size=63, hidden_size=32, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).double()


def llama_groups(model, pattern):
    matrices = [p for name, p in model.named_parameters() if "layers" in name and p.ndim == 2]
    others = [p for name, p in model.named_parameters() if "layers" not in name or p.ndim != 2]
    return [{"params": matrices, "pattern": pattern}, {"params": others, "weight_decay": 0.1}]


def share(batch):
    """The rows of this process."""
    return batch.chunk(dist.get_world_size())[dist.get_rank()] if dist.is_initialized() else batch


def llama_losses(model, first, last, parts=1):
    """For every step the losses, of equal parts of the batch, whose gradients are accumulated."""
    batches = torch.randint(63, (STEPS, 4, 12), generator=torch.Generator().manual_seed(1))
    for batch in batches[first:last]:
        yield (
            F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()) / parts
            for ids in share(batch).chunk(parts)
        )


def odd_losses(model, first, last):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, 8, 16, generator=generator, dtype=torch.float64)
    y = torch.randn(STEPS, 8, 34, generator=generator, dtype=torch.float64)
    for inputs, wanted in list(zip(x, y, strict=True))[first:last]:
        yield [F.mse_loss(model(share(inputs)), share(wanted))]


def train(model, optimizer, losses, first=0, last=STEPS):
    """The gradients' norm at every step, before it is clipped."""
    norms = []
    for parts in losses(model, first, last):
        for loss in parts:
            loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def keep(path, optimizer, model, **facts):
    tensors, numbers = gather_state(optimizer, model.named_parameters())
    assert is_first() or not tensors
    if is_first():
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path.with_suffix(".safetensors"))
        path.with_suffix(".json").write_text(json.dumps({**numbers, **facts}))


def resume(path, optimizer, model):
    tensors, numbers = {}, {}
    if is_first():
        tensors = load_file(path.with_suffix(".safetensors"))
        numbers = json.loads(path.with_suffix(".json").read_text())
    deal_state(optimizer, model.named_parameters(), tensors, numbers)


def one(model):
    return model


def by_fsdp2(model, *shape):
    mesh = init_device_mesh("cpu", shape or (2,), mesh_dim_names=("replicas", "shards")[-len(shape or (2,)) :])
    for layer in getattr(getattr(model, "model", None), "layers", []):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WRAPS = {
    "one": one,
    "ddp": DistributedDataParallel,
    "fsdp2": by_fsdp2,
    "fsdp2 1x2": lambda model: by_fsdp2(model, 1, 2),
    "fsdp2 2x1": lambda model: by_fsdp2(model, 2, 1),
}


def optimizer_for(model, method="ast", structure="2:4", **options):
    scope = "global" if structure == "global" else "matrix"
    if structure == "scales":
        structure, options = "2:4", {"scales": 2, **options}
    pattern = make_pattern("unstructured" if scope == "global" else structure, None if ":" in structure else 0.6)
    schedule = Schedule(STEPS, refresh=2, freeze=0.75)
    return SparseAdamW(llama_groups(model, pattern), method=method, lr=1e-2, schedule=schedule, scope=scope, **options)


def run_llama(folder, world, method, structure):
    model = WRAPS[world](llama())
    optimizer = optimizer_for(model, method, structure)
    before = train(model, optimizer, llama_losses, 0, HALF)
    flip_rate = optimizer.flip_rate() if is_first() else None  # nobody waits for the others
    name = f"{method} {structure}"
    keep(folder / world / f"{name} half", optimizer, model, norms=before, flip_rate=flip_rate)
    norms = train(model, optimizer, llama_losses, HALF)
    optimizer.project()
    keep(folder / world / name, optimizer, model, norms=norms)


def run_odd(folder, world):
    model = WRAPS[world](Odd())
    bare = model.module if world == "ddp" else model
    schedule = Schedule(STEPS, refresh=2, sparsify=0.5, freeze=0.75)
    optimizer = SparseAdamW(odd_groups(bare), metric="fisher", lr=1e-2, schedule=schedule)
    norms = train(model, optimizer, odd_losses)
    optimizer.project()
    keep(folder / world / "odd", optimizer, model, norms=norms)
    optimizer.load_state_dict(optimizer.state_dict())
    keep(folder / world / "odd loaded", optimizer, model, norms=norms)


def run_resumed(folder, world, source):
    """From the half that another world wrote: at once kept again, then finished."""
    model = WRAPS[world](llama())
    optimizer = optimizer_for(model)
    resume(folder / source / "ast 2:4 half", optimizer, model)
    keep(folder / world / f"{source} taken", optimizer, model)
    norms = train(model, optimizer, llama_losses, HALF)
    optimizer.project()
    keep(folder / world / f"{source} resumed", optimizer, model, norms=norms)


def run_in_halves(folder, world):
    """Two backward passes a step, their activations recomputed."""
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model = WRAPS[world](model.train())
    optimizer = optimizer_for(model)
    norms = train(model, optimizer, partial(llama_losses, parts=2))
    optimizer.project()
    keep(folder / world / "in halves", optimizer, model, norms=norms[HALF:])


def run_torch_checkpoint(folder):
    """torch's own sharded optimizer state, which accelerate's save_state writes."""
    model = by_fsdp2(llama())
    optimizer = optimizer_for(model)
    resume(folder / "one" / "ast 2:4 half", optimizer, model)
    other = by_fsdp2(llama())
    taken = optimizer_for(other)
    set_optimizer_state_dict(other, taken, get_optimizer_state_dict(model, optimizer))
    taken.rewrite()
    keep(folder / "fsdp2" / "torch taken", taken, other)


def run_accelerate(folder):
    """accelerate takes the plugin on accelerators only; what it does with it runs on CPUs all the same."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model = llama()
    optimizer = optimizer_for(model, begin=False)
    model, prepared = accelerator.prepare(model, optimizer)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert not optimizer.state
    optimizer.begin()
    norms = train(model, prepared, llama_losses)
    optimizer.project()
    keep(folder / "accelerate" / "ast 2:4", optimizer, model, norms=norms[HALF:])


def alone(_, folder):
    torch.set_num_threads(1)
    for case in CASES:
        run_llama(folder, "one", *case)
    run_odd(folder, "one")
    run_in_halves(folder, "one")


def both(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for world in ("ddp", "fsdp2"):
        for case in CASES:
            run_llama(folder, world, *case)
        run_odd(folder, world)
        run_resumed(folder, world, "one")
        run_in_halves(folder, world)
    for world in ("fsdp2 1x2", "fsdp2 2x1"):
        run_odd(folder, world)
    run_torch_checkpoint(folder)
    run_accelerate(folder)
    dist.destroy_process_group()


def alone_again(_, folder):
    torch.set_num_threads(1)
    for source in ("one", "ddp", "fsdp2"):
        run_resumed(folder, "one", source)


if __name__ == "__main__":
    for process, number in ((alone, 1), (both, 2), (alone_again, 1)):
        start_processes(process, (Path(sys.argv[1]),), nprocs=number, start_method="fork")
