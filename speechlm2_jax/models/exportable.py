"""`Exportable`: how a model with an LLM is saved, and compared with what was saved."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from speechlm2_jax.conversion.coverage import Coverage, coverage
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.quantizing import dequantized
from speechlm2_jax.conversion.readers import open_weights
from speechlm2_jax.inference import probe as probes
from speechlm2_jax.layers.module import VariableInfo, Variables
from speechlm2_jax.layers.quantized_layers import unquantized
from speechlm2_jax.pretrained import blueprint as blueprints
from speechlm2_jax.pretrained import hub, llm_directory, save_load
from speechlm2_jax.pretrained.quantization import Quantization, unquantized_settings
from speechlm2_jax.pretrained.save_load import SaveOptions


class Exportable(ABC):
    """A base of the models with an LLM: all that writes them."""

    _blueprint: Any
    _graphdef: Any
    _quantization: Quantization
    infos: dict[str, VariableInfo]

    @property
    @abstractmethod
    def variables(self) -> Variables:
        """Weights and buffers by path."""

    def save_pretrained(
        self, save_directory: str | Path, *, merge_lora: bool = False, dtype: str | None = None
    ) -> None:
        """Writes a directory that `from_pretrained` here and in NeMo 3.0.0 reads.

        With `merge_lora`, LoRA adapters become part of the weights, and the directory has no LoRA.
        `dtype` ("float32", "bfloat16" or "float16") is that of every floating tensor in the file;
        None keeps each as it is. Weights that training held quantized are written in fp32. Raises
        ConversionError for values that it cannot hold, and for a model that `quantize` changed.
        """
        options = SaveOptions(merge_lora=merge_lora, dtype=dtype)
        save_load.save_model(Path(save_directory), *self._written(), options)

    def save_llm(
        self, save_directory: str | Path, *, merge_lora: bool = True, dtype: str | None = None
    ) -> None:
        """Writes the LLM alone: a directory that transformers' AutoModelForCausalLM reads.

        It holds config.json, weights (sharded above 5 GB), tokenizer and generation_config.json.
        LoRA is merged into the weights, or else written to the folder `adapter` as PEFT saves it.
        `dtype` is as for `save_pretrained`.
        """
        options = SaveOptions(merge_lora=merge_lora, dtype=dtype)
        llm_directory.save_llm(Path(save_directory), *self._written(), options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str = "Upload model",
        create_pr: bool = False,
        merge_lora: bool = False,
        dtype: str | None = None,
    ) -> str:
        """Uploads what `save_pretrained` writes to OWNER/NAME on the Hugging Face hub.

        The repository is made if it does not exist. `private`, `token`, `revision` and `create_pr`
        are as in huggingface_hub; without `token` the one that is logged in is used. Returns the
        address of the commit. Raises HubError, one line, without a network or a token.
        """
        options = SaveOptions(merge_lora=merge_lora, dtype=dtype, name=repo_id)
        target = hub.Upload(
            repo_id=repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )

        def write(folder: Path) -> None:
            save_load.save_model(folder, *self._written(), options)

        return hub.upload(target, write)

    def save_definition(self, directory: str | Path) -> None:
        """Writes everything but the weights: config, LLM architecture and tokenizer."""
        save_load.save_definition(Path(directory), self._blueprint)

    def state_dict(self, variables: Variables | None = None) -> dict[str, np.ndarray]:
        """The weights, or other values of the same paths and shapes, under NeMo's names."""
        values = self.variables if variables is None else variables
        return blueprints.state_dict(self._blueprint, values)

    def coverage(self, checkpoint: str | Path) -> Coverage:
        """What became of each tensor of a checkpoint of this model. Reads no value."""
        infos = unquantized(self.infos)
        return coverage(open_weights(checkpoint), self._blueprint.table, infos)

    def probe(self) -> probes.Outputs:
        """Outputs of one small forward pass: another copy of the model gives the same."""
        network = self._blueprint.network
        return probes.probe_speech(self._graphdef, self.variables, network)

    def probe_llm(self, *, with_lora: bool = True) -> probes.Outputs:
        """Outputs of one small forward pass of the LLM alone."""
        network = self._blueprint.network
        own = llm_directory.llm_variables(dequantized(self.variables), with_lora=with_lora)
        return probes.probe_llm(network.llm, own, network.lora if with_lora else None)

    def _written(self) -> tuple[Any, Variables]:
        """Blueprint and variables as they are written.

        A model that was trained over a quantized LLM is written with the weights that these stand
        for. Raises ConversionError for one that was quantized afterwards.
        """
        kind = self._quantization.weights
        if kind is None:
            return self._blueprint, self.variables
        if self._blueprint.config.quantize_frozen_llm is None:
            raise ConversionError(
                f"the weights are quantized to {kind}, so what is written would not be the model's "
                "own; load it without quantize to save it"
            )
        return unquantized_settings(self._blueprint), dequantized(self.variables)
