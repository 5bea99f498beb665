"""The methods that the suite "text" compares: how each is made, and the values that tuning tries.

A method is an entry of `METHODS`. Its configuration is the demo's without protection, changed by those fixed values and
options that are fields of `ttt.TTTConfig`; its rules are made from the other options.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import ttt
from bench.learning.suite import named
from bench.learning.text import readers
from bench.learning.text.base_model import BaseModel
from bench.learning.text.streams import Stream
from ttt.config import TTTConfig
from ttt.defences import OFF, SWITCHES
from ttt.demo.model import COLUMNS, COMBINED, CONFIG
from ttt.rules import DarkSequenceReplay, LogitDistillation, SampledReplay, SequenceReplay, StreamRule

Options = Mapping[str, Any]
Sweep = tuple[str, Sequence[Any]]

FIELDS = frozenset(f.name for f in dataclasses.fields(TTTConfig)) | frozenset(OFF)
PERIOD, EPOCHS, NEIGHBOURS = 2048, 2, 32
ROWS, CAPACITY = 4, 256  # inputs replayed per commit; sequences of 64 bytes in a replay memory of text

RATES = (0.01, 0.02)
LAMBDAS = (0.003, 0.01, 0.03)
# Sweeps go from almost no protection to almost no learning.
LAMBDA_SWEEP: Sweep = ("ewc_lambda", (0.0005, 0.02, 0.2))
BETAS = (0.1, 0.2, 0.4)
BETA_SWEEP: Sweep = ("replay_beta", (0.03, 0.3, 1.0))
RATE_SWEEP: Sweep = ("lr", (0.001, 0.0025, 0.005, 0.01))


@dataclasses.dataclass(frozen=True)
class TextMethod:
    """One row of the table: a learner, or what ``reader`` makes.

    Attributes:
        family: a key of `bench.learning.report.COLOURS`.
        grid: option -> values; tuning tries all combinations of them.
        fixed: fields of `ttt.TTTConfig` that are not options.
        rules: functions that make the rules of a run, for ``Learner(model, rules=...)``, from the options, a seed, and
            windows (N, T) of text that the model was trained on.
        sweep: the option that trades gain for forgetting, and its values on the trade-off curve.
        score: what tuning maximises. "shares": the share of naive's gain minus the share of its forgetting, mean over
            the texts. "worst": the smallest of these differences over the texts, with naive at the best rate for each
            text. "new": the gain alone.
        streams: on how many kinds of text the options are searched: the first of `streams.TUNING`.
        reader: makes the reader from the base model, the stream, the options and a seed; None for a learner.
        recurs: whether the method also reads the long stream in which domains come back.
    """

    family: str
    grid: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rules: Sequence[Callable[[Options, int, Tensor], StreamRule]] = ()
    sweep: Sweep | None = None
    score: str = "shares"
    streams: int = 2
    reader: Callable[[BaseModel, Stream, Options, int], readers.Reader] | None = None
    recurs: bool = True

    def config(self, base: TTTConfig, options: Options, seed: int) -> TTTConfig:
        """``base`` without its protection, with this method's fixed values and ``options``."""
        own = {name: value for name, value in options.items() if name in FIELDS}
        return base.with_flat(**{**SWITCHES, **self.fixed, **own, "seed": seed})

    def learner(self, base: BaseModel, options: Options, seed: int) -> ttt.Learner:
        """A new learner with this method's configuration and rules."""
        rules = [rule(options, seed, torch.cat(base.batches)) for rule in self.rules]
        return base.learner(self.config(base.config, options, seed), rules)

    def make_reader(self, base: BaseModel, stream: Stream, options: Options, seed: int) -> readers.Reader:
        """What reads ``stream`` in one run of this method."""
        if self.reader is None:
            return readers.Learning(self.learner(base, options, seed))
        return self.reader(base, stream, options, seed)


def _joint(base: BaseModel, stream: Stream, o: Options, seed: int) -> readers.Reader:
    # Independent samples, shuffled: half is other text of the stream's domains, of the length of the stream; half is
    # text that the base model was trained on.
    rows = torch.cat([stream.other, base.known_rows(len(stream.other), seed)])
    generator = torch.Generator().manual_seed(seed)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    return readers.Joint(METHODS["joint"].learner(base, o, seed), rows)


def _neighbours(base: BaseModel, stream: Stream, o: Options, seed: int) -> readers.Reader:
    return readers.NearestNeighbours(base.model, o["weight"], o["temperature"], NEIGHBOURS)


def _tune_layers(base: BaseModel, stream: Stream, o: Options, seed: int) -> readers.Reader:
    names = readers.adapted_weights(base.model, base.config)
    return readers.FineTuning(base.model, names, o["lr"], PERIOD, EPOCHS, seed)


def _tune_all(base: BaseModel, stream: Stream, o: Options, seed: int) -> readers.Reader:
    return readers.FineTuning(base.model, None, o["lr"], PERIOD, EPOCHS, seed)


def _growing(base: BaseModel, stream: Stream, o: Options, seed: int) -> readers.Reader:
    return readers.Growing(ttt.GrowingLearner(METHODS["growing columns"].learner(base, o, seed)))


METHODS: dict[str, TextMethod] = {
    "frozen": TextMethod("reference", reader=lambda base, *_: readers.Reader(base.model)),
    # SGD without protection, at the rate that gains most on the new text. Shares are relative to it.
    "naive": TextMethod("reference", {"lr": (0.005, 0.01, 0.02, 0.04, 0.08)}, sweep=RATE_SWEEP, score="new"),
    # The same at lower rates: the best rate differs from text to text.
    **{f"naive (lr {lr})": TextMethod("reference", {"lr": (lr,)}, recurs=False) for lr in (0.01, 0.02)},
    "joint": TextMethod("reference", {"lr": (0.005, 0.01, 0.02)}, reader=_joint, recurs=False),
    "EWC": TextMethod("regularisation", {"lr": RATES, "ewc_lambda": LAMBDAS}, sweep=LAMBDA_SWEEP),
    "SI": TextMethod(
        "regularisation", {"lr": RATES, "ewc_lambda": LAMBDAS}, {"importance": "si"}, sweep=LAMBDA_SWEEP
    ),
    "MAS": TextMethod(
        "regularisation", {"lr": RATES, "ewc_lambda": LAMBDAS}, {"importance": "mas"}, sweep=LAMBDA_SWEEP, recurs=False
    ),
    "LwF": TextMethod(
        "distillation", {"lr": RATES, "weight": (0.1, 0.3, 1.0, 2.0)}, sweep=("weight", (0.03, 0.3, 4.0)), recurs=False,
        rules=[lambda o, seed, known: LogitDistillation(o["weight"])],
    ),
    "layer LwF": TextMethod(
        "distillation", {"lr": RATES, "replay_beta": BETAS}, {"distill_rows": ROWS}, sweep=BETA_SWEEP, recurs=False
    ),
    "ER": TextMethod(
        "replay", {"lr": RATES, "weight": (0.3, 1.0)}, sweep=("weight", (0.1, 0.5, 3.0)),
        rules=[lambda o, seed, known: SequenceReplay(CAPACITY, weight=o["weight"], base=known, seed=seed)],
    ),
    "DER++": TextMethod(
        "replay", {"lr": RATES, "alpha": (0.3, 1.0)}, sweep=("alpha", (0.1, 0.5, 3.0)), recurs=False,
        rules=[lambda o, seed, known: DarkSequenceReplay(CAPACITY, alpha=o["alpha"], beta=0.5, base=known, seed=seed)],
    ),
    "generative replay": TextMethod(
        "replay", {"lr": RATES, "weight": (0.3, 1.0)}, sweep=("weight", (0.1, 0.5, 3.0)),
        rules=[lambda o, seed, known: SampledReplay(weight=o["weight"])],
    ),
    "layer replay": TextMethod(
        "replay", {"lr": RATES, "replay_beta": (*BETAS, 0.8)}, {"replay_rows": ROWS}, sweep=BETA_SWEEP
    ),
    "layer generative": TextMethod(
        "replay", {"lr": RATES, "replay_beta": BETAS}, {"generated_rows": 4 * ROWS}, sweep=BETA_SWEEP, recurs=False
    ),
    "EWC + layer replay": TextMethod(
        "combination", {"lr": (0.02,), "ewc_lambda": (0.001, 0.003, 0.01), "replay_beta": (0.05, 0.1, 0.2)},
        {"replay_rows": ROWS}, sweep=LAMBDA_SWEEP,
    ),
    "orthogonal": TextMethod(
        "orthogonal", {"lr": (0.02, 0.04), "orthogonal": (8, 16, 32)}, sweep=("orthogonal", (4, 24, 96)), recurs=False
    ),
    "orthogonal + layer replay": TextMethod(
        "orthogonal", {"lr": (0.02, 0.04), "orthogonal": (8, 16), "replay_beta": (0.1, 0.2)},
        {"replay_rows": ROWS}, sweep=BETA_SWEEP, recurs=False,
    ),
    # Chosen by `python -m bench.learning.experiments.tune` on headers that the search reads as well.
    "combined": TextMethod(
        "combination", {"lr": (COMBINED.lr,)}, {name: getattr(COMBINED, name) for name in ("replay_beta", *SWITCHES)},
        sweep=("lr", (0.01, 0.02, 0.08)),
    ),
    # The default of `ttt.TTTConfig`, which was chosen on another model: nothing is searched here.
    "soft projection": TextMethod(
        "orthogonal", {"lr": (CONFIG.lr,)},
        {name: getattr(CONFIG, name) for name in ("rate", "burst", "kronecker_power", *SWITCHES)},
        sweep=("lr", (0.1, 0.6, 1.2)),
    ),
    "momentum": TextMethod(
        "regularisation", {"lr": (0.005, 0.01), "momentum": (0.5, 0.9), "decay": (0.1, 1.0)},
        sweep=("decay", (0.03, 0.3, 3.0)), recurs=False,
    ),
    "growing columns": TextMethod(
        "architecture",
        {"rate": ("constant", "rms"), "lr": (0.04, 0.06, 0.08, 0.12), "orthogonal": (16, 32)},
        {"replay_capacity": COLUMNS.replay_capacity},
        sweep=("lr", (0.02, 0.04, 0.16)), score="worst", streams=4, reader=_growing,
    ),
    # What is common today instead of learning layers.
    "in-context only": TextMethod("workaround", reader=lambda base, *_: readers.InContext(base.model)),
    "kNN-LM": TextMethod(
        "workaround", {"weight": (0.2, 0.4), "temperature": (3.0, 10.0, 30.0, 100.0)},
        sweep=("weight", (0.05, 0.3, 0.6)), reader=_neighbours,
    ),
    "fine-tuning": TextMethod(
        "workaround", {"lr": (1e-4, 3e-4, 1e-3, 3e-3)}, sweep=("lr", (1e-4, 5e-4, 2e-3)), reader=_tune_layers
    ),
    "fine-tuning (all)": TextMethod(
        "workaround", {"lr": (3e-5, 1e-4, 3e-4, 1e-3)}, sweep=("lr", (3e-5, 2e-4, 5e-4)), reader=_tune_all,
        recurs=False,
    ),
}  # fmt: skip
"""Name -> method, in the order of the tables. The references that others are scored against come first."""


def method(name: str) -> TextMethod:
    """The method ``name``.

    Raises:
        ValueError: if there is none.
    """
    return named(METHODS, name)
