"""A chat with a tiny model, and its tokenizer."""

import copy
import types

from tiny_models import VOCAB

import ttt
from ttt.chat import Chat


class Letters:
    """A tokenizer with a chat template: a token for each letter; some letters share one."""

    chat_template, eos_token_id = "{{ messages }}", 0

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        text = "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
        return text + "<assistant>" * add_generation_prompt

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
        ids = [1 + ord(letter) % (VOCAB - 1) for letter in text]
        if return_offsets_mapping:
            return {"input_ids": ids, "offset_mapping": [(at, at + 1) for at in range(len(text))]}
        return types.SimpleNamespace(input_ids=ids)

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(97 + int(i) % 26) for i in ids)


def chat_of(base, folder, user="ada", **options):
    return Chat(copy.deepcopy(base), Letters(), ttt.Store(folder), user, max_new_tokens=5, **options)


def file_of(folder, version):
    """The file of a version of a store in ``folder``."""
    (file,) = [each for each in (folder / "blobs").rglob("*") if version.key.endswith(each.name) and each.is_file()]
    return file
