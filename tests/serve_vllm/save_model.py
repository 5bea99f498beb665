"""Saves SmolLM2-135M-Instruct as a folder that vLLM can serve: ``python save_model.py FOLDER``."""

import sys

import torch

from ttt.demo.language_model import load_language_model

if __name__ == "__main__":
    model, tokenizer = load_language_model(torch.bfloat16)
    model.save_pretrained(sys.argv[1])
    tokenizer.save_pretrained(sys.argv[1])
