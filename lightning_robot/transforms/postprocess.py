"""Action post-processing by configuration: small corrections between a policy's prediction and the robot's command.

A policy names them in order in its configuration and saves them in its checkpoint:

    postprocess:
      - class_path: lightning_robot.transforms.postprocess.Smooth
        init_args: {weight: 0.5}
      - class_path: lightning_robot.transforms.postprocess.GripperThreshold
        init_args: {threshold: 30.0, below: 0.0, above: 100.0}

They change single actions in physical units, one control step after the other, and belong to acting alone: the controller
applies them, after ensembling, and training never sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_robot.features import Feature, Features

Action = NDArray[np.float32]
Apply = Callable[[Action, Action | None], Action]
Values = float | Sequence[float] | dict[str, float]


class PostprocessError(ValueError):
    """A step of the post-processing does not fit the actions."""


class ActionStep:
    """One step; subclasses are dataclasses of plain values."""

    def bind(self, features: Features) -> Apply:
        """Meets the actions.

        Args:
            features: of the policy; the action's names and kinds say which elements a step concerns.

        Returns:
            A function of an action (A,) float32 and of what this step returned one control step before (None in an episode's
            first step), which returns a new action. It keeps nothing itself.

        Raises:
            PostprocessError: the step names an element that the action does not have, or sizes differ.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Offset(ActionStep):
    """Adds a constant, for example against a calibration error.

    Attributes:
        values: one number for all elements, one per element, or element name → number (the others keep theirs).
    """

    values: Values

    def bind(self, features: Features) -> Apply:
        offset = _per_element("Offset", self.values, features.action, 0.0)
        return lambda action, before: action + offset


@dataclass(frozen=True)
class Clip(ActionStep):
    """Keeps elements within bounds.

    Attributes:
        low: lower bound, given like the values of `Offset`; None for none.
        high: upper bound.
    """

    low: Values | None = None
    high: Values | None = None

    def bind(self, features: Features) -> Apply:
        low = _per_element("Clip", self.low, features.action, -np.inf)
        high = _per_element("Clip", self.high, features.action, np.inf)
        if (low > high).any():
            raise PostprocessError(f"Clip: a lower bound lies above its upper one ({low.tolist()}, {high.tolist()}).")
        return lambda action, before: np.clip(action, low, high)


@dataclass(frozen=True)
class Smooth(ActionStep):
    """Exponential moving average over the control steps of an episode: weight · action + (1 - weight) · its own last output.

    Attributes:
        weight: of the newest action, above 0 (holds still) up to 1 (changes nothing).
        elements: names of the elements to smooth; None takes all but grippers, which would open and close late.
    """

    weight: float
    elements: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise PostprocessError(f"Smooth: weight must be above 0 and at most 1, not {self.weight}.")

    def bind(self, features: Features) -> Apply:
        action = features.action
        if self.elements is None:
            chosen = [number for number in range(action.shape[-1]) if _kind(action, number) != "gripper"]
        else:
            chosen = [_index("Smooth", name, action) for name in self.elements]
        turning = [_name(action, number) for number in chosen if _kind(action, number) == "rotation"]
        if turning and not features.action_semantics.startswith("relative"):
            raise PostprocessError(
                f"Smooth: {', '.join(turning)} are absolute rotations, whose elements have no mean (they wrap around). Name "
                "the elements to smooth without them."
            )
        weight = np.ones(action.shape[-1], dtype=np.float32)
        weight[chosen] = self.weight

        def apply(new: Action, before: Action | None) -> Action:
            return new if before is None else np.where(weight < 1, weight * new + (1 - weight) * before, new)

        return apply


@dataclass(frozen=True)
class GripperThreshold(ActionStep):
    """Turns the gripper's command into one of two: a regressed half-open gripper neither holds nor lets go.

    Attributes:
        threshold: between the two.
        below: command where the prediction lies below the threshold.
        above: command where it does not.
        margin: the command changes only once the prediction is this far beyond the threshold, so that it does not flutter.
        element: the gripper's name; None takes every element of the kind gripper.
    """

    threshold: float
    below: float
    above: float
    margin: float = 0.0
    element: str | None = None

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise PostprocessError(f"GripperThreshold: margin must not be negative, but is {self.margin}.")
        if self.below == self.above:
            raise PostprocessError(f"GripperThreshold: below and above must differ; both are {self.below}.")

    def bind(self, features: Features) -> Apply:
        chosen = _grippers("GripperThreshold", self.element, features.action)

        def apply(action: Action, before: Action | None) -> Action:
            action = action.copy()
            predicted = action[chosen]
            up = predicted >= self.threshold
            if before is not None:
                undecided = np.abs(predicted - self.threshold) < self.margin
                up = np.where(undecided, before[chosen] == np.float32(self.above), up)
            action[chosen] = np.where(up, self.above, self.below)
            return action

        return apply


@dataclass(frozen=True)
class GripperBias(ActionStep):
    """Adds a constant to the gripper's command: a firmer or looser grip.

    Attributes:
        value: what is added.
        element: the gripper's name; None takes every element of the kind gripper.
    """

    value: float
    element: str | None = None

    def bind(self, features: Features) -> Apply:
        chosen = _grippers("GripperBias", self.element, features.action)

        def apply(action: Action, before: Action | None) -> Action:
            action = action.copy()
            action[chosen] += np.float32(self.value)
            return action

        return apply


def build_postprocess(steps: Sequence[dict[str, Any]], features: Features) -> list[Apply]:
    """The steps of a configuration or a checkpoint, ready to be applied in their order.

    Args:
        steps: plain dicts with ``class_path`` and ``init_args``; a class of this module needs its name alone.
        features: of the policy.

    Raises:
        PostprocessError: a step is none, has other arguments, or does not fit the actions.
    """
    return [_instantiated(number, step).bind(features) for number, step in enumerate(steps)]


def postprocess_action(steps: Sequence[Apply], action: Action, before: list[Action] | None) -> tuple[Action, list[Action]]:
    """Applies all steps to one action.

    Args:
        steps: from `build_postprocess`.
        action: (A,) float32 as predicted.
        before: the second value returned one control step before, None in an episode's first step.

    Returns:
        The command (A,) float32, and the output of every step, which the next call wants.
    """
    outputs = []
    for number, apply in enumerate(steps):
        action = np.asarray(apply(action, None if before is None else before[number]), dtype=np.float32)
        outputs.append(action)
    return action, outputs


def _instantiated(number: int, step: dict[str, Any]) -> ActionStep:
    where = f"postprocess[{number}]"
    if not isinstance(step, dict) or set(step) - {"class_path", "init_args"} or not isinstance(step.get("class_path"), str):
        raise PostprocessError(f"{where}: {step!r}; a step is given as class_path and init_args.")
    module, _, name = step["class_path"].rpartition(".")
    try:
        kind = getattr(import_module(module or __name__), name)
    except (ImportError, AttributeError) as error:
        offered = ", ".join(sorted(kind.__name__ for kind in ActionStep.__subclasses__()))
        raise PostprocessError(f"{where}: no class {step['class_path']!r}; {__name__} has {offered}.") from error
    if not (isinstance(kind, type) and issubclass(kind, ActionStep)):
        raise PostprocessError(f"{where}: {step['class_path']} is no step of the post-processing.")
    try:
        return kind(**(step.get("init_args") or {}))
    except TypeError as error:
        raise PostprocessError(f"{where}: {error}.") from error


def _per_element(who: str, values: Values | None, action: Feature, default: float) -> Action:
    """(A,) float32 of one number, one per element, or some by name."""
    size = action.shape[-1]
    filled = np.full(size, default, dtype=np.float32)
    if isinstance(values, dict):
        for name, value in values.items():
            filled[_index(who, name, action)] = value
    elif values is not None:
        given = np.asarray(values, dtype=np.float32)
        if given.ndim > 1 or (given.ndim == 1 and len(given) != size):
            raise PostprocessError(f"{who}: {given.size} values for actions of {size} elements.")
        filled[:] = given
    return filled


def _index(who: str, name: str, action: Feature) -> int:
    if name not in action.names:
        raise PostprocessError(f"{who}: the action has no element {name!r}; it has {', '.join(action.names) or 'no names'}.")
    return action.names.index(name)


def _grippers(who: str, element: str | None, action: Feature) -> list[int]:
    if element is not None:
        return [_index(who, element, action)]
    found = [number for number, kind in enumerate(action.kinds) if kind == "gripper"]
    if not found:
        raise PostprocessError(
            f"{who}: no element of the action is of the kind gripper; name one of {', '.join(action.names) or 'its names'} "
            "(element)."
        )
    return found


def _kind(action: Feature, number: int) -> str:
    return action.kinds[number] if action.kinds else ""


def _name(action: Feature, number: int) -> str:
    return action.names[number] if action.names else f"element {number}"
