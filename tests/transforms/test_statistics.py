"""Streamed statistics equal those of the whole array."""

import json

import numpy as np
import pytest

from lightning_robot.transforms import statistics as module
from lightning_robot.transforms.statistics import Statistics, StatisticsAccumulator


def test_streamed_equals_whole_whatever_the_blocks():
    data = (np.random.default_rng(0).normal(size=(1000, 5, 3)) * [1, 100, 1e-3] + [0, 1e4, -7]).astype(np.float32)
    accumulator = StatisticsAccumulator()
    for start in range(0, 1000, 77):
        accumulator.update(data[start : start + 77])
    result, rows = accumulator.result(), data.reshape(-1, 3).astype(np.float64)
    assert result.count == 5000
    np.testing.assert_array_equal(result.min, rows.min(0))
    np.testing.assert_array_equal(result.max, rows.max(0))
    np.testing.assert_allclose(result.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(result.std, rows.std(0, ddof=1), rtol=1e-9)
    np.testing.assert_allclose(result.q01, np.quantile(rows, 0.01, axis=0))
    np.testing.assert_allclose(result.q99, np.quantile(rows, 0.99, axis=0))


def test_quantiles_of_many_rows_come_from_every_nth(monkeypatch):
    monkeypatch.setattr(module, "QUANTILE_ROWS", 1000)
    data = np.random.default_rng(0).normal(size=(50_000, 2))
    accumulator = StatisticsAccumulator()
    for start in range(0, len(data), 333):
        accumulator.update(data[start : start + 333])
    kept = np.concatenate(accumulator._kept)
    np.testing.assert_array_equal(kept, data[:: accumulator._stride])
    assert 1000 <= len(kept) <= 2000
    np.testing.assert_allclose(accumulator.result().q99, np.quantile(data, 0.99, axis=0), atol=0.3)
    np.testing.assert_array_equal(accumulator.result().max, data.max(0))


def test_plain_containers_and_back():
    accumulator = StatisticsAccumulator()
    accumulator.update(np.random.default_rng(0).normal(size=(9, 2)))
    back = Statistics.from_dict(json.loads(json.dumps(accumulator.result().to_dict())))
    assert back.count == 9
    np.testing.assert_array_equal(back.q99, accumulator.result().q99)


def test_bad_values():
    accumulator = StatisticsAccumulator()
    with pytest.raises(ValueError, match="no rows"):
        accumulator.result()
    with pytest.raises(ValueError, match=r"element\(s\) \[1\] are not finite"):
        accumulator.update(np.array([[0.0, np.nan]]))
    accumulator.update(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="size 2 after blocks of size 3"):
        accumulator.update(np.zeros((2, 2)))
