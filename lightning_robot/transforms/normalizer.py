"""Normalisation of observations and actions: part of the policy, saved with its weights, always in float32."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_robot.features import Features
from lightning_robot.transforms.statistics import Statistics

MODES = ("limits", "mean_std", "quantiles", "identity")

CONSTANT = 1e-4
"""A range (or deviation) below this is no signal: the element is shifted, not scaled. The Diffusion Policy family's value."""


class NormalizationError(ValueError):
    """Statistics and data do not belong together."""


class Normalizer(nn.Module):
    """Maps physical units to what networks see, and back: ``x * scale + offset`` and ``(x - offset) / scale``.

    Per key one `scale` and one `offset` of the size of its last axis, float32 buffers:

    | mode | scale | offset | near-constant element |
    | --- | --- | --- | --- |
    | ``limits`` | 2 / (max - min): minimum → -1, maximum → 1 | -1 - scale · min | scale 1, offset -min |
    | ``mean_std`` | 1 / std | -mean · scale | scale 1, offset -mean |
    | ``quantiles`` | 2 / (q99 - q01) | -1 - scale · q01 | scale 1, offset -q01 |
    | ``identity`` | no buffers, values pass unchanged | | |

    Source: `LinearNormalizer` of the Diffusion Policy and DP3 code, in words (arXiv 2303.04137, 2403.03954). It reshapes data
    to the size of its statistics, so that a wrong size may pass unseen; here sizes must agree.

    Values set from elsewhere may have a `center` too, ``(x - center) * scale + offset``: where the spread is a millionth of the
    value or less, a single offset would round it away.

    A normalizer made by `from_features` has sizes but no values yet: it refuses to work until `set_statistics` or
    `load_state_dict` gave them. It is float32 whatever happens to the module around it (`half()`, bf16 parameters), and keeps
    its values when the module around it is built or moved without them (meta device, `to_empty`).
    """

    def __init__(
        self,
        statistics: Mapping[str, Statistics],
        modes: Mapping[str, str],
        names: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        """Makes a normalizer from statistics.

        Args:
            statistics: per key; needed for every key whose mode is not ``identity``.
            modes: per key one of `MODES`.
            names: per key the names of its elements, for the message on near-constant ones.

        Raises:
            NormalizationError: a key has no statistics, or an unknown mode.
        """
        super().__init__()
        self._prepare({key: statistics[key].size for key in modes if key in statistics}, modes)
        self.set_statistics(statistics, names)

    @classmethod
    def from_sizes(cls, sizes: Mapping[str, int], modes: Mapping[str, str]) -> Normalizer:
        """A normalizer without values, whose state dict has the right names and shapes."""
        normalizer = cls.__new__(cls)
        nn.Module.__init__(normalizer)
        normalizer._prepare(sizes, modes)
        return normalizer

    @classmethod
    def from_features(cls, features: Features, modes: Mapping[str, str]) -> Normalizer:
        """As `from_sizes`; sizes are those of the features' last axes."""
        offered = {**features.observations, "action": features.action}
        unknown = [key for key in modes if key not in offered]
        if unknown:
            raise NormalizationError(
                f"Normalisation of {', '.join(unknown)} is asked for, but the data offer {', '.join(offered)}."
            )
        return cls.from_sizes({key: offered[key].shape[-1] for key in modes}, modes)

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.modes)

    @property
    def is_fitted(self) -> bool:
        """True once every key that needs values has them."""
        return all(key in self._fitted for key, mode in self.modes.items() if mode != "identity")

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of every scale, offset and center: which statistics these are."""
        return fingerprint_of(dict(self.named_buffers()))

    def normalize(self, key: str, value: Tensor) -> Tensor:
        """Physical units to network units.

        Args:
            key: e.g. ``"observation.state"`` or ``"action"``.
            value: (..., D).

        Returns:
            (..., D) float32.

        Raises:
            NormalizationError: unknown key, no values yet, or D is not the size of the statistics.
        """
        values = self._values(key, value)
        if values is None:
            return value.float()
        scale, offset, center = values
        return (value.float() if center is None else value.float() - center) * scale + offset

    def unnormalize(self, key: str, value: Tensor) -> Tensor:
        """Network units to physical units; arguments as in `normalize`."""
        values = self._values(key, value)
        if values is None:
            return value.float()
        scale, offset, center = values
        physical = (value.float() - offset) / scale
        return physical if center is None else physical + center

    def set_statistics(self, statistics: Mapping[str, Statistics], names: Mapping[str, tuple[str, ...]] | None = None) -> None:
        """Computes all values from statistics, and says in one message which elements hardly vary.

        Raises:
            NormalizationError: a key has no statistics, or statistics of another size.
        """
        constant: dict[str, list[str]] = {}
        for key, mode in self.modes.items():
            if mode == "identity":
                continue
            if key not in statistics:
                raise NormalizationError(f"{key}: no statistics for mode {mode!r}; there are some for {', '.join(statistics)}.")
            scale, offset, flat = _scale_and_offset(statistics[key], mode)
            self.set_values(key, scale, offset)
            if flat.any():
                labels = (names or {}).get(key) or ()
                constant[key] = [str(labels[i]) if i < len(labels) else f"element {i}" for i in np.flatnonzero(flat)]
        if constant:
            from lightning_robot.console import say

            listed = "; ".join(f"{key}: {', '.join(elements)}" for key, elements in constant.items())
            say(f"Nearly constant (range or deviation below {CONSTANT:g}), therefore not scaled: {listed}.")

    def set_values(self, key: str, scale: Any, offset: Any, center: Any = None) -> None:
        """Sets scale and offset of one key directly, e.g. from a published checkpoint.

        Args:
            key: a key whose mode is not ``identity``.
            scale: (D,)
            offset: (D,)
            center: (D,), subtracted before scaling; None for none.
        """
        self._keep_center(key, center is not None)
        for name, value in (("scale", scale), ("offset", offset), *((("center", center),) if center is not None else ())):
            value = torch.as_tensor(value, dtype=torch.float32, device="cpu").reshape(-1)
            buffer = self.get_buffer(_buffer_name(key, name))
            _check_size(key, len(value), len(buffer))
            buffer.copy_(value)
        self._fitted.add(key)

    def extra_repr(self) -> str:
        return ", ".join(f"{key}: {mode} ({self.sizes.get(key, 'any size')})" for key, mode in self.modes.items())

    def _prepare(self, sizes: Mapping[str, int], modes: Mapping[str, str]) -> None:
        self.modes = dict(modes)
        self.sizes = {key: int(sizes[key]) for key in modes if key in sizes}
        self._fitted: set[str] = set()
        for key, mode in self.modes.items():
            if mode not in MODES:
                raise NormalizationError(f"{key}: unknown normalisation mode {mode!r}; use {', '.join(MODES)}.")
            if mode == "identity":
                continue
            if key not in self.sizes:
                raise NormalizationError(
                    f"{key}: no statistics for mode {mode!r}; there are some for {', '.join(sizes) or 'none'}."
                )
            # Device and type are explicit: the module around may be under construction on the meta device or in bf16.
            self.register_buffer(_buffer_name(key, "scale"), torch.ones(self.sizes[key], dtype=torch.float32, device="cpu"))
            self.register_buffer(_buffer_name(key, "offset"), torch.zeros(self.sizes[key], dtype=torch.float32, device="cpu"))

    def _keep_center(self, key: str, wanted: bool) -> None:
        """Creates or drops the buffer of the center: most keys have none, nor have their checkpoints."""
        name = _buffer_name(key, "center")
        if not wanted:
            self._buffers.pop(name, None)
        elif name not in self._buffers:
            device = self.get_buffer(_buffer_name(key, "scale")).device
            self.register_buffer(name, torch.zeros(self.sizes[key], dtype=torch.float32, device=device))

    def _values(self, key: str, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Scale, offset and center (where there is one), None for identity."""
        mode = self.modes.get(key)
        if mode is None:
            raise NormalizationError(f"{key}: this policy does not normalise it; it knows {', '.join(self.modes)}.")
        if key in self.sizes:
            _check_size(key, self.sizes[key], value.shape[-1])
        if mode == "identity":
            return None
        if key not in self._fitted:
            raise NormalizationError(
                f"{key}: the normalizer has no statistics yet. Train the policy (fit computes them) or load a checkpoint."
            )
        scale, offset = self.get_buffer(_buffer_name(key, "scale")), self.get_buffer(_buffer_name(key, "offset"))
        return scale, offset, self._buffers.get(_buffer_name(key, "center"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Normalizer:
        """Follows moves between devices; ignores changes of type, and whatever would drop the values."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                device = fn(buffer).device
                self._buffers[name] = buffer if device.type == "meta" else buffer.to(device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:  # type: ignore[no-untyped-def]
        """As nn.Module's; sizes are compared first, to name the key, and values keep float32."""
        for key, mode in self.modes.items():
            if mode == "identity":
                continue
            loaded = state_dict.get(prefix + _buffer_name(key, "scale"))
            if loaded is not None:
                _check_size(key, loaded.numel(), self.sizes[key])
                self._keep_center(key, prefix + _buffer_name(key, "center") in state_dict)
                self._fitted.add(key)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def fingerprint_of(buffers: Mapping[str, Tensor]) -> str:
    """`Normalizer.fingerprint` of a normaliser's buffers by name, as a state dict holds them."""
    digest = hashlib.sha256()
    for name in sorted(buffers):
        values = buffers[name].detach().float().cpu()
        digest.update(f"{name}:{tuple(values.shape)};".encode() + values.numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_size(key: str, statistics: int, data: int) -> None:
    if statistics != data:
        raise NormalizationError(
            f"{key}: statistics of size {statistics}, data of size {data}. The policy (or its statistics) belongs to other "
            "data: use the data and the robot that it was trained on, or train anew."
        )


def _buffer_name(key: str, value: str) -> str:
    return f"{key.replace('.', '_')}_{value}"


def _scale_and_offset(statistics: Statistics, mode: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale, offset (float32, as the original computes them) and which elements are near-constant, each (D,)."""
    if mode == "mean_std":
        zero, spread = statistics.mean.astype(np.float32), statistics.std.astype(np.float32)
    else:
        low, high = (statistics.q01, statistics.q99) if mode == "quantiles" else (statistics.min, statistics.max)
        zero = low.astype(np.float32)
        spread = high.astype(np.float32) - zero
    flat = spread < CONSTANT
    one = np.float32(1)
    safe = np.where(flat, one, spread)
    if mode == "mean_std":
        scale = one / safe
        offset = -zero * scale
    else:
        scale = np.where(flat, one, np.float32(2) / safe)
        offset = np.where(flat, -zero, -one - scale * zero)
    return scale, offset, flat
