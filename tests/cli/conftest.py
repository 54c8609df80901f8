"""A model small enough to prune in a second, saved as people save models, and the command run in this process."""

import io
import json
import string
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.cli import main

CONTEXT = 128


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line on stderr."""
        return self.err.strip().splitlines()[-1]

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def _run(*args: object) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(arg) for arg in args])
    return Ran(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def run() -> Callable[..., Ran]:
    """``run("prune", ...)`` is the command, in this process."""
    return _run


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory, byte_tokenizer) -> Path:
    """A random Llama of 2 blocks with tied embeddings, and a tokenizer of one token per byte."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    path = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(path)
    byte_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def sharp_dir(model_dir, byte_tokenizer, tmp_path_factory) -> Path:
    """The same Llama with weights so large that its words follow from its input: there is something to learn."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    for parameter in model.parameters():
        parameter.data *= 8 if parameter.ndim == 2 else 1
    path = tmp_path_factory.mktemp("models") / "sharp"
    model.save_pretrained(path)
    byte_tokenizer.save_pretrained(path)
    return path


class KilledError(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def killed_at(monkeypatch, run) -> Callable[..., None]:
    """``killed_at(20, "train", ...)``: the command, whose process ends before it takes another step after 20."""
    from secateur.training.loop import Loop

    step = Loop._step

    def train(at: int, *args: object) -> None:
        def killed(loop: Loop):
            if loop.step == at:
                raise KilledError
            return step(loop)

        with monkeypatch.context() as patch:
            patch.setattr(Loop, "_step", killed)
            with pytest.raises(KilledError):
                run(*args)

    return train


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """9,000 characters, so 9,000 tokens."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    words = [string.ascii_lowercase[i % 23 : i % 23 + 5] for i in range(1500)]
    path.write_text(" ".join(words).ljust(9000, "."), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def files() -> Callable[[Path], dict[str, bytes]]:
    """``files(OUT)``: what the promise of same bytes is about, all but the two files that hold times."""
    timed = {"records.jsonl", "report.json"}

    def read(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in timed
        }

    return read


# ------------------------------------------------------------------------------------------------- to be quantized

FEW = ["--samples", "4", "--seq-len", "32"]


@pytest.fixture(scope="session")
def dense(byte_tokenizer, tmp_path_factory):
    """A random bfloat16 Llama whose widths are multiples of 128, with biases in its attention and tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=260, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, attention_bias=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            parameter.data = torch.randn_like(parameter) * 0.05 if name.endswith("bias") else parameter.data
    path = tmp_path_factory.mktemp("models") / "dense"
    model.to(torch.bfloat16).save_pretrained(path)
    byte_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def sparse(run, dense, text_file, tmp_path_factory):
    """The same at 2:4."""
    out = tmp_path_factory.mktemp("models") / "sparse"
    flags = ["--method", "wanda", "--pattern", "2:4", "--data", text_file, *FEW]
    assert run("prune", dense, *flags, "--out", out).code == 0
    return out


@pytest.fixture(scope="session")
def text(text_file):
    return ["--data", text_file, *FEW]


@pytest.fixture(scope="session")
def int4(run, sparse, text, tmp_path_factory):
    """OUT of one run with the defaults, and what it said."""
    out = tmp_path_factory.mktemp("runs") / "int4"
    ran = run("quantize", sparse, *text, "--out", out)
    assert ran.code == 0, ran.err
    return out, ran
