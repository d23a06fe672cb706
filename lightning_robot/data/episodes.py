"""The data module of every source that is an episode store."""

from __future__ import annotations

import copy
import dataclasses
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from lightning_robot.console import counted, progress, say
from lightning_robot.data.cache import BLOCK_BYTES, decoded_array, file_lock
from lightning_robot.data.pictures import picture_statistics, sampled_rows
from lightning_robot.data.recorded_facts import recorded_facts
from lightning_robot.data.sampler import EpisodeBatchSampler
from lightning_robot.data.store import EpisodeStore, StoreError
from lightning_robot.data.windows import WindowDataset, limit_episodes, split_episodes, window_begins, window_steps
from lightning_robot.features import Features
from lightning_robot.transforms.statistics import Statistics, StatisticsAccumulator
from lightning_robot.transforms.text import HashedTextEncoder

DEFAULT_VALIDATION_RATIO = 0.02


class EpisodeDataModule(LightningDataModule):
    """Windows of the episodes of one store.

    Which window, which keys and which channels is the policy's to say: `setup` asks the trainer's module for its `window` and
    `select_features`. Without a trainer, set `window` before `setup`.

    Attributes:
        window: what to cut (`lightning_robot.policies.base.Window`); taken from the trainer's module where there is one.
        store: the open store, after `setup`.
        features: what the store offers.
        fingerprint: of the store.
        language: None, or ``encoder``, ``texts``, ``tasks`` (a name per text) and ``embeddings`` (n, E) float32.
        train_windows: dataset of the training windows.
        validation_windows: dataset of the validation windows; may be empty.
        train_episodes: numbers of the training episodes.
        validation_episodes: numbers of the validation episodes.
    """

    def __init__(
        self,
        store: str | None = None,
        batch_size: int = 128,
        num_workers: int = 2,
        validation_ratio: float | None = None,
        train_episodes: list[int] | None = None,
        validation_episodes: list[int] | None = None,
        max_train_episodes: int | None = None,
        seed: int = 42,
        pad_before: int | None = None,
        pad_after: int | None = None,
        segments: bool | None = None,
        drop_last: bool = False,
        decode: bool = True,
    ) -> None:
        """Describes the data; nothing is opened yet.

        Args:
            store: an episode store (Zarr), ours or one of the Diffusion Policy family.
            batch_size: windows per device and batch.
            num_workers: processes that gather batches; 0 gathers in the training process.
            validation_ratio: share of episodes held out, chosen by `seed`. None uses the store's own split where it has one,
                else 0.02. 0 holds out none.
            train_episodes: numbers of the episodes to train on; None for all that are not held out.
            validation_episodes: numbers of the episodes to hold out, instead of a ratio.
            max_train_episodes: limit on training episodes, chosen by `seed`.
            seed: of the split; together with the run's seed (``seed_everything``) also of the order of windows.
            pad_before: steps that a window may begin before its episode; None as the policy says.
            pad_after: steps that a window may end after its episode; None as the policy says. (The last L - 1 - `pad_after`
                frames of an episode begin no window, L being the window's steps.)
            segments: cut windows within language segments and give them their task. None does so if the policy is
                conditioned on the task and the store has segments.
            drop_last: leave out an epoch's smaller last batch, so that all batches have one shape (`torch.compile`).
            decode: map arrays larger than 64 MB from a decoded copy on disk, made at the first use; without it every window is
                read from the compressed store, about a hundred times slower.

        Raises:
            ValueError: `validation_ratio` is no share, or a number or limit is too small.
        """
        super().__init__()
        if validation_ratio is not None and not 0 <= validation_ratio < 1:
            raise ValueError(f"validation_ratio: {validation_ratio}; it is a share of the episodes, from 0 to below 1.")
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size}; a batch has at least one window.")
        if num_workers < 0:
            raise ValueError(f"num_workers: {num_workers}; 0 gathers batches in the training process.")
        if max_train_episodes is not None and max_train_episodes < 1:
            raise ValueError(f"max_train_episodes: {max_train_episodes}; leave it out for no limit.")
        for name, pad in (("pad_before", pad_before), ("pad_after", pad_after)):
            if pad is not None and pad < 0:
                raise ValueError(f"{name}: {pad}; it is a number of steps, 0 or more, or null for the policy's.")
        self.store_path = None if store is None else Path(store).expanduser().absolute()
        self.batch_size, self.num_workers, self.drop_last, self.decode = batch_size, num_workers, drop_last, decode
        self.validation_ratio, self.max_train_episodes, self.seed = validation_ratio, max_train_episodes, seed
        self.chosen_train, self.chosen_validation = train_episodes, validation_episodes
        self.pad_before, self.pad_after, self.use_segments = pad_before, pad_after, segments
        self.window: Any = None
        self.store: EpisodeStore | None = None
        self.features: Features | None = None
        self.fingerprint = ""
        self.language: dict[str, Any] | None = None
        self._resume: dict[str, Any] | None = None
        self._sampler: EpisodeBatchSampler | None = None
        self._statistics: dict[tuple[Any, ...], Statistics] = {}

    # What a source implements.

    def find_store(self) -> Path:
        """Where the store is, or will be; overridden by sources that have another way to name it."""
        if self.store_path is None:
            raise StoreError("No store is named: set data.init_args.store to an episode store.")
        return self.store_path

    def open_store(self, path: Path) -> EpisodeStore:
        """Opens what lies at `path`; sources of another format override it with a class that reads as `EpisodeStore` does."""
        return EpisodeStore.open(path)

    def make_store(self, path: Path) -> None:
        """Makes the store at `path`; sources that can, override it. One process at a time calls this, when there is none."""

    # Lightning's hooks.

    def prepare_data(self) -> None:
        """Makes the store and decoded copies where they are missing: once per storage, whoever else shares it."""
        path = self.find_store()
        if not path.exists() and type(self).make_store is not EpisodeDataModule.make_store:
            with file_lock(path.with_name(path.name + ".lock")):
                if not path.exists():  # another process may have made it meanwhile
                    self.make_store(path)
        if self._module() is not None or self.window is not None:
            store = self.open_store(path)
            for key, channels in self._wanted(store).items():
                self._array(store, key, channels)

    def setup(self, stage: str | None = None) -> None:
        """Opens the store, splits its episodes and indexes the windows.

        Raises:
            StoreError: the store is missing or broken, lacks a key that the policy reads, or no episode is long enough.
            ValueError: wrong episode numbers; or the trainer would wrap the sampler.
        """
        self._refuse_wrapped_sampler()
        self._resume = self._sampler = None
        path = self.find_store()
        if self.store is None or self.store.path != path:
            self.store = self.open_store(path)
        store = self.store
        self.features, self.fingerprint = store.features, store.fingerprint
        self._channels = self._wanted(store)
        arrays = {key: self._array(store, key, channels) for key, channels in self._channels.items()}
        self.train_episodes, self.validation_episodes = self._split(store)
        has_texts = self._uses_segments(store) or store.frame_texts is not None
        self.language = self._language(store) if has_texts else None
        pads = self._pads()
        make = partial(
            WindowDataset,
            arrays,
            episode_starts=store.episode_starts,
            window=self.window,
            pads=pads,
            language=self.language,
            frame_texts=store.frame_texts,
        )
        spans = {
            "training": self._spans(store, self.train_episodes),
            "validation": self._spans(store, self.validation_episodes),
        }
        for part, part_spans in spans.items():
            self._report_short(part, part_spans, pads)
        self.train_windows, self.validation_windows = (make(spans[part]) for part in ("training", "validation"))
        if self.language is not None:
            tasks = self.language["tasks"]  # the table may hold sentences of tasks that no training segment shows
            self.language["trained_tasks"] = sorted({tasks[text] for text in self.train_windows.used_texts() if tasks[text]})
            if self._uses_segments(store):
                self._report_overlap(spans["training"])
        say(
            f"Data: {path}: {counted(len(self.train_windows), 'training window')} of "
            f"{counted(len(self.train_episodes), 'episode')}, {counted(len(self.validation_windows), 'validation window')} of "
            f"{counted(len(self.validation_episodes), 'episode')}."
        )

    def train_dataloader(self) -> DataLoader:
        """Batches of training windows, in an order that depends on seed and epoch alone; continues a resumed epoch."""
        sampler = self._training_sampler()
        if sampler.left_out:
            many = f"whole batches in multiples of {sampler.accumulate}" if sampler.accumulate > 1 else "whole batches"
            say(
                f"Each epoch leaves out {sampler.left_out} of {sampler.num_windows} windows, others every time, to make {many}."
            )
        if self._resume is not None:
            sampler.resume(self._resume["epoch"], self._resume["consumed"])
        elif self.trainer is not None:
            sampler.set_epoch(self.trainer.current_epoch)
        self._sampler = sampler
        return self._loader(self.train_windows, sampler)

    def val_dataloader(self) -> DataLoader | list:
        """Batches of validation windows in their order; none if no episode is held out."""
        if len(self.validation_windows) == 0:
            return []
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = EpisodeBatchSampler(
            len(self.validation_windows),
            self.batch_size,
            rank=rank,
            world_size=world_size,
            shuffle=False,
            valid_steps=self.validation_windows.valid_steps(),
            optimizing=False,
        )
        return self._loader(self.validation_windows, sampler)

    def test_dataloader(self) -> DataLoader | list:
        """As `val_dataloader`."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader | list:
        """Validation windows; with a plain batch sampler, because Lightning replaces it to number the predictions."""
        if len(self.validation_windows) == 0:
            return []
        return DataLoader(
            self.validation_windows, batch_size=self.batch_size, num_workers=self.num_workers, collate_fn=_as_it_is
        )

    def state_dict(self) -> dict[str, Any]:
        """Position in the data, independent of the number of ranks: epoch, windows consumed of it, seed of the order."""
        if self._sampler is None:
            return dict(self._resume or {})
        trainer: Any = self.trainer
        sampler, loop = self._sampler, trainer.fit_loop
        epochs = loop.epoch_progress.current
        # `processed` counts the present batch, `completed` does not yet when a checkpoint is written after it.
        batches = loop.epoch_loop.batch_progress.current.processed
        epoch, consumed = sampler.epoch, sampler.consumed(batches)
        if epochs.processed > epoch or batches >= trainer.num_training_batches:
            epoch, consumed = epoch + 1, 0
        if epochs.started <= epochs.processed:  # between two epochs: the counts are the last one's
            epoch, consumed = epochs.processed, 0
        return {
            "epoch": epoch,
            "consumed": consumed,
            "windows": sampler.num_windows,
            "seed": [int(part) for part in np.atleast_1d(sampler.seed)],
            "fingerprint": self.fingerprint,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken, with any number of ranks.

        Raises:
            ValueError: the epoch that was begun had another number of windows.
        """
        if not state_dict or self.trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        self._resume = dict(state_dict)
        if self._resume["fingerprint"] != self.fingerprint:
            say("The checkpoint was trained on other data: the fingerprint of the store differs.")
        if self._resume["consumed"] == 0:
            return
        sampler = self._training_sampler()
        if self._resume["windows"] != sampler.num_windows:
            raise ValueError(
                f"The checkpoint stands in the middle of an epoch of {self._resume['windows']} windows, but the data now give "
                f"{sampler.num_windows}. Resume with the data and the split of that run, or start a new run from its weights."
            )
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
        # Lightning counts the batches of an epoch; another number of ranks, or an optimizer step that was not completed,
        # changes the count. Its loops are restored from this dictionary a little later.
        first = sampler.resume(self._resume["epoch"], self._resume["consumed"])
        loops = self.trainer._checkpoint_connector._loaded_checkpoint["loops"]["fit_loop"]
        counter = loops["epoch_loop.batch_progress"]["current"]
        change = first - counter["processed"]
        counter.update({name: count + change for name, count in counter.items()})

    # What policies ask for.

    def statistics(
        self, keys: tuple[str, ...] | list[str], transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    ) -> dict[str, Statistics]:
        """Statistics over the frames that training windows see, each counted once; the same on every rank.

        Args:
            keys: batch keys. Of a coloured cloud of which the policy reads positions only, those count.
            transform: of a policy that changes state or action: statistics are then those of its outcome, over the steps of
                all training windows (those beyond an episode's ends left out).

        Raises:
            StoreError: the data lack a key, or hold values that are not finite.
        """
        if self.store is None:
            raise RuntimeError("Call setup() first: statistics need the split into training and validation.")
        if transform is not None:
            return self._transformed_statistics(keys, transform)
        covered = np.zeros(self.store.num_frames, np.int8)
        for start, end in self.train_windows.spans[:, :2]:
            covered[start:end] = 1
        edges = np.flatnonzero(np.diff(covered, prepend=0, append=0))
        runs = list(zip(edges[::2].tolist(), edges[1::2].tolist()))
        results = {}
        for key in keys:
            identity = (key, self._channels.get(key), self.fingerprint, hash(covered.tobytes()))
            if identity not in self._statistics:
                self._statistics[identity] = self._stream_statistics(key, runs)
            results[key] = self._statistics[identity]
        return results

    def recorded_facts(self) -> dict[str, Any]:
        """What checkpoints record of the training demonstrations, see `lightning_robot.data.recorded_facts`."""
        return recorded_facts(self)

    # Below: private.

    def _module(self) -> Any:
        return getattr(self.trainer, "lightning_module", None) if self.trainer is not None else None

    def _wanted(self, store: EpisodeStore) -> dict[str, int | None]:
        """Keys to gather, and how many channels of the last axis where the policy reads fewer than there are."""
        module = self._module()
        self.window = getattr(module, "window", None) or self.window
        if self.window is None:
            raise RuntimeError(
                "The data module does not know what windows to cut: use it in a Trainer with a policy, or set `window` first."
            )
        missing = [key for key in (*self.window.keys, "action") if key not in store.keys]
        if missing:
            raise StoreError(
                f"{store.path} holds no {', '.join(missing)}, which the policy reads; it holds {', '.join(store.keys)}. "
                "Convert or generate with these, rename cameras (RenameCameras in model.init_args.transforms), or choose a "
                "policy that does without."
            )
        select = getattr(module, "select_features", None)
        selected = select(store.features).observations if select is not None else {}
        if selected and set(selected) != set(
            self.window.keys
        ):  # a policy may leave it to the data which keys there are, such as cameras
            self.window = dataclasses.replace(self.window, keys=tuple(selected))
        wanted: dict[str, int | None] = dict.fromkeys((*self.window.keys, "action"))
        if select is not None:
            for key, feature in selected.items():
                if key in wanted and "point_cloud" in key and feature.shape[-1] < store.shape(key)[-1]:
                    wanted[key] = feature.shape[-1]
        return wanted

    def _array(self, store: EpisodeStore, key: str, channels: int | None) -> Any:
        """All frames of a key: in memory, memory-mapped, or behind an object that gathers."""
        if not store.is_large(key):
            return store.whole(key) if channels is None else np.ascontiguousarray(store.whole(key)[..., :channels])
        return decoded_array(store, key, channels) if self.decode else _Gather(store, key, channels)

    def _pads(self) -> tuple[int, int]:
        """Steps that a window may stand out of its episode, before and after."""
        return (
            self.window.pad_before if self.pad_before is None else self.pad_before,
            self.window.pad_after if self.pad_after is None else self.pad_after,
        )

    def _uses_segments(self, store: EpisodeStore) -> bool:
        if self.use_segments is None:
            return store.segments is not None and bool(getattr(self._module(), "uses_task", False))
        if self.use_segments and store.segments is None:
            raise StoreError(f"{store.path} has no language segments (meta/segments): set data.init_args.segments: false.")
        return self.use_segments

    def _language(self, store: EpisodeStore) -> dict[str, Any]:
        table = store.language
        if table is None:
            raise StoreError(f"{store.path} has language segments but no texts: convert or generate it again.")
        embeddings, encoder = table["embeddings"], table["encoder"]
        if embeddings is None:
            encoder = HashedTextEncoder.name
            embeddings = HashedTextEncoder().encode(table["texts"])
        embeddings = torch.from_numpy(np.ascontiguousarray(embeddings, np.float32))
        return {"encoder": encoder or "unknown", "texts": table["texts"], "tasks": table["tasks"], "embeddings": embeddings}

    def _split(self, store: EpisodeStore) -> tuple[np.ndarray, np.ndarray]:
        count = store.num_episodes
        own = store.episode_split
        if self.chosen_validation is not None:
            validation = _checked(self.chosen_validation, count, "validation_episodes")
        elif self.validation_ratio is None and own is not None and own.any() and not own.all():
            validation = np.flatnonzero(own)
        else:
            ratio = DEFAULT_VALIDATION_RATIO if self.validation_ratio is None else self.validation_ratio
            validation = split_episodes(count, ratio, self.seed)[1]
        if self.chosen_train is None:
            training = np.setdiff1d(np.arange(count), validation)
        else:
            training = _checked(self.chosen_train, count, "train_episodes")
            both = np.intersect1d(training, validation)
            if self.chosen_validation is not None and len(both):
                raise ValueError(f"Episodes {both.tolist()} are in both train_episodes and validation_episodes.")
            validation = np.setdiff1d(validation, training)
        return limit_episodes(training, self.max_train_episodes, self.seed), validation

    def _spans(self, store: EpisodeStore, episodes: np.ndarray) -> np.ndarray:
        """(S, 5) int64: first row, exclusive end, episode, segment and text; segments follow their episode."""
        none = np.full(len(episodes), -1)
        if not self._uses_segments(store):
            return np.stack([store.episode_starts[episodes], store.episode_ends[episodes], episodes, none, none], axis=1)
        segments = store.segments
        assert segments is not None
        episode = np.searchsorted(store.episode_ends, segments[:, 0], side="right")
        number = np.flatnonzero(np.isin(episode, episodes))
        return np.column_stack([segments[number, :2], episode[number], number, segments[number, 2]]).astype(np.int64)

    def _report_short(self, part: str, spans: np.ndarray, pads: tuple[int, int]) -> None:
        steps = window_steps(self.window)
        used = np.unique(window_begins(spans[:, 0], spans[:, 1], steps, *pads)[1])
        short = np.setdiff1d(np.arange(len(spans)), used)
        what = "segments" if len(spans) and spans[0, 3] >= 0 else "episodes"
        if len(used) == 0 and part == "training":
            column = 3 if what == "segments" else 2
            listed = ", ".join(f"{span[column]} ({span[1] - span[0]} frames)" for span in spans[:10]) or "none"
            listed += " …" if len(spans) > 10 else ""
            raise StoreError(
                f"{self.find_store()}: no training window. A window has {steps} steps and may stand out by {pads[0]} before "
                f"and {pads[1]} after; {what}: {listed}. Shorten the policy's horizon, "
                "raise data.init_args.pad_after, or use longer episodes."
            )
        if len(short):
            say(f"{len(short)} of {len(spans)} {part} {what} are too short for a window of {steps} steps and are left out.")

    def _report_overlap(self, spans: np.ndarray) -> None:
        change = np.zeros(int(spans[:, 1].max()) + 1, np.int64)
        np.add.at(change, spans[:, 0], 1)
        np.add.at(change, spans[:, 1], -1)
        depth = np.cumsum(change)
        shared = (depth > 1).sum() / max(1, (depth > 0).sum())
        say(f"{len(spans)} training segments; {shared:.0%} of their frames lie in more than one segment (stored once).")

    def _stream_statistics(self, key: str, runs: list[tuple[int, int]]) -> Statistics:
        store = self.store
        assert store is not None
        if key.startswith(("observation.images.", "observation.depth.")):
            return self._picture_statistics(key, runs)
        channels = self._channels.get(key)
        source = self._array(store, key, channels) if key in self._channels else None
        rows = max(1, BLOCK_BYTES // max(1, store.frame_bytes(key)))
        blocks = [(begin, min(begin + rows, end)) for start, end in runs for begin in range(start, end, rows)]
        accumulator = StatisticsAccumulator()
        for begin, end in progress(blocks, description=f"statistics of {key}", unit="blocks"):
            if isinstance(source, np.ndarray):
                block = source[begin:end]
            else:
                block = store.read(key, slice(begin, end))[..., :channels]
            try:
                accumulator.update(block)
            except ValueError as error:
                raise StoreError(f"{store.path}: {key}, frames {begin} to {end}: {error}.") from error
        return accumulator.result()

    def _picture_statistics(self, key: str, runs: list[tuple[int, int]]) -> Statistics:
        """Per channel in 0 to 1 (depth: metres), of frames spread evenly over the training episodes."""
        assert self.store is not None
        store, source = self.store, self._array(self.store, key, None)
        starts, ends = store.episode_starts[self.train_episodes], store.episode_ends[self.train_episodes]
        rows = np.concatenate([sampled_rows(start, end) for start, end in zip(starts, ends)])
        covered = np.zeros(store.num_frames, bool)
        for start, end in runs:
            covered[start:end] = True
        return picture_statistics(source, rows[covered[rows]] if covered[rows].any() else np.flatnonzero(covered), key)

    def _transformed_statistics(
        self, keys: tuple[str, ...] | list[str], transform: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> dict[str, Statistics]:
        accumulators = {key: StatisticsAccumulator() for key in keys}
        windows = copy.copy(self.train_windows)
        windows.keys = tuple(key for key in windows.keys if not key.startswith(("observation.images.", "observation.depth.")))
        for begin in progress(range(0, len(windows), 1024), description="statistics after transforms", unit="blocks"):
            batch = transform(windows.__getitems__(list(range(begin, min(begin + 1024, len(windows))))))
            for key, accumulator in accumulators.items():
                values = batch[key][~batch["action_is_pad"]] if key == "action" else batch[key]
                accumulator.update(values.numpy())
        return {key: accumulator.result() for key, accumulator in accumulators.items()}

    def _training_sampler(self) -> EpisodeBatchSampler:
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        accumulate = trainer.accumulate_grad_batches if trainer is not None else 1
        seed = (self.seed, int(os.environ.get("PL_GLOBAL_SEED", "0"))) if self._resume is None else tuple(self._resume["seed"])
        return EpisodeBatchSampler(
            len(self.train_windows),
            self.batch_size,
            seed,
            rank,
            world_size,
            accumulate,
            drop_last=self.drop_last,
            valid_steps=self.train_windows.valid_steps(),
        )

    def _loader(self, windows: WindowDataset, sampler: EpisodeBatchSampler) -> DataLoader:
        return DataLoader(
            windows,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def _refuse_wrapped_sampler(self) -> None:
        connector = getattr(self.trainer, "_accelerator_connector", None)
        if connector is not None and connector.use_distributed_sampler and connector.is_distributed:
            raise ValueError(
                "The trainer would replace the sampler that shares out windows among ranks: set "
                "trainer.use_distributed_sampler: false."
            )


class _Gather:
    """Rows of an array that stays compressed."""

    def __init__(self, store: EpisodeStore, key: str, channels: int | None) -> None:
        self.store, self.key, self.channels = store, key, channels

    def gather(self, rows: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(self.store.gather(self.key, rows)[..., : self.channels])


def _checked(numbers: list[int], count: int, name: str) -> np.ndarray:
    unique = np.unique(np.asarray(numbers, np.int64))
    if len(unique) == 0 or unique[0] < 0 or unique[-1] >= count:
        raise ValueError(f"{name}: {numbers} — the store's episodes are numbered 0 to {count - 1}.")
    return unique


def _as_it_is(batch: Any) -> Any:
    """Collates nothing: a dataset of windows gives whole batches."""
    return batch
