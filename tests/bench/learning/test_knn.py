"""The kNN datastore against brute force in numpy."""

import numpy as np
import pytest
import torch

from bench.learning.text.knn import Datastore


@pytest.mark.parametrize(("stored", "neighbours"), [(200, 7), (5, 7), (1, 1)])
def test_probabilities_are_those_of_the_nearest_keys(stored, neighbours):
    keys, values = torch.randn(stored, 6), torch.randint(4, (stored,))
    queries, wanted = torch.randn(33, 6), torch.randint(4, (33,))
    store = Datastore(6, neighbours)
    for part in range(0, stored, 50):
        store.add(keys[part : part + 50], values[part : part + 50])
    found = store.probability(queries, wanted, 2.5).numpy()
    k, v, q = keys.double().numpy(), values.numpy(), queries.double().numpy()
    for i in range(33):
        distance = ((q[i] - k) ** 2).sum(1)
        near = np.argsort(distance)[:neighbours]
        weight = np.exp(-distance[near] / 2.5)
        expected = weight[v[near] == int(wanted[i])].sum() / weight.sum()
        assert found[i] == pytest.approx(expected, abs=1e-5)
    assert len(store) == stored
    assert store.nbytes() == stored * (6 * 4 + 1)


def test_probabilities_of_all_values_sum_to_one():
    store = Datastore(3, 4)
    store.add(torch.randn(40, 3), torch.randint(5, (40,)))
    query = torch.randn(1, 3)
    assert float(sum(store.probability(query, torch.tensor([v]), 1.0) for v in range(5))) == pytest.approx(1)


def test_an_empty_datastore_is_refused():
    with pytest.raises(ValueError, match="at least one key"):
        Datastore(3, 4).probability(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64), 1.0)
