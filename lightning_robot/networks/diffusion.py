"""Arithmetic of diffusion: noising, and one step back by DDIM or DDPM."""

from __future__ import annotations

from typing import Literal

import numpy as np
from torch import Tensor

Prediction = Literal["sample", "epsilon"]
SamplerFormula = Literal["current", "historical"]


def add_noise(clean: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Forward process: sqrt(alpha) * clean + sqrt(1 - alpha) * noise.

    Args:
        clean: (B, H, A) normalised actions.
        noise: (B, H, A).
        timesteps: (B,) int64.
        alphas_cumprod: (K,) product of 1 - beta up to each time step.

    Returns:
        (B, H, A).
    """
    alpha = alphas_cumprod[timesteps].view(-1, 1, 1)
    return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


def ddim_step(
    noisy: Tensor,
    output: Tensor,
    alpha: float,
    alpha_previous: float,
    formula: SamplerFormula = "current",
    prediction: Prediction = "sample",
    clip: float | None = 1.0,
) -> Tensor:
    """One deterministic step of DDIM (Song et al. 2021, eta 0).

    Args:
        noisy: (B, H, A) at this time step.
        output: (B, H, A) of the network.
        alpha: cumulative product at this time step, below 1.
        alpha_previous: the same at the next smaller time step, 1 at the end.
        formula: ``current`` derives the noise from the (unclipped) output. ``historical`` puts the output itself in the
            noise's place, as diffusers did before 0.15.0 (its issue 1486): checkpoints of the original DP3 were trained
            the same way but evaluated with that formula.
        prediction: what the network predicts: the clean sample, or the noise (epsilon).
        clip: bound of the estimated clean sample; the noise stays what the network says.

    Returns:
        (B, H, A) at the previous time step.
    """
    clean = estimated_sample(noisy, output, alpha, prediction, clip)
    if prediction == "epsilon" or formula == "historical":
        noise = output
    else:
        noise = (noisy - alpha**0.5 * output) / (1 - alpha) ** 0.5
    return alpha_previous**0.5 * clean + (1 - alpha_previous) ** 0.5 * noise


def ddpm_step(
    noisy: Tensor,
    output: Tensor,
    alpha: float,
    alpha_previous: float,
    noise: Tensor | None,
    prediction: Prediction = "epsilon",
    clip: float | None = 1.0,
) -> Tensor:
    """One step of DDPM (Ho et al. 2020, equations 6 and 7) with the smaller of its two variances.

    Args:
        noisy: (B, H, A) at this time step.
        output: (B, H, A) of the network.
        alpha: cumulative product at this time step, below 1.
        alpha_previous: the same at the next smaller time step, 1 at the end.
        noise: (B, H, A) standard normal, None at the last step.
        prediction: what the network predicts: the clean sample, or the noise (epsilon).
        clip: bound of the estimated clean sample.

    Returns:
        (B, H, A) at the previous time step.
    """
    clean = estimated_sample(noisy, output, alpha, prediction, clip)
    # Of this step alone; 1 - kept is its beta. In float32, as diffusers has it: of a small beta that is the fourth digit.
    kept = float(np.float32(alpha / alpha_previous))
    remaining = (1 - alpha_previous) / (1 - alpha)
    result = (alpha_previous**0.5 * (1 - kept) / (1 - alpha)) * clean + (kept**0.5 * remaining) * noisy
    return result if noise is None else result + max(remaining * (1 - kept), 1e-20) ** 0.5 * noise


def estimated_sample(noisy: Tensor, output: Tensor, alpha: float, prediction: Prediction, clip: float | None) -> Tensor:
    """(B, H, A): the clean sample that the network's output stands for, within +-`clip`."""
    clean = output if prediction == "sample" else (noisy - (1 - alpha) ** 0.5 * output) / alpha**0.5
    return clean if clip is None else clean.clamp(-clip, clip)


def denoising_plan(alphas_cumprod: Tensor, timesteps: Tensor) -> list[tuple[int, float, float]]:
    """Time step, alpha and previous alpha of each denoising step as plain numbers: no step waits for the device.

    Args:
        alphas_cumprod: (K,).
        timesteps: (steps,) int64, falling, evenly spaced down to 0.
    """
    spacing = len(alphas_cumprod) // len(timesteps)
    alphas = alphas_cumprod.tolist()
    return [(t, alphas[t], alphas[t - spacing] if t >= spacing else 1.0) for t in timesteps.tolist()]


def check_formula(formula: str) -> None:
    """Raises ValueError for a formula that does not exist."""
    if formula not in ("current", "historical"):
        raise ValueError(f"sampler_formula must be 'current' or 'historical', not {formula!r}.")
