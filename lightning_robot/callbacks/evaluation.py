"""Judges the policy in simulation while it trains."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gymnasium
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_robot.console import say
from lightning_robot.evaluation.controller import Ensembling
from lightning_robot.evaluation.demonstrated import refuse_training_seeds
from lightning_robot.evaluation.metrics import SuccessRate
from lightning_robot.evaluation.result import EvaluationResult
from lightning_robot.evaluation.rollout import (
    REPORTING_SEEDS,
    SELECTION_SEEDS,
    Episode,
    choose_tasks,
    environment_maker,
    inspect_environment,
    plan_episodes,
    refuse_errors_only,
    rollout,
)
from lightning_robot.features import IncompatibleFeatures


class SimulationEvaluation(Callback):
    """Plays episodes after a validation, with the averaged weights, and logs ``val/success`` and ``val/success/<task>``.

    The episodes are the same at every evaluation, are shared out over the ranks, and use seeds that neither demonstrations nor
    the command ``evaluate`` use. Their table goes to ``evaluations/epochXXXX.json`` in the run directory. The settings are
    saved in checkpoints, so that ``evaluate CKPT`` needs nothing else.

    Args:
        env: Gymnasium id of the environment; null switches simulation off.
        env_kwargs: arguments of the environment's constructor.
        tasks: task ids to play; null plays the environment's, of which a task-conditioned policy plays those it was trained on.
        episodes: episodes per evaluation, over all tasks and ranks; 0 switches simulation off.
        seed: seed of the first episode, between 1,000,000 and 2,000,000.
        every_n_epochs: epochs between two evaluations; they happen at validations, so at the first one after that many.
        at_end: evaluates in the last epoch too.
        num_envs: environments at the same time, on each rank.
        inference_batch: rows of every query of the policy; another number changes results in the last digits.
        processes: worker processes per rank that step environments; 0 steps them in the training process.
        threads: torch's threads per rank while playing.
        execution_horizon: actions executed of each chunk; null takes the policy's own.
        ensembling: temporal ensembling: coefficient and direction (oldest, newest), true for the published ones, false for
            none; null takes the policy's own.
        max_steps: step limit of an episode; null takes the environment's own.
        videos: videos per evaluation, failures first.
    """

    def __init__(
        self,
        env: str | None = "lightning_robot/PlayTable-v0",
        env_kwargs: dict[str, Any] | None = None,
        tasks: list[str] | None = None,
        episodes: int = 20,
        seed: int = SELECTION_SEEDS,
        every_n_epochs: int = 1,
        at_end: bool = True,
        num_envs: int = 8,
        inference_batch: int = 8,
        processes: int = 0,
        threads: int = 1,
        execution_horizon: int | None = None,
        ensembling: dict[str, Any] | bool | None = None,
        max_steps: int | None = None,
        videos: int = 0,
    ) -> None:
        if every_n_epochs < 1 or episodes < 0:
            raise ValueError("evaluation.every_n_epochs must be at least 1, evaluation.episodes at least 0.")
        if episodes and not SELECTION_SEEDS <= seed <= REPORTING_SEEDS - episodes:
            raise ValueError(
                f"evaluation.seed {seed} with {episodes} episodes leaves the seeds {SELECTION_SEEDS} to {REPORTING_SEEDS - 1}, "
                "which choose checkpoints: demonstrations and final results have seeds of their own."
            )
        if ensembling and execution_horizon not in (None, 1):
            raise ValueError(
                "evaluation.ensembling asks at every step: evaluation.execution_horizon must be 1 or null, not "
                f"{execution_horizon}."
            )
        self.env = env
        self.env_kwargs = dict(env_kwargs or {})
        self.tasks = list(tasks) if tasks else None
        self.episodes = episodes if env else 0
        self.seed = seed
        self.every_n_epochs = every_n_epochs
        self.at_end = at_end
        self.num_envs = num_envs
        self.inference_batch = inference_batch
        self.processes = processes
        self.threads = threads
        self.execution_horizon = execution_horizon
        self.ensembling = ensembling
        self._ensembling = Ensembling.from_setting(ensembling)
        self.max_steps = max_steps
        self.videos = videos
        self.evaluated_this_epoch = False  # the logged success is of these very weights
        self.last_evaluated_epoch = -1
        self.result: EvaluationResult | None = None
        self._last_step = -1
        self._plan: list[Episode] | None = None
        self._told: set[str] = set()
        self.played_tasks: list[str] = []  # settled when the environment is met

    @property
    def enabled(self) -> bool:
        return self.episodes > 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.enabled:
            return
        off = "or switch simulation off (evaluation.episodes: 0)"
        if not trainer.enable_validation:
            raise MisconfigurationException(
                "The policy is to be judged in simulation after validations, but there is no validation: "
                + ("trainer.limit_val_batches is 0" if not trainer.limit_val_batches else "the data has no validation part")
                + f". Change that, {off}."
            )
        every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
        if every is not None and epochs is not None and 0 < epochs < every:
            raise MisconfigurationException(
                f"trainer.check_val_every_n_epoch is {every}, but training ends after {epochs} epochs: the policy would never "
                f"be judged in simulation. Lower it, {off}."
            )
        self._prepare(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = trainer.num_val_batches
        if self.enabled and batches and sum(batches) == 0:
            raise MisconfigurationException(
                "The policy is to be judged in simulation after validations, but the validation part of the data is empty. "
                "Raise data.validation_ratio, or switch simulation off (evaluation.episodes: 0)."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.evaluated_this_epoch = False

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.evaluated_this_epoch = False

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not self.enabled or not self._is_due(trainer):
            return
        averaging = next((callback for callback in trainer.callbacks if hasattr(callback, "averaged")), None)
        with averaging.averaged(pl_module) if averaging is not None else nullcontext():
            self.result = self._evaluate(trainer, pl_module)
        self.evaluated_this_epoch = True
        self._last_step = trainer.global_step

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before: a run interrupted between evaluation and checkpoint evaluates again.
        if self.evaluated_this_epoch and trainer.state.fn == "fit":
            self.last_evaluated_epoch = trainer.current_epoch

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.enabled and self.at_end and self._last_step != trainer.global_step:
            last = self.last_evaluated_epoch
            said = "never" if last < 0 else f"last after epoch {last}"
            say(
                f"Training ended at step {trainer.global_step} without a validation there; the policy was judged in simulation "
                f"{said}. Judge the final weights by: python -m lightning_robot evaluate {trainer.default_root_dir}"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.enabled:
            checkpoint["evaluation"] = {
                "env": self.env,
                "env_kwargs": self.env_kwargs,
                "tasks": self.played_tasks or self.tasks,
                "execution_horizon": self.execution_horizon,
                "ensembling": self.ensembling,
                "max_steps": self.max_steps,
                "inference_batch": self.inference_batch,
            }

    def state_dict(self) -> dict[str, Any]:
        return {"last_evaluated_epoch": self.last_evaluated_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_evaluated_epoch = state_dict["last_evaluated_epoch"]

    def _is_due(self, trainer: Trainer) -> bool:
        if trainer.state.fn != "fit":
            return True
        if self._last_step == trainer.global_step:
            return False
        if trainer.current_epoch - self.last_evaluated_epoch >= self.every_n_epochs:
            return True
        last_batch = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        last_epoch = trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch + 1
        ending = trainer.should_stop or 0 < trainer.max_steps <= trainer.global_step
        return self.at_end and (ending or (last_epoch and last_batch))

    def _prepare(self, pl_module: Any) -> list[Episode]:
        """Meets the environment once, before the work, and settles which episodes to play."""
        if self._plan is None:
            assert self.env is not None
            try:
                make_env = environment_maker(self.env, self.env_kwargs)
                description, notes = inspect_environment(pl_module, make_env, self.tasks or ())
                self._say_once(notes)
                self.played_tasks = choose_tasks(pl_module, description, self.tasks)
                self._plan = plan_episodes(self.episodes, self.seed, self.played_tasks)
                refuse_training_seeds(pl_module, [episode.seed for episode in self._plan], description)
            except IncompatibleFeatures:
                raise
            except (ValueError, ImportError, gymnasium.error.Error) as error:
                raise MisconfigurationException(f"evaluation: {error}") from error
        return self._plan

    def _evaluate(self, trainer: Trainer, pl_module: Any) -> EvaluationResult:
        assert self.env is not None
        plan = self._prepare(pl_module)
        make_env = environment_maker(self.env, self.env_kwargs)
        share, problem = EvaluationResult([]), None
        try:
            share = rollout(
                pl_module,
                make_env,
                plan,
                num_envs=self.num_envs,
                inference_batch=self.inference_batch,
                threads=self.threads,
                processes=self.processes,
                max_steps=self.max_steps,
                execution_horizon=self.execution_horizon,
                ensembling=self._ensembling,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
            )
        except Exception as error:  # the other ranks must hear of it, or they wait for ever
            problem = error
        parts = _gather((share, None if problem is None else f"{type(problem).__name__}: {problem}"), trainer.world_size)
        if problem is not None:
            raise problem
        for rank, (_, text) in enumerate(parts):
            if text is not None:
                raise RuntimeError(f"The evaluation failed on rank {rank}: {text}")
        self._log(pl_module, share, plan)
        result = EvaluationResult.merge(part for part, _ in parts)
        refuse_errors_only(result)
        result.settings = {"environment": self.env, "environment_arguments": self.env_kwargs, **result.settings}
        if trainer.is_global_zero:
            self._report(trainer, pl_module, result)
        return result

    def _say_once(self, notes: list[str]) -> None:
        """Differences between training and simulation are the same at every evaluation."""
        for note in notes:
            if note not in self._told:
                say(note)
        self._told.update(notes)

    def _log(self, pl_module: LightningModule, share: EvaluationResult, plan: list[Episode]) -> None:
        """Logs rates that are reduced over the ranks; every rank goes through the same tasks in the same order."""
        tasks = sorted({episode.task for episode in plan if episode.task is not None})
        for name, task in [("val/success", None), *((f"val/success/{task}", task) for task in tasks)]:
            rate = SuccessRate().to(pl_module.device)
            outcomes = [record.success for record in share.counted if task is None or record.task == task]
            rate.update(torch.tensor(outcomes, dtype=torch.bool))
            pl_module.log(name, rate.compute(), prog_bar=task is None, sync_dist=True, batch_size=1)

    def _report(self, trainer: Trainer, pl_module: Any, result: EvaluationResult) -> None:
        low, high = result.interval()
        failures = ", ".join(f"{name} {count}" for name, count in result.failures().items())
        say(
            f"Simulation after epoch {trainer.current_epoch}: {result.successes} of {result.episodes} episodes solved, "
            f"{100 * result.success_rate:.0f} % (95 % interval {100 * low:.0f} to {100 * high:.0f})"
            + (f"; failures: {failures}." if failures else ".")
        )
        self._say_once(result.notes)
        for sentence in result.warnings():
            say(sentence)
        if trainer.state.fn != "fit" or trainer.fast_dev_run:
            return
        folder = Path(trainer.default_root_dir) / "evaluations"
        name = f"epoch{trainer.current_epoch:04d}"
        result.save(folder / f"{name}.json")
        if self.videos:
            from lightning_robot.evaluation.video import record_videos

            assert self.env is not None
            record_videos(pl_module, environment_maker(self.env, self.env_kwargs), result, folder / name, self.videos)


def _gather(value: Any, world_size: int) -> list[Any]:
    """One value from each rank, in their order."""
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(values, value)
    return values
