"""Short digests of what an evaluation depends on, so that a result says of which weights, statistics and settings it is."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def fingerprint_policy(policy: Any) -> str:
    """16 hexadecimal digits of a policy's class, weights and buffers, as they are now."""
    digest = hashlib.sha256(type(policy).__name__.encode())
    if isinstance(policy, torch.nn.Module):
        for name, tensor in sorted(policy.state_dict().items()):
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{name}:{values.dtype}:{tuple(values.shape)};".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy() if values.numel() else b"")
    return digest.hexdigest()[:16]


def fingerprint_statistics(policy: Any) -> str:
    """Digest of what the policy's normaliser holds; "none" for a policy without one."""
    normalizer = getattr(policy, "normalizer", None)
    return "none" if normalizer is None else normalizer.fingerprint


def fingerprint_configuration(policy: Any) -> str:
    """16 hexadecimal digits of a policy's class and hyper-parameters, the features it was trained on included."""
    digest = hashlib.sha256(type(policy).__name__.encode())
    hyper_parameters = getattr(policy, "hparams", None) or {}
    _digest({name: value for name, value in hyper_parameters.items() if not str(name).startswith("_")}, digest)
    return digest.hexdigest()[:16]


def environment_fingerprints(stated: Mapping[str, str]) -> dict[str, str]:
    """What an environment says of itself, with ``simulator``, ``scene`` and ``renderer`` in any case.

    A scene that has no name is told by the digest of its model, where there is one.
    """
    return {
        **stated,
        "simulator": stated.get("simulator", "not stated"),
        "scene": stated.get("scene") or stated.get("model") or "not stated",
        "renderer": stated.get("renderer", "not stated"),
    }


def package_version(package: str) -> str:
    """Of an installed package, "absent" for none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _digest(value: Any, digest: Any) -> None:
    """Feeds plain containers, numbers and tensors; dicts in the order of their keys."""
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{key}=".encode())
            _digest(value[key], digest)
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _digest(item, digest)
    elif isinstance(value, torch.Tensor | np.ndarray):
        array = np.ascontiguousarray(value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else value)
        digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    else:
        digest.update(f"{value!r};".encode())
