"""Layers whose weight stands transposed in ``state_dict``."""

from __future__ import annotations

import torch


class Transposed(torch.nn.Linear):
    """With ``transposed`` True, ``weight`` (m, n) is saved and loaded as (n, m), as GPT-2's ``Conv1D`` has it."""

    transposed = False

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.transposed:
            key = prefix + "weight"
            destination[key] = destination[key].T.contiguous()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        key = prefix + "weight"
        if self.transposed and key in state_dict:
            state_dict = {**state_dict, key: state_dict[key].T}
        super()._load_from_state_dict(state_dict, prefix, *args)
