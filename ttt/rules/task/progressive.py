"""Progressive neural networks: one column for each task, which also reads the columns before it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from ttt.checks import check_whole
from ttt.config import TTTConfig
from ttt.nn import Linear
from ttt.rules.task.base import Batch, Rule


def with_ones(x: Tensor) -> Tensor:
    """Append a feature that is always 1, (..., n) -> (..., n + 1), so that a bias is a weight and learns like one."""
    return torch.cat([x, x.new_ones((*x.shape[:-1], 1))], -1)


class Column(nn.Module):
    """A multilayer perceptron with lateral connections from ``older`` columns of the same sizes."""

    def __init__(self, sizes: Sequence[int], older: int, adapter: int | None, config: TTTConfig, name: str) -> None:
        super().__init__()

        def linear(n: int, m: int, role: str) -> Linear:
            return Linear(n, m, bias=False, config=config, name=f"{name}.{role}")

        self.layers = nn.ModuleList(linear(n + 1, m, f"layers.{i}") for i, (n, m) in enumerate(pairwise(sizes)))
        self.adapters = nn.ModuleList()  # of the second layer, the third, ...
        for i, (n, m) in enumerate(pairwise(sizes[1:])):
            if older == 0:
                continue
            if adapter is None:
                self.adapters.append(linear(older * n, m, f"lateral.{i}"))
            else:
                parts = linear(older * n + 1, adapter, f"adapter.{i}"), linear(adapter, m, f"lateral.{i}")
                self.adapters.append(nn.Sequential(Ones(), parts[0], nn.ReLU(), parts[1]))

    def forward(self, x: Tensor, older: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """The activations of every layer, the last of which is the output.

        Args:
            x: (N, n).
            older: activations of the earlier columns.
        """
        out: list[Tensor] = []
        h = x
        for i, layer in enumerate(self.layers):
            h = layer(with_ones(h))
            if i > 0 and older:
                h = h + self.adapters[i - 1](torch.cat([column[i - 1] for column in older], -1))
            if i < len(self.layers) - 1:
                h = torch.relu(h)
            out.append(h)
        return out


class Ones(nn.Module):
    """`with_ones` as a module."""

    def forward(self, x: Tensor) -> Tensor:
        return with_ones(x)


class ProgressiveNet(nn.Module):
    """A progressive neural network (Rusu et al., 2016) of multilayer perceptrons with ReLU.

    Layer i of column k reads its own column's layer below and those of all earlier columns:

        h_i^k = relu(W_i^k h_{i-1}^k + sum_{j<k} U_i^{k:j} h_{i-1}^j)        i >= 2; no relu at the output

    or, with ``adapter`` = a, the paper's nonlinear adapter U relu(V [h^1 ... h^{k-1}]) with V of a rows (its learnt
    scale is part of V). Earlier columns run without gradient, and do not change by one bit. The model has to be told
    the task, at test time too.

    Args:
        sizes: features of the input, the hidden layers and the output; at least one hidden layer.
        config: how the newest column learns.
        adapter: a, the width of the adapters; None for linear lateral connections.

    Raises:
        ValueError: for sizes that are no network with a hidden layer, or ``adapter`` < 1.
    """

    def __init__(self, sizes: Sequence[int], config: TTTConfig, *, adapter: int | None = None) -> None:
        super().__init__()
        if len(sizes) < 3 or min(sizes) < 1:
            raise ValueError(f"sizes must be at least three whole numbers of at least 1, got {tuple(sizes)}")
        self.sizes, self.config = tuple(sizes), config
        self.adapter = None if adapter is None else check_whole("adapter", adapter, 1)
        self.columns = nn.ModuleList()

    def add_column(self) -> Column:
        """Add a column, which learns from now on, and freeze the others."""
        k = len(self.columns)
        column = Column(self.sizes, k, self.adapter, self.config, f"columns.{k}")
        like = next(self.parameters(), None)
        if like is not None:
            column = column.to(like.device, like.dtype)
        self.columns.append(column)
        return column

    def forward(self, x: Tensor, task: Tensor | int) -> Tensor:
        """The outputs (N, K) of inputs (N, n), each from its task's column.

        Args:
            x: (N, n).
            task: one for all inputs, or (N,) int64.

        Raises:
            ValueError: for a task without a column.
        """
        if isinstance(task, Tensor):
            found = task.unique().tolist()
            if len(found) > 1:
                y = x.new_zeros((len(x), self.sizes[-1]))
                for t in found:
                    y[task == t] = self(x[task == t], t)
                return y
            task = found[0] if found else 0
        if not 0 <= task < len(self.columns):
            raise ValueError(f"task must be one of the {len(self.columns)} tasks that have a column, got {task}")
        older: list[list[Tensor]] = []
        with torch.no_grad():
            for column in self.columns[:task]:
                older.append(column(x, older))
        if task < len(self.columns) - 1:  # not the newest: it must not learn
            with torch.no_grad():
                return self.columns[task](x, older)[-1]
        return self.columns[task](x, older)[-1]


class Progressive(Rule):
    """Gives a `ProgressiveNet` a column for each task.

    Raises:
        TypeError: at `check_model`, for a model of another class.
    """

    architecture: ClassVar[bool] = True

    def check_model(self, model: nn.Module) -> None:
        if not isinstance(model, ProgressiveNet):
            raise TypeError(f"model must be a ProgressiveNet, got {type(model).__name__}")
        super().check_model(model)

    def begin_task(self, task: int) -> None:
        assert isinstance(self.model, ProgressiveNet)
        self.model.add_column()


def forward_task(model: nn.Module, batch: Batch) -> Tensor:
    """The forward pass of a model that is told the task."""
    return model(batch.x, batch.task)
