"""Shares of ranks are disjoint and complete; a resumed epoch neither repeats nor loses a window."""

import itertools
import pickle

import numpy as np
import pytest

from lightning_robot.data.sampler import EpisodeBatchSampler


def rank_batches(epoch=0, resume=None, world_size=1, **arguments):
    samplers = [EpisodeBatchSampler(rank=rank, world_size=world_size, **arguments) for rank in range(world_size)]
    for sampler in samplers:
        if resume:
            sampler.resume(*resume)
        sampler.sampler.set_epoch(epoch)
    return samplers, [list(sampler) for sampler in samplers]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_windows", [7, 64, 65, 66, 67, 1003])
def test_shares_are_disjoint_complete_and_equally_long(num_windows, world_size):
    samplers, ranks = rank_batches(num_windows=num_windows, batch_size=16, world_size=world_size, seed=3)
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == len(samplers[0])
    assert sorted(itertools.chain(*itertools.chain(*ranks))) == list(range(num_windows))
    for step in zip(*ranks):
        sizes = [len(batch) for batch in step]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1


def test_order_is_a_function_of_seed_and_epoch():
    first = rank_batches(num_windows=100, batch_size=8, seed=1)[1]
    assert first == rank_batches(num_windows=100, batch_size=8, seed=1)[1]
    assert first != rank_batches(num_windows=100, batch_size=8, seed=2)[1]
    assert first != rank_batches(num_windows=100, batch_size=8, seed=1, epoch=1)[1]
    plain = rank_batches(num_windows=10, batch_size=4, shuffle=False)[1][0]
    assert plain == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_two_ranks_share_the_batches_of_one_with_twice_the_size():
    one = rank_batches(num_windows=100, batch_size=16, seed=1)[1][0]
    two = rank_batches(num_windows=100, batch_size=8, seed=1, world_size=2)[1]
    assert [sorted(batch) for batch in one] == [sorted(a + b) for a, b in zip(*two)]


def test_accumulation_gets_whole_steps_and_drop_last_whole_batches():
    sampler = EpisodeBatchSampler(100, 8, accumulate=5)
    assert len(sampler) == len(list(sampler)) == 10
    assert sampler.left_out == 20
    sampler = EpisodeBatchSampler(100, 8, drop_last=True)
    assert {len(batch) for batch in sampler} == {8}
    assert sampler.left_out == 4
    seen = set()
    for epoch in range(30):
        sampler.set_epoch(epoch)
        seen |= set(range(100)) - set(itertools.chain(*sampler))
    assert len(seen) > 50  # others are left out each time
    with pytest.raises(ValueError, match="not one optimizer step per epoch"):
        EpisodeBatchSampler(20, 8, accumulate=4)
    with pytest.raises(ValueError, match="nothing to sample"):
        EpisodeBatchSampler(0, 8)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1), (2, 3), (4, 3), (1, 4)])
@pytest.mark.parametrize("done", [1, 3, 5])
def test_resume_with_any_number_of_ranks_covers_the_epoch_once(before, after, done):
    common = {"num_windows": 411, "batch_size": 16, "seed": 5}
    samplers, ranks = rank_batches(epoch=2, world_size=before, **common)
    used = list(itertools.chain(*(batch for batches in ranks for batch in batches[:done])))
    consumed = samplers[0].consumed(done)
    assert consumed == len(used)
    samplers, ranks = rank_batches(epoch=2, resume=(2, consumed), world_size=after, **common)
    rest = list(itertools.chain(*itertools.chain(*ranks)))
    if before == after:
        assert ranks[0] == rank_batches(epoch=2, world_size=before, **common)[1][0][done:]
    assert sorted(used + rest) == list(range(411))
    first = samplers[0].resume(2, consumed)
    assert len(samplers[0]) == first + len(ranks[0])
    assert samplers[0].consumed(len(samplers[0])) == 411  # and it can be interrupted again
    samplers[0].set_epoch(3)
    assert len(list(samplers[0])) == len(samplers[0])  # the next epoch is whole


def test_an_unfinished_optimizer_step_is_done_again():
    sampler = EpisodeBatchSampler(96, 8, seed=1, accumulate=3)
    whole = list(sampler)
    assert sampler.consumed(4) == sampler.consumed(3) == 24
    assert sampler.resume(0, sampler.consumed(4)) == 3
    assert list(sampler) == whole[3:]


def test_fewer_windows_than_ranks_leave_no_rank_without_a_batch():
    ranks = rank_batches(num_windows=2, batch_size=8, world_size=3, shuffle=False)[1]
    assert [len(batches) for batches in ranks] == [1, 1, 1]
    assert all(batches[0] for batches in ranks)


@pytest.mark.parametrize(("world_size", "batch_size", "accumulate"), [(1, 8, 2), (2, 4, 2), (1, 4, 4), (4, 2, 2)])
def test_batches_know_what_their_optimizer_step_consists_of(world_size, batch_size, accumulate):
    """However 16 windows are cut into ranks and batches, the divisors add up to the same step."""
    steps = np.random.default_rng(0).integers(0, 9, 31)
    options = {"world_size": world_size, "batch_size": batch_size, "accumulate": accumulate}
    ranks = rank_batches(num_windows=31, seed=4, valid_steps=steps, **options)[1]
    for first in range(0, len(ranks[0]), accumulate):
        together = [batch for batches in ranks for batch in batches[first : first + accumulate]]
        windows = list(itertools.chain(*together))
        assert len(windows) == (16, 15)[first // accumulate]
        for batch in together:
            assert batch.mean_rows == len(windows) / (world_size * accumulate)
            assert batch.mean_steps == steps[windows].sum() / (world_size * accumulate)
        assert pickle.loads(pickle.dumps(together[0])).mean_rows == together[0].mean_rows  # as workers get it


def test_batches_that_are_judged_are_divided_by_their_rows():
    steps = np.arange(10)
    batches = rank_batches(num_windows=10, batch_size=4, shuffle=False, valid_steps=steps, optimizing=False)[1][0]
    assert [(batch.mean_rows, batch.mean_steps) for batch in batches] == [(4, 18), (4, 18), (2, 9)]
    assert rank_batches(num_windows=4, batch_size=4)[1][0][0].mean_steps is None
