"""Accuracy by lm-eval on questions that lie in a file; differences of two models by hand."""

import json
import math
import sys

import pytest
import yaml

from secateur.errors import DataError, UsageError
from secateur.evaluation import tasks
from secateur.evaluation.tasks import Score, ScorePair, scores, standard_error, task_list

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
QUESTIONS = [("ab", 0), ("ba", 1), ("aa", 0), ("bb", 1)] * 3


def described(folder, **more):
    """A task of twelve questions with two answers each, as a file."""
    data = folder / "questions.jsonl"
    lines = [json.dumps({"text": text, "answers": [" a", " bcd"], "right": right}) for text, right in QUESTIONS]
    data.write_text("\n".join(lines))
    told = {
        "task": "letters", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{text}}",
        "doc_to_target": "right", "target_delimiter": "", "doc_to_choice": "answers",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}, {"metric": "acc_norm"}],
    }  # fmt: skip
    path = folder / "letters.yaml"
    path.write_text(yaml.safe_dump(told | more))
    return path


@pytest.fixture
def model(byte_tokenizer):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def test_scores_are_those_of_the_model(model, byte_tokenizer, tmp_path):
    """acc by hand: which answer's tokens are likelier behind the text."""
    import torch

    shown = []
    wanted = task_list([str(described(tmp_path))])
    found = scores(model, byte_tokenizer, wanted, update=lambda *seen: shown.append(seen))
    by_hand, normed = [], []
    for text, right in QUESTIONS:
        likely = []
        for answer in (" a", " bcd"):
            ids = byte_tokenizer(text + answer)["input_ids"]
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            at = range(len(ids) - len(answer), len(ids))
            likely.append(sum(float(logp[i - 1, ids[i]]) for i in at))
        by_hand.append(float((likely[1] > likely[0]) == right))
        normed.append(float((likely[1] / 4 > likely[0] / 2) == right))
    answers = {score.metric: score.answers for score in found}
    assert answers == {"acc": tuple(by_hand), "acc_norm": tuple(normed)}
    assert {score.task for score in found} == {"letters"}
    acc = next(score for score in found if score.metric == "acc")
    assert (acc.samples, acc.value) == (12, sum(by_hand) / 12)
    assert shown[-1][0] <= shown[-1][1] == 24


def test_limit(model, byte_tokenizer, tmp_path):
    found = scores(model, byte_tokenizer, task_list([str(described(tmp_path))]), limit=5)
    assert {score.samples for score in found} == {5}


def test_a_difference_is_judged_question_by_question():
    one, other = Score("t", "acc", 0.75, 4, (1.0, 1, 0, 1)), Score("t", "acc", 0.5, 4, (1.0, 0, 0, 1))
    pair = ScorePair(one, other)
    assert pair.gap == 0.25
    assert pair.gap_stderr == pytest.approx(0.5 / math.sqrt(4))  # of 0, 1, 0, 0
    assert one.stderr == pytest.approx(0.5 / 2)
    assert ScorePair(one).gap is None
    assert ScorePair(one, Score("t", "acc", 0.5, 2, (1.0, 0.0))).gap_stderr is None
    assert ScorePair(one, Score("t", "f1", 0.5, 4, None)).gap_stderr is None
    assert standard_error([1.0]) is None
    json.dumps(pair.to_dict())


@pytest.mark.parametrize(
    ("written", "said"), [("a: [", "can be read"), ("- 1", "has a key `task`"), ("group: x", "has a key `task`")]
)
def test_files_that_are_no_task(written, said, tmp_path):
    (tmp_path / "task.yaml").write_text(written)
    with pytest.raises(UsageError, match=said):
        task_list([str(tmp_path / "task.yaml")])


def test_a_file_that_would_run_code(tmp_path):
    """lm-eval's own loader would call what `!function` names; here nothing in a file is called."""
    path = tmp_path / "task.yaml"
    path.write_text("task: x\ndoc_to_text: !function os.system\n")
    with pytest.raises(UsageError, match="no task that can be read"):
        task_list([str(path)])


def test_an_unknown_task(model, byte_tokenizer):
    with pytest.raises(UsageError, match="unknown task 'no_such_task'"):
        scores(model, byte_tokenizer, ["no_such_task"])


def test_questions_that_are_not_there(model, byte_tokenizer, tmp_path):
    path = described(tmp_path)
    (tmp_path / "questions.jsonl").unlink()
    with pytest.raises(DataError, match="questions of letters could not be loaded"):
        scores(model, byte_tokenizer, task_list([str(path)]))


def test_without_lm_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[eval\]'"):
        tasks.check_tasks([])


def test_from_the_command_line(model, byte_tokenizer, tmp_path, capsys, monkeypatch):
    from secateur import runs
    from secateur.cli import main

    opened, load = [], runs.load
    monkeypatch.setattr(runs, "load", lambda source, **options: opened.append(source) or load(source, **options))
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    task, place = described(tmp_path), str(tmp_path / "model")
    assert main(["eval", place, "--baseline", place, "--tasks", str(task), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["results"] == []
    assert {(pair["score"]["metric"], pair["gap"], pair["gap_stderr"]) for pair in told["tasks"]} == {
        ("acc", 0.0, 0.0), ("acc_norm", 0.0, 0.0)
    }  # fmt: skip
    opened.clear()
    (tmp_path / "text.txt").write_text("abc " * 20)
    texts = ["--data", str(tmp_path / "text.txt"), "--seq-len", "16"]
    assert main(["eval", place, "--baseline", place, "--tasks", str(task), *texts]) == 0
    assert "+0.0000 ± 0.0000" in capsys.readouterr().out
    assert opened == [place, place]  # each once, for texts and tasks
    assert main(["eval", place]) == 2
    assert "neither --data nor --tasks" in capsys.readouterr().err
