"""The verification of a store that was written at some time: counts, order, checksums; and the sentence that tells it."""

from __future__ import annotations

import numpy as np

from lightning_robot.console import counted
from lightning_robot.data.checksums import changed_blocks
from lightning_robot.data.lerobot_checksums import changed_parts
from lightning_robot.data.lerobot_folder import LeRobotFolder
from lightning_robot.data.store import EpisodeStore, StoreError, array_name

_REMEDY = "It is damaged, or was changed by hand: copy it again, or delete it and make it anew."


def verify_store(store: EpisodeStore, processes: int = 1) -> None:
    """Checks an old store in itself: opening it compared lengths and looked for its files.

    Args:
        store: an open one.
        processes: worker processes that read it.

    Raises:
        StoreError: checksums or fingerprint say that values, episodes or features are not those that were written.
    """
    if store.checksums is not None:
        changed = changed_blocks(store.path, store.checksums, processes)
        if changed:
            name, start = changed[0]
            raise StoreError(
                f"{store.path} does not hold what was written: {name}, rows from {start}"
                + (f", and {len(changed) - 1} more" if len(changed) > 1 else "")
                + f". {_REMEDY}"
            )
        strange = [key for key in store.keys if array_name(key) not in store.checksums["data"]]
        if strange:
            raise StoreError(f"{store.path} holds what its writer did not write: {', '.join(strange)}.")
    if store.fingerprint != store.compute_fingerprint():
        raise StoreError(
            f"{store.path}: values, episodes or features are not those that its fingerprint was made of. {_REMEDY}"
        )


def verify_lerobot(dataset: LeRobotFolder) -> None:
    """Checks an old LeRobot dataset in itself: opening it compared counts and counters.

    Args:
        dataset: an open one.

    Raises:
        StoreError: it does not hold what was written, or videos are too short.
    """
    if dataset.checksums is not None and (changed := changed_parts(dataset.path, dataset.checksums)):
        raise StoreError(f"{dataset.path} does not hold what was written: {', '.join(changed)}. {_REMEDY}")
    dataset.check_videos(tuple(dataset.cameras), np.arange(dataset.num_episodes))


def outcome(store: EpisodeStore | LeRobotFolder, frames: str) -> str:
    """The sentence that a verification without a fault ends with.

    Args:
        store: that was verified.
        frames: what became of the sampled frames.
    """
    sums = store.checksums
    parts = sum(map(len, (part for part in sums.values() if isinstance(part, dict)))) if sums else 0
    held = f"{counted(parts, 'checksum')} hold" if sums else "no checksums were noted when it was written"
    lengths = np.diff(store.episode_ends, prepend=0)
    return (
        f"Verified: {counted(len(lengths), 'episode')} and {counted(int(lengths.sum()), 'frame')} in order; {held}; {frames}."
    )
