"""A checkpoint of integer codes, as ``secateur quantize`` writes it, opened to be measured.

It is transformers that opens it, by the compressed-tensors library. Weights come back as the values that the codes
stand for, in the model's type; where activations are quantized too, every linear rounds its inputs before it
multiplies. So what is measured is the arithmetic of the format, at the speed of an ordinary model.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from secateur.errors import ModelError

METHOD, PACKAGE = "compressed-tensors", "compressed_tensors"
INSTALL = "`pip install -e '.[quantize]'` in the clone"


def holds_codes(config: PretrainedConfig) -> bool:
    """Whether a checkpoint's config says that it is in this form."""
    return _told(config).get("quant_method") == METHOD


def prepare(config: PretrainedConfig, source: str) -> None:
    """Have weights dequantized as they are read, where nothing else is to be done; ModelError without the library."""
    if find_spec(PACKAGE) is None:
        raise ModelError(f"{source} is quantized and needs compressed-tensors; install it with {INSTALL}")
    import loguru

    loguru.logger.disable(PACKAGE)
    if not _rounds_inputs(config):
        config.quantization_config = {**_told(config), "dequantize": True}


def decompress(model: PreTrainedModel) -> None:
    """Weights in place of codes, now and not in the first forward."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.quantization_config.dequantize:
        quantizer.compressor.decompress_model(model)


def made_of_codes(folder: Path | None) -> str | None:
    """What becomes of a directory's codes when it is opened so; None where it holds none."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False) if folder else None
    if config is None or not holds_codes(config):
        return None
    return "codes decoded when opened" + (", inputs rounded by PyTorch" if _rounds_inputs(config) else "")


def _rounds_inputs(config: PretrainedConfig) -> bool:
    groups = _told(config).get("config_groups") or {}
    return any(isinstance(group, dict) and group.get("input_activations") for group in groups.values())


def _told(config: PretrainedConfig) -> dict[str, Any]:
    told = getattr(config, "quantization_config", None)
    return told if isinstance(told, dict) else {}
