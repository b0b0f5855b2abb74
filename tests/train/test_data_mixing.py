from __future__ import annotations

import numpy as np
import pytest

from train.data.mixing import EpochOrder, SourceOrder, WeightedOrder


@pytest.mark.parametrize(("batch", "num_rows"), [(3, 10), (10, 10), (4, 12), (25, 10), (1, 1)])
def test_epochs_equal_a_loop_over_them(batch: int, num_rows: int) -> None:
    steps = 20
    sequence: list[int] = []
    epoch = 0
    while len(sequence) < steps * batch:
        sequence += np.random.default_rng([7, epoch]).permutation(num_rows).tolist()
        epoch += 1
    order = EpochOrder(num_rows, 7)
    for step in reversed(range(steps)):  # no state: any order of asking gives the same
        places = np.arange(step * batch, (step + 1) * batch)
        assert order(places).tolist() == sequence[step * batch : (step + 1) * batch]


def test_every_epoch_is_another_permutation() -> None:
    rows = EpochOrder(50, 0)(np.arange(150)).reshape(3, 50)
    assert all(sorted(epoch.tolist()) == list(range(50)) for epoch in rows)
    assert not (rows[0] == rows[1]).all()
    assert not (rows[1] == rows[2]).all()
    assert not (EpochOrder(50, 1)(np.arange(50)) == rows[0]).all()


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [3, 2, 1, 0.5], [0, 1], [1, 0, 2], [1e-3, 1]])
def test_sources_get_their_shares_everywhere_in_a_run(weights: list[float]) -> None:
    order = SourceOrder(weights, seed=3)
    sources, before = order(np.arange(5000))
    shares = np.array(weights) / sum(weights)
    counts = np.cumsum(sources[:, None] == np.arange(len(weights)), axis=0)  # [places, sources]
    expected = np.arange(1, 5001)[:, None] * shares
    # Each choice among the sources so far is exact to one row; those after it divide what is left.
    assert np.abs(counts - expected).max() < len(weights)
    for source in range(len(weights)):  # each source's rows are counted through: 0, 1, 2, ...
        assert before[sources == source].tolist() == list(range(int(counts[-1, source])))
    # Places are asked for in any order and far out, without those before them.
    shuffled = np.random.default_rng(0).permutation(5000)
    assert (order(shuffled)[0] == sources[shuffled]).all()
    assert (order(shuffled)[1] == before[shuffled]).all()
    far = order(np.arange(2**31, 2**31 + 1000))
    assert np.abs(np.bincount(far[0], minlength=len(weights)) - 1000 * shares).max() < len(weights)


def test_the_seed_moves_the_order_of_sources() -> None:
    first, second = (SourceOrder([1.0, 1.7], seed)(np.arange(100))[0].tolist() for seed in (0, 1))
    assert first != second


def test_weighted_rows_are_each_sources_epochs() -> None:
    sizes, weights = [5, 400, 20], [0.5, 0.2, 0.3]
    order = WeightedOrder(sizes, weights, seed=1)
    rows = order(np.arange(200))
    firsts = np.cumsum([0, *sizes])
    for source, size in enumerate(sizes):
        own = rows[(rows >= firsts[source]) & (rows < firsts[source + 1])] - firsts[source]
        assert own.tolist() == EpochOrder(size, 1, source)(np.arange(len(own))).tolist()
        assert abs(len(own) - 200 * weights[source]) < 3
    assert order(np.arange(100, 120)).tolist() == rows[100:120].tolist()
