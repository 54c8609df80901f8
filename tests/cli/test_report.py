"""Small words of the reports: units, progress, what is said when two perplexities do not compare."""

import io
import math

import pytest
from rich.console import Console
from rich.progress import Progress as RichProgress

from secateur.report.export_page import against_dense
from secateur.report.facts import Stopwatch, peak_memory
from secateur.report.jsonable import dumps
from secateur.report.progress import Bar, Lines, on_stderr
from secateur.report.tables import command, eval_command, memory_of, seconds, size


@pytest.mark.parametrize(
    ("value", "text"), [(0.04, "0.0 s"), (59.94, "59.9 s"), (65, "1 min 05 s"), (3600 * 2 + 185, "2 h 03 min")]
)
def test_seconds(value, text):
    assert seconds(value) == text


def test_size():
    assert size(2.1e9) == "2.10 GB"
    assert size(15e6) == "15 MB"
    assert size(46_300) == "46 kB"


def test_memory_of_a_gpu_is_told_where_there_is_one(monkeypatch):
    import torch

    assert Stopwatch().spent()["peak_gpu_memory_bytes"] is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: int(3e9))
    report = Stopwatch().spent() | {"peak_memory_bytes": 15e6}
    assert memory_of(report) == "15 MB, 3.00 GB on the GPU"
    assert memory_of({"peak_memory_bytes": 15e6}) == "15 MB"


def test_a_command_can_be_pasted():
    assert command("Next:", "secateur", "eval", "my models/out").plain == "Next:  secateur eval 'my models/out'"


@pytest.mark.parametrize(
    ("data", "tail"),
    [
        ({"name": "embedded", "seq_len": 512}, ["embedded", "--seq-len", "512"]),
        ({"name": "c4", "seq_len": 2048}, ["wikitext2"]),
    ],
)
def test_the_next_command_measures_on_other_text(data, tail):
    assert eval_command("out", "demo", data) == ["secateur", "eval", "out", "--baseline", "demo", "--data", *tail]


def test_a_graph_is_measured_beside_the_dense_one_exported_alike():
    text = {"name": "c4", "samples": 32, "seq_len": 512}
    told = {"source": "pruned", "dense": "demo", "out": "ov", "text": text}
    assert [line.plain for line in against_dense(told)] == [
        "Dense:  secateur export demo --to openvino --data c4 --samples 32 --seq-len 512 --out dense-ov",
        "Next:  secateur bench dense-ov ov",
    ]
    assert against_dense({**told, "source": "demo"}) == []


def test_plain_lines_tell_the_time_left():
    stream = io.StringIO()
    lines = Lines(stream, every=0)
    lines.stage("prune")
    lines.update(1, 2, "block 0")
    lines.update(2, 2)
    assert stream.getvalue() == "prune\nprune 1/2, block 0\nprune 2/2, left 0:00:00\n"


def test_what_an_earlier_run_did_says_nothing_of_the_time_left(monkeypatch):
    clock = iter([0.0, 10.0, 20.0])
    monkeypatch.setattr("secateur.report.progress.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    lines = Lines(stream)
    lines.stage("prune, going on after 20 blocks")
    for done in (21, 22):
        lines.update(done, 30)
    assert stream.getvalue().endswith("21/30\nprune, going on after 20 blocks 22/30, left 0:01:20\n")


def test_plain_lines_are_few():
    stream = io.StringIO()
    lines = Lines(stream)
    lines.stage("eval")
    for done in range(1, 101):
        lines.update(done, 100)
    assert stream.getvalue() == "eval\neval 100/100, left 0:00:00\n"


def test_json_has_no_nan():
    assert dumps({"ppl": math.inf, "error": [math.nan, 1.5]}, indent=None) == '{"ppl": null, "error": [null, 1.5]}'


def test_a_bar_is_one_task_that_begins_again_at_each_stage():
    stream = io.StringIO()
    with RichProgress(console=Console(file=stream)) as rich:
        bar = Bar(rich)
        bar.stage("load")
        bar.note("out[1] will be replaced")
        bar.stage("prune")
        bar.update(3, 30, "block 2")
        (task,) = rich.tasks
        assert (task.description, task.completed, task.total) == ("prune", 3, 30)
    assert "out[1] will be replaced\n" in stream.getvalue()


def test_no_terminal_no_bar(capsys):
    with on_stderr() as progress:
        progress.stage("load")
    assert capsys.readouterr().err == "load\n"


def test_stopwatch_adds_up_and_counts_failures():
    watch = Stopwatch()

    def fails() -> None:
        with watch.stage("save"):
            raise OSError("full")

    with watch.stage("load"):
        pass
    with pytest.raises(OSError, match="full"):
        fails()
    assert list(watch.seconds) == ["load", "save"]
    assert watch.total >= 0


def test_peak_memory_is_in_bytes():
    assert 1e7 < peak_memory() < 1e12
