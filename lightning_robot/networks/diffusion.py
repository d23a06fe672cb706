"""Arithmetic of diffusion for networks that predict the clean sample: noising, and one DDIM step."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

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
    noisy: Tensor, prediction: Tensor, alpha: float, alpha_previous: float, formula: SamplerFormula = "current"
) -> Tensor:
    """One deterministic step of DDIM (Song et al. 2021, eta 0) with clipping, for a network that predicts the clean sample.

    Args:
        noisy: (B, H, A) at this time step.
        prediction: (B, H, A) output of the network.
        alpha: cumulative product at this time step, below 1.
        alpha_previous: the same at the next smaller time step, 1 at the end.
        formula: ``current`` derives the noise from the (unclipped) prediction. ``historical`` puts the prediction itself in
            the noise's place, as diffusers did before 0.15.0 (its issue 1486): checkpoints of the original DP3 were trained
            the same way but evaluated with that formula.

    Returns:
        (B, H, A) at the previous time step.
    """
    clean = prediction.clamp(-1, 1)
    if formula == "current":
        noise = (noisy - alpha**0.5 * prediction) / (1 - alpha) ** 0.5
    else:
        noise = prediction
    return alpha_previous**0.5 * clean + (1 - alpha_previous) ** 0.5 * noise


def denoising_plan(alphas_cumprod: Tensor, timesteps: Tensor) -> list[tuple[int, float, float]]:
    """Time step, alpha and previous alpha of each denoising step as plain numbers: no step waits for the device.

    Args:
        alphas_cumprod: (K,).
        timesteps: (steps,) int64, falling, evenly spaced.
    """
    spacing = len(alphas_cumprod) // len(timesteps)
    alphas = alphas_cumprod.tolist()
    return [(t, alphas[t], alphas[t - spacing] if t >= spacing else 1.0) for t in timesteps.tolist()]


def check_formula(formula: str) -> None:
    """Raises ValueError for a formula that does not exist."""
    if formula not in ("current", "historical"):
        raise ValueError(f"sampler_formula must be 'current' or 'historical', not {formula!r}.")
