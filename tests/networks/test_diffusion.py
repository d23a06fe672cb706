"""The arithmetic of diffusion, against diffusers and the published tables."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from lightning_robot.networks.diffusion import add_noise, check_formula, ddim_step, ddpm_step, denoising_plan


@pytest.fixture
def schedule():
    made = DDIMScheduler(
        num_train_timesteps=100,
        beta_schedule="squaredcos_cap_v2",
        clip_sample=True,
        set_alpha_to_one=True,
        steps_offset=0,
        prediction_type="sample",
    )
    made.set_timesteps(10)
    return made


def test_noising_is_that_of_diffusers(schedule):
    torch.manual_seed(0)
    clean, noise, timesteps = torch.randn(4, 16, 7), torch.randn(4, 16, 7), torch.tensor([0, 7, 50, 99])
    expected = schedule.add_noise(clean, noise, timesteps)
    torch.testing.assert_close(add_noise(clean, noise, timesteps, schedule.alphas_cumprod), expected)


def test_current_steps_are_those_of_diffusers(schedule):
    torch.manual_seed(0)
    plan = denoising_plan(schedule.alphas_cumprod, schedule.timesteps)
    assert [t for t, _, _ in plan] == list(range(90, -1, -10))
    for t, alpha, alpha_previous in plan:
        noisy, prediction = torch.randn(2, 16, 7), torch.randn(2, 16, 7) * 1.5
        expected = schedule.step(prediction, t, noisy).prev_sample
        torch.testing.assert_close(ddim_step(noisy, prediction, alpha, alpha_previous), expected, rtol=0, atol=2e-6)


def test_both_formulas_end_in_the_clipped_prediction():
    noisy, prediction = torch.randn(2, 16, 7), torch.randn(2, 16, 7) * 2
    for formula in ("current", "historical"):
        assert torch.equal(ddim_step(noisy, prediction, 0.99, 1.0, formula), prediction.clamp(-1, 1))
    a, b = ddim_step(noisy, prediction, 0.5, 0.6, "current"), ddim_step(noisy, prediction, 0.5, 0.6, "historical")
    assert (a - b).abs().max() > 0.1


def test_published_tables(shared, schedule):
    published = json.loads((shared / "golden" / "dp3_schedules_and_sampler.json").read_text())
    torch.testing.assert_close(schedule.betas, torch.tensor(published["squaredcos_cap_v2_betas_100"]), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(schedule.alphas_cumprod, torch.tensor(published["alphas_cumprod_100"]), rtol=1e-6, atol=1e-9)


def test_unknown_formula():
    with pytest.raises(ValueError, match="'current' or 'historical', not 'old'"):
        check_formula("old")


@pytest.mark.parametrize("clip", [1.0, 2.5, None])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("steps", [100, 16, 10])
def test_steps_are_those_of_diffusers(steps, prediction, clip):
    """Both samplers, also where the steps do not divide the time steps."""
    torch.manual_seed(0)
    options = {
        "num_train_timesteps": 100,
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": clip is not None,
        "clip_sample_range": clip or 1.0,
        "prediction_type": prediction,
    }
    ddim, ddpm = DDIMScheduler(**options), DDPMScheduler(**options)
    for schedule in (ddim, ddpm):
        schedule.set_timesteps(steps)
    assert torch.equal(ddim.timesteps, ddpm.timesteps)
    for t, alpha, alpha_previous in denoising_plan(ddim.alphas_cumprod, ddim.timesteps)[:: max(1, steps // 10)]:
        noisy, output = torch.randn(2, 16, 7), torch.randn(2, 16, 7)
        tolerance = {"rtol": 1e-4, "atol": 1e-5}
        found = ddim_step(noisy, output, alpha, alpha_previous, prediction=prediction, clip=clip)
        torch.testing.assert_close(found, ddim.step(output, t, noisy).prev_sample, **tolerance)
        expected = ddpm.step(output, t, noisy, generator=torch.Generator().manual_seed(t)).prev_sample
        noise = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(t)) if t > 0 else None
        torch.testing.assert_close(
            ddpm_step(noisy, output, alpha, alpha_previous, noise, prediction, clip), expected, **tolerance
        )


def test_published_ddim_values(schedule):
    noisy, output = torch.tensor([0.5, -1.7]), torch.tensor([0.3, -0.2])
    plan = {t: pair for t, *pair in denoising_plan(schedule.alphas_cumprod, schedule.timesteps)}
    for t, expected in {50: (0.50766641, -0.91654950), 0: (0.49261796, -1.0)}.items():
        found = ddim_step(noisy, output, *plan[t], prediction="epsilon")
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)
