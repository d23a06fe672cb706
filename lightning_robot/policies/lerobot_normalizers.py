"""Normalisation as LeRobot's checkpoints store it: processor files since 0.4, tensors among the weights before.

Whatever the mode, it is ``(x - center) / spread + offset`` here:

| mode | center | spread | offset |
| --- | --- | --- | --- |
| ``MEAN_STD`` | mean | std + eps | 0 |
| ``MIN_MAX`` | min | (max - min) / 2 | -1 |
| ``QUANTILES`` | q01 | (q99 - q01) / 2 | -1 |
| ``QUANTILE10`` | q10 | (q90 - q10) / 2 | -1 |
| ``IDENTITY`` | | | |

A range of exactly zero counts as eps (1e-8). A constant element is therefore scaled by about 1e8, as there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

EPSILON = 1e-8
BOUNDS = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}
NEEDED = {"MEAN_STD": ("mean", "std"), **BOUNDS, "IDENTITY": ()}
OUR_MODES = {
    "MEAN_STD": "mean_std",
    "MIN_MAX": "limits",
    "QUANTILES": "quantiles",
    "QUANTILE10": "quantiles",
    "IDENTITY": "identity",
}
THEIR_MODES = {"mean_std": "MEAN_STD", "limits": "MIN_MAX", "quantiles": "QUANTILES", "identity": "IDENTITY"}
IN_WEIGHTS = ("normalize_inputs.", "normalize_targets.", "unnormalize_outputs.")
PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor", "policy_postprocessor"


class LeRobotCheckpointError(ValueError):
    """A LeRobot checkpoint cannot be read, or a policy cannot be written as one; says why."""


@dataclass(frozen=True)
class Scaling:
    """``(x - center) / spread + offset``, each (D,) float32."""

    center: np.ndarray
    spread: np.ndarray
    offset: np.ndarray

    @property
    def scale(self) -> np.ndarray:
        return np.float32(1) / self.spread

    @classmethod
    def from_statistics(cls, mode: str, statistics: Mapping[str, np.ndarray], epsilon: float = EPSILON) -> Scaling:
        """From statistics of any shape with D values, e.g. (3, 1, 1) for pictures; `mode` is not ``IDENTITY``."""
        first, second = (np.asarray(statistics[name], np.float32).reshape(-1) for name in NEEDED[mode])
        if mode == "MEAN_STD":
            return cls(center=first, spread=second + np.float32(epsilon), offset=np.zeros_like(first))
        width = second - first
        return cls(center=first, spread=np.where(width == 0, np.float32(epsilon), width) / 2, offset=-np.ones_like(first))

    @classmethod
    def from_scale(cls, scale: np.ndarray, offset: np.ndarray, center: np.ndarray) -> Scaling:
        """From ``(x - center) * scale + offset``, with the spread whose inverse is `scale` to the bit where there is one."""
        candidates = _neighbours(1 / scale.astype(np.float64))
        return cls(center, _closest(candidates, candidates, candidates[0], scale), offset)

    def statistics(self, mode: str) -> dict[str, np.ndarray]:
        """Statistics from which `from_statistics` makes this scaling, to the bit where float32 allows it."""
        zero = 0.0 if mode == "MEAN_STD" else -1.0
        spread = self.spread.astype(np.float64)
        first = (self.center + (zero - self.offset) * spread).astype(np.float32)
        candidates = _neighbours(spread - EPSILON if mode == "MEAN_STD" else first + 2 * spread)
        if mode != "MEAN_STD":
            candidates = np.concatenate((candidates, first[None]))  # a range of zero
        made = [Scaling.from_statistics(mode, dict(zip(NEEDED[mode], (first, each)))).spread for each in candidates]
        return dict(zip(NEEDED[mode], (first, _closest(candidates, np.stack(made), self.spread, self.scale))))


def _neighbours(values: np.ndarray) -> np.ndarray:
    """(9, D): each value as float32, and the four next to it on both sides."""
    found = [values.astype(np.float32)]
    for end in (np.inf, -np.inf):
        near = found[0]
        for _ in range(4):
            near = np.nextafter(near, np.float32(end))
            found.append(near)
    return np.stack(found)


def _closest(candidates: np.ndarray, spreads: np.ndarray, spread: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Per column the one of (C, D) `candidates` whose spread has the wanted inverse, and of several the wanted spread.

    Networks see the inverse of vectors and the spread itself of pictures; several spreads have one inverse.
    """
    error = np.abs((np.float32(1) / spreads).astype(np.float64) / scale - 1) * 1e4 + np.abs(spreads / spread.astype(float) - 1)
    return candidates[np.argmin(error, axis=0), np.arange(candidates.shape[1])]


@dataclass
class Normalization:
    """What a checkpoint says about normalisation.

    Attributes:
        modes: LeRobot's mode of every feature, by its key.
        scalings: by key, for every feature whose mode is not ``IDENTITY``.
        renames: keys that LeRobot renames before anything else: the data's key → the policy's.
        in_weights: whether the statistics were among the weights, as LeRobot before 0.4 stored them.
    """

    modes: dict[str, str]
    scalings: dict[str, Scaling]
    renames: dict[str, str] = field(default_factory=dict)
    in_weights: bool = False


def read_normalization(folder: Path, config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> Normalization:
    """Reads modes and statistics of the features in ``config["input_features"]`` and ``["output_features"]``.

    Args:
        folder: with ``policy_preprocessor.json`` and ``policy_postprocessor.json``, unless an old release wrote it.
        config: LeRobot's ``config.json``.
        weights: those tensors of ``model.safetensors`` that begin with one of `IN_WEIGHTS`.

    Raises:
        LeRobotCheckpointError: statistics are missing, unset or contradict one another, or a processing step is unknown.
    """
    if (folder / f"{PREPROCESSOR}.json").is_file() and (folder / f"{POSTPROCESSOR}.json").is_file():
        return _from_processors(folder, config)
    if weights:
        return _from_weights(folder, config, weights)
    raise LeRobotCheckpointError(
        f"{folder} holds no statistics: neither {PREPROCESSOR}.json with {POSTPROCESSOR}.json (LeRobot 0.4 and newer) nor "
        f"tensors {IN_WEIGHTS[0]}* in model.safetensors (older). Without them the policy would act on values that it was not "
        "trained on. Copy the files from where the checkpoint was trained."
    )


def _from_processors(folder: Path, config: Mapping[str, Any]) -> Normalization:
    known = {"to_batch_processor", "device_processor", "rename_observations_processor"}
    before = _read_steps(folder / f"{PREPROCESSOR}.json", {*known, "normalizer_processor"})
    after = _read_steps(folder / f"{POSTPROCESSOR}.json", {*known, "unnormalizer_processor"})
    renames = dict(before.get("rename_observations_processor", ({}, {}))[0].get("rename_map", {}))
    modes: dict[str, str] = {}
    scalings: dict[str, Scaling] = {}
    for features, (settings, statistics), name in (
        (config["input_features"], before.get("normalizer_processor", ({}, {})), PREPROCESSOR),
        (config["output_features"], before.get("normalizer_processor", ({}, {})), PREPROCESSOR),
        (config["output_features"], after.get("unnormalizer_processor", ({}, {})), POSTPROCESSOR),
    ):
        only = settings.get("normalize_observation_keys")
        for key, feature in features.items():
            is_observation = key.startswith("observation")
            listed = settings.get("features", {}).get(key)
            unused = is_observation and (listed is None or (only is not None and key not in only))
            mode = "IDENTITY" if unused else settings.get("norm_map", {}).get((listed or feature)["type"], "IDENTITY")
            scaling = _scaling(key, mode, statistics.get(key, {}), f"{folder / name}.json", settings.get("eps", EPSILON))
            _add(modes, scalings, key, mode, scaling, folder)
    return Normalization(modes, scalings, renames)


def _from_weights(folder: Path, config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> Normalization:
    """The arithmetic of those releases differs in that eps is added to every range, which matters for ranges near it only."""
    modes: dict[str, str] = {}
    scalings: dict[str, Scaling] = {}
    mapping = config.get("normalization_mapping") or {}
    for key, feature in {**config["input_features"], **config["output_features"]}.items():
        mode = mapping.get(feature["type"], "IDENTITY")
        prefixes = IN_WEIGHTS[1:] if key in config["output_features"] else IN_WEIGHTS[:1]
        stored = {prefix: _below(weights, f"{prefix}buffer_{key.replace('.', '_')}.") for prefix in prefixes}
        for prefix in [prefix for prefix in prefixes if stored[prefix]] or prefixes[:1]:
            scaling = _scaling(key, mode, stored[prefix], f"{folder / 'model.safetensors'} ({prefix}*)", EPSILON)
            _add(modes, scalings, key, mode, scaling, folder)
    return Normalization(modes, scalings, in_weights=True)


def _below(weights: Mapping[str, np.ndarray], start: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}


def _add(
    modes: dict[str, str], scalings: dict[str, Scaling], key: str, mode: str, scaling: Scaling | None, folder: Path
) -> None:
    """Adds a feature's normalisation; that of the action is stored twice, for targets and for outputs."""
    if key in modes:
        other = scalings.get(key)
        same = modes[key] == mode and (
            scaling is None
            or (other is not None and all(np.array_equal(getattr(scaling, n), getattr(other, n)) for n in ("spread", "center")))
        )
        if not same:
            raise LeRobotCheckpointError(
                f"{folder}: {key} is normalised in training ({modes[key]}) otherwise than it is un-normalised in acting "
                f"({mode}); a policy has one normalisation of actions. Write both from the same statistics."
            )
    modes[key] = mode
    if scaling is not None:
        scalings[key] = scaling


def _scaling(key: str, mode: str, statistics: Mapping[str, np.ndarray], place: str, epsilon: float) -> Scaling | None:
    if mode not in NEEDED:
        raise LeRobotCheckpointError(f"{place}: {key} has the unknown normalisation {mode!r}; known are {', '.join(NEEDED)}.")
    missing = [name for name in NEEDED[mode] if name not in statistics]
    if missing:
        raise LeRobotCheckpointError(
            f"{place}: {key} is normalised by {mode}, but its {' and '.join(missing)} are not stored (stored for it: "
            f"{', '.join(sorted(statistics)) or 'nothing'}). LeRobot would pass it through un-normalised. Add the statistics "
            "of the data that the policy was trained on."
        )
    if unset := [name for name in NEEDED[mode] if not np.isfinite(statistics[name]).all()]:
        raise LeRobotCheckpointError(f"{place}: {' and '.join(unset)} of {key} were never set (infinite).")
    return None if mode == "IDENTITY" else Scaling.from_statistics(mode, statistics, epsilon)


def _read_steps(file: Path, known: set[str]) -> dict[str, tuple[dict[str, Any], dict[str, dict[str, np.ndarray]]]]:
    """Settings and statistics (feature → name → values) of each step of a processor file, by the step's name."""
    steps = {}
    for step in json.loads(file.read_text(encoding="utf-8"))["steps"]:
        name = step.get("registry_name") or step.get("class")
        settings = step.get("config", {})
        if name not in known:
            raise LeRobotCheckpointError(
                f"{file} has the step {name!r}, which changes what the policy sees or does in a way not known here; known are "
                f"{', '.join(sorted(known))}."
            )
        if settings.get("float_dtype") not in (None, "float32", "float"):
            raise LeRobotCheckpointError(f"{file}: {name} computes in {settings['float_dtype']}; only float32 is known here.")
        statistics: dict[str, dict[str, np.ndarray]] = {}
        if "state_file" in step:
            stored = file.parent / step["state_file"]
            if not stored.is_file():
                raise LeRobotCheckpointError(f"{file} names {stored.name}, which is not beside it.")
            for flat, value in load_file(stored).items():
                key, _, statistic = flat.rpartition(".")
                statistics.setdefault(key, {})[statistic] = value
        steps[name] = (settings, statistics)
    return steps


def write_processors(
    folder: Path,
    inputs: Mapping[str, dict[str, Any]],
    outputs: Mapping[str, dict[str, Any]],
    norm_map: Mapping[str, str],
    scalings: Mapping[str, Scaling],
    renames: Mapping[str, str],
) -> None:
    """Writes the two processor files and their statistics, as LeRobot 0.4 and newer read them.

    Args:
        folder: where to.
        inputs: LeRobot's features of observations: key → ``{"type", "shape"}``.
        outputs: the same of actions.
        norm_map: LeRobot's mode of each feature type.
        scalings: of every feature whose mode is not ``IDENTITY``.
        renames: the data's key → the policy's.
    """
    everything = {**inputs, **outputs}
    statistics = {}
    for key, scaling in scalings.items():
        feature = everything[key]
        shape = (-1, 1, 1) if feature["type"] == "VISUAL" else (-1,)
        for name, values in scaling.statistics(norm_map[feature["type"]]).items():
            statistics[f"{key}.{name}"] = np.ascontiguousarray(values.reshape(shape))

    def normalizer(kind: str, features: Mapping[str, Any], state_file: str) -> dict[str, Any]:
        config = {"eps": EPSILON, "features": dict(features), "norm_map": dict(norm_map)}
        return {"registry_name": kind, "config": config, "state_file": state_file}

    device = {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": None}}
    before = f"{PREPROCESSOR}_step_3_normalizer_processor.safetensors"
    after = f"{POSTPROCESSOR}_step_0_unnormalizer_processor.safetensors"
    first = [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": dict(renames)}},
        {"registry_name": "to_batch_processor", "config": {}},
        device,
        normalizer("normalizer_processor", everything, before),
    ]
    last = [normalizer("unnormalizer_processor", outputs, after), device]
    _write(folder, PREPROCESSOR, first, before, statistics)
    _write(folder, POSTPROCESSOR, last, after, _of(statistics, outputs))


def _of(statistics: Mapping[str, np.ndarray], keys: Iterable[str]) -> dict[str, np.ndarray]:
    return {name: value for name, value in statistics.items() if name.rpartition(".")[0] in keys}


def _write(folder: Path, name: str, steps: list[dict[str, Any]], state_file: str, statistics: dict[str, np.ndarray]) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"name": name, "steps": steps}, indent=2), encoding="utf-8")
    save_file(statistics, folder / state_file)
