"""Named transforms between what data and environments offer and what a policy's networks see.

A policy names them in order in its configuration and saves them in its checkpoint:

    transforms:
      - class_path: lightning_robot.transforms.named.RenameCameras
        init_args: {names: {top: overhead}}
      - class_path: lightning_robot.transforms.named.DeltaActions

They are applied in this order to the batches of training and to the observations of acting, and inverted on the predicted
actions in the opposite order. All work in physical units, on whole batches, on the device; the normaliser comes after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_robot.features import Feature, Features

IMAGES, DEPTH, STATE = "observation.images.", "observation.depth.", "observation.state"


class TransformError(ValueError):
    """A transform does not fit the data that it is asked to transform."""


class Transform:
    """One step; subclasses are dataclasses of plain values.

    Attributes:
        changes_vectors: whether values of state or action change, so that statistics must be taken after the transform.
    """

    changes_vectors = False

    def features(self, features: Features) -> Features:
        """What is offered after the transform.

        Raises:
            TransformError: the transform does not fit what is offered.
        """
        return features

    def sources(self, keys: Sequence[str]) -> tuple[str, ...]:
        """Observation keys that must be there before the transform so that `keys` are there after it."""
        return tuple(keys)

    def apply(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Transforms a batch (B, T, ...); `action` and `action_is_pad` are there in training alone."""
        return batch

    def invert(self, actions: Tensor, observation: dict[str, Any]) -> Tensor:
        """Maps predicted actions back.

        Args:
            actions: (B, S, H', A) as after the transform.
            observation: what the transform was applied to.

        Returns:
            (B, S, H', A') as before the transform.
        """
        return actions


@dataclass
class RenameCameras(Transform):
    """Gives cameras the names that the policy knows them by.

    Attributes:
        names: the data's name of a camera → the policy's.
    """

    names: dict[str, str]

    def __post_init__(self) -> None:
        if len(set(self.names.values())) < len(self.names):
            raise TransformError(f"RenameCameras: {self.names} gives two cameras one name.")

    def features(self, features: Features) -> Features:
        cameras = {_camera(key) for key in features.observations} - {None}
        if unknown := [name for name in self.names if name not in cameras]:
            raise TransformError(
                f"RenameCameras: no camera {', '.join(unknown)}; there are {', '.join(sorted(map(str, cameras)))}."
            )
        if taken := sorted({new for new in self.names.values() if new in cameras} - set(self.names)):
            raise TransformError(f"RenameCameras: there is a camera {', '.join(taken)} already; rename that one too.")
        renamed = {self._renamed(key): feature for key, feature in features.observations.items()}
        return replace(features, observations=renamed)

    def sources(self, keys: Sequence[str]) -> tuple[str, ...]:
        back = RenameCameras({new: old for old, new in self.names.items()})
        return tuple(back._renamed(key) for key in keys)

    def apply(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {self._renamed(key): value for key, value in batch.items()}

    def _renamed(self, key: str) -> str:
        for prefix in (IMAGES, DEPTH):
            if key.startswith(prefix):
                camera, pad = key.removeprefix(prefix), ""
                if camera.removesuffix("_is_pad") in self.names:
                    camera, pad = camera.removesuffix("_is_pad"), "_is_pad" * camera.endswith("_is_pad")
                return f"{prefix}{self.names.get(camera, camera)}{pad}"
        return key


@dataclass
class Resize(Transform):
    """Resizes pictures and depth.

    Attributes:
        height: pixels.
        width: pixels.
        cameras: which; all where None.
        keep_ratio: shrinks or enlarges as a whole and pads the rest evenly with zeros, instead of stretching.
    """

    height: int
    width: int
    cameras: tuple[str, ...] | None = None
    keep_ratio: bool = False

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise TransformError(f"Resize: {self.height} x {self.width} is no size of a picture.")
        self.cameras = None if self.cameras is None else tuple(self.cameras)

    def features(self, features: Features) -> Features:
        cameras = {_camera(key) for key in features.observations}
        if unknown := [name for name in self.cameras or () if name not in cameras]:
            raise TransformError(f"Resize: no camera {', '.join(unknown)} among {', '.join(features.observations)}.")
        resized = {
            key: replace(feature, shape=(feature.shape[0], self.height, self.width)) if self._concerns(key) else feature
            for key, feature in features.observations.items()
        }
        return replace(features, observations=resized)

    def apply(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {key: self._resized(key, value) if self._concerns(key) else value for key, value in batch.items()}

    def _concerns(self, key: str) -> bool:
        camera = _camera(key)
        return camera is not None and not key.endswith("_is_pad") and (self.cameras is None or camera in self.cameras)

    def _resized(self, key: str, pictures: Tensor) -> Tensor:
        """(B, T, C, h, w) to (B, T, C, height, width) of the same type; depth takes the nearest pixel, which invents none."""
        rows, columns = pictures.shape[-2:]
        height, width = self.height, self.width
        if self.keep_ratio:
            factor = min(height / rows, width / columns)
            height, width = max(1, round(rows * factor)), max(1, round(columns * factor))
        flat = pictures.flatten(0, 1)
        if (rows, columns) != (height, width):
            if key.startswith(DEPTH):
                flat = F.interpolate(flat, (height, width), mode="nearest-exact")
            else:
                flat = F.interpolate(flat.float(), (height, width), mode="bilinear", antialias=True)
                flat = flat.round().clamp(0, 255).to(pictures.dtype)
        if (height, width) != (self.height, self.width):
            top, left = (self.height - height) // 2, (self.width - width) // 2
            flat = F.pad(flat, (left, self.width - width - left, top, self.height - height - top))
        return flat.unflatten(0, pictures.shape[:2])


@dataclass
class SelectState(Transform):
    """Keeps some elements of the state.

    Attributes:
        elements: names of the elements, or their numbers, in the order wanted.
    """

    elements: tuple[str | int, ...]
    changes_vectors = True

    def __post_init__(self) -> None:
        self.elements = tuple(self.elements)
        self._numbers: list[int] = []

    def features(self, features: Features) -> Features:
        state = _offered(features, STATE, self)
        numbers = [_number(element, state, STATE, self) for element in self.elements]
        self._numbers = numbers
        return replace(features, observations={**features.observations, STATE: _cut(state, numbers)})

    def apply(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {**batch, STATE: batch[STATE][..., self._numbers]} if STATE in batch else batch


@dataclass
class DeltaActions(Transform):
    """Actions relative to the newest state: every step of the chunk less the same state, that of the newest observation.

    (Not less the state of its own step: the policy does not know those when it acts.)

    Attributes:
        elements: names, or numbers, of the action's elements to change; all but grippers where None. The state must have
            elements of the same names; where either has no names, those of the same numbers are taken.
    """

    elements: tuple[str | int, ...] | None = None
    changes_vectors = True

    def __post_init__(self) -> None:
        self.elements = None if self.elements is None else tuple(self.elements)
        self._pairs: tuple[tuple[int, int], ...] = ()  # element of the action, element of the state

    def features(self, features: Features) -> Features:
        if features.action_semantics and not features.action_semantics.startswith("absolute"):
            raise TransformError(f"DeltaActions: the actions are {features.action_semantics!r}, not absolute.")
        state, action = _offered(features, STATE, self), features.action
        if self.elements is not None:
            numbers = [_number(element, action, "action", self) for element in self.elements]
        else:
            grippers = [
                number
                for number in range(action.shape[-1])
                if (action.kinds and action.kinds[number] == "gripper")
                or (action.names and "gripper" in action.names[number].lower())
            ]
            if not (action.kinds or action.names):
                raise TransformError("DeltaActions: the action's elements have no names; give their numbers as `elements`.")
            numbers = [number for number in range(action.shape[-1]) if number not in grippers]
        if action.names and state.names:
            pairs = [(number, _number(action.names[number], state, STATE, self)) for number in numbers]
        else:
            pairs = [(number, number) for number in numbers]
        if beyond := [number for number, place in pairs if place >= state.shape[-1]]:
            raise TransformError(
                f"DeltaActions: the state has {state.shape[-1]} elements, none for the action's {', '.join(map(str, beyond))}: "
                "give the numbers of the action's elements that the state has, as `elements`."
            )
        self._pairs = tuple(pairs)
        semantics = "; ".join(["relative to the state", *features.action_semantics.split("; ")[1:]])
        return replace(features, action_semantics=semantics)

    def sources(self, keys: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*keys, STATE)))

    def apply(self, batch: dict[str, Any]) -> dict[str, Any]:
        if "action" not in batch:
            return batch
        return {**batch, "action": batch["action"] - self._reference(batch, batch["action"])[:, None]}

    def invert(self, actions: Tensor, observation: dict[str, Any]) -> Tensor:
        return actions + self._reference(observation, actions)[:, None, None]

    def _reference(self, batch: dict[str, Any], actions: Tensor) -> Tensor:
        """(B, A): the newest state's elements where actions are relative, else zero."""
        newest = batch[STATE][:, -1].to(actions.device)
        reference = torch.zeros(len(newest), actions.shape[-1], dtype=newest.dtype, device=newest.device)
        for action, state in self._pairs:
            reference[:, action] = newest[:, state]
        return reference


@dataclass
class GripperConvention(Transform):
    """Rescales a gripper, in state and action: the data's closed and open values to the policy's.

    Attributes:
        element: name of the element, or its number, in the action; also in the state where the state has that name.
        data: (closed, open) of the data, e.g. (0, 100).
        policy: (closed, open) as the policy shall see them, e.g. (-1, 1).
    """

    element: str | int
    data: tuple[float, float]
    policy: tuple[float, float] = (-1.0, 1.0)
    changes_vectors = True

    def __post_init__(self) -> None:
        for name in ("data", "policy"):
            low, high = getattr(self, name)
            if low == high:
                raise TransformError(f"GripperConvention: {name} has the same value for closed and open ({low}).")
            setattr(self, name, (float(low), float(high)))
        self._places: dict[str, int] = {}

    def features(self, features: Features) -> Features:
        places = {"action": _number(self.element, features.action, "action", self)}
        state = features.observations.get(STATE)
        name = features.action.names[places["action"]] if features.action.names else None
        if state is not None and name in state.names:
            places[STATE] = state.names.index(name)
        self._places = places
        return features

    def apply(self, batch: dict[str, Any]) -> dict[str, Any]:
        places = self._places
        changed = {key: _rescaled(batch[key], number, self.data, self.policy) for key, number in places.items() if key in batch}
        return {**batch, **changed}

    def invert(self, actions: Tensor, observation: dict[str, Any]) -> Tensor:
        return _rescaled(actions, self._places["action"], self.policy, self.data)


@dataclass
class PadVectors(Transform):
    """Fills state and action up with zeros, for networks of a fixed size; the filling of predicted actions is cut off.

    Attributes:
        state: elements of the state afterwards; None leaves it.
        action: elements of the action afterwards; None leaves it.
    """

    state: int | None = None
    action: int | None = None
    changes_vectors = True

    def __post_init__(self) -> None:
        self._action_size: int | None = None

    def features(self, features: Features) -> Features:
        observations, action = dict(features.observations), features.action
        self._action_size = action.shape[-1]
        if self.state is not None:
            observations[STATE] = _widened(_offered(features, STATE, self), self.state, STATE)
        if self.action is not None:
            action = _widened(action, self.action, "action")
        return replace(features, observations=observations, action=action)

    def apply(self, batch: dict[str, Any]) -> dict[str, Any]:
        sizes = {STATE: self.state, "action": self.action}
        padded = {
            key: F.pad(batch[key], (0, size - batch[key].shape[-1]))
            for key, size in sizes.items()
            if size is not None and key in batch
        }
        return {**batch, **padded}

    def invert(self, actions: Tensor, observation: dict[str, Any]) -> Tensor:
        return actions[..., : self._action_size]


class Transforms:
    """A policy's transforms in their order.

    Args:
        steps: plain dicts with ``class_path`` and ``init_args``, as a configuration or a checkpoint holds them.

    Raises:
        TransformError: a step is no transform, or has other arguments.
    """

    def __init__(self, steps: Sequence[dict[str, Any]] = ()) -> None:
        self.steps = [_instantiated(number, step) for number, step in enumerate(steps)]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def change_vectors(self) -> bool:
        """Whether statistics of state and action must be taken after the transforms."""
        return any(step.changes_vectors for step in self.steps)

    def features(self, features: Features) -> Features:
        """What is offered after all of them; each learns here which elements it concerns, so this comes before `apply`."""
        for step in self.steps:
            features = step.features(features)
        return features

    def sources(self, keys: Sequence[str]) -> tuple[str, ...]:
        """Keys that data and environments must offer so that the policy finds `keys`."""
        for step in reversed(self.steps):
            keys = step.sources(keys)
        return tuple(keys)

    def apply(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as the policy sees it."""
        for step in self.steps:
            batch = step.apply(batch)
        return batch

    def invert(self, actions: Tensor, observation: dict[str, Any]) -> Tensor:
        """Predicted actions (B, S, H', A) in the units and the form of the data, given the untransformed observation."""
        seen = [observation]
        for step in self.steps[:-1]:
            seen.append(step.apply(seen[-1]))
        for step, before in zip(reversed(self.steps), reversed(seen)):
            actions = step.invert(actions, before)
        return actions


def _instantiated(number: int, step: dict[str, Any]) -> Transform:
    if not isinstance(step, dict) or set(step) - {"class_path", "init_args"} or "class_path" not in step:
        raise TransformError(f"transforms[{number}]: {step!r}; a transform is given as class_path and init_args.")
    module, _, name = step["class_path"].rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        offered = ", ".join(sorted(kind.__name__ for kind in Transform.__subclasses__()))
        raise TransformError(f"transforms[{number}]: no class {step['class_path']!r}; {__name__} has {offered}.") from error
    if not (isinstance(kind, type) and issubclass(kind, Transform)):
        raise TransformError(f"transforms[{number}]: {step['class_path']} is no transform.")
    try:
        return kind(**(step.get("init_args") or {}))
    except TypeError as error:
        raise TransformError(f"transforms[{number}]: {error}.") from error


def _camera(key: str) -> str | None:
    for prefix in (IMAGES, DEPTH):
        if key.startswith(prefix):
            return key.removeprefix(prefix).removesuffix("_is_pad")
    return None


def _offered(features: Features, key: str, step: Transform) -> Feature:
    if key not in features.observations:
        raise TransformError(f"{type(step).__name__} needs {key}; offered are {', '.join(features.observations)}.")
    return features.observations[key]


def _number(element: str | int, feature: Feature, key: str, step: Transform) -> int:
    if isinstance(element, str) and element in feature.names:
        return feature.names.index(element)
    if isinstance(element, int) and 0 <= element < feature.shape[-1]:
        return element
    named = f"named {', '.join(feature.names)}" if feature.names else "without names"
    raise TransformError(f"{type(step).__name__}: no element {element!r} in {key}, which has {feature.shape[-1]}, {named}.")


def _cut(feature: Feature, numbers: list[int]) -> Feature:
    kept: dict[str, Any] = {
        name: tuple(values[number] for number in numbers) if (values := getattr(feature, name)) else ()
        for name in ("names", "kinds", "effector")
    }
    return replace(feature, shape=(*feature.shape[:-1], len(numbers)), **kept)


def _widened(feature: Feature, size: int, key: str) -> Feature:
    missing = size - feature.shape[-1]
    if missing < 0:
        raise TransformError(f"PadVectors: {key} has {feature.shape[-1]} elements already, more than {size}.")
    names = tuple(f"padding_{number}" for number in range(missing))
    filled: dict[str, Any] = {
        "names": (*feature.names, *names) if feature.names else (),
        "kinds": (*feature.kinds, *("scalar",) * missing) if feature.kinds else (),
        "effector": (*feature.effector, *("",) * missing) if feature.effector else (),
    }
    return replace(feature, shape=(*feature.shape[:-1], size), **filled)


def _rescaled(values: Tensor, number: int, old: tuple[float, float], new: tuple[float, float]) -> Tensor:
    """A copy of `values` (..., D) whose element `number` is mapped linearly from `old` to `new`."""
    values = values.clone()
    share = (values[..., number] - old[0]) / (old[1] - old[0])
    values[..., number] = new[0] + share * (new[1] - new[0])
    return values
