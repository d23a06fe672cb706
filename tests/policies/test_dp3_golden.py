"""DP3 and Simple DP3 against values computed with the published implementation (facts/dp3_calvin.md §3)."""

import math

import pytest
import torch
from torch import nn

from lightning_robot.features import Feature, Features
from lightning_robot.networks.diffusion import add_noise, ddim_step
from lightning_robot.policies.action_diffusion import warmup_cosine
from lightning_robot.policies.dp3 import CLOUD, DP3, STATE, SimpleDP3
from lightning_robot.policies.original_dp3 import converted_state, normalizer_values

NAMES = ("dp3_small", "dp3_simple_small")
KEYS = {CLOUD: "point_cloud", STATE: "agent_pos"}


def load(shared, name):
    return torch.load(shared / "golden" / f"{name}.pt", weights_only=True)


@pytest.fixture(scope="module", params=NAMES)
def golden(request, shared):
    return load(shared, request.param)


def golden_policy(golden):
    """The policy with the file's weights, normaliser included."""
    sizes = golden["config"]
    features = Features(
        {STATE: Feature((sizes["state_dim"],)), CLOUD: Feature((sizes["num_points"], sizes["point_channels"]))},
        Feature((sizes["action_dim"],)),
    )
    policy = {"dp3": DP3, "simple_dp3": SimpleDP3}[sizes["variant"]](
        encoder_size=sizes["encoder_output_dim"],
        down_dims=list(sizes["down_dims"]),
        time_embedding=sizes["diffusion_step_embed_dim"],
        cloud_normalization="identity" if sizes["cloud_normalizer"] == "identity" else "limits",
        features=features.to_dict(),
    )
    policy.configure_model()
    missing, unexpected = policy.load_state_dict(converted_state(golden["state_dict"]), strict=False)
    assert not unexpected
    assert all(name.startswith("normalizer.") for name in missing)
    for key, (scale, offset) in normalizer_values(golden["state_dict"], features).items():
        if policy.normalization[key] != "identity":
            policy.normalizer.set_values(key, scale, offset)
    return policy


def our_batch(batch):
    return {key: batch["obs"][name][:, :2] for key, name in KEYS.items()} | {"action": batch["action"]}


def close(ours, theirs, tolerance):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def trainable(policy):
    """Our parameters by name, in the order of `converted_state`."""
    return dict(policy.named_parameters())


def test_normaliser(golden):
    policy = golden_policy(golden)
    for key, name in (*KEYS.items(), ("action", "action")):
        raw = golden["batch"]["action"] if key == "action" else golden["batch"]["obs"][name]
        normal = golden["normalized_batch"]["action"] if key == "action" else golden["normalized_batch"]["obs"][name]
        torch.testing.assert_close(policy.normalizer.normalize(key, raw), normal, rtol=1e-6, atol=1e-6)


def test_encoder_and_condition(golden):
    policy, expected = golden_policy(golden), golden["encoder"]
    clouds = expected["point_cloud_in"]
    critical = policy.cloud_encoder.critical_points(clouds)
    live = expected["point_mlp_max"] > 0  # elsewhere every point ties at zero, but for rounding
    assert torch.equal(critical[live], expected["argmax"][live])
    close(policy.cloud_encoder.pool(clouds), expected["point_mlp_max"], 1e-5)
    close(policy.cloud_encoder(clouds), expected["cloud_feature"], 1e-5)
    close(policy.state_encoder(expected["agent_pos_in"]), expected["state_feature"], 1e-5)
    close(policy.encode(our_batch(golden["batch"])), golden["global_cond"], 1e-5)
    with torch.no_grad():
        close(policy.encode(our_batch(golden["batch"])), golden["global_cond"], 1e-5)


@torch.no_grad()
def test_unet(golden):
    unet, expected = golden_policy(golden).unet, golden["unet"]
    for t, out in zip(expected["t"], expected["out"]):
        timesteps = torch.full((2,), int(t))
        close(unet(expected["x"], unet.conditioning(timesteps, golden["global_cond"])), out, 1e-5)
        of_time, of_condition = unet.time_modulations(timesteps), unet.condition_modulations(golden["global_cond"])
        close(unet(expected["x"], [a + b for a, b in zip(of_time, of_condition)]), out, 1e-5)


def test_loss_and_gradients(golden):
    policy, expected = golden_policy(golden), golden["loss"]
    close(policy.unet.embed_time(expected["timesteps"]), expected["timestep_embedding"], 1e-5)
    noisy = add_noise(expected["target"], expected["noise"], expected["timesteps"], policy.alphas_cumprod)
    close(noisy, expected["noisy_trajectory"], 1e-6)
    loss = policy._loss(our_batch(golden["batch"]), expected["noise"], expected["timesteps"])
    close(loss, expected["loss"], 2e-6)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in trainable(policy).items()}
    for name, gradient in converted_state(expected["grads"]).items():
        close(gradients[name], gradient, 1e-5 * gradient.abs().max().item())
    norms = converted_state(expected["grad_norms"])
    assert norms.keys() == gradients.keys()
    for name, norm in norms.items():
        assert math.isclose(gradients[name].norm().item(), float(norm), rel_tol=2e-5), name
    total = nn.utils.get_total_norm(list(gradients.values())).item()
    assert math.isclose(total, float(expected["global_grad_norm"]), rel_tol=1e-5)


@pytest.mark.parametrize("formula", ["current", "historical"])
@torch.no_grad()
def test_sample(golden, formula):
    policy, expected = golden_policy(golden), golden["sample"][formula]
    policy.hparams["sampler_formula"] = formula
    condition = policy.encode(our_batch(golden["batch"]))
    assert [step[0] for step in policy.denoising_plan] == [int(t) for t in expected["t"]]
    for index, (t, alpha, alpha_previous) in enumerate(policy.denoising_plan):
        modulations = policy.unet.conditioning(torch.full((2,), t), condition)
        output = policy.unet(expected["x_t"][index], modulations)
        close(output, expected["model_output"][index], 1e-5)
        close(ddim_step(expected["x_t"][index], output, alpha, alpha_previous, formula), expected["x_prev"][index], 1e-5)
    sample = policy._sample(condition, lambda draw: golden["sample"]["x_T"])
    close(sample, expected["normalized_sample"], 3e-5)
    close(policy.normalizer.unnormalize("action", sample), expected["action_pred"], 3e-5)
    executed = policy.normalizer.unnormalize("action", sample)[:, 1 : 1 + policy.execution_horizon]
    close(executed, expected["action"], 3e-5)


def train(policy, batches, hyper, warmup, total, steps, noise, timesteps):
    """The published loop: loss, backward, AdamW, schedule, average. Yields (loss, gradient norm, averages) per step."""
    parameters = trainable(policy)
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=hyper["lr"],
        betas=hyper["betas"],
        eps=hyper["eps"],
        weight_decay=hyper["weight_decay"],
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total))
    averages = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for step in range(steps):
        loss = policy._loss(batches[step % len(batches)], noise[step % len(noise)], timesteps[step])
        loss.backward()
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters.values()])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        decay = 0.0 if step < 2 else min(0.9999, 1 - step**-0.75)
        torch._foreach_lerp_(list(averages.values()), [p.detach() for p in parameters.values()], 1 - decay)
        yield loss.item(), norm.item(), averages


def test_five_training_steps(golden):
    policy, expected = golden_policy(golden), golden["train"]
    hyper = expected["hyper"]
    run = train(
        policy,
        [our_batch(golden["batch"])],
        hyper,
        hyper["num_warmup_steps"],
        hyper["num_training_steps"],
        5,
        expected["noise"],
        expected["timesteps"],
    )
    averages = {}
    for step, (loss, norm, averages) in enumerate(run):  # noqa: B007
        assert abs(loss - float(expected["loss"][step])) < 5e-6
        assert math.isclose(norm, float(expected["grad_norm"][step]), rel_tol=1e-4)
    for name, value in converted_state(expected["final_params"]).items():
        close(trainable(policy)[name].detach(), value, 5e-6)
    for name, value in converted_state(expected["final_ema"]).items():
        close(averages[name], value, 5e-6)


class ExactNormaliser(nn.Module):
    """The golden file's normaliser in float64; ours is float32 by design."""

    def __init__(self, golden):
        super().__init__()
        prefix = "normalizer.params_dict."
        self.values = {
            key: [golden["state_dict"][f"{prefix}{name}.{part}"].double() for part in ("scale", "offset")]
            for key, name in (*KEYS.items(), ("action", "action"))
        }

    def normalize(self, key, value):
        scale, offset = self.values[key]
        return value.double() * scale + offset


def curve_batches(golden, curve, horizon=16):
    data = golden["dataset"]
    batches = []
    for starts in curve["starts"]:
        rows = torch.stack([torch.arange(int(start), int(start) + horizon) for start in starts])
        batches.append({key: data[name][rows[:, :2]] for key, name in KEYS.items()} | {"action": data["action"][rows]})
    return batches


@pytest.mark.parametrize("run", ["published", "probe"])
@pytest.mark.parametrize("name", ["dp3", "dp3_simple"])
def test_training_curve_in_float64(shared, name, run):
    """60 steps, to 1e-9: nothing but the published arithmetic gives this."""
    golden, curve = load(shared, f"{name}_small"), load(shared, f"curve_{name}")
    policy = golden_policy(golden).double()
    policy.normalizer = ExactNormaliser(golden)
    policy.alphas_cumprod = curve["alphas_cumprod"].double()
    policy.unet.sinusoids = curve["timestep_embedding_table"].double()
    expected, hyper = curve["runs"][run]["f64"], curve["runs"][run]["hyper"]
    assert len(trainable(policy)) == len(curve["parameter_names"])
    steps = train(policy, curve_batches(golden, curve), hyper, 20, 200, 60, curve["noise"].double(), curve["timesteps"])
    for step, (loss, norm, _) in enumerate(steps):
        assert math.isclose(loss, float(expected["loss"][step]), rel_tol=1e-9), step
        assert math.isclose(norm, float(expected["grad_norm"][step]), rel_tol=1e-9), step
        if step + 1 == 50:
            total = nn.utils.get_total_norm([p.detach() for p in trainable(policy).values()]).item()
            assert math.isclose(total, expected["param_norm"]["50"], rel_tol=1e-9)


@pytest.mark.parametrize("name", ["dp3", "dp3_simple"])
def test_training_curve_in_float32(shared, name):
    """All 200 steps of the run whose weight decay and schedule leave a mark."""
    golden, curve = load(shared, f"{name}_small"), load(shared, f"curve_{name}")
    policy = golden_policy(golden)
    start = {key: value.detach().clone() for key, value in trainable(policy).items()}
    expected, hyper = curve["runs"]["probe"]["f64"], curve["runs"]["probe"]["hyper"]
    steps = train(policy, curve_batches(golden, curve), hyper, 20, 200, 200, curve["noise"], curve["timesteps"])
    averages = {}
    for step, (loss, norm, averages) in enumerate(steps):  # noqa: B007
        assert math.isclose(loss, float(expected["loss"][step]), rel_tol=3e-4), step
        assert math.isclose(norm, float(expected["grad_norm"][step]), rel_tol=2e-3), step
    final = {key: value.detach() for key, value in trainable(policy).items()}
    assert math.isclose(norm_of(final), expected["param_norm"]["200"], rel_tol=5e-6)
    assert math.isclose(norm_of(averages), expected["ema_norm"]["200"], rel_tol=5e-6)
    assert math.isclose(norm_of({k: final[k] - start[k] for k in start}), expected["update_norm"]["200"], rel_tol=1e-4)
    assert math.isclose(norm_of({k: averages[k] - start[k] for k in start}), expected["ema_update_norm"]["200"], rel_tol=1e-4)
    for key, value in converted_state(expected["params"]).items():
        close(final[key].double(), value, 2e-5)


def norm_of(values):
    return nn.utils.get_total_norm([value.double() for value in values.values()]).item()
