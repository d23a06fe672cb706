"""Which windows go into which batch, on which rank: a function of seed, epoch and position, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class WindowBatch(list[int]):
    """Window numbers of one rank's batch, and what its losses are divided by.

    A mean over its own rows would weigh them by how many rows the rank happens to have, and a mean over its steps within the
    episode by how many of those: the gradient would depend on how an optimizer step is cut into ranks and batches. Both
    numbers are therefore those of the whole optimizer step, divided by ranks times accumulated batches, as the trainer does.

    Attributes:
        mean_rows: windows.
        mean_steps: action steps within the episode; None where the sampler does not know them.
    """

    def __init__(self, windows: list[int], mean_rows: float, mean_steps: float | None) -> None:
        super().__init__(windows)
        self.mean_rows, self.mean_steps = mean_rows, mean_steps


class EpisodeBatchSampler(Sampler[list[int]]):
    """Batches of window numbers for one rank.

    The order of an epoch is a permutation drawn from (seed, epoch). It is cut into global batches of
    ``batch_size * world_size`` windows, and each rank takes every `world_size`-th window of each: shares are disjoint and
    complete, and all ranks have the same number of batches. The last batch of an epoch is smaller and is shared out so that
    the ranks' parts differ by at most one window (a rest of fewer windows than ranks joins the batch before it). With
    `drop_last` the rest is left out, another one each epoch, and all batches have one shape.

    With gradient accumulation the number of batches is a multiple of `accumulate`, so that no optimizer step sees a part of
    its batches; up to ``accumulate - 1`` batches of an epoch are left out, others each epoch.

    A resumed epoch continues behind the windows that were consumed, however many ranks consumed them: no window is repeated
    or lost. (Fewer windows than ranks, in all or to resume with, are repeated: a rank without a batch would wait for ever.)
    Lightning calls `set_epoch` on a batch sampler's `sampler` only, therefore this is its own.

    Batches are `WindowBatch`: they know what their losses are divided by.
    """

    def __init__(
        self,
        num_windows: int,
        batch_size: int,
        seed: int | tuple[int, ...] = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        shuffle: bool = True,
        drop_last: bool = False,
        valid_steps: np.ndarray | None = None,
        optimizing: bool = True,
    ) -> None:
        """Describes the batches.

        Args:
            num_windows: windows in all.
            batch_size: windows per rank and batch.
            seed: of the permutations.
            rank: of this process.
            world_size: number of ranks.
            accumulate: batches per optimizer step.
            shuffle: a new permutation every epoch; the order of the windows otherwise.
            drop_last: leave out a smaller last batch.
            valid_steps: (num_windows,) action steps of each window that lie within its episode.
            optimizing: losses are divided by the numbers of their optimizer step; else, for losses that are averaged over
                batches weighted by rows, by their own rows and the mean number of steps of all windows.

        Raises:
            ValueError: not a single batch (or optimizer step) comes together.
        """
        if num_windows < 1 or batch_size < 1:
            raise ValueError(f"{num_windows} windows in batches of {batch_size}: nothing to sample.")
        self.num_windows, self.batch_size, self.seed = num_windows, batch_size, seed
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.shuffle, self.drop_last = shuffle, drop_last
        self.valid_steps, self.optimizing = valid_steps, optimizing
        self.epoch = 0
        self._resumed_epoch, self._resumed_at = -1, 0
        self._length = len(self._sizes(num_windows))
        if self._length == 0:
            raise ValueError(
                f"{num_windows} windows make fewer than {accumulate} batch(es) of {batch_size} on each of {world_size} ranks: "
                "not one optimizer step per epoch. Lower batch_size or accumulate_grad_batches, or use more data."
            )

    @property
    def sampler(self) -> EpisodeBatchSampler:
        """Itself: where Lightning looks for `set_epoch`."""
        return self

    @property
    def left_out(self) -> int:
        """Windows that a whole epoch leaves out (others each time)."""
        return max(0, self.num_windows - sum(self._sizes(self.num_windows)))

    def set_epoch(self, epoch: int) -> None:
        """Chooses the permutation of the next iteration."""
        self.epoch = epoch

    def resume(self, epoch: int, consumed: int) -> int:
        """Begins in the middle of an epoch.

        Args:
            epoch: the epoch to continue.
            consumed: windows of it that all ranks together have used.

        Returns:
            Number of the batch to continue with, such that ``len(self)`` is reached at the epoch's end.
        """
        self.epoch = self._resumed_epoch = epoch
        self._resumed_at = consumed
        return len(self) - len(self._sizes(self.num_windows - consumed))

    def consumed(self, batches: int) -> int:
        """Windows of the present epoch that all ranks have used after this many batches, as counted by `resume`.

        Batches of an unfinished optimizer step do not count: their gradients are not in a checkpoint.
        """
        done, begin = batches - batches % self.accumulate, 0
        if self.epoch == self._resumed_epoch:
            begin = self._resumed_at
        sizes = self._sizes(self.num_windows - begin)
        return begin + int(np.sum(sizes[: done - (len(self) - len(sizes))], dtype=np.int64))

    def __len__(self) -> int:
        """Batches of a whole epoch, also while a resumed epoch has fewer left."""
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        begin = self._resumed_at if self.epoch == self._resumed_epoch else 0
        order = self._order(self.epoch)[begin:]
        order = np.resize(order, max(len(order), self.world_size))  # never a rank without a window
        stops = np.cumsum(self._sizes(self.num_windows - begin), dtype=np.int64)
        # The order is fixed here, not when the first batch is asked for: by then the epoch may have been set to another.
        return (self._batch(order, stops, number) for number in range(len(stops)))

    def _batch(self, order: np.ndarray, stops: np.ndarray, number: int) -> WindowBatch:
        """This rank's part of a global batch."""
        start = stops[number - 1] if number else 0
        own = order[start + self.rank : stops[number] : self.world_size].tolist()
        if not self.optimizing:
            rows = float(len(own))
            return WindowBatch(own, rows, None if self.valid_steps is None else rows * float(self.valid_steps.mean()))
        first = number - number % self.accumulate
        begin, end = stops[first - 1] if first else 0, stops[first + self.accumulate - 1]
        parts = self.accumulate * self.world_size
        steps = None if self.valid_steps is None else int(self.valid_steps[order[begin:end]].sum()) / parts
        return WindowBatch(own, (end - begin) / parts, steps)

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.num_windows)
        return np.random.default_rng((*np.atleast_1d(self.seed).tolist(), epoch)).permutation(self.num_windows)

    def _sizes(self, windows: int) -> list[int]:
        """Sizes of the global batches that this many windows make."""
        if windows <= 0:
            return []
        whole, rest = divmod(max(windows, self.world_size), self.batch_size * self.world_size)
        sizes = [self.batch_size * self.world_size] * whole
        if rest and not self.drop_last:
            if rest >= self.world_size or not sizes:
                sizes.append(rest)
            else:
                sizes[-1] += rest
        return sizes[: len(sizes) - len(sizes) % self.accumulate]
