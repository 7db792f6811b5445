"""An LLM in a GGUF file of llama.cpp -> config.json, weights and tokenizer of Hugging Face.

`readers/gguf.py` reads the file; here is what its keys and tensors mean. Conversions that
llama.cpp's `convert_hf_to_gguf.py` makes are undone.
"""

from speechlm2_jax.conversion.gguf.directory import GgufModel, open_gguf, write_directory

__all__ = ["GgufModel", "open_gguf", "write_directory"]
