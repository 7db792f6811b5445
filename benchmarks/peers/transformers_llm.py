"""The peer of benchmarks/llm.py: the same prompts through transformers' generate, greedy."""

import argparse
import json
import os

import numpy as np
import torch
import transformers
from measuring import measure

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("directory")
parser.add_argument("--batch", type=int, default=1)
parser.add_argument("--prompt", type=int, default=32)
parser.add_argument("--new", type=int, default=64)
parser.add_argument("--repeats", type=int, default=3)
arguments = parser.parse_args()
torch.set_num_threads(len(os.sched_getaffinity(0)))
transformers.utils.logging.set_verbosity_error()
model = transformers.AutoModelForCausalLM.from_pretrained(
    arguments.directory, dtype=torch.float32, trust_remote_code=False
).eval()
shape = (arguments.batch, arguments.prompt)
ids = np.random.default_rng(0).integers(100, model.config.vocab_size // 2, shape)
ids = torch.from_numpy(ids.astype(np.int64))


def generate(new):
    """Exactly `new` tokens."""
    with torch.inference_mode():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            eos_token_id=None,
            pad_token_id=0,
        )[:, ids.shape[1] :]


first = measure("first", "first", lambda: generate(1), arguments.repeats)
whole = measure("generate", "generate", lambda: generate(arguments.new), arguments.repeats)
token_s = (whole["generate_s"][0] - first["first_s"][0]) / (arguments.new - 1)
count = sum(p.numel() for p in model.parameters())
print(
    json.dumps(
        {
            "parameters_m": round(count / 1e6, 2),
            **whole,
            "token_s": token_s,
            "ids": generate(arguments.new)[0, :8].tolist(),
        }
    )
)
