"""What a dataset or an environment offers, and what a policy was trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

KINDS = ("position", "direction", "rotation", "scalar", "gripper")


class IncompatibleFeatures(ValueError):
    """A policy met data or an environment that does not offer what it was trained on."""


@dataclass(frozen=True)
class Feature:
    """One array of an observation, or the action, for a single step (no batch and no time axis).

    Attributes:
        shape: e.g. ``(15,)`` for a state, ``(1024, 3)`` for a point cloud, ``(3, 200, 200)`` for an image.
        dtype: numpy's name, e.g. ``"float32"``.
        unit: e.g. ``"m"``; ``"mixed"`` where elements differ.
        names: one name per element of the last axis, where elements have names.
        kinds: one of `KINDS` per element: how the element transforms when the scene is moved.
        effector: end effector that each element belongs to (one name per element), empty for a single arm.
        frame: coordinate frame of positions and directions, e.g. ``"world"``.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    unit: str = ""
    names: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    effector: tuple[str, ...] = ()
    frame: str = ""

    def __post_init__(self) -> None:
        for name in ("shape", "names", "kinds", "effector"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        unknown = set(self.kinds) - set(KINDS)
        if unknown:
            raise ValueError(f"Unknown kind(s) of element {sorted(unknown)}; use {', '.join(KINDS)}.")


@dataclass(frozen=True)
class Features:
    """Everything a policy must agree on with its data and with the environment it acts in.

    Attributes:
        observations: per batch key (``observation.state`` …) its `Feature`.
        action: the action of one control step.
        action_semantics: one string of ``;``-separated parts: ``"relative|absolute; commanded|achieved; frame; gripper
            convention"``, e.g. ``"relative; achieved; world; gripper +1 open -1 closed"``. The second part is provenance:
            a difference there is reported, not refused.
        control_rate: Hz.
        cloud: the point cloud's recipe (`lightning_robot.points.CloudRecipe.to_dict`), None without clouds.
        source: fingerprint of the simulator or recording: plain strings such as version, scene and renderer.
        cameras: per camera name where it is fixed, as far as it is known: ``mount`` (a body's name), ``position`` (3) in metres
            and ``rotation`` (4), a unit quaternion (w, x, y, z), both in the mount's frame, and ``fov``, vertical, in degrees.
    """

    observations: dict[str, Feature]
    action: Feature
    action_semantics: str = ""
    control_rate: float = 0.0
    cloud: dict[str, Any] | None = None
    source: dict[str, str] = field(default_factory=dict)
    cameras: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers only: fit for JSON, for Zarr attributes and for a checkpoint read with `weights_only=True`."""
        values = _plain(asdict(self))
        if not self.cameras:
            del values["cameras"]  # older stores do not name them: their fingerprints stay
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Features:
        values = dict(values)
        values["observations"] = {key: Feature(**feature) for key, feature in values["observations"].items()}
        values["action"] = Feature(**values["action"])
        return cls(**values)


def check_compatible(trained: Features, offered: Features, keys: tuple[str, ...] | None = None) -> list[str]:
    """Refuses data or an environment that does not offer what the policy was trained on.

    Args:
        trained: features of the policy.
        offered: features of the dataset or environment it meets.
        keys: observation keys that the policy reads; all of `trained` when None.

    Returns:
        Sentences about differences that do not prevent acting (provenance of actions, recipe of the cloud, cameras' places).

    Raises:
        IncompatibleFeatures: names every difference and the setting that resolves it.
    """
    errors, notes = [], []
    for key in keys if keys is not None else tuple(trained.observations):
        want, have = trained.observations.get(key), offered.observations.get(key)
        if want is None:
            errors.append(f"{key}: the policy reads it but was trained on {', '.join(trained.observations)}.")
        elif have is None:
            remedy = "Store or render it, or train a policy without it."
            if key.startswith(("observation.images.", "observation.depth.")):
                remedy = (
                    "Give the camera that name, or rename it for the policy (transforms: "
                    "lightning_robot.transforms.named.RenameCameras)."
                )
            errors.append(f"{key}: the policy needs it; offered are {', '.join(offered.observations)}. {remedy}")
        elif want.shape != have.shape and not _is_wider_cloud(key, want, have):
            setting = (
                "set the number of points of the environment or of the conversion" if "cloud" in key else "check the source"
            )
            errors.append(f"{key}: trained on shape {want.shape}, offered {have.shape}; {setting}.")
        elif want.dtype != have.dtype and "uint8" in (want.dtype, have.dtype):  # counts 0 to 255 against physical values
            errors.append(f"{key}: trained on {want.dtype}, offered {have.dtype}: another scale of values.")
        elif want.unit and have.unit and want.unit != have.unit:
            errors.append(f"{key}: trained in {want.unit!r}, offered in {have.unit!r}; choose the same units at the source.")
        elif want.names and have.names and want.names != have.names:
            errors.append(f"{key}: element names differ: trained on {want.names}, offered {have.names}.")
        elif want.frame and have.frame and want.frame != have.frame:
            errors.append(f"{key}: trained in frame {want.frame!r}, offered in {have.frame!r}.")
    if trained.action.shape != offered.action.shape:
        errors.append(f"action: trained on shape {trained.action.shape}, offered {offered.action.shape}.")
    elif trained.action.unit and offered.action.unit and trained.action.unit != offered.action.unit:
        errors.append(
            f"action: trained in {trained.action.unit!r}, offered in {offered.action.unit!r}; choose the same units in the "
            "environment or the conversion."
        )
    elif trained.action.names and offered.action.names and trained.action.names != offered.action.names:
        errors.append(f"action: element names differ: trained on {trained.action.names}, offered {offered.action.names}.")
    for index, (wanted, given) in enumerate(zip(_parts(trained), _parts(offered), strict=False)):
        if wanted != given:
            sentence = f"action semantics: trained on {wanted!r}, offered {given!r}"
            if index == 1:
                notes.append(f"{sentence} (recorded motion against command: expect a lag).")
            else:
                errors.append(f"{sentence}; choose the same action form in the environment or the conversion.")
    if trained.cloud and offered.cloud and "observation.point_cloud" in (keys or trained.observations):
        for name in sorted(set(trained.cloud) & set(offered.cloud)):
            if trained.cloud[name] != offered.cloud[name]:
                notes.append(f"point cloud {name}: trained with {trained.cloud[name]}, offered {offered.cloud[name]}.")
    notes += _camera_notes(trained, offered, keys if keys is not None else tuple(trained.observations))
    if error := other_rate(trained.control_rate, offered.control_rate):
        errors.append(error)
    if errors:
        raise IncompatibleFeatures("The policy does not fit:\n  " + "\n  ".join(errors))
    return notes


def check_observation(trained: Features, observation: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    """Refuses an observation that is not what was announced: an environment's wrapper may change what it offers.

    Args:
        trained: features of the policy.
        observation: of one step, arrays without batch and time axes.
        keys: observation keys that the policy reads.

    Raises:
        IncompatibleFeatures: names every difference.
    """
    errors = []
    for key in keys:
        want, value = trained.observations.get(key), observation.get(key)
        if want is None:
            continue
        if value is None:
            errors.append(f"{key}: the policy reads it; what the environment gives has only {', '.join(observation)}.")
            continue
        have = Feature(tuple(value.shape), str(value.dtype))
        if have.shape != want.shape and not _is_wider_cloud(key, want, have):
            errors.append(f"{key}: trained on shape {want.shape}, the environment gives {have.shape}; look at its wrappers.")
        elif want.dtype != have.dtype and "uint8" in (want.dtype, have.dtype):
            depth = " (depth where colour is expected?)" if "images" in key else ""
            errors.append(
                f"{key}: trained on {want.dtype}, the environment gives {have.dtype}: another scale of values{depth}."
            )
    if errors:
        raise IncompatibleFeatures("The policy does not fit:\n  " + "\n  ".join(errors))


def other_rate(trained: float, offered: float) -> str | None:
    """A sentence if two control rates in Hz are both known and differ by more than a hundredth."""
    if not trained or not offered or abs(trained - offered) <= 0.01 * trained:
        return None
    return (
        f"control rate: trained at {trained:g} Hz, offered {offered:g} Hz: every action would last {trained / offered:.3g} "
        "times as long. Let the environment step at the data's rate, or train on data of its rate."
    )


def camera_names(keys: Iterable[str]) -> list[str]:
    """Cameras whose colour or depth is among the keys, each once."""
    kinds = ("observation.images.", "observation.depth.")
    return list(dict.fromkeys(key.removeprefix(kind) for key in keys for kind in kinds if key.startswith(kind)))


def _camera_notes(trained: Features, offered: Features, keys: tuple[str, ...]) -> list[str]:
    """Sentences about cameras that are fixed elsewhere than in training, where both sides know."""
    names = [name for name in camera_names(keys) if name in trained.cameras and name in offered.cameras]
    moved = [name for name in names if not _same_mount(trained.cameras[name], offered.cameras[name])]
    exchanged = {}
    for name in moved:
        other = next((one for one in names if _same_mount(trained.cameras[one], offered.cameras[name])), None)
        if other is not None:
            exchanged[name] = other
    notes = []
    if exchanged:
        pairs = ", ".join(f"{name} stands where {other} stood" for name, other in exchanged.items())
        notes.append(f"cameras are swapped under their names: {pairs} in the demonstrations (by their poses).")
    for name in moved:
        if name not in exchanged:
            was, now = trained.cameras[name], offered.cameras[name]
            distance = 100 * math.dist(was["position"], now["position"])
            turn = math.degrees(2 * math.acos(min(1.0, abs(sum(a * b for a, b in zip(was["rotation"], now["rotation"]))))))
            notes.append(
                f"camera {name}: on {was['mount']} in the demonstrations, on {now['mount']} here; moved by {distance:.1f} cm, "
                f"turned by {turn:.0f} degrees, field of view {was['fov']:g} and {now['fov']:g} degrees."
            )
    return notes


def _same_mount(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Within a millimetre, half a degree and a tenth of a degree of view."""
    cosine = abs(sum(a * b for a, b in zip(one["rotation"], other["rotation"])))
    return (
        one["mount"] == other["mount"]
        and math.dist(one["position"], other["position"]) < 1e-3
        and cosine > math.cos(math.radians(0.25))
        and abs(one["fov"] - other["fov"]) < 0.1
    )


def _parts(features: Features) -> list[str]:
    return [part.strip() for part in features.action_semantics.split(";")] if features.action_semantics else []


def _is_wider_cloud(key: str, want: Feature, have: Feature) -> bool:
    """A coloured cloud serves a policy that reads positions only."""
    return "point_cloud" in key and want.shape[0] == have.shape[0] and want.shape[1] == 3 and have.shape[1] == 6


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


CALVIN_STATE = (
    "tcp_x",
    "tcp_y",
    "tcp_z",
    "tcp_roll",
    "tcp_pitch",
    "tcp_yaw",
    "gripper_width",
    *(f"joint_{number}" for number in range(1, 8)),
    "gripper_command",
)
CALVIN_SCENE = (
    *("slider", "drawer", "button", "switch", "bulb", "led"),
    *(f"{color}_block_{part}" for color in ("red", "blue", "pink") for part in ("x", "y", "z", "roll", "pitch", "yaw")),
)
CALVIN_ACTION = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


def calvin_features(
    points: int = 0,
    colors: bool = False,
    cloud: dict[str, Any] | None = None,
    *,
    relative: bool = True,
    provenance: str = "commanded",
    cameras: dict[str, tuple[int, int]] | None = None,
    depth_cameras: dict[str, tuple[int, int]] | None = None,
    environment_state: bool = False,
    source: dict[str, str] | None = None,
) -> Features:
    """Features of CALVIN's recordings and of environments that follow its conventions: 30 Hz, world frame, one arm.

    Args:
        points: points of the cloud, 0 for none.
        colors: whether points have red, green and blue in 0 to 1.
        cloud: the recipe, `lightning_robot.points.CloudRecipe.to_dict`.
        relative: scaled pose differences (0.02 m and 0.05 rad per unit); else the next absolute pose.
        provenance: "achieved" where actions are differences of recorded poses (CALVIN's own), "commanded" where they were sent.
        cameras: colour pictures by camera name, (height, width).
        depth_cameras: depth pictures by camera name, (height, width).
        environment_state: whether the scene's privileged state is offered (blocks in the order red, blue, pink).
        source: see `Features`.
    """
    if provenance not in ("achieved", "commanded"):
        raise ValueError(f"provenance {provenance!r}: use 'achieved' or 'commanded'.")
    kinds = ("position",) * 3 + ("rotation",) * 3 + ("scalar",) * 8 + ("gripper",)
    observations = {
        "observation.state": Feature((15,), unit="m, rad", names=CALVIN_STATE, kinds=kinds, frame="world"),
    }
    if points:
        observations["observation.point_cloud"] = Feature((points, 6 if colors else 3), unit="m", frame="world")
    for name, size in (cameras or {}).items():
        observations[f"observation.images.{name}"] = Feature((3, *size), dtype="uint8")
    for name, size in (depth_cameras or {}).items():
        observations[f"observation.depth.{name}"] = Feature((1, *size), unit="m")
    if environment_state:
        pose = ("position",) * 3 + ("rotation",) * 3
        observations["observation.environment_state"] = Feature(
            (24,), unit="m, rad", names=CALVIN_SCENE, kinds=("scalar",) * 6 + pose * 3, frame="world"
        )
    # A displacement turns with the scene but does not move with it: a direction, not a position.
    moves = ("direction" if relative else "position",) * 3 + ("rotation",) * 3 + ("gripper",)
    action = Feature((7,), unit="" if relative else "m, rad", names=CALVIN_ACTION, kinds=moves, frame="world")
    form = "relative" if relative else "absolute"
    return Features(
        observations=observations,
        action=action,
        action_semantics=f"{form}; {provenance}; world; gripper +1 open -1 closed",
        control_rate=30.0,
        cloud=cloud if points else None,
        source=dict(source or {}),
    )
