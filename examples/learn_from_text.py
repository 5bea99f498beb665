"""A language model learns from a file; what it learnt is saved and loaded in a new process.

Run it with ``python examples/learn_from_text.py``: the demo's byte-level model reads C++ headers. With
``--model FOLDER --text FILE`` a Hugging Face model of yours reads your text.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import ttt
from ttt.demo.text import held_out_python, stream_of

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="folder of a Hugging Face causal language model")
parser.add_argument("--text", type=Path, help="file to learn from")
parser.add_argument("--weights", help="only load this file, and score the end of the text")
args = parser.parse_args()

if args.model is None:
    from ttt.demo import load_model

    model, _ = load_model()

    def tokens(data: bytes) -> torch.Tensor:
        return torch.tensor([list(data)])
else:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def tokens(data: bytes) -> torch.Tensor:
        return tokenizer(data.decode(errors="replace"), return_tensors="pt").input_ids


data = (args.text.read_bytes() if args.text else stream_of("headers"))[:8_000]
begin, end = tokens(data[: len(data) * 3 // 4]), tokens(data[len(data) * 3 // 4 :])

if args.weights is None:
    ttt.adapt_(model, ttt.TTTConfig(target_modules=["down_proj"], layers="last:2"))  # these layers will learn
    learner = ttt.Learner(model)
    learner.calibrate(tokens(held_out_python()[:8192])[:, :2048].view(4, -1).split(2))  # what must not be forgotten
    print(f"frozen:   {learner.observe(end, learn=False).bits:.3f} bits per token at the end of the text")
    print(f"learning: {learner.observe(begin).bits:.3f} on the text before it, each token scored before it is learnt")
    print(f"learnt:   {learner.observe(end, learn=False).bits:.3f} at the end of the text, which was not learnt")
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "learnt.safetensors"
        ttt.save(model, weights)
        print(f"saved:    {weights.stat().st_size / 1e6:.1f} MB", flush=True)
        subprocess.run([sys.executable, *sys.argv, "--weights", str(weights)], check=True)
else:
    ttt.load(model, args.weights)
    bits = ttt.Learner(model).observe(end, learn=False).bits
    print(f"loaded:   {bits:.3f} bits per token at the end of the text, in a new process")
