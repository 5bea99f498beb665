"""Shared by all tests. Without a GPU the Triton kernels run in Triton's interpreter, and tests/gpu is not collected."""

import os

import torch

collect_ignore_glob = []
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
    collect_ignore_glob.append("gpu/*")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
