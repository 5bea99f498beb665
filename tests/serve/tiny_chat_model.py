"""A tiny language model of bytes with a chat template, and what serves it."""

import copy
import threading

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import ttt
from ttt.serve.errors import RequestError
from ttt.serve.limits import Limits
from ttt.serve.request import Outcome, Piece, Request
from ttt.serve.sampling import Sampling
from ttt.serve.service import Service

CONTEXT = 512
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer():
    """A fast tokenizer with a token for each byte, and two that begin and end a message."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=TEMPLATE)


def tiny_chat_model(seed=0, dtype=torch.float32, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=258, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=256, eos_token_id=257, **changes,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        with torch.no_grad():  # the usual initialisation is so small that the logits hardly depend on the input
            for p in model.parameters():
                if p.ndim == 2:
                    p.mul_(4)
    return model.to(dtype).eval()


def learner_of(model, slots=3, **options):
    config = ttt.TTTConfig(
        ["down_proj"], layers="last:0.5", protect=[ttt.KroneckerFisher(directions=3)], chunk=8,
        **{"lr": 0.02, "per_user": ttt.LowRank(slots=slots, rank=16, window=16), **options},
    )  # fmt: skip
    learner = ttt.Learner(ttt.adapt_(copy.deepcopy(model), config), episodes=ttt.EpisodeLog())
    with torch.random.fork_rng():
        torch.manual_seed(1)
        learner.calibrate([torch.randint(0, 256, (2, 32))])
    return learner


def service_of(model, store, slots=3, observer=None, lease_seconds=30.0, learner=None, telling=None, **limits):
    learner = learner or learner_of(model, slots)
    limits = Limits(**{"study_after": 0.0, "prefill": 16, **limits})
    store = store if isinstance(store, ttt.Store) else ttt.Store(store)
    return Service(
        learner, byte_tokenizer(), store, "tiny", limits=limits, observer=observer, lease_seconds=lease_seconds,
        telling=telling,
    )  # fmt: skip


def slowed(steps, wait):
    """``steps``, which makes generators of steps, with a call of ``wait`` after each step."""

    def slow(*args, **options):
        inner = steps(*args, **options)
        while True:
            try:
                next(inner)
            except StopIteration as done:
                return done.value
            wait()
            yield

    return slow


class Answer:
    """A request that is being served, and what came of it."""

    def __init__(self, service, user, prompt, lesson=None, n=1, wait=False, **sampling):
        self.pieces, self.end, self.prompt_scores = [], None, None
        self._done = threading.Event()
        self.request = Request(
            user, list(prompt), Sampling(**{"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, **sampling}),
            self._deliver, n=n, lesson=lesson, wait=wait, score_prompt="logprobs" in sampling,
            on_prompt=self._prompt_scores,
        )  # fmt: skip
        service.submit(self.request)

    def _prompt_scores(self, scores):
        self.prompt_scores = scores

    def _deliver(self, event):
        if isinstance(event, Piece):
            assert self.end is None
            self.pieces.append(event)
        else:
            assert isinstance(event, (Outcome, RequestError))
            assert self.end is None
            self.end = event
            self._done.set()

    def wait(self, seconds=60):
        assert self._done.wait(seconds), "nothing came"
        return self

    def text(self, index=0):
        return "".join(piece.text for piece in self.pieces if piece.index == index)

    def tokens(self, index=0):
        return [score.token for piece in self.pieces if piece.index == index for score in piece.tokens]


def served_in_random_order(batch, waiting):
    """Let the batch serve ``waiting``, (request, pieces) each, which begin at random steps: those that began."""
    todo, begun = list(waiting), []
    for _ in range(500):
        if todo and batch.fits(todo[0][0]) and torch.rand(1) < 0.5:
            batch.begin(todo[0][0])
            begun.append(todo.pop(0))
        batch.read_step()
        batch.decode_step()
        if batch.idle and not todo:
            break
    return begun
