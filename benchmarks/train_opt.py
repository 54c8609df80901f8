"""Train a small OPT-architecture model: two-matrix ReLU feed-forwards, the form SparseLLM was published for.

    python benchmarks/train_opt.py OUT [--steps 500]

A byte-level BPE vocabulary and about 4 million weights, learned from ``SECATEUR_DATA/train/*.jsonl`` in some minutes on
two cores with plain AdamW and a cosine schedule. One document in fifty is held out; the loss on those is printed. OUT
is a normal Hugging Face directory. Seeds are fixed, so one machine gives one model.
"""

import argparse
import json
import math
import os
import random
import time
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

SEED = 0
END = "</s>"
HELD_OUT_EVERY = 50
HELD_OUT_WINDOWS = 64


def read_documents(data: Path) -> list[str]:
    """Every document with a ``text`` field under train/, in one fixed shuffled order."""
    files = sorted((data / "train").glob("*.jsonl"))
    if not files:
        raise SystemExit(f"no train/*.jsonl under {data}; set SECATEUR_DATA to the folder that has it")
    rows = [json.loads(line) for file in files for line in file.open(encoding="utf-8")]
    documents = [row["text"] for row in rows if "text" in row]
    random.Random(SEED).shuffle(documents)
    return documents


def train_tokenizer(documents: list[str], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: no unknown characters; id 0 ends a document."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents, vocab_size=vocab_size, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=context
    )


def to_windows(documents: list[str], tokenizer: PreTrainedTokenizerFast, length: int) -> Tensor:
    """Documents one after the other, END between them, cut into (windows, length); the last partial one is dropped."""
    end = tokenizer.eos_token_id
    ids = [i for encoded in tokenizer(documents, verbose=False)["input_ids"] for i in (*encoded, end)]
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).view(count, length)


def build_model(args: argparse.Namespace) -> OPTForCausalLM:
    torch.manual_seed(SEED)
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=args.vocab,
            hidden_size=args.hidden,
            word_embed_proj_dim=args.hidden,
            ffn_dim=4 * args.hidden,
            num_hidden_layers=args.layers,
            num_attention_heads=args.hidden // 64,
            max_position_embeddings=args.context,
            activation_function="relu",
            do_layer_norm_before=True,
            dropout=0.0,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def optimizer_for(model: OPTForCausalLM, rate: float) -> torch.optim.AdamW:
    """Decay on matrices, none on biases and norms."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def cosine(step: int, steps: int) -> float:
    """Warm-up over the first 5 %, then a cosine to 5 % of the top rate."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def mean_loss(model: OPTForCausalLM, ids: Tensor) -> Tensor:
    """Next-token cross entropy in nats; the forward in bfloat16, the loss in float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: OPTForCausalLM, windows: Tensor) -> float:
    model.eval()
    losses = [mean_loss(model, window[None]) for window in windows]
    model.train()
    return torch.stack(losses).mean().item()


def batches(windows: Tensor, size: int, steps: int) -> list[Tensor]:
    """Row numbers for every step: as many shuffled passes over the windows as the steps need."""
    generator = torch.Generator().manual_seed(SEED)
    passes = math.ceil(steps * size / len(windows))
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(passes)])
    return [order[start:stop] for start, stop in pairwise(range(0, steps * size + 1, size))]


def train(model: OPTForCausalLM, windows: Tensor, held_out: Tensor, args: argparse.Namespace) -> None:
    optimizer = optimizer_for(model, args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, args.steps))
    began = time.monotonic()
    for step, rows in enumerate(batches(windows, args.batch, args.steps), start=1):
        loss = mean_loss(model, windows[rows])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % (args.steps // 10) == 0 or step == args.steps:
            rate = step * args.batch * args.context / (time.monotonic() - began)
            print(f"step {step}/{args.steps}  loss {loss.item():.3f}  {rate:,.0f} tokens/s", flush=True)
    loss = held_out_loss(model, held_out)
    print(f"held-out: loss {loss:.4f}, perplexity {math.exp(loss):.2f} on {held_out.numel():,} tokens")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a small OPT-architecture model for the ReLU experiments.")
    parser.add_argument("out", type=Path, help="the Hugging Face directory to write")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3, help="top learning rate")
    return parser.parse_args()


def main() -> None:
    args = parse()
    documents = read_documents(Path(os.environ.get("SECATEUR_DATA", "../shared/data")))
    held_out, kept = documents[::HELD_OUT_EVERY], [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY]
    tokenizer = train_tokenizer(kept, args.vocab, args.context)
    windows = to_windows(kept, tokenizer, args.context)
    model = build_model(args)
    print(f"{model.num_parameters():,} weights, {windows.numel():,} training tokens, {torch.get_num_threads()} threads")
    train(model, windows, to_windows(held_out, tokenizer, args.context)[:HELD_OUT_WINDOWS], args)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
