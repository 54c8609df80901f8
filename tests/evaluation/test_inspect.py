import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.core.pattern import NM, Block, Unstructured, keep_mask, pattern_to_dict
from secateur.errors import ArtefactError
from secateur.evaluation.inspect import Checkpoint, inspect

TIED = ["model.embed_tokens.weight", "lm_head.weight"]
PATTERNS = {
    "model.layers.0.self_attn.q_proj.weight": NM(2, 4),
    "model.layers.0.mlp.up_proj.weight": Unstructured(0.7),
    "model.layers.1.mlp.gate_proj.weight": Unstructured(0.5, "row"),
    "model.layers.1.mlp.down_proj.weight": Block(0.5, 4, 8),
}
UP, DOWN, Q = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight", next(iter(PATTERNS))


def promise(directory, linears, tied=(), transposed=False):
    (directory / "secateur").mkdir(exist_ok=True)
    entries = {name: {"pattern": pattern_to_dict(p), "transposed": transposed} for name, p in linears.items()}
    (directory / "secateur" / "promise.json").write_text(json.dumps({"linears": entries, "tied": list(tied)}))


@pytest.fixture
def dense(tiny_llama, tmp_path):
    tiny_llama.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.fixture
def pruned(tiny_llama, tmp_path):
    """A directory that keeps every promise it makes."""
    for name, pattern in PATTERNS.items():
        W = tiny_llama.get_parameter(name)
        W.masked_fill_(~keep_mask(W.abs(), pattern), 0.0)
    tiny_llama.save_pretrained(tmp_path / "pruned")
    promise(tmp_path / "pruned", PATTERNS, [TIED])
    return tmp_path / "pruned"


def edit(directory, name, change):
    """Rewrite one stored tensor; ``change`` returns the new one, None drops it."""
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = change(tensors.get(name))
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def first(value):
    def change(W):
        W.view(-1)[0] = value
        return W

    return change


def test_kept_promises(pruned, dense):
    # the fixtures share one model, saved dense first: only the planned weights differ
    report = inspect(pruned, baseline=dense)
    assert report.broken == []
    assert (report.promised, report.finite, report.negative_zeros, report.tied) == (True, True, 0, [TIED])
    rows = {row.name: row for row in report.rows}
    assert {name: row.pattern for name, row in rows.items() if row.ok is not None} == {
        name: str(pattern) for name, pattern in PATTERNS.items()
    }
    assert (rows[Q].sparsity, rows[Q].shape, rows[Q].ok, rows[Q].why) == (0.5, (32, 32), True, "")
    assert rows["model.layers.0.self_attn.k_proj.weight"].sparsity == 0
    assert report.weights == sum(32 * 32 if name == Q else 32 * 64 for name in PATTERNS)
    assert report.sparsity == pytest.approx((512 + 1434 + 1024 + 1024) / report.weights)
    assert json.loads(json.dumps(report.to_dict()))["sparsity"] == report.sparsity


def test_without_promises_only_the_sparsity_is_told(dense):
    report = inspect(dense)
    assert (report.promised, report.broken, report.sparsity) == (False, [], 0.0)
    assert all(row.ok is None for row in report.rows)
    assert len(report.rows) == 2 * 7 + 1
    assert report.tensors == 2 * 9 + 2


BREAKS = [
    (UP, torch.ones_like, rf"^{UP}: 2048 weights are not zero, 614 were promised$"),
    (Q, torch.ones_like, rf"^{Q}: 256 of 256 groups of 4 hold more than 2 weights$"),
    (DOWN, lambda W: None, rf"^{DOWN}: promised but not stored$"),
    (Q, lambda W: W[:, :30].contiguous(), rf"^{Q}: 2:4 needs in_features divisible by 4, got 30"),
    (Q, lambda W: torch.where(W == 0, -0.0, W), rf"^{Q}: 512 zeros are -0.0; write \+0.0$"),
    ("model.norm.weight", first(torch.nan), r"^model.norm.weight: 1 of 32 values are not finite$"),
    ("model.norm.weight", first(torch.inf), r"^model.norm.weight: 1 of 32 values are not finite$"),
    (TIED[1], lambda W: torch.zeros(128, 32), r"^tied model.embed_tokens.weight = lm_head.weight: they differ$"),
    (TIED[0], lambda W: None, r"^tied model.embed_tokens.weight = lm_head.weight: none of them is stored$"),
]


@pytest.mark.parametrize(("name", "change", "line"), BREAKS)
def test_broken_promises_are_named(pruned, name, change, line):
    edit(pruned, name, change)
    (broken,) = inspect(pruned).broken
    assert re.search(line, broken)


def test_equal_copies_count_as_tied_and_an_untying_config_does_not(pruned):
    config = json.loads((pruned / "config.json").read_text())
    (pruned / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert inspect(pruned).broken == [f"tied {' = '.join(TIED)}: only {TIED[0]} is stored, and config.json unties it"]
    edit(pruned, TIED[1], lambda _: load_file(pruned / "model.safetensors")[TIED[0]].clone())
    assert inspect(pruned).broken == []


def test_transposed_weights_are_turned_before_they_are_checked(tmp_path):
    mask = keep_mask(torch.rand(6, 8), NM(1, 4))  # (out, in); Conv1D stores (in, out)
    save_file({"c_fc.weight": mask.float().T.contiguous()}, tmp_path / "model.safetensors")
    promise(tmp_path, {"c_fc.weight": NM(1, 4)}, transposed=True)
    report = inspect(tmp_path)
    assert report.broken == []
    assert report.rows[0].shape == (8, 6)
    promise(tmp_path, {"c_fc.weight": NM(1, 4)})
    assert "divisible by 4, got 6" in inspect(tmp_path).broken[0]


def test_baseline_outside_the_plan_must_be_unchanged(pruned, dense, tiny_llama):
    assert inspect(pruned, baseline=tiny_llama.state_dict()).broken == []
    edit(pruned, "model.norm.weight", first(7.0))
    edit(pruned, "extra.weight", lambda _: torch.ones(2, 2))
    edit(pruned, "model.layers.0.input_layernorm.weight", lambda _: None)
    assert inspect(pruned, baseline=dense).broken == [
        "model.norm.weight: outside the plan, yet not the baseline's",
        "model.layers.0.input_layernorm.weight: only in the baseline",
        "extra.weight: not in the baseline",
    ]


def test_what_the_run_changed_on_purpose_is_counted_and_not_compared(pruned, dense):
    edit(pruned, "model.norm.weight", first(7.0))
    path = pruned / "secateur" / "promise.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"changed": ["model.norm.weight", UP]}))
    report = inspect(pruned, baseline=dense)
    assert (report.broken, report.uncompared) == ([], 1)
    assert inspect(pruned).uncompared == 0


def test_a_baseline_of_another_dtype_is_cast(pruned, dense):
    for name in load_file(pruned / "model.safetensors"):
        edit(pruned, name, lambda W: W.bfloat16())
    assert inspect(pruned, baseline=dense).broken == []


def test_sharded_checkpoints(pruned, tiny_llama):
    whole = inspect(pruned)
    (pruned / "model.safetensors").unlink()
    tiny_llama.save_pretrained(pruned, max_shard_size="20KB")
    shards = sorted(pruned.glob("model-*.safetensors"))
    assert len(shards) > 2
    sharded = inspect(pruned)
    assert sharded.broken == []
    assert {row.name: row for row in sharded.rows} == {row.name: row for row in whole.rows}
    shards[1].unlink()
    with pytest.raises(ArtefactError, match=f"asks for {shards[1].name}, which is not there"):
        inspect(pruned)
    (pruned / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ArtefactError, match="no index"):
        inspect(pruned)


def test_tensors_are_read_one_at_a_time(pruned):
    checkpoint = Checkpoint(pruned)
    assert len(checkpoint) == len(list(checkpoint)) == 2 * 9 + 2
    assert checkpoint[Q] is not checkpoint[Q]


def corrupt(name, content):
    def change(directory):
        (directory / name).write_bytes(content)

    return change


def promised(**told):
    """A promise file of nothing but ``told``."""
    return corrupt("secateur/promise.json", json.dumps({"linears": {}, "tied": []} | told).encode())


def part(**told):
    return promised(linears={"W": {"pattern": {"kind": "n:m", "n": 2, "m": 4}, "transposed": False, "part": told}})


BAD_DIRECTORIES = [
    (lambda d: (d / "model.safetensors").unlink(), "no .safetensors file"),
    (corrupt("model.safetensors", b"rubbish"), "not a readable safetensors file"),
    (lambda d: corrupt("model.safetensors", (d / "model.safetensors").read_bytes()[:-10])(d), "not a readable safe"),
    (corrupt("config.json", b""), "not readable JSON"),
    (corrupt("secateur/promise.json", b"{"), "not readable JSON"),
    (corrupt("secateur/promise.json", b"[]"), "holds a list, an object was wanted"),
    (corrupt("secateur/promise.json", b"{}"), "not a promise file"),
    (corrupt("secateur/promise.json", b'{"linears": {"a": {"pattern": {"kind": "x"}, "transposed": false}}}'), "kind"),
    (corrupt("secateur/promise.json", b"[" * 9999), "not readable JSON"),
    *((promised(tied=value), "not a promise file") for value in (True, None, {}, "ab", [0], ["ab"], [[0]])),
    *((promised(changed=value), "not a promise file") for value in (True, None, {}, "ab", [0], [[]])),
    *((promised(zeros=value), "not a promise file") for value in (True, None, {}, "1", [], -1, 0.5)),
    *((promised(low_rank=value), "not a promise file") for value in (True, None, [], {"a": "1"}, {"a": None})),
    *((part(of="W", at=at), "not a promise file") for at in (1, [1], ["0", "1"], [[0], 0, 1], [3, 3], [-1, 3])),
    (part(of=["W"], at=[0, 1]), "not a promise file"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_DIRECTORIES)
def test_damaged_directories_are_one_line(pruned, damage, message):
    damage(pruned)
    with pytest.raises(ArtefactError, match=message) as error:
        inspect(pruned)
    assert "\n" not in str(error.value)


def test_missing_directory(tmp_path):
    with pytest.raises(ArtefactError, match="no directory"):
        inspect(tmp_path / "gone")


# ---- one expert of a stack


def promise_parts(directory, parts, tensor="experts.gate_up_proj"):
    """Promise NM(2, 4) of ``{name: place}`` in one stored tensor."""
    (directory / "secateur").mkdir(exist_ok=True)
    entries = {
        name: {"pattern": pattern_to_dict(NM(2, 4)), "transposed": False, "part": {"of": tensor, "at": at}}
        for name, at in parts.items()
    }
    (directory / "secateur" / "promise.json").write_text(json.dumps({"linears": entries, "tied": []}))


PARTS = {f"experts.{e}.{part}": [e, 6 * i, 6 * i + 6] for e in range(3) for i, part in enumerate(("gate", "up"))}


@pytest.fixture
def stack(tmp_path):
    W = torch.rand(36, 8) + 0.1
    W = (W * keep_mask(W, NM(2, 4))).view(3, 12, 8)
    save_file({"experts.gate_up_proj": W}, tmp_path / "model.safetensors")
    promise_parts(tmp_path, PARTS)
    return tmp_path


def test_each_matrix_of_a_stack_is_a_row_with_its_own_promise(stack):
    report = inspect(stack, baseline={"experts.gate_up_proj": torch.ones(3, 12, 8)})
    assert report.broken == []
    assert [(row.name, row.shape, row.sparsity, row.ok) for row in report.rows] == [
        (name, (6, 8), 0.5, True) for name in PARTS
    ]
    assert (report.weights, report.zeros, report.tensors) == (288, 144, 1)


def test_a_broken_promise_inside_a_stack_is_named(stack):
    def change(W):
        W[2, 7, :3] = 1
        W[0, 0] = torch.where(W[0, 0] == 0, -0.0, W[0, 0])
        return W

    edit(stack, "experts.gate_up_proj", change)
    assert inspect(stack).broken == [
        "experts.0.gate: 4 zeros are -0.0; write +0.0",
        "experts.2.up: 1 of 12 groups of 4 hold more than 2 weights",
    ]


def test_what_is_not_promised_of_a_stack_must_be_the_baselines(stack):
    dense = {"experts.gate_up_proj": load_file(stack / "model.safetensors")["experts.gate_up_proj"].clone()}
    promise_parts(stack, {name: at for name, at in PARTS.items() if at[0] != 1})
    edit(stack, "experts.gate_up_proj", lambda W: W.index_fill(0, torch.tensor(0), 0.0))
    assert inspect(stack, baseline=dense).broken == []
    edit(stack, "experts.gate_up_proj", lambda W: W.index_fill(0, torch.tensor(1), 0.0))
    assert inspect(stack, baseline=dense).broken == ["experts.gate_up_proj: outside the plan, yet not the baseline's"]


@pytest.mark.parametrize("at", [[3, 0, 6], [0, 6, 13], [0, 6]])
def test_a_part_that_is_not_there_is_broken(stack, at):
    promise_parts(stack, {"experts.0.gate": at})
    dense = {"experts.gate_up_proj": torch.ones(3, 12, 8)}
    assert inspect(stack, baseline=dense).broken == [
        f"experts.0.gate: stored with shape (3, 12, 8), a part at {at} was promised"
    ]


def test_a_part_of_a_larger_matrix(tmp_path):
    W = torch.cat([torch.ones(4, 8), torch.zeros(4, 8)])
    save_file({"gate_up": W}, tmp_path / "model.safetensors")
    promise_parts(tmp_path, {"gate": [0, 4], "up": [4, 8]}, tensor="gate_up")
    assert [row.ok for row in inspect(tmp_path).rows] == [False, True]
