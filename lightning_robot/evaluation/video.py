"""Videos of chosen episodes: each is played again with rendering, once the table is known."""

from __future__ import annotations

import os
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_robot.console import say
from lightning_robot.evaluation.controller import Controller, Ensembling
from lightning_robot.evaluation.result import EpisodeRecord, EvaluationResult
from lightning_robot.evaluation.rollout import Episode, acting, play
from lightning_robot.evaluation.stepping import EnvironmentFault, LocalPool, MakeEnvironment, Transition

if TYPE_CHECKING:
    from lightning_robot.policies.base import Policy

CODECS = ("libx264", "mpeg4")


class VideoWriter:
    """Writes RGB frames to an mp4 file: H.264 where this build of FFmpeg can, MPEG-4 elsewhere (and it says so).

    The file has a temporary name until `close`; odd sizes lose their last row or column, which 4:2:0 cannot hold.
    """

    def __init__(self, path: str | Path, rate: float = 30.0) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.rate = Fraction(rate).limit_denominator(1001)
        self.container: Any = None
        self.stream: Any = None

    def add(self, frame: np.ndarray) -> None:
        """Appends a frame, (H, W, 3) uint8; all frames have one size."""
        import av

        frame = np.ascontiguousarray(frame[: frame.shape[0] // 2 * 2, : frame.shape[1] // 2 * 2, :3])
        if self.container is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.container = av.open(str(self.partial), "w", format="mp4")
            self.stream = self.container.add_stream(_codec(), rate=self.rate)
            self.stream.height, self.stream.width = frame.shape[:2]
            self.stream.pix_fmt = "yuv420p"
        self.container.mux(self.stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))

    def close(self) -> bool:
        """Finishes the file; False if there was no frame to write."""
        if self.container is None:
            return False
        self.container.mux(self.stream.encode(None))
        self.container.close()
        os.replace(self.partial, self.path)
        return True

    def abandon(self) -> None:
        """Removes what was written so far."""
        if self.container is not None:
            self.container.close()
        self.partial.unlink(missing_ok=True)


def _codec() -> str:
    import av

    available = [codec for codec in CODECS if codec in av.codecs_available]
    if not available:
        raise RuntimeError(f"PyAV has none of the encoders {', '.join(CODECS)}.")
    if available[0] != CODECS[0]:
        say(f"PyAV has no H.264 encoder here; videos are written as {available[0]}, which browsers may not play.")
    return available[0]


def picture(env: Any, observation: dict[str, Any]) -> np.ndarray:
    """What an environment shows now: its rendering, else its cameras' pictures side by side; (H, W, 3) uint8.

    Raises:
        RuntimeError: there is neither.
    """
    failure = "render() returned nothing"
    try:
        if (frame := env.render()) is not None:
            return np.asarray(frame)
    except Exception as error:  # what an environment without a renderer raises is its own affair
        failure = f"{type(error).__name__}: {error}"
    images = [np.asarray(observation[key]) for key in sorted(observation) if key.startswith("observation.images.")]
    if not images:
        raise RuntimeError(f"{failure}, and the observation holds no picture")
    height = max(image.shape[-2] for image in images)
    padded = [np.pad(image, ((0, 0), (0, height - image.shape[-2]), (0, 0))) for image in images]
    return np.concatenate(padded, axis=-1).transpose(1, 2, 0)


def _renders(pool: LocalPool, seed: int, task: str | None) -> bool:
    """Whether an environment can show itself without its observations."""
    pool.send(0, "reset", seed, task)
    pool.receive()
    env = pool.hosts[0].env
    try:
        return env is not None and env.render() is not None
    except Exception:  # as in `picture`
        return False


def choose_episodes(result: EvaluationResult, count: int) -> list[EpisodeRecord]:
    """The episodes most worth seeing: failures before successes, and the tasks in turn."""
    turns: Counter = Counter()
    ordered = []
    for record in result.counted:
        turns[record.task, record.success] += 1
        ordered.append((record.success, turns[record.task, record.success], record.seed, record))
    return [record for *_, record in sorted(ordered, key=lambda item: item[:3])[:count]]


def record_videos(
    policy: Policy,
    make_env: MakeEnvironment,
    result: EvaluationResult,
    folder: str | Path,
    count: int = 4,
) -> list[Path]:
    """Plays some episodes of a result again and films them; failures first.

    An episode is fixed by its seed, so the outcome must repeat; a line says so where it does not. An environment that renders
    nothing shows its cameras' pictures; where there are none either a line says why, and nothing fails.

    Args:
        policy: the policy that the result is of, with the same weights.
        make_env: called with ``render_mode="rgb_array"``.
        result: whose episodes.
        folder: where ``<number>_<task>_seed<seed>_<outcome>.mp4`` go.
        count: at most so many.

    Returns:
        The files written.
    """
    settings = result.settings
    ensembling = settings["ensembling"] and Ensembling(*settings["ensembling"])
    controller = Controller(
        policy,
        1,
        execution_horizon=settings["execution_horizon"],
        ensembling=ensembling or False,
        postprocess=settings["postprocess"],
        inference_batch=settings["inference_batch"],
    )
    written: list[Path] = []
    renders = True
    pool = LocalPool(lambda: make_env(render_mode="rgb_array"), 1, policy.features)
    try:
        try:
            description = pool.describe()
        except EnvironmentFault:  # an environment that knows no render_mode can still have cameras
            pool = LocalPool(make_env, 1, policy.features)
            description = pool.describe()
        if count > 0 and result.records:
            first = result.records[0]
            renders = _renders(pool, first.seed, first.task)
        for number, record in enumerate(choose_episodes(result, count)):
            parts = (f"{number:02d}", record.task, f"seed{record.seed}", record.outcome)
            name = "_".join(re.sub(r"[^\w.-]+", "-", part) for part in parts if part)
            writer = VideoWriter(Path(folder) / f"{name}.mp4", description.rate)

            def film(index: int, transition: Transition, writer: VideoWriter = writer) -> None:
                env = pool.hosts[index].env
                if env is not None:  # None: closed after an exception
                    writer.add(picture(env, transition.observation))

            try:
                with acting(policy, settings["threads"]):
                    episode = Episode(record.seed, record.task)
                    limit = settings["max_steps"]
                    ((again, _),) = play(pool, controller, [episode], description, limit, film, observe_all=not renders)
                if writer.close():
                    written.append(writer.path)
            except BaseException:
                writer.abandon()
                raise
            if again != record:
                say(
                    f"Seed {record.seed} did not repeat: {record.outcome} after {record.steps} steps in the evaluation, "
                    f"{again.outcome} after {again.steps} in the video. The environment carries something over."
                )
    except Exception as error:  # a picture is no reason to lose a result
        say(f"No video beyond {len(written)} of {min(count, result.episodes)}: {type(error).__name__}: {error}")
    finally:
        pool.close()
    return written
