"""Training beside other tools: trackers that are told every step, and accelerate's launcher with the shipped config."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

from secateur.train_runs import LAUNCH

FLAGS = ["--tokens", 1024, "--seq-len", 32, "--batch", 4, "--micro-batch", 2, "--lr", 1e-2, "--set", "holdout=4"]
"""8 steps."""


@pytest.fixture
def recorder(monkeypatch):
    """A tracker of the name "recorder", as somebody would register one, and what it was told."""
    from accelerate import tracking

    told = SimpleNamespace(recipe={}, steps=[], finished=0)

    class Recorder(tracking.GeneralTracker):
        name = "recorder"
        requires_logging_directory = True

        def __init__(self, run_name, logging_dir):
            super().__init__()
            told.folder = logging_dir

        tracker = None

        def start(self):
            pass

        def store_init_configuration(self, values):
            told.recipe = values

        def log(self, values, step=None, **kwargs):
            told.steps.append((step, values))

        def finish(self):
            told.finished += 1

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    return told


def test_a_tracker_is_told_the_recipe_and_every_step(run, recorder, sharp_dir, text_file, tmp_path, files):
    flags = ["train", sharp_dir, "--data", text_file, *FLAGS]
    ran = run(*flags, "--set", "tracker=recorder", "--out", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert recorder.recipe["tokens"] == 1024
    assert all(isinstance(value, str | int | float) for value in recorder.recipe.values())
    assert str(recorder.folder) == str(tmp_path / "out.logs")
    records = [json.loads(line) for line in (tmp_path / "out" / "secateur" / "records.jsonl").read_text().splitlines()]
    assert [step for step, _ in recorder.steps] == [*range(1, 9)]
    assert [values["loss"] for _, values in recorder.steps] == [record["loss"] for record in records]
    assert recorder.finished == 1
    assert run(*flags, "--out", tmp_path / "bare").code == 0
    with_tracker, without = files(tmp_path / "out"), files(tmp_path / "bare")
    assert {name for name in without if without[name] != with_tracker[name]} == {"secateur/recipe.yaml"}


@pytest.mark.parametrize(
    ("name", "said"),
    [("tensorboard", "needs a package that is not here: pip install tensorboard"), ("tensorbord", "use one of aim, ")],
)
def test_a_tracker_that_cannot_be_used(name, said, run, sharp_dir, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.training.tracking.get_available_trackers", list)
    ran = run("train", sharp_dir, "--data", text_file, *FLAGS, "--set", f"tracker={name}", "--out", tmp_path / "out")
    assert ran.code == 2
    assert said in ran.error
    assert not list(tmp_path.iterdir())


def test_accelerates_own_sharding_is_refused():
    from accelerate import DistributedType

    from secateur.errors import UsageError
    from secateur.train_config import TrainConfig
    from secateur.train_runs import _check_launch

    told = SimpleNamespace(num_processes=2, distributed_type=DistributedType.FSDP)
    with pytest.raises(UsageError, match=rf"accelerate was told to use FSDP; .*{re.escape(str(LAUNCH))}.*shard=true"):
        _check_launch(told, TrainConfig(tokens=10_000))


def test_the_shipped_config_has_no_keys_that_accelerate_does_not_know():
    from accelerate.commands.config.config_args import load_config_from_file

    ours, known = yaml.safe_load(LAUNCH.read_text(encoding="utf-8")), load_config_from_file(str(LAUNCH)).to_dict()
    assert {key: known[key] for key in ours} == ours


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--set", "shard=true"]], ids=["DDP", "FSDP2"])
def test_accelerate_launches_the_command(more, run, sharp_dir, text_file, tmp_path):
    """The config for GPUs, whose launcher starts processes on any machine."""
    out = tmp_path / "out"
    arguments = ["train", sharp_dir, "--data", text_file, *FLAGS, *more, "--device", "cpu", "--out", out, "--json"]
    launch = ["-m", "accelerate.commands.launch", "--config_file", LAUNCH, "--num_processes", 2, "-m", "secateur"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    command = [sys.executable, *map(str, launch + arguments)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert json.loads(ran.stdout)["processes"] == 2
    assert run("inspect", out).code == 0


def test_a_run_is_where_it_was_asked_to_be_whatever_was_there_before(monkeypatch):
    """accelerate's state is one for the whole process; a second run on another device would stay on the first one's."""
    import torch
    from accelerate.state import PartialState

    from secateur.train_runs import accelerator_on

    PartialState(cpu=True)
    monkeypatch.setitem(PartialState._shared_state, "device", torch.device("meta"))
    assert accelerator_on("cpu", None, None).device.type == "cpu"


@pytest.mark.parametrize(("able", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_that_multiplies_bfloat16_does(monkeypatch, able, precision):
    import torch

    from secateur.runs import resolve_precision

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    assert resolve_precision("auto", "cuda") == precision
    assert resolve_precision("float32", "cuda") == "float32"
