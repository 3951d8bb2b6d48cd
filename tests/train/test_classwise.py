"""Per-class aggregates against NumPy, with classes that some or all lack."""

import numpy as np
import torch

from fedfuse.train.classwise import class_means, mean_over_holders


def test_class_means_against_numpy():
    rng = np.random.default_rng(0)
    values, labels = rng.normal(size=(9, 3)), np.array([0, 0, 3, 3, 3, 1, 0, 1, 3])
    means, counts = class_means(torch.tensor(values), torch.tensor(labels), 5)
    assert counts.tolist() == [3, 2, 0, 4, 0]
    for c in (0, 1, 3):
        np.testing.assert_allclose(means[c], values[labels == c].mean(0), rtol=1e-14)
    assert not means[[2, 4]].any()


def test_no_examples_at_all():
    means, counts = class_means(torch.empty(0, 3), torch.empty(0, dtype=torch.int64), 4)
    assert means.shape == (4, 3)
    assert not means.any()
    assert not counts.any()


def test_the_divisor_is_the_holders_not_the_clients():
    values = torch.tensor([[[2.0], [5.0]], [[4.0], [99.0]], [[9.0], [99.0]]], dtype=torch.float64)
    means, held = mean_over_holders(values, torch.tensor([[1, 1], [1, 0], [0, 0]]))
    assert means.tolist() == [[3.0], [5.0]]  # not 2 = (2 + 4 + 0)/3, and the last client does not overwrite
    means, held = mean_over_holders(values, torch.tensor([[3, 0], [1, 0], [0, 0]]))
    assert means.tolist() == [[2.5], [0.0]]
    assert held.tolist() == [True, False]
