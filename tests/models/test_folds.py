"""Folding: found by running, exact to the last bit, undone where the block notices."""

import pytest
import torch

from secateur.models.adapter import DecoderAdapter
from secateur.models.folds import Fold, apply_fold, find_folds
from secateur.models.grids import divisions, grid_tensors, restore_grids
from secateur.models.layout import observe


def tiny(name, **options):
    import transformers

    config = getattr(transformers, name)(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, **options,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def first_block(model):
    adapter = DecoderAdapter(model)
    capture = adapter.capture(torch.randint(0, 64, (1, 32), generator=torch.Generator().manual_seed(0)))
    layout = observe(adapter, 0, capture.hidden, capture.calls[0])
    return adapter.blocks[0], layout, capture.hidden, lambda: adapter.replay(0, capture.hidden, capture.calls[0])


def powers(size, seed=0):
    return torch.randint(-3, 4, (size,), generator=torch.Generator().manual_seed(seed)).float().exp2()


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FFN = ("mlp.gate_proj", "mlp.up_proj")


@pytest.mark.parametrize(("name", "options"), [("LlamaConfig", {"attention_bias": True}), ("Qwen2Config", {})])
def test_norms_and_up_projections_are_found_and_folded_exactly(name, options):
    block, layout, hidden, replay = first_block(tiny(name, **options))
    folds = find_folds(block, layout, replay)
    assert folds == [
        Fold("input_layernorm", ATTENTION),
        Fold("post_attention_layernorm", FFN),
        Fold("mlp.up_proj", ("mlp.down_proj",)),
    ]
    before, norm = replay(), block.input_layernorm.weight.clone()
    for seed, fold in enumerate(folds):
        width = block.get_submodule(fold.linears[0]).weight.shape[1]
        assert apply_fold(block, fold, powers(width, seed), hidden, replay)
    torch.testing.assert_close(replay(), before, rtol=1e-5, atol=1e-5)
    assert torch.equal(block.input_layernorm.weight, norm / powers(32))
    assert len(divisions(block)) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_uses_its_weight_otherwise_is_left_as_it_was(dtype):
    """Beside a token whose activations are a thousand times the others', too."""
    model = tiny("GemmaConfig", head_dim=8).to(dtype)  # 1 + w
    adapter, (block, layout, hidden, replay) = DecoderAdapter(model), first_block(model)
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    fold = next(fold for fold in find_folds(block, layout, replay) if fold.source == "input_layernorm")
    call = adapter.capture(torch.randint(0, 64, (1, 32))).calls[0]
    huge = hidden.clone()
    huge[:, 0, 3] = 1000 * hidden.abs().median()
    for given in (hidden, huge):
        assert not apply_fold(block, fold, powers(32), given, lambda given=given: adapter.replay(0, given, call))
        assert all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items())
        assert divisions(block) == []


def test_what_was_divided_is_divided_again_after_a_restart():
    """The weights of planned linears are kept; norms, and biases of what was divided, are not."""
    block, layout, hidden, replay = first_block(tiny("LlamaConfig", mlp_bias=True))
    for fold in find_folds(block, layout, replay):
        assert apply_fold(block, fold, powers(block.get_submodule(fold.linears[0]).weight.shape[1]), hidden, replay)
    again, _, _, replay_again = first_block(tiny("LlamaConfig", mlp_bias=True))
    for name, parameter in again.named_parameters():
        if name.endswith("proj.weight"):
            parameter.copy_(block.get_parameter(name))
    restore_grids(again, grid_tensors(block))
    assert all(torch.equal(parameter, block.get_parameter(name)) for name, parameter in again.named_parameters())
    assert torch.equal(replay_again(), replay())
