"""Every config that can be made survives its recipe file, and whatever else is written there ends in our own error."""

import math
import re

from hypothesis import example, given, settings
from hypothesis import strategies as st

from secateur.config import (
    METHODS,
    PruneConfig,
    apply_sets,
    config_from_dict,
    dump_recipe,
    load_recipe,
)
from secateur.core.solvers import ADMM, Magnitude, SparseGPT, Wanda
from secateur.core.sparsellm import SparseLLM
from secateur.errors import UsageError

MANY = settings(max_examples=300, deadline=None)
SHARES = st.floats(0, 1, exclude_max=True)
POSITIVE = st.floats(1e-6, 1e6)
COUNTS = st.integers(1, 10**6)
WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=20
) | st.sampled_from(["null", "yes", "1e3", "2:4", "0o17", "~", "- a", "a: b", "# c", "1_000", "2026-11-22", "é\u2028"])
SOLVERS = st.one_of(
    st.just(Magnitude()),
    st.just(Wanda()),
    st.builds(SparseGPT, damp=POSITIVE),
    st.builds(ADMM, iterations=st.integers(20, 99), rho=POSITIVE),
)
METHOD = SOLVERS | st.builds(
    SparseLLM,
    inner=SOLVERS,
    mode=st.sampled_from(["closed", "paper"]),
    iterations=st.integers(1, 9),
    alpha=POSITIVE,
    beta=POSITIVE,
    gamma=POSITIVE,
    target=st.sampled_from(["block", "ffn"]),
)
NM = st.integers(2, 32).flatmap(
    lambda m: st.integers(1, m - 1).map(lambda n: {"pattern": f"{n}:{m}", "sparsity": None})
)
FREE = st.fixed_dictionaries(
    {
        "pattern": st.sampled_from(["unstructured", "row"])
        | st.tuples(COUNTS, COUNTS).map(lambda rc: f"block:{rc[0]}x{rc[1]}"),
        "sparsity": SHARES,
    }
)
EXPRESSIONS = st.lists(WORDS.map(re.escape), max_size=3).map(tuple)
BLOCKS = st.sampled_from(["all", "first-half"]) | st.tuples(st.integers(0, 99), st.integers(0, 99)).map(
    "{0[0]}:{0[1]}".format
)
CONFIGS = st.builds(
    lambda target, **rest: PruneConfig(**target, **rest),
    NM | FREE,
    method=METHOD,
    data=WORDS,
    samples=COUNTS,
    seq_len=st.integers(2, 10**6),
    seed=st.integers(0, 2**63 - 1),
    blocks=BLOCKS,
    include=EXPRESSIONS,
    ignore=EXPRESSIONS,
    device=st.sampled_from(["auto", "cpu", "cuda"]),
    dtype=st.sampled_from(["auto", "float32", "bfloat16", "float16"]),
    batch=COUNTS,
    offload=st.sampled_from(["auto", "on", "off"]),
    hidden_memory=st.floats(0, 1e6),
    precision=st.sampled_from(["auto", "float32", "bfloat16"]),
)


@MANY
@given(config=CONFIGS, model=WORDS)
def test_every_config_survives_its_recipe_file(config, model, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_text(dump_recipe({"model": model, **config.to_dict()}), encoding="utf-8")
    recipe = load_recipe(path)
    assert recipe.pop("model") == model
    assert config_from_dict(recipe) == config


NUMBERS = st.integers() | st.floats() | st.sampled_from([math.nan, math.inf, -1, 0, 1e300, 10**400])
PLAIN = st.none() | st.booleans() | NUMBERS | WORDS
KEYS = st.sampled_from([*PruneConfig.__dataclass_fields__, "name", "inner", "damp", "iterations"]) | WORDS
VALUES = st.recursive(
    PLAIN | st.sampled_from([*METHODS, "2:4", "unstructured", "auto"]),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(KEYS, inside, max_size=4),
    max_leaves=8,
)


@MANY
@given(st.dictionaries(KEYS, VALUES, max_size=5))
@example({"method": {"name": ["admm"]}})
@example({"sparsity": 10**400})
@example({"pattern": "9" * 5000 + ":4"})
def test_whatever_a_recipe_holds_is_a_config_or_our_error(recipe):
    try:
        assert isinstance(config_from_dict(recipe), PruneConfig)
    except UsageError as error:
        said = str(error)
        assert said


@MANY
@given(WORDS, WORDS | st.sampled_from(["[", "{a", "!!python/object:os.system", "*a", "&a [*a]", "\t", "'"]))
def test_whatever_is_set_is_a_recipe_or_our_error(key, value):
    try:
        assert isinstance(apply_sets({"method": "admm"}, [f"{key}={value}"]), dict)
    except UsageError as error:
        said = str(error)
        assert said


@MANY
@given(text=st.text() | VALUES.map(str))
def test_whatever_a_recipe_file_says_is_a_mapping_or_our_error(text, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        assert isinstance(load_recipe(path), dict)
    except UsageError as error:
        said = str(error)
        assert said
