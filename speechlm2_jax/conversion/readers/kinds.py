"""What a file or a folder is that holds no weights which can be read, by its right name."""

import re
from pathlib import Path

from speechlm2_jax.conversion.errors import ConversionError

SNIFFED_BYTES = 512
GGUF_SUFFIX = ".gguf"
FETCH_AGAIN = "fetch the file again"
PLAIN_WEIGHTS = "name the model that it was made from, with .safetensors or .bin files"
BEGINNINGS = (
    (rb"version https://git-lfs\.github\.com/spec/",
     "a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"),
    (rb"# xet version ", "a Xet pointer, not the file itself; " + FETCH_AGAIN),
    (rb"\s*(?:<!doctype html|<html|<head|<\?xml|<error)",
     "a web page, not the file itself: the download gave an error page; " + FETCH_AGAIN),
    (rb"\s*(?:Entry not found|Invalid username or password|Not Found|Access denied"
     rb"|Access to model|Repository not found|Forbidden|\{\s*\"error\")",
     "a server's error message, not the file itself; " + FETCH_AGAIN),
    (rb"GGUF", "a GGUF file of llama.cpp; name it with the ending .gguf"),
    (rb"GGML|ggml|lmgg|tjgg|fmgg",
     "a GGML file, older than GGUF, which is not supported; " + PLAIN_WEIGHTS),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file of Keras, which is not supported; " + PLAIN_WEIGHTS),
)  # fmt: skip
"""How files begin that are not what their names say."""
SUFFIXES = {
    ".ggml": "GGML weights of llama.cpp",
    ".h5": "TensorFlow weights",
    ".msgpack": "Flax weights",
    ".onnx": "an ONNX program",
    ".npz": "NumPy arrays (MLX)",
    ".tflite": "a TFLite program",
    ".engine": "a TensorRT program",
}
"""What files of other tools are."""


def check_file(path: Path) -> None:
    """Raises ConversionError, naming what it is, for an empty file or one of another kind."""
    try:
        with path.open("rb") as file:
            head = file.read(SNIFFED_BYTES)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    if not head:
        raise ConversionError(f"{path} is empty (0 bytes); {FETCH_AGAIN}")
    for pattern, what in BEGINNINGS:
        if pattern == rb"GGUF" and path.suffix == GGUF_SUFFIX:
            continue
        if re.match(pattern, head, re.IGNORECASE if pattern.startswith(rb"\s") else 0):
            raise ConversionError(f"{path} is {what}")


def folder_problem(folder: Path) -> str:
    """What a folder holds in place of weights, and what to do; "" if nothing is known of it."""
    for names, what, remedy in FOLDERS:
        found = next((hit for name in names for hit in sorted(folder.glob(name))), None)
        if found is not None:
            return f"{folder} is {what} ({found.name}); {remedy}"
    return ""


def suffix_problem(path: Path) -> str:
    """What a file of another tool is, by its suffix; "" if it is not known."""
    if path.suffix == ".distcp":
        return f"{path} is a part of a torch distributed checkpoint; name its folder"
    what = SUFFIXES.get(path.suffix.lower())
    return "" if what is None else f"{path} is {what}, which is not supported; {PLAIN_WEIGHTS}"


FOLDERS = (
    (("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
     "a PEFT adapter without its model",
     "merge it first (PEFT: model.merge_and_unload().save_pretrained(DIR)) and name that"),
    ((".metadata",),
     "a torch distributed checkpoint", "copy the config.json of its model into it"),
    (("*.distcp",),
     "a torch distributed checkpoint without its .metadata", "fetch that file too"),
    (("*/.metadata", "*/*.distcp"),
     "a folder with a torch distributed checkpoint", "name the folder that .metadata is in"),
    (("zero_to_fp32.py", "*mp_rank_*_model_states.pt", "global_step*/*mp_rank_*_model_states.pt"),
     "a DeepSpeed checkpoint",
     "write one file first (python zero_to_fp32.py FOLDER OUTPUT)"),
    (("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt"),
     "an Orbax checkpoint", "name the run directory that it belongs to, or export it first"),
    (("consolidated*.pth", "consolidated*.safetensors", "params.json"),
     "a model in its maker's own format",
     "name the same model in Hugging Face's format"),
    (("*.gguf",), "a folder of several GGUF files", "name one of them"),
    (("tf_model*.h5", "flax_model*.msgpack", "*.onnx", "onnx/*.onnx", "rust_model.ot", "*.npz"),
     "a folder of weights of another framework, which is not supported", PLAIN_WEIGHTS),
    (("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin"),
     "a folder of shards without their index",
     "fetch model.safetensors.index.json (or pytorch_model.bin.index.json) too"),
    (("*.incomplete", "*.safetensors.part", "*.aria2"),
     "an unfinished download", "fetch the model again"),
    (("*.safetensors", "*.bin", "*.pt", "*.pth"),
     "a folder whose weights have another name",
     "rename them to model.safetensors (or pytorch_model.bin), or name the file itself"),
)  # fmt: skip
"""(files that tell, what the folder is, what to do), the most telling first."""
