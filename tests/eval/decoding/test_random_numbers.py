"""The random numbers of sampling, and the noise that is made of them."""

from __future__ import annotations

import math

import numpy as np
import torch

from eval.decoding.sampling import OWN, gumbel_noise, random_numbers


def test_numbers_depend_on_seed_stream_place_and_purpose_alone() -> None:
    table = random_numbers(3, [7, 2], 50)
    assert table.shape == (2, 50, 3)
    assert (random_numbers(3, [2], 9)[0] == table[1, :9]).all()
    assert len(np.unique(table)) == table.size
    assert not np.isin(random_numbers(4, [7, 2], 50), table).any()
    assert ((table >= 0) & (table < 1)).all()
    big = random_numbers(0, list(range(2000)), 4).reshape(2000, 12)
    assert np.abs(np.corrcoef(big, rowvar=False) - np.eye(12)).max() < 0.1
    assert np.abs(big.mean(axis=0) - 0.5).max() < 0.03


def test_the_noise_draws_by_the_softmax_and_each_place_for_itself() -> None:
    """Chi-square of the argmax, and of pairs of neighbouring places and rows, by float32 and by float64."""
    table = torch.from_numpy(random_numbers(0, list(range(20_000)), 3)[..., OWN])  # [rows, places]
    p = torch.tensor([0.02, 0.5, 0.0, 0.08, 0.1, 0.3], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        logits = p.log().to(dtype).expand(*table.shape, 6)
        tokens = (logits + gumbel_noise(table, logits)).argmax(dim=-1)  # [rows, places]
        assert (tokens != 2).all()
        pairs = (tokens[:, :-1] * 6 + tokens[:, 1:], tokens[:-1] * 6 + tokens[1:])
        for drawn, share in ((tokens, p), *((pair, torch.outer(p, p).flatten()) for pair in pairs)):
            for place in range(drawn.shape[1]):
                observed = torch.bincount(drawn[:, place], minlength=len(share)).double()
                wanted = share * len(drawn)
                statistic = ((observed - wanted) ** 2 / wanted)[wanted > 0].sum()
                freedom = torch.tensor((int((wanted > 0).sum()) - 1) / 2, dtype=torch.float64)
                assert float(torch.special.gammaincc(freedom, statistic / 2)) > 1e-4


def test_the_noise_has_a_gumbel_distribution_and_is_always_finite() -> None:
    numbers = torch.from_numpy(random_numbers(1, [0], 200)[0, :, OWN])
    for dtype in (torch.float32, torch.float64):
        noise = gumbel_noise(numbers, torch.zeros((200, 1000), dtype=dtype))
        assert noise.dtype == dtype
        assert noise.isfinite().all()
        assert abs(float(noise.mean()) - 0.5772) < 0.01
        assert abs(float(noise.var()) - math.pi**2 / 6) < 0.03
        correlations = torch.corrcoef(noise[:20].double()) - torch.eye(20)
        assert correlations.abs().max() < 0.15
    ends = torch.tensor([0.0, 2.0**-53, 1 - 2.0**-53], dtype=torch.float64)
    assert gumbel_noise(ends, torch.zeros((3, 5000))).isfinite().all()
    # A token's noise does not depend on how many there are.
    assert gumbel_noise(ends, torch.zeros((3, 7))).equal(gumbel_noise(ends, torch.zeros((3, 50)))[:, :7])
