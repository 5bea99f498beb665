"""A datastore of hidden states and the bytes that followed them, which predicts by its k nearest neighbours."""

from __future__ import annotations

import torch
from torch import Tensor


class Datastore:
    """Keys (d,) and their values, with exact search by squared Euclidean distance (faiss's ``IndexFlatL2``).

    Among the ``neighbours`` keys k_i nearest to a query q, p(v | q) is proportional to the sum of
    exp(-|q - k_i|^2 / temperature) over the keys whose value is v (Khandelwal et al., "Generalization through
    Memorization: Nearest Neighbor Language Models", 2020).

    Raises:
        ImportError: without faiss (``pip install 'ttt[bench]'``).
    """

    def __init__(self, dimension: int, neighbours: int) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ImportError("the kNN language model needs faiss: pip install 'ttt[bench]'") from error
        faiss.omp_set_num_threads(torch.get_num_threads())
        self._index = faiss.IndexFlatL2(dimension)
        self._values = torch.zeros(0, dtype=torch.int64)
        self.neighbours = neighbours

    def __len__(self) -> int:
        return len(self._values)

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Store ``values`` (N,) int64 under ``keys`` (N, d) float32."""
        self._index.add(keys.contiguous().numpy())
        self._values = torch.cat([self._values, values])

    def probability(self, queries: Tensor, values: Tensor, temperature: float) -> Tensor:
        """(N,) float32: p(values[i] | queries[i]) for ``queries`` (N, d) float32 and ``values`` (N,) int64.

        Raises:
            ValueError: if the store is empty.
        """
        if not len(self):
            raise ValueError("the datastore must hold at least one key, got none")
        found, rows = self._index.search(queries.contiguous().numpy(), min(self.neighbours, len(self)))
        weights = torch.from_numpy(found).div(-temperature).softmax(-1)
        return (weights * (self._values[torch.from_numpy(rows)] == values.unsqueeze(1))).sum(-1)

    def nbytes(self) -> int:
        """Bytes of keys and values, where a value is one byte."""
        return len(self) * (4 * self._index.d + 1)
