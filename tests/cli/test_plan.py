"""``secateur plan``: the same linears as prune, no weight read, one line for what cannot be done."""

import json
import re
import shutil
import struct
from pathlib import Path

import pytest

from secateur.pruning.workdir import Workdir

SMALL = ["--samples", "4", "--seq-len", "32"]
KEYS = "model recipe pattern linears skipped sparsity blocks stages seconds rates memory result runtimes warnings notes"


@pytest.fixture(autouse=True)
def short_probes(monkeypatch):
    monkeypatch.setattr("secateur.planning.rates.PATIENCE", 0.0)
    monkeypatch.setattr("secateur.planning.rates.DISK_BYTES", 1 << 20)


@pytest.fixture(scope="module")
def chosen(text_file):
    """Options for both verbs."""
    flags = ["--sparsity", "0.6", "--data", text_file, *SMALL, "--blocks", "1:2", "--method", "wanda"]
    return [*flags, "--include", "mlp", "--include", "q_proj", "--ignore", "gate"]


def test_what_is_planned_is_what_is_pruned(run, model_dir, chosen, tmp_path):
    told = run("plan", model_dir, *chosen, "--json")
    assert told.code == 0, told.err
    done = run("prune", model_dir, *chosen, "--out", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    promised = json.loads((tmp_path / "out" / "secateur" / "promise.json").read_text())["linears"]
    named = [name for row in told.json["linears"] for name in row["names"]]
    assert sorted(f"{name}.weight" for name in named) == sorted(promised)
    assert told.json["skipped"] == done.json["skipped"]
    assert told.json["sparsity"]["planned"] == done.json["sparsity"]["requested"]
    assert told.json["blocks"] == done.json["blocks"]
    assert told.json["pattern"] == done.json["pattern"]
    assert sum(row["weights"] for row in told.json["linears"]) == done.json["weights"]
    saved = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert told.json["memory"]["disk"]["model"] == pytest.approx(saved, rel=0.1)
    ours, theirs = told.json["recipe"], done.json["recipe"]
    assert {k for k in ours if ours[k] != theirs[k]} <= {"blocks", "dtype", "data"}


def test_what_a_run_keeps_on_disk_is_foreseen(run, model_dir, text_file, tmp_path, monkeypatch):
    """The run's directory as it is when all blocks are finished, hidden states in memory for the most part."""
    sizes = {}

    def weighed(work, *finished):
        keep(work, *finished)
        for folder in ("blocks", "hidden"):
            sizes[folder] = sum(file.stat().st_size for file in (work.path / folder).iterdir())

    keep = Workdir.keep
    monkeypatch.setattr(Workdir, "keep", weighed)
    flags = ["--sparsity", "0.5", "--data", text_file, *SMALL, "--set", "hidden_memory=0.000008192"]
    disk = run("plan", model_dir, *flags, "--json").json["memory"]["disk"]
    ran = run("prune", model_dir, *flags, "--out", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert sizes["blocks"] == pytest.approx(disk["finished blocks"], rel=0.2)  # and their headers
    assert sizes["hidden"] == pytest.approx(disk["hidden states"] / 2, rel=0.2)
    assert ran.json["hidden_states"] == {"memory_peak": 8192, "disk_peak": disk["spilled"]}


def test_blocks_that_stay_on_disk_are_not_counted_as_memory(run, model_dir):
    flags = ["plan", model_dir, "--pattern", "2:4", "--data", "c4", *SMALL, "--json"]
    whole, lazy = (run(*flags, "--offload", offload).json["memory"]["host"] for offload in ("off", "on"))
    assert lazy["outside the blocks"] == 4 * (260 * 32 + 32)
    assert lazy["outside the blocks"] + 2 * (lazy["block"] + 4 * 64) == whole["model"]
    assert "block" not in whole


def test_the_stages_are_those_of_the_records(run, model_dir, text_file, tmp_path):
    flags = ["--sparsity", "0.5", "--data", text_file, *SMALL]
    stages = {row["name"] for row in run("plan", model_dir, *flags, "--json").json["stages"]}
    assert run("prune", model_dir, *flags, "--out", tmp_path / "out").code == 0
    line = json.loads((tmp_path / "out" / "secateur" / "records.jsonl").read_text().splitlines()[0])
    assert stages == {*line["stages"], "sample"}


def test_the_json_is_what_programs_may_rely_on(run, model_dir):
    told = run("plan", model_dir, "--pattern", "2:4", "--data", "c4", *SMALL, "--json").json
    assert " ".join(told) == KEYS
    assert told["linears"][0] == {
        "role": "self_attn.q_proj",
        "count": 2,
        "shape": [32, 32],
        "pattern": "2:4",
        "weights": 2048,
        "names": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"],
    }
    assert set(told["seconds"]) == {"load", "prune", "keep", "save", "total", "busy"}
    assert set(told["stages"][0]) == {"name", "operations", "bytes", "seconds"}
    assert set(told["memory"]) == {"host", "device", "disk"}
    assert told["memory"]["device"] == {"peak": 0}
    assert told["result"]["bits_per_weight"]["mask and 16 bit values"] == 9
    assert told["model"]["parameters"] == 260 * 32 + 2 * (32 * 32 * 3 + 3 * 32 * 64 + 64) + 32
    assert "CUDA sm_80+" in " ".join(row["name"] for row in told["runtimes"])
    assert "below 7 B" in told["warnings"][0]
    assert "verified when pruning begins" in told["notes"][0]


def test_the_page(run, model_dir, chosen):
    ran = run("plan", model_dir, *chosen)
    assert ran.code == 0, ran.err
    for words in (
        "to be pruned with wanda; no weight was read",
        "7: not in blocks 1:2",
        "1: ignore 'gate' matches it",
        "2: embeddings and the output head",
        "60.00% of these linears",
        "OpenVINO, AMX Xeon",
        "vLLM, SGLang",
        "dense int4",
        "verified when pruning begins",
    ):
        assert words in ran.out, words
    assert re.search(r"mlp\.up_proj +60% +1 +64 x 32 +2,048", ran.out)
    (warning,) = re.findall("warning: .*", ran.out)
    assert "of a mask and 16 bit values without any zeros: dense int4" in warning
    assert "measure this machine" in ran.err


# ---- no weight is read


def headers(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write(path: Path, header: dict, body: bytes = b"", size: int = 0) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + body)
        file.truncate(8 + len(text) + (size or len(body)))


def test_a_checkpoint_larger_than_the_memory(run, model_dir, tmp_path):
    """50 GB that a sparse file claims to hold; the weights are never there."""
    big = shutil.copytree(model_dir, tmp_path / "big")
    wide = {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128, "num_key_value_heads": 8}
    config = json.loads((big / "config.json").read_text())
    (big / "config.json").write_text(json.dumps(config | wide | {"num_hidden_layers": 4, "head_dim": 128}))
    shapes = {"model.embed_tokens.weight": [260, 16384], "model.norm.weight": [16384]}
    for i in range(4):
        block = f"model.layers.{i}"
        shapes |= {f"{block}.self_attn.{n}_proj.weight": [16384, 16384] for n in "qo"}
        shapes |= {f"{block}.self_attn.{n}_proj.weight": [1024, 16384] for n in "kv"}
        shapes |= {f"{block}.mlp.{n}_proj.weight": [53248, 16384] for n in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": [16384, 53248]}
        shapes |= {f"{block}.{n}_layernorm.weight": [16384] for n in ("input", "post_attention")}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    assert end > 50e9
    write(big / "model.safetensors", header, size=end)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.planning.rates.LARGEST", 1 << 18)  # probes of the real width would take a while
        patch.setattr("secateur.planning.rates.WIDEST", 512)
        flags = ["plan", big, "--pattern", "2:4", "--data", "embedded", *SMALL, "--json"]
        ran, lazy = run(*flags, "--offload", "off"), run(*flags)
    assert ran.code == 0, ran.err
    assert ran.json["model"]["bytes"] == end
    assert ran.json["memory"]["host"]["peak"] > 50e9
    assert lazy.json["memory"]["host"]["outside the blocks"] == 4 * (260 + 1) * 16384
    assert sum(row["count"] for row in ran.json["linears"]) == 28
    assert "below 7 B" in ran.json["warnings"][0]
    assert "this model has" not in ran.json["warnings"][0]


@pytest.fixture(params=["missing", "reshaped", "corrupt", "weightless", "shard"])
def broken(request, model_dir, tmp_path):
    """A directory whose weights do not fit, and words of the line that says so."""
    path = Path(shutil.copytree(model_dir, tmp_path / "broken"))
    file = path / "model.safetensors"
    header, body = headers(file)
    name = "model.layers.1.mlp.up_proj.weight"
    if request.param == "missing":
        header["model.layers.1.mlp.other.weight"] = header.pop(name)
        write(file, header, body)
        return path, f"lacks 1 of the model's tensors, such as {name}"
    if request.param == "reshaped":
        header[name]["shape"].reverse()
        write(file, header, body)
        return path, f"{name} is (32, 64) in the file and (64, 32) by config.json"
    if request.param == "corrupt":
        file.write_bytes(b"not a checkpoint at all")
        return path, "broken"
    file.unlink()
    if request.param == "shard":
        (path / "other.safetensors").touch()
        index = {"weight_map": {name: "model-00001-of-00002.safetensors"}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        return path, "model-00001-of-00002.safetensors"
    return path, "no .safetensors file"


def test_weights_that_do_not_fit_are_named_as_prune_names_them(run, broken, text_file, tmp_path):
    path, words = broken
    flags = ["--sparsity", "0.5", "--data", text_file, *SMALL]
    planned = run("plan", path, *flags)
    pruned = run("prune", path, *flags, "--out", tmp_path / "out")
    assert (planned.code, pruned.code) == (1, 1)
    assert words in planned.error, planned.error
    assert planned.out == ""
    if "in the file" in words or "lacks" in words:
        assert planned.error == pruned.error


def test_what_exports_refuse_is_seen(moe, run, model_dir):
    from transformers import GPT2Config, GPT2LMHeadModel

    from secateur.models.adapter import DecoderAdapter
    from secateur.planning.report import held_by
    from secateur.report.runtimes import CONV1D, EXPERTS

    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=64))
    assert held_by(DecoderAdapter(gpt), 0) == {CONV1D}
    assert held_by(DecoderAdapter(moe("mixtral")), 0) == {EXPERTS}
    ran = run("plan", model_dir, "--pattern", "2:4", "--low-rank", "4", "--data", "c4", *SMALL)
    assert re.search("OpenVINO, AMX Xeon +none: the export refuses low-rank branches", ran.out)


# ---- what cannot be done

WRONG = {
    "no model": ([], 2, ["no MODEL"]),
    "nothing there": (["TMP/none", "--sparsity", "0.5"], 1, ["nothing at"]),
    "no sparsity": (["MODEL"], 2, ["needs a sparsity"]),
    "N:M does not divide": (["MODEL", "--pattern", "3:5", *SMALL], 2, ["divisible by 5", "got 32"]),
    "unknown method": (["MODEL", "--sparsity", "0.5", "--method", "wonda"], 2, ["did you mean wanda"]),
    "unknown data": (["MODEL", "--sparsity", "0.5", "--data", "c5"], 2, ["'c5'"]),
    "data missing": (["MODEL", "--sparsity", "0.5", "--data", "TMP/none.txt"], 1, ["no file"]),
    "hub data malformed": (["MODEL", "--sparsity", "0.5", "--data", "hf:"], 2, ["hf:ID"]),
    "seq-len": (["MODEL", "--sparsity", "0.5", "--seq-len", "256"], 2, ["context of 128"]),
    "blocks": (["MODEL", "--sparsity", "0.5", *SMALL, "--blocks", "0:9"], 2, ["at most 0:2"]),
    "branches": (["MODEL", "--pattern", "2:4", *SMALL, "--low-rank", "2", "--offload", "on"], 2, ["stay on disk"]),
    "include": (["MODEL", "--sparsity", "0.5", *SMALL, "--include", "qproj"], 2, ["did you mean", "q_proj"]),
    "half an FFN": (["MODEL", "--sparsity", "0.5", *SMALL, "--ignore", "up"], 2, ["as a whole", "mlp.up_proj"]),
    "out": (["MODEL", "--sparsity", "0.5", "--out", "x"], 2, ["--out"]),
    "quantized": (["QUANTIZED", "--sparsity", "0.5", *SMALL], 1, ["already quantized"]),
    "alien": (["ALIEN", "--sparsity", "0.5", *SMALL], 1, ["cannot load"]),
    "experts": (["MIXTRAL", "--sparsity", "0.5", *SMALL], 1, ["MIXTRAL"]),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, model_dir):
    from transformers import MixtralConfig

    tmp = tmp_path_factory.mktemp("wrong")
    changes = {"QUANTIZED": {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "ALIEN": {"model_type": "x"}}
    for name, change in changes.items():
        shutil.copytree(model_dir, tmp / name)
        config = json.loads((tmp / name / "config.json").read_text())
        (tmp / name / "config.json").write_text(json.dumps(config | change))
    shutil.copytree(model_dir, tmp / "MIXTRAL")
    MixtralConfig(vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2).save_pretrained(
        tmp / "MIXTRAL"
    )
    return {"MODEL": str(model_dir), "TMP": str(tmp), **{n: str(tmp / n) for n in ("QUANTIZED", "ALIEN", "MIXTRAL")}}


@pytest.mark.parametrize("case", WRONG)
def test_one_line_and_the_exit_code(case, places, run):
    typed, code, words = WRONG[case]
    filled = [re.sub(r"^[A-Z]+(?=$|/)", lambda found: places[found[0]], word) for word in typed]
    ran = run("plan", *filled)
    assert ran.code == code, ran.err
    assert ran.error.startswith("secateur: ")
    assert ran.out == ""
    assert "Traceback" not in ran.err
    assert not [word for word in words if word not in ran.error], ran.error


# ---- Python


def test_python_plans_a_name_and_an_object_alike(model_dir, text_file):
    from transformers import AutoModelForCausalLM

    from secateur import PlanReport, PruneConfig, plan

    config = PruneConfig(sparsity=0.5, samples=4, seq_len=32, data="c4")
    named = plan(model_dir, config, data=str(text_file))
    assert isinstance(named, PlanReport)
    held = plan(AutoModelForCausalLM.from_pretrained(model_dir), config, data=str(text_file))
    assert named.linears == held.linears
    assert named.skipped == held.skipped
    assert [row["operations"] for row in named.stages] == [row["operations"] for row in held.stages]
    assert named.model == held.model
    assert json.loads(json.dumps(named.to_dict())) == named.to_dict() | {"recipe": named.recipe}
