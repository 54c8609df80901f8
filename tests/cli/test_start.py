"""Starting up: nothing heavy is imported before it is needed, and the public names are what they say."""

import subprocess
import sys
import time

import pytest

import secateur
from secateur.cli import cli

HEAVY = ("torch", "transformers", "datasets", "pydantic", "numpy", "zstandard")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


@pytest.mark.parametrize(
    "args", [["--help"], ["--version"], ["prune", "--help"], ["plan", "--help"], [], ["prune", "--nonsense"]], ids=str
)
def test_no_heavy_import_before_work(args):
    start = time.perf_counter()
    done = python(
        f"import sys; from secateur.cli import main; main({args!r});"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert time.perf_counter() - start < 5, "about 0.3 s on a quiet machine"


def test_importing_the_package_is_light():
    done = python(f"import sys, secateur; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert done.stdout == "[]\n"


def test_version(run):
    assert run("--version").out == f"secateur {secateur.__version__}\n"


def test_verbs(run):
    verbs = "prune train quantize cache plan eval inspect export unpack bench methods demo"
    assert list(cli.commands) == verbs.split()
    assert run().out == run("--help").out


def test_every_verb_has_help_and_debug(run):
    for verb in cli.commands:
        ran = run(verb, "--help")
        assert ran.code == 0
        assert "--debug" in ran.out
        assert "--json" in ran.out


def test_public_names():
    from secateur import (
        PruneConfig,
        TrainConfig,
        evaluate,
        export_to,
        load_packed,
        load_pruned,
        plan,
        prune,
        train,
        unpack,
    )

    assert callable(prune)
    assert callable(plan)
    assert callable(evaluate)
    assert callable(train)
    assert callable(load_pruned)
    assert callable(export_to)
    assert callable(load_packed)
    assert callable(unpack)
    assert TrainConfig(tokens=10_000).steps == 2
    assert PruneConfig(sparsity=0.5).sparsity == 0.5


def test_unknown_attribute_names_what_there_is():
    with pytest.raises(AttributeError, match="offers ExportOptions, PlanReport, PruneConfig"):
        secateur.nonsense  # noqa: B018
