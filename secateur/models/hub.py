"""A model on the Hugging Face hub: its files brought here as a directory like any other, or only its headers.

Everything that is checked of a directory is so checked of a hub model too, and its blocks can be left on disk. Fetched
are the files at the top of the repository that a decoder and its tokenizer consist of: no pickles, no code, no second
copy of the weights in another format. Low-rank branches lie in a folder of their own and are fetched too.
"""

from pathlib import Path

from huggingface_hub import get_safetensors_metadata, snapshot_download

from secateur.models.branches import CONFIG, FACTORS, FOLDER
from secateur.models.headers import Headers

WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""Config, weights, chat template, tokenizers."""
UNWANTED = ["*/*", "consolidated*.safetensors"]
"""Other formats in folders; the weights once more in their makers' own."""
BRANCHES = [f"{FOLDER}/{CONFIG}", f"{FOLDER}/{FACTORS}"]
"""Of a model that we have pruned; a second request, since the first one wants no folders."""


def snapshot(repository: str) -> Path:
    """The directory of a hub model, from the cache as far as it is there."""
    snapshot_download(repository, allow_patterns=BRANCHES)
    return Path(snapshot_download(repository, allow_patterns=WANTED, ignore_patterns=UNWANTED))


def hub_headers(repository: str) -> tuple[Headers, int]:
    """Shapes and types of the stored tensors and their bytes, without the files."""
    headers, size = Headers(), 0
    for file in get_safetensors_metadata(repository).files_metadata.values():
        headers |= {name: (tuple(entry.shape), entry.dtype) for name, entry in file.tensors.items()}
        size += max((entry.data_offsets[1] for entry in file.tensors.values()), default=0)
    return headers, size
