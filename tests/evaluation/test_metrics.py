"""Success counts, in one process and summed over two."""

import pytest
import torch

from lightning_robot.evaluation.metrics import SuccessRate
from lightning_robot.evaluation.result import wilson


def test_rate_and_interval():
    rate = SuccessRate()
    rate.update(torch.tensor([True, False, True]))
    rate.update(True)
    assert rate.compute() == 0.75
    assert rate.wilson() == wilson(3, 4)
    assert rate.compute() == 0.75
    rate.reset()
    assert rate.compute().isnan()
    assert rate.wilson() == (0.0, 1.0)


def _count(rank, port, results):
    import torch.distributed as distributed

    distributed.init_process_group("gloo", init_method=f"file://{port}", rank=rank, world_size=2)
    rate = SuccessRate()
    # Unequal shares: the mean of the two rates, 0.75, would be wrong.
    rate.update(torch.ones(2, dtype=torch.bool) if rank == 0 else torch.tensor([True, False, False, False, True, True]))
    results[rank] = (float(rate.compute()), *rate.wilson(), float(rate.compute()), int(rate.episodes))
    distributed.destroy_process_group()


def test_counts_are_summed_over_processes(tmp_path):
    from multiprocessing import get_context

    context = get_context("fork")
    with context.Manager() as manager:
        results = manager.dict()
        workers = [context.Process(target=_count, args=(rank, tmp_path / "meet", results), daemon=True) for rank in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        for rank in range(2):
            value, low, high, again, own = results[rank]
            assert value == again == pytest.approx(5 / 8)
            assert (low, high) == wilson(5, 8)
            assert own == (2 if rank == 0 else 6)
