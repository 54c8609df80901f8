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
def model_dir(tmp_path_factory) -> Path:
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
    byte_tokenizer().save_pretrained(path)
    return path


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template="{{ messages }}")


@pytest.fixture(scope="session")
def tokenizer():
    """One token per byte, 257 in all."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """9,000 characters, so 9,000 tokens."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    words = [string.ascii_lowercase[i % 23 : i % 23 + 5] for i in range(1500)]
    path.write_text(" ".join(words).ljust(9000, "."), encoding="utf-8")
    return path
