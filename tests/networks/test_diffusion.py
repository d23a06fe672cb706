"""The arithmetic of diffusion, against diffusers and the published tables."""

import json

import pytest
import torch
from diffusers import DDIMScheduler

from lightning_robot.networks.diffusion import add_noise, check_formula, ddim_step, denoising_plan


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
