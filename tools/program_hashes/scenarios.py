"""What is run to have its programs lowered: tiny models through the public classes alone."""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

import speechlm2_jax as slm

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
RATE_HZ = 16000
TAG = "<|audioplaceholder|>"
MESH = {"data_parallel_size": 4, "tensor_parallel_size": 2}
Scenario = Callable[[Path, int], None]


def noise(seconds: float, rate_hz: int = RATE_HZ, seed: int = 0) -> np.ndarray:
    """Float32 [S]."""
    random = np.random.default_rng(seed)
    return random.uniform(-0.1, 0.1, round(seconds * rate_hz)).astype(np.float32)


def salm_config(name: str = "llama_adapter", **changes: Any) -> dict[str, Any]:
    """The `model:` block of a recorded NeMo run on the tiny parts."""
    made = json.loads((DATA / "salm" / f"{name}.json").read_text())["cfg_in"]
    llm = made["pretrained_llm"].rsplit("/", 1)[-1]
    parts = {"pretrained_llm": DATA / "llm" / llm, "pretrained_asr": DATA / "salm" / "asr.nemo"}
    return {**made, **{key: str(path) for key, path in parts.items()}, **changes}


def speech_data(folder: Path, prompt_format: str) -> dict[str, Any]:
    """A training and a validation set of eight recordings of 0.5 s."""
    soundfile.write(folder / "a.wav", noise(0.5), RATE_HZ)
    rows = [{"audio_filepath": "a.wav", "duration": 0.5, "text": f"say {n}"} for n in range(8)]
    manifest = folder / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {
        "type": "lhotse_as_conversation",
        "manifest_filepath": str(manifest),
        "audio_locator_tag": TAG,
        "tags": {"context": "Repeat:"},
    }
    common = {
        "sample_rate": RATE_HZ,
        "prompt_format": prompt_format,
        "token_equivalent_duration": 0.08,
        "batch_size": 2,
    }
    train = {**common, "input_cfg": [source], "shuffle": True, "seed": 1, "num_workers": 1}
    validation = {**common, "datasets": {"own": {"input_cfg": [source]}}}
    return {"train_ds": train, "validation_ds": validation}


def fit(folder: Path, model: Any, datamodule: Any, devices: int, **trainer: Any) -> None:
    """Two optimizer steps and a validation."""
    strategy = slm.ModelParallelStrategy(**(MESH if devices > 1 else {}))
    made = slm.Trainer(
        max_steps=2,
        limit_train_batches=2,
        val_check_interval=2,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        precision="32-true",
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        **trainer,
    )
    slm.exp_manager(made, {"explicit_log_dir": str(folder / "run")})
    made.fit(model, datamodule)


def salm_data(folder: Path, model: Any) -> Any:
    """The data of `speech_data` for a model."""
    blocks = speech_data(folder, model.cfg["prompt_format"])
    dataset = slm.data.SALMDataset(tokenizer=model.tokenizer)
    return slm.data.DataModule(blocks, tokenizer=model.tokenizer, dataset=dataset)


def salm_adapter_step(folder: Path, devices: int) -> None:
    """SALM with a modality adapter and a frozen LLM: training step and validation."""
    model = slm.models.SALM(salm_config())
    fit(folder, model, salm_data(folder, model), devices)


def salm_lora_step(folder: Path, devices: int) -> None:
    """SALM with LoRA, gradients of two micro-batches added up."""
    model = slm.models.SALM(salm_config("qwen3_lora"))
    fit(folder, model, salm_data(folder, model), devices, accumulate_grad_batches=2)


def ctc_step(folder: Path, devices: int) -> None:
    """An encoder with a CTC head: training step."""
    read = slm.models.CTCModel.from_pretrained(DATA / "asr" / "ctc.nemo")
    model = slm.models.CTCModel(
        {**read.cfg, "optimizer": salm_config()["optimizer"]}, tokenizer=read.tokenizer
    )
    blocks = speech_data(folder, "plain")
    dataset = slm.data.SALMDataset(tokenizer=model.tokenizer)
    datamodule = slm.data.DataModule(blocks, tokenizer=model.tokenizer, dataset=dataset)
    fit(folder, model, datamodule, devices)


def _prompts(tag: str) -> dict[str, Any]:
    return {
        "prompts": [[{"role": "user", "content": f"Repeat: {tag}"}]],
        "audios": noise(0.5)[None],
        "audio_lens": np.array([RATE_HZ // 2]),
        "max_new_tokens": 4,
    }


def greedy(folder: Path, devices: int) -> None:
    """Generation: encode, prefill and decode."""
    del folder
    model = _generating(devices)
    model.generate(**_prompts(model.audio_locator_tag))


def beam_search(folder: Path, devices: int) -> None:
    """Generation with four beams."""
    del folder
    model = _generating(devices)
    model.generate(**_prompts(model.audio_locator_tag), num_beams=4)


def sampling(folder: Path, devices: int) -> None:
    """Generation with random draws and logits processors."""
    del folder
    model = _generating(devices)
    chosen = {"do_sample": True, "top_k": 5, "temperature": 0.7, "repetition_penalty": 1.1}
    model.generate(**_prompts(model.audio_locator_tag), **chosen)


def continuous_batching(folder: Path, devices: int) -> None:
    """Prompts that take turns on two slots."""
    del folder, devices
    model = _generating(1)
    turn = {"role": "user", "content": f"Repeat: {model.audio_locator_tag}", "audio": [noise(0.5)]}
    for _ in model.generate_each([[turn]] * 3, slots=2, max_new_tokens=3):
        pass


def _generating(devices: int) -> Any:
    model = slm.models.SALM.from_pretrained(DATA / "salm" / "qwen3_lora_hf").eval()
    return on_mesh(model, devices)


def on_mesh(model: Any, devices: int) -> Any:
    """The model with its weights on a mesh of several devices."""
    if devices > 1:
        from speechlm2_jax.sharding import make_sharding, place

        placement = make_sharding(data=2, fsdp=2, tensor=2)
        axes = {path: info.axes for path, info in model.infos.items()}
        model.variables = place(model.variables, axes, placement)
    return model


def duplex_step(folder: Path, devices: int) -> None:
    """Full duplex with codes from the LLM: training step."""
    _duplex_step(folder, devices, "duplex_s2s", slm.models.DuplexS2SModel)


def speech_decoder_step(folder: Path, devices: int) -> None:
    """Full duplex with a speech decoder: training step."""
    kind = slm.models.DuplexS2SSpeechDecoderModel
    _duplex_step(folder, devices, "duplex_s2s_speech_decoder", kind)


def _duplex_step(folder: Path, devices: int, run: str, kind: Any) -> None:
    cfg = json.loads((DATA / "duplex" / run / "cfg_input.json").read_text())
    keys = ("pretrained_llm", "pretrained_audio_codec", "pretrained_asr")
    cfg |= {key: str(DATA / "duplex" / cfg[key]) for key in keys} | {"scoring_asr": None}
    model = kind(cfg)
    cuts = ROOT / "corpus" / "dialogs" / "validation.jsonl.gz"
    blocks: Mapping[str, Any] = {
        "frame_length": 0.08,
        "source_sample_rate": RATE_HZ,
        "target_sample_rate": 22050,
        "input_roles": ["user"],
        "output_roles": ["agent"],
        "train_ds": {
            "sample_rate": 22050,
            "input_cfg": [{"type": "lhotse", "cuts_path": str(cuts)}],
            "batch_size": 2,
            "seed": 1,
            "shuffle": True,
        },
    }
    dataset = slm.data.DuplexS2SDataset.from_config(blocks, model.tokenizer)
    datamodule = slm.data.DataModule(blocks, tokenizer=model.tokenizer, dataset=dataset)
    fit(folder, model, datamodule, devices)


def duplex_inference(folder: Path, devices: int) -> None:
    """Offline inference of the model with codes from the LLM."""
    del folder
    _duplex_inference("duplex_s2s", slm.models.DuplexS2SModel, devices)


def speech_decoder_inference(folder: Path, devices: int) -> None:
    """Offline inference of the model with a speech decoder."""
    del folder
    kind = slm.models.DuplexS2SSpeechDecoderModel
    _duplex_inference("duplex_s2s_speech_decoder", kind, devices)


def _duplex_inference(run: str, kind: Any, devices: int) -> None:
    from tests.parity.duplex_golden import hf

    with contextlib.chdir(DATA / "duplex"):
        model = on_mesh(kind.from_pretrained(hf(run)).eval(), devices)
    audio = noise(1.0)[None].repeat(2, 0)
    model.offline_inference(input_signal=audio, input_signal_lens=np.array([RATE_HZ, 12000]))


def codec(folder: Path, devices: int) -> None:
    """Codec: waveform to codes and back, and one streamed frame."""
    del folder, devices
    model = slm.models.AudioCodec.from_pretrained(DATA / "codec" / "causal_tiny.nemo")
    samples = 4 * model.samples_per_frame
    encoded = model.encode(noise(samples / RATE_HZ)[None], np.array([samples]))
    model.decode(encoded.codes, encoded.lengths)
    model.decode_step(model.new_stream(), encoded.codes[:, :1])


def encoder_stream(folder: Path, devices: int) -> None:
    """Perception of a stream, one step."""
    del folder, devices
    with contextlib.chdir(DATA / "duplex"):
        model = slm.models.DuplexS2SModel.from_pretrained(DATA / "duplex" / "duplex_s2s" / "hf")
    stream = model.perception_stream()
    stream.push(noise(stream.plan.samples / RATE_HZ)[None])


def transducer(folder: Path, devices: int) -> None:
    """Greedy decoding of an RNN-T and of a CTC model."""
    del folder, devices
    for name in ("rnnt", "ctc"):
        kind = slm.models.CTCModel if name == "ctc" else slm.models.ASRModel
        kind.from_pretrained(DATA / "asr" / f"{name}.nemo").transcribe([noise(0.5)])


SCENARIOS: Mapping[str, Scenario] = {
    function.__name__: function
    for function in (
        *(salm_adapter_step, salm_lora_step, ctc_step, duplex_step, speech_decoder_step),
        *(greedy, beam_search, sampling, continuous_batching),
        *(duplex_inference, speech_decoder_inference),
        *(codec, encoder_stream, transducer),
    )
}
ON_ONE_DEVICE = {"continuous_batching", "codec", "encoder_stream", "transducer"}
"""Scenarios that do not run on a mesh."""
