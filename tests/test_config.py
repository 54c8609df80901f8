"""The recipe: YAML, flags and Python are one config, and whatever does not fit is refused by name."""

from dataclasses import replace

import pytest

from secateur.config import (
    METHODS,
    PruneConfig,
    apply_sets,
    config_from_dict,
    dump_recipe,
    load_recipe,
    method_from_dict,
)
from secateur.core.pattern import NM, Unstructured
from secateur.core.solvers import ADMM, SparseGPT
from secateur.core.sparsellm import SparseLLM
from secateur.errors import UsageError

CONFIGS = [
    PruneConfig(sparsity=0.5),
    PruneConfig(pattern="2:4", data="embedded", blocks="0:15"),
    PruneConfig(method=SparseGPT(damp=1e-5, column_block=64), sparsity=0.7, seed=3),
    PruneConfig(method=SparseLLM(inner=ADMM(iterations=40), mode="paper"), sparsity=0.6, dtype="bfloat16"),
    PruneConfig(sparsity=0.5, include=("q_proj", r"layers\.1\d\."), ignore=("down",)),
    *(PruneConfig(method=cls(), pattern="block:16x16", sparsity=0.25) for cls in METHODS.values()),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c.method).__name__)
def test_a_dumped_recipe_reads_back_as_the_same_config(config, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe({"model": "some/model", **config.to_dict()}), encoding="utf-8")
    recipe = load_recipe(path)
    assert recipe.pop("model") == "some/model"
    assert config_from_dict(recipe) == config
    assert list(recipe) == list(PruneConfig.__dataclass_fields__), "a resolved recipe leaves nothing out"


def test_yaml_reads_what_people_write(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("pattern: 2:4\nblocks: 1:15\nmethod: {name: sparsegpt, damp: 1e-3}\nseed: 7\n", encoding="utf-8")
    config = config_from_dict(load_recipe(path))  # YAML 1.1 would read the numbers 124 and 75 and a string
    assert config.pattern == "2:4"
    assert config.blocks == "1:15"
    assert config.method == SparseGPT(damp=0.001)
    assert config.seed == 7


@pytest.mark.parametrize(
    ("recipe", "sets", "method"),
    [
        ({}, ["method=admm"], ADMM()),
        ({"method": "admm"}, ["method.iterations=40"], ADMM(iterations=40)),
        ({}, ["method.inner=sparsegpt", "method.inner.damp=0.05"], SparseLLM(inner=SparseGPT(damp=0.05))),
        ({}, ["method.inner.rho=2"], SparseLLM(inner=ADMM(rho=2.0))),
        ({"method": {"mode": "paper"}}, ["method.iterations=3"], SparseLLM(mode="paper", iterations=3)),
    ],
)
def test_set_changes_one_leaf(recipe, sets, method):
    before = repr(recipe)
    assert config_from_dict({"sparsity": 0.5, **apply_sets(recipe, sets)}).method == method
    assert repr(recipe) == before


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"sparsety": 0.5}, ["unknown recipe key 'sparsety'", "did you mean sparsity?"]),
        ({"method": {"name": "admm", "ro": 1}}, ["'method.ro'", "did you mean rho?", "iterations, ramp"]),
        ({"method": {"inner": {"name": "admm", "dmap": 1}}}, ["'method.inner.dmap'", "did you mean damp?"]),
        ({"method": "sparsegtp"}, ["unknown method 'sparsegtp'", "did you mean sparsegpt?", "known: sparsellm"]),
        ({"method": {"inner": "wonda"}}, ["unknown method.inner 'wonda'", "did you mean wanda?"]),
        ({"method": 7}, ["method must be a mapping", "got 7"]),
        ({"samples": "many"}, ["samples:", "got 'many'"]),
        ({"device": "tpu"}, ["device:", "'cpu'", "got 'tpu'"]),
        ({"method": {"mode": "open"}}, ["method.mode:", "'closed'", "got 'open'"]),
        ({"method": {"inner": "sparsellm"}}, ["unknown method.inner 'sparsellm'", "known: magnitude"]),
        ({"method": {"name": "admm", "ramp": 50}}, ["ramp must lie in 1..iterations"]),
        ({"sparsity": 1.5}, ["share of zeros", "got 1.5"]),
        ({"sparsity": 0.7, "pattern": "2:4"}, ["keep 2 of every 4", "contradicts sparsity 0.7"]),
        ({"pattern": "4:2", "sparsity": None}, ["1 <= N < M", "4:2"]),
        ({"pattern": "circles"}, ["unknown pattern 'circles'"]),
        ({"sparsity": None}, ["needs a sparsity"]),
        ({"pattern": "2:4", "sparsity": None, "taper": 0.1}, ["taper", "2:4 has as many in all", "leave it 0"]),
        ({"sparsity": 0.95, "taper": 0.08}, ["taper 0.08", "from 0.87 to 1.03", "[0, 1)"]),
        ({"sparsity": 0.05, "taper": -0.08}, ["from 0.13 to -0.03"]),
        ({"samples": 0}, ["samples must be at least 1"]),
        ({"seq_len": 1}, ["seq_len must be at least 2"]),
        ({"blocks": "half"}, ["'first-half'", "got 'half'"]),
        ({"include": ["(q_proj"]}, ["include '(q_proj'", "no regular expression", "unterminated"]),
        ({"ignore": "["}, ["ignore '['", "no regular expression"]),
        ({"ignore": [7]}, ["ignore:", "got 7"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_in_one_line(recipe, words):
    with pytest.raises(UsageError) as caught:
        config_from_dict({"sparsity": 0.5, **recipe})
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


def test_contradictions_are_value_errors_in_python():
    with pytest.raises(ValueError, match="contradicts"):
        PruneConfig(sparsity=0.7, pattern="2:4")


@pytest.mark.parametrize(
    ("text", "said"), [("seed", "'seed'"), ("=3", "'=3'"), ("method..damp=1", "'method..damp=1'"), ("", "''")]
)
def test_malformed_sets(text, said):
    with pytest.raises(UsageError, match="--set wants key=value") as caught:
        apply_sets({}, [text])
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"), [(None, "cannot read"), ("a: [", "is not YAML"), ("- 1\n- 2\n", "must be a mapping")]
)
def test_recipes_that_are_no_recipes(text, said, tmp_path):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=said) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("blocks", "total", "expected"),
    [
        ("all", 5, range(5)),
        ("first-half", 5, range(2)),
        ("first-half", 6, range(3)),
        ("0:15", 30, range(15)),
        ("4:5", 5, range(4, 5)),
    ],
)
def test_block_range(blocks, total, expected):
    assert PruneConfig(sparsity=0.5, blocks=blocks).block_range(total) == expected


@pytest.mark.parametrize("blocks", ["0:6", "3:3", "4:2"])
def test_blocks_that_the_model_does_not_have(blocks):
    with pytest.raises(UsageError, match="at most 0:5"):
        PruneConfig(sparsity=0.5, blocks=blocks).block_range(5)


def test_one_expression_or_a_list_of_them():
    assert config_from_dict({"sparsity": 0.5, **apply_sets({}, ["ignore=q_proj"])}).ignore == ("q_proj",)
    assert config_from_dict({"sparsity": 0.5, "include": ["q", "k"]}).include == ("q", "k")
    with pytest.raises(ValueError, match="include wants a tuple"):
        PruneConfig(sparsity=0.5, include="q_proj")  # pyright: ignore[reportArgumentType]


def test_target_is_a_pattern():
    config = PruneConfig(sparsity=0.5)
    assert config.target == Unstructured(0.5)
    assert replace(config, sparsity=None, pattern="1:4").target == NM(1, 4)


def test_a_method_without_a_name_is_the_default():
    assert method_from_dict({}) == SparseLLM()
    assert method_from_dict("magnitude") == METHODS["magnitude"]()
