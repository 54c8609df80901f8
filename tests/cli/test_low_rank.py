"""``prune --low-rank``: ordinary sparse weights, branches beside them; loaded, evaluated and held to a promise."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

SMALL = ["--samples", "4", "--seq-len", "32"]
LINEARS, RANK = 14, 4
NUMBERS = 2 * RANK * (4 * 32 + 2 * (32 + 16) + 3 * (32 + 64))  # two blocks: q, o; k, v; gate, up, down
WEIGHTS = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)


@pytest.fixture(autouse=True)
def short_probes(monkeypatch):
    monkeypatch.setattr("secateur.planning.rates.PATIENCE", 0.0)
    monkeypatch.setattr("secateur.planning.rates.DISK_BYTES", 1 << 20)


@pytest.fixture(scope="module")
def flags(text_file):
    return ["--pattern", "2:4", "--method", "wanda", "--data", text_file, *SMALL, "--low-rank", RANK]


@pytest.fixture(scope="module")
def compensated(run, model_dir, flags, tmp_path_factory):
    """OUT of one run, and its report."""
    out = tmp_path_factory.mktemp("runs") / "out"
    ran = run("prune", model_dir, *flags, "--out", out, "--json")
    assert ran.code == 0, ran.err
    return out, ran.json


@pytest.fixture
def broken(compensated, tmp_path):
    """A copy to break."""
    return shutil.copytree(compensated[0], tmp_path / "out")


def test_the_saved_model_is_an_ordinary_one(compensated):
    out, _ = compensated
    weights = load_file(out / "model.safetensors")
    assert not [name for name in weights if "low_rank" in name or "lora" in name]
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert int((model.model.layers[1].mlp.up_proj.weight.reshape(-1, 4) == 0).sum(1).min()) == 2


def test_branches_are_packed_counted_and_under_a_checksum(compensated, run, tmp_path):
    packed, back = tmp_path / "packed", tmp_path / "back"
    told = run("export", compensated[0], "--to", "sparse-safetensors", "--out", packed, "--json").json
    file = packed / "low_rank" / "adapter_model.sparse.safetensors"
    assert told["packed_bytes"] == (packed / "model.sparse.safetensors").stat().st_size + file.stat().st_size
    assert (told["sparse"]["tensors"], told["whole"]["tensors"]) == (LINEARS, LINEARS + 6)
    found = run("inspect", packed, "--json")
    assert found.code == 0, found.err
    assert found.json["low_rank"]["numbers"] == NUMBERS
    room = found.json["room"]
    assert room["bytes"] == told["packed_bytes"]
    assert told["bits_per_weight"]["whole"] == 8 * room["bytes"] / room["elements"]
    assert told["alternatives"].items() <= room["whole"].items()
    assert run("unpack", packed, "--out", back).code == 0
    for name in ("model.safetensors", "low_rank/adapter_model.safetensors", "low_rank/adapter_config.json"):
        assert (back / name).read_bytes() == (compensated[0] / name).read_bytes()
    data = bytearray(file.read_bytes())
    data[-20] ^= 4
    file.write_bytes(data)
    for words in (("inspect", packed), ("unpack", packed, "--out", tmp_path / "again")):
        ran = run(*words)
        assert ran.code == 1
        assert "low_rank/adapter_model.sparse.safetensors: " in ran.error
        assert "is damaged" in ran.error


def test_what_it_costs_is_told(compensated, run):
    out, report = compensated
    told = report["low_rank"]
    returned = told.pop("returned")
    assert 0.1 < returned < 1
    assert told == {
        "rank": RANK,
        "branches": LINEARS,
        "numbers": NUMBERS,
        "bytes": 4 * NUMBERS,
        "share": pytest.approx(NUMBERS / (WEIGHTS / 2)),
        "bits_per_weight": pytest.approx(9 + 16 * NUMBERS / WEIGHTS),
    }
    found = run("inspect", out, "--json")
    assert found.code == 0
    assert found.json["low_rank"] == {
        "branches": LINEARS,
        "numbers": NUMBERS,
        "bytes": 4 * NUMBERS,
        "share": pytest.approx(told["share"]),
        "bits_per_weight": pytest.approx(16 * NUMBERS / WEIGHTS),
    }
    assert f"14 branches, {NUMBERS:,} numbers" in run("inspect", out).out
    lines = [json.loads(line) for line in (out / "secateur" / "records.jsonl").read_text().splitlines()]
    assert all(0 < linear["branch"]["returned"] <= 1 for line in lines for linear in line["linears"])


def test_what_is_evaluated_is_what_was_saved(compensated, run, text_file, tmp_path):
    """With branches the same as their products folded into the weights; without, another function."""
    from secateur import load_pruned
    from secateur.models.branches import attached, detach
    from secateur.models.linears import matrix

    out, _ = compensated
    model, tokenizer = load_pruned(out)
    assert len(attached(model)) == LINEARS
    assert model.config.use_cache
    folded = tmp_path / "folded"
    for name, branch in detach(model).items():
        matrix(model.get_submodule(name)).add_(branch.product.detach())
    model.save_pretrained(folded)
    tokenizer.save_pretrained(folded)
    bare = shutil.copytree(out, tmp_path / "bare")
    shutil.rmtree(bare / "low_rank")
    ppl = {}
    for path in (out, folded, bare):
        ran = run("eval", path, "--data", text_file, "--seq-len", "32", "--limit", "8", "--json")
        ppl[path.name] = ran.json["results"][0]["result"]["ppl"]
    assert ppl["out"] == pytest.approx(ppl["folded"], rel=1e-5)
    assert ppl["bare"] != pytest.approx(ppl["out"], rel=1e-4)


def test_the_result_in_memory_has_the_same_branches(compensated, model_dir, flags, text_file):
    from secateur import PruneConfig, prune
    from secateur.core.solvers import Wanda
    from secateur.models.branches import attached, load_branches

    config = PruneConfig(Wanda(), pattern="2:4", data=str(text_file), samples=4, seq_len=32, low_rank=RANK)
    here, saved = attached(prune(model_dir, config).model), load_branches(compensated[0] / "low_rank")
    assert here.keys() == saved.keys()
    assert all(torch.equal(here[name].product, saved[name].product) for name in saved)


def test_a_method_without_text_gets_some_for_its_branches(run, model_dir, text_file, tmp_path):
    flags = ["--method", "magnitude", "--sparsity", "0.6", "--data", text_file, *SMALL, "--low-rank", "2"]
    ran = run("prune", model_dir, *flags, "--out", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["data"]["needed"]
    assert ran.json["data"]["samples"] == 4


def edit(folder, change):
    path = folder / "low_rank" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def without_one(factors):
    return {name: tensor for name, tensor in factors.items() if "0.self_attn.q_proj" not in name}


def test_a_branch_that_is_gone_breaks_the_promise(broken, run):
    shutil.rmtree(broken / "low_rank")
    ran = run("inspect", broken)
    assert ran.code == 1
    assert "model.layers.0.self_attn.q_proj: a branch of rank 4 was promised, none is stored" in ran.out


def test_a_branch_that_is_not_finite_breaks_the_promise(broken, run):
    edit(
        broken,
        lambda factors: {name: tensor.index_fill(0, torch.tensor(0), torch.inf) for name, tensor in factors.items()},
    )
    ran = run("inspect", broken)
    assert ran.code == 1
    assert "values of its branch are not finite" in ran.out


def test_a_branch_that_nobody_promised_breaks_the_promise(broken, run):
    path = broken / "secateur" / "promise.json"
    promise = json.loads(path.read_text())
    promise["low_rank"]["model.layers.0.mlp.up_proj"] = 5
    del promise["low_rank"]["model.layers.0.mlp.down_proj"]
    path.write_text(json.dumps(promise))
    said = run("inspect", broken).out
    assert "model.layers.0.mlp.up_proj: a branch of rank 4 is stored, rank 5 was promised" in said
    assert "model.layers.0.mlp.down_proj: a branch of rank 4 is stored, none was promised" in said


def test_a_damaged_adapter_is_one_line(broken, run, text_file):
    edit(broken, without_one)
    for verb in (["inspect", broken], ["eval", broken, "--data", text_file, "--seq-len", "32"]):
        ran = run(*verb)
        assert ran.code == 1
        assert "low_rank: adapter_config.json and adapter_model.safetensors name different linears" in ran.error


@pytest.mark.parametrize("verb", ["prune", "plan"])
def test_it_is_not_pruned_again(verb, compensated, run, text_file, tmp_path):
    out = ["--out", tmp_path / "again"] if verb == "prune" else []
    ran = run(verb, compensated[0], "--sparsity", "0.7", "--data", text_file, *SMALL, *out)
    assert ran.code == 2
    assert (
        "has low-rank branches beside 14 linears, fitted to the zeros that it has now; prune the dense model"
        in ran.error
    )


@pytest.mark.parametrize("verb", ["prune", "plan"])
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--low-rank", "17"], "low_rank 17 is more than model.layers.0.self_attn.k_proj of 16 x 32 can have; take 16"),
        (["--low-rank", "-1"], "low_rank must be at least 0, got -1"),
    ],
)
def test_a_rank_that_cannot_be(verb, more, said, run, model_dir, text_file, tmp_path):
    out = ["--out", tmp_path / "out"] if verb == "prune" else []
    ran = run(verb, model_dir, "--sparsity", "0.5", "--data", text_file, *SMALL, *more, *out)
    assert ran.code == 2
    assert said in ran.error


def test_blocks_on_disk_are_refused(compensated, run, model_dir, flags, tmp_path):
    from secateur.errors import UsageError
    from secateur.models.load import load

    ran = run("prune", model_dir, *flags, "--offload", "on", "--out", tmp_path / "out")
    assert ran.code == 2
    assert "low_rank wants its blocks in memory, and these stay on disk; use --offload off" in ran.error
    with pytest.raises(UsageError, match="which blocks left on disk cannot carry"):
        load(str(compensated[0]), offload="on")


@pytest.mark.parametrize("verb", ["prune", "plan"])
def test_experts_get_none(verb, run, moe, byte_tokenizer, text_file, tmp_path):
    moe("mixtral", vocab_size=260).save_pretrained(tmp_path / "moe")
    byte_tokenizer.save_pretrained(tmp_path / "moe")
    flags = [tmp_path / "moe", "--method", "wanda", "--sparsity", "0.5", "--data", text_file, *SMALL, "--low-rank", "2"]
    out = ["--out", tmp_path / "out"] if verb == "prune" else []
    ran = run(verb, *flags, *out)
    assert ran.code == 2
    assert (
        "is a matrix of an expert, and these get no branches; leave them as they are with --ignore experts" in ran.error
    )
    ran = run(verb, *flags, "--ignore", "experts", *out, "--json")
    assert ran.code == 0, ran.err


def test_what_is_planned_is_what_is_saved(compensated, run, model_dir, flags):
    out, report = compensated
    told = run("plan", model_dir, *flags, "--json").json
    bare = run("plan", model_dir, *flags, "--low-rank", "0", "--json").json
    branches = report["low_rank"]
    assert told["result"]["bits_per_weight"]["mask, 16 bit values, branches"] == pytest.approx(
        branches["bits_per_weight"]
    )
    for grown in (
        ("result", "bytes", "saved, zeros stored"),
        ("memory", "disk", "model"),
        ("memory", "disk", "finished blocks"),
    ):
        with_, without = told, bare
        for key in grown:
            with_, without = with_[key], without[key]
        assert with_ - without == branches["bytes"], grown
    size = (out / "low_rank" / "adapter_model.safetensors").stat().st_size
    assert size == pytest.approx(branches["bytes"], rel=0.4)  # and a header
    stages = {row["name"] for row in told["stages"]} - {row["name"] for row in bare["stages"]}
    assert stages == {"low rank"}
    assert any("singular values" in note for note in told["notes"])
