"""Noise that a row owns."""

import numpy as np
import torch

from lightning_robot.networks.noise import mix_seeds, seeded_integers, seeded_normal


def test_a_row_depends_on_its_own_seed_only():
    seeds = torch.tensor([3, -1, 2**62, 3])
    noise = seeded_normal(seeds, 0, 0, (16, 7))
    assert noise.dtype == torch.float32
    assert noise.shape == (4, 16, 7)
    assert torch.equal(noise[0], noise[3])
    assert torch.equal(noise[1:2], seeded_normal(seeds[1:2], 0, 0, (16, 7)))
    assert not torch.equal(noise[0], seeded_normal(seeds, 1, 0, (16, 7))[0])
    assert not torch.equal(noise[0], seeded_normal(seeds, 0, 1, (16, 7))[0])


def test_values_never_change():
    """Seeds name results in reports: another version must give the same numbers."""
    expected = torch.tensor([1.76023126, 0.83287191, 1.44600964])
    torch.testing.assert_close(seeded_normal(torch.tensor([7]), 1, 2, (3,))[0], expected, rtol=0, atol=1e-6)
    assert mix_seeds(1, 2, 3).item() == 1434657543605386066


def test_normal_distribution():
    noise = seeded_normal(torch.arange(2000), 0, 0, (112,)).double()
    count = noise.numel()
    assert abs(noise.mean()) < 4 / count**0.5
    assert abs(noise.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((noise**4).mean() - 3) < 4 * (96 / count) ** 0.5
    correlation = np.corrcoef(noise[:1000, :50].T.numpy())  # between the entries of a row
    assert np.abs(correlation - np.eye(50)).max() < 0.16
    assert abs((noise[1:] * noise[:-1]).mean()) < 4 / count**0.5  # between rows of neighbouring seeds


def test_mixing():
    rows = mix_seeds(5, torch.arange(4), torch.tensor([-1, -1, 0, 0]))
    assert rows.dtype == torch.int64
    assert rows.shape == (4,)
    assert len(set(rows.tolist())) == 4
    assert (rows >= 0).all()
    assert rows[2] == mix_seeds(5, 2, 0)
    assert mix_seeds(1, 2) != mix_seeds(2, 1)
    assert mix_seeds(0) != mix_seeds(0, 0)


def test_integers_are_uniform():
    values = seeded_integers(torch.arange(20000), 0, 1, 100)
    counts = torch.bincount(values, minlength=100)
    assert len(counts) == 100
    assert ((counts - 200).abs() < 5 * 200**0.5).all()
