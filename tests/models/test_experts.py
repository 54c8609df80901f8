"""Experts as linears: in every form they come in, their view computes, reads and writes what the model holds."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GptOssConfig

from secateur.errors import ModelError
from secateur.models.adapter import DecoderAdapter
from secateur.models.expert_layout import observe_experts, watchable
from secateur.models.experts import expert_linears, find_experts, routing
from secateur.models.layout import TOLERANCE, observe, relative
from secateur.models.stored import Stored, stored

NAMES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"]
GATES = {"qwen2_moe": ["gate", "shared_expert_gate"]}


def observed(model, input_ids):
    adapter = DecoderAdapter(model)
    capture = adapter.capture(input_ids)
    return adapter, capture, observe_experts(adapter, 0, capture.hidden, capture.calls[0])


def describe_experts(layout):
    """One line: "8 experts gate_proj+up_proj > down_proj, silu(gate) * up"."""
    member = layout.members[0]
    groups = " > ".join("+".join(name.rpartition(".")[2] for name in linears) for linears in member.groups)
    said = f"{len(layout.members)} experts {groups}"
    if member.ffn is None:
        return f"{said} ({member.refusal})"
    return f"{said}, {member.ffn.activation}({'gate) * up' if member.ffn.gate else 'up)'}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_equals_the_forward(moe, input_ids, name, dtype):
    assert DecoderAdapter(moe(name).to(dtype)).verify(input_ids) <= 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_every_expert_matrix_is_a_linear_and_no_router_is(moe, name):
    adapter = DecoderAdapter(moe(name))
    linears = adapter.linears(adapter.blocks[0])
    experts = {name: adapter.shape(linear) for name, linear in linears.items() if ".experts." in name}
    parts = {"gate_proj": (24, 32), "up_proj": (24, 32), "down_proj": (32, 24)}
    assert experts == {f"mlp.experts.{e}.{part}": shape for e in range(6) for part, shape in parts.items()}
    shared = {name for name in linears if "shared" in name}
    assert shared == ({f"mlp.shared_expert.{part}" for part in parts} if name == "qwen2_moe" else set())
    gates = GATES.get(name, ["gate"])
    assert adapter.left_alone() == [f"model.layers.{i}.mlp.{gate}.weight" for i in range(2) for gate in gates]
    assert not {f"mlp.{gate}" for gate in gates} & linears.keys()
    planned = sum(adapter.shape(linear)[0] * adapter.shape(linear)[1] for linear in linears.values())
    alone = sum(adapter.blocks[0].get_parameter(f"mlp.{gate}.weight").numel() for gate in gates)
    assert planned + alone == sum(p.numel() for p in adapter.blocks[0].parameters() if p.ndim >= 2)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooks_fire_on_experts_whatever_the_kernel(moe, input_ids, implementation, dtype):
    model = moe("mixtral").to(dtype)
    model.set_experts_implementation(implementation)
    adapter, capture, layouts = observed(model, input_ids)
    seen = {}
    for name, linear in expert_linears(adapter.experts(adapter.blocks[0])).items():
        linear.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    expected = adapter.replay(0, capture.hidden, capture.calls[0])
    assert seen == {}
    with watchable(layouts):
        out = adapter.replay(0, capture.hidden, capture.calls[0])
    assert relative(out, expected) <= TOLERANCE[dtype]
    tokens = [len(rows) for name, rows in seen.items() if name.endswith("gate_proj")]
    assert sum(tokens) == 2 * input_ids.numel(), "every token goes to two experts"
    assert "forward" not in vars(adapter.blocks[0].mlp.experts)


@pytest.mark.parametrize("name", NAMES)
def test_reading_and_writing_one_expert_leaves_the_others(moe, name):
    adapter = DecoderAdapter(moe(name))
    fused, linears = adapter.blocks[1].mlp.experts, adapter.linears(adapter.blocks[1])
    assert torch.equal(adapter.read(linears["mlp.experts.3.gate_proj"]), fused.gate_up_proj[3, :24])
    assert torch.equal(adapter.read(linears["mlp.experts.3.up_proj"]), fused.gate_up_proj[3, 24:])
    assert torch.equal(adapter.read(linears["mlp.experts.3.down_proj"]), fused.down_proj[3])
    before = fused.gate_up_proj.clone()
    adapter.write(linears["mlp.experts.3.up_proj"], torch.full((24, 32), -0.0))
    assert not fused.gate_up_proj[3, 24:].signbit().any()
    before[3, 24:] = 0
    assert torch.equal(fused.gate_up_proj, before)
    with pytest.raises(ValueError, match=r"\(1, 32\).*\(24, 32\)"):
        adapter.write(linears["mlp.experts.3.up_proj"], torch.zeros(1, 32))


def test_views_follow_a_block_that_moves(moe):
    adapter = DecoderAdapter(moe("olmoe"))
    linear = adapter.linears(adapter.blocks[0])["mlp.experts.0.down_proj"]
    adapter.blocks[0].to(torch.float64)
    assert linear.weight.dtype == torch.float64
    assert linear.weight.data_ptr() == adapter.blocks[0].mlp.experts.down_proj.data_ptr()


def test_nothing_is_registered_in_the_model(moe, input_ids):
    model = moe("qwen2_moe")
    before = [name for name, _ in model.named_parameters()], [name for name, _ in model.named_modules()]
    observed(model, input_ids)
    assert before == ([name for name, _ in model.named_parameters()], [name for name, _ in model.named_modules()])


@pytest.mark.parametrize("name", NAMES)
def test_what_an_expert_computes_is_observed(moe, input_ids, name, describe):
    adapter, capture, (layout,) = observed(moe(name), input_ids)
    assert describe_experts(layout) == "6 experts gate_proj+up_proj > down_proj, silu(gate) * up"
    around = describe(observe(adapter, 0, capture.hidden, capture.calls[0]))
    assert around.startswith("attention q_proj+k_proj+v_proj > o_proj")
    assert ("ffn gate_proj+up_proj > down_proj, silu(gate) * up" in around) == (name == "qwen2_moe")


def test_another_activation_is_found(moe, input_ids):
    _, _, (layout,) = observed(moe("mixtral", hidden_act="relu"), input_ids)
    assert {member.ffn.activation for member in layout.members} == {"relu"}


def test_an_unknown_activation_is_refused_with_the_nearest_one(moe, input_ids):
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.experts: .*\(nearest \w+, relative error"):
        observed(moe("mixtral", hidden_act="mish"), input_ids)


def test_experts_in_another_form_are_refused_by_name():
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"model\.layers\.0 .*experts\.gate_up_proj \(4x32x48\)"):
        DecoderAdapter(AutoModelForCausalLM.from_config(config))


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.ones(4, 6, 8)), nn.Parameter(torch.ones(4, 8, 3))


def test_experts_without_a_router_beside_them_are_refused():
    block = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": Fused(), "gate": nn.Linear(8, 5)})})
    with pytest.raises(
        ModelError, match=r"mlp\.experts holds 4 experts, but no matrix beside it has one output for each"
    ):
        find_experts(block)
    block.mlp["gate"] = nn.Sequential(nn.Linear(8, 4), nn.Linear(8, 1), nn.Linear(8, 16))  # however deep
    assert find_experts(block)[0].left_alone == ("mlp.gate.0.weight", "mlp.gate.1.weight")


def test_an_unknown_call_of_experts_is_refused():
    with pytest.raises(ModelError, match=r"mlp\.experts is called with float32 \(5, 8\); hidden states"):
        routing("mlp.experts", (torch.ones(5, 8),), {})


def test_experts_in_a_list_are_routed_linears_too(listed_moe, input_ids):
    adapter, _, (layout,) = observed(listed_moe(), input_ids)
    assert adapter.verify(input_ids) <= 1e-5
    assert describe_experts(layout) == "4 experts w1+w3 > w2, silu(gate) * up"
    assert adapter.left_alone() == [f"model.layers.{i}.mlp.router.weight" for i in range(2)]
    assert "mlp.router" not in adapter.linears(adapter.blocks[0])
    assert len(expert_linears(adapter.experts(adapter.blocks[0]))) == 12


MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@pytest.mark.parametrize("name", NAMES)
def test_where_an_expert_is_stored_is_asked_of_transformers(moe, name):
    linears = [f"model.layers.1.mlp.experts.5.{part}" for part in MIXTRAL] + ["model.layers.0.self_attn.q_proj"]
    places = stored(moe(name), linears)
    expected = [f"{linear}.weight" for linear in linears]
    if name == "mixtral":
        expected[:3] = [f"model.layers.1.block_sparse_moe.experts.5.{w}.weight" for w in MIXTRAL.values()]
    assert list(places.values()) == [Stored(tensor) for tensor in expected]


def test_a_stack_that_is_stored_as_it_is(moe, monkeypatch):
    monkeypatch.setattr("secateur.models.stored.revert_weight_conversion", lambda model, tensors: tensors)
    places = stored(moe("olmoe"), ["model.layers.0.mlp.experts.5.up_proj", "model.layers.0.mlp.experts.2.down_proj"])
    assert list(places.values()) == [
        Stored("model.layers.0.mlp.experts.gate_up_proj", (5, 24, 48)),
        Stored("model.layers.0.mlp.experts.down_proj", (2, 0, 32)),
    ]
