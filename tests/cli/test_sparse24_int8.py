"""2:4 in int8: pruned, quantized, packed, and the same function again. CPUs have the dense int8 product only."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from secateur.models.container import read_header
from secateur.models.sparse24 import dense_state
from secateur.models.sparse24_loader import INT8, Codes, Int8Linear, build, read_state, swap

SMALL = ["--samples", "4", "--seq-len", "32"]
SPARSE = ["--method", "wanda", "--pattern", "2:4"]


@pytest.fixture(scope="module")
def quantized(run, model_dir, text_file, tmp_path_factory):
    """``quantized(FLAGS)``: a 2:4 model, then quantized so."""
    folder = tmp_path_factory.mktemp("int8")
    assert run("prune", model_dir, *SPARSE, "--data", text_file, *SMALL, "--out", folder / "sparse").code == 0

    def make(*flags):
        out = folder / "".join(map(str, flags))
        if not out.exists():
            ran = run("quantize", folder / "sparse", "--data", text_file, *SMALL, *flags, "--out", out)
            assert ran.code == 0, ran.err
        return out

    return make


@pytest.fixture(scope="module")
def source(quantized):
    return quantized("--bits", 8, "--activations", "dynamic")


@pytest.fixture(scope="module")
def packed(run, source, tmp_path_factory):
    out = tmp_path_factory.mktemp("packed") / "out"
    ran = run("export", source, "--to", "torch-2:4", "--out", out, "--json")
    assert ran.code == 0, ran.err
    storage = run("inspect", out, "--json").json["quantized"]
    bits = {"sparse": storage["bits_per_weight"], "whole": storage["whole_bits_per_weight"]}
    assert ran.json["bits_per_weight"] == pytest.approx(bits)
    return out


def test_every_code_comes_back_from_five_bits(source, packed):
    held, state = load_file(source / "model.safetensors"), dense_state(packed)
    assert set(state) == set(held)
    assert all(torch.equal(state[name], held[name]) for name in held)
    matrices = [name for name, tensor in held.items() if tensor.dtype == torch.int8]
    stored = load_file(packed / "model.sparse24.safetensors")
    assert len(matrices) == 14
    for name in matrices:
        assert 8 * (stored[f"{name}.values"].nbytes + stored[f"{name}.places"].nbytes) == 5 * held[name].numel()


def test_it_is_the_function_of_the_quantized_model(source, packed):
    """Its own reader, int8 products for the wide matrices, against transformers with compressed-tensors."""
    state, names = read_state(str(packed))
    model, codes = build(str(packed), state)
    assert set(codes) == set(names)
    ids = torch.arange(40)[None] * 5
    weights = model(ids).logits
    report = swap(
        model, codes, 8, lambda form, X: float(not isinstance(form, Int8Linear)), lambda codes: {"int8": INT8["int8"]}
    )
    assert {choice.chosen for choice in report} == {"int8"}
    assert report[0].ms == {"dense": 1.0, "int8": 0.0}
    there = AutoModelForCausalLM.from_pretrained(source)(ids).logits
    torch.testing.assert_close(model(ids).logits, there, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(weights, there, rtol=1e-4, atol=1e-4)  # rounded inputs are no trifle


@pytest.mark.parametrize("tokens", [1, 31, 32, 33])
def test_a_rounded_product_by_hand(tokens):
    generator = torch.Generator().manual_seed(0)
    W = torch.randint(-127, 128, (24, 64), generator=generator).to(torch.int8)
    scale, bias = torch.rand(24, 1, generator=generator), torch.nn.Parameter(torch.randn(24, generator=generator))
    x = torch.randn(2, tokens, 64, generator=generator)
    x[0, 0] = 0
    step = x.abs().amax(2, keepdim=True) / 127.5
    q = (x / step.clamp(min=1e-30)).round().clamp(-128, 127)
    wanted = F.linear(q * step, W.float() * scale, bias)
    found = Int8Linear(lambda q: torch._int_mm(q, W.T), scale, bias)(x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_read_without_secateur_and_inspected_with_it(run, packed):
    code = (
        "import sys, sparse24_loader as s; state, names = s.read_state('.'); model, codes = s.build('.', state);"
        "print(len(codes), model.dtype); assert not any(name.startswith('secateur') for name in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=packed, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["14", "torch.float32"]
    told = run("inspect", packed, "--json")
    assert told.code == 0
    storage = told.json["quantized"]
    assert storage["zeros"] >= storage["weights"] / 2
    assert 8 * storage["code_bytes"] == 5 * storage["weights"]
    header = read_header(packed / "model.sparse24.safetensors")
    parts = storage["code_bytes"] + storage["side_bytes"] + storage["other_bytes"]
    assert told.json["packed"]
    assert storage["file_bytes"] == header.file_bytes == parts + header.data_at


@pytest.mark.parametrize(
    "flags",
    [
        ("--bits", 4, "--group-size", 32),
        ("--bits", 8),
        ("--bits", 8, "--activations", "static"),
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_codes_that_no_sparse_product_takes(flags, run, quantized, tmp_path):
    ran = run("export", quantized(*flags), "--to", "torch-2:4", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "quantize with --bits 8 --activations dynamic" in ran.error
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("form", INT8)
def test_every_form_on_a_gpu(form):
    """Against the product by hand, at a size that every kernel takes."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    W = torch.randint(1, 128, (256, 128, 4), device="cuda").to(torch.int8)
    W[..., ::2] = 0
    codes = Codes(W.view(256, 512), torch.rand(256, 1, device="cuda").bfloat16())
    linear = torch.nn.Linear(512, 256, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(40, 512, device="cuda").bfloat16()
    step = x.float().abs().amax(1, keepdim=True) / 127.5
    q = (x.float() / step).round().clamp(-128, 127)
    wanted = F.linear(q * step, codes.codes.float() * codes.scale.float(), linear.bias.float())
    torch.testing.assert_close(INT8[form](linear, codes)(x).float(), wanted, rtol=0.01, atol=0.1)
