"""Diffusion Policy against values that LeRobot 0.6.1 computed (facts/lerobot.md §2, facts/training_curves.md)."""

import json
import math
import re
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "standins"))

from curves import BFLOAT16, FLOAT32, FLOAT64, check, check_settings, follow, largest_gap

from lightning_robot.features import Feature, Features
from lightning_robot.networks.diffusion import add_noise
from lightning_robot.policies.action_diffusion import STATE
from lightning_robot.policies.diffusion_policy import DiffusionPolicy

CAMERAS = ("wrist", "front")
RENAMES = (
    (r"^diffusion\.rgb_encoder\.(\d+)\.backbone\.0\.", r"image_encoders.\1.backbone.conv1."),
    (r"^diffusion\.rgb_encoder\.(\d+)\.backbone\.1\.", r"image_encoders.\1.backbone.bn1."),
    (r"^diffusion\.rgb_encoder\.(\d+)\.pool\.nets\.", r"image_encoders.\1.keypoint_maps."),
    (r"^diffusion\.rgb_encoder\.(\d+)\.out\.", r"image_encoders.\1.output."),
    (r"^diffusion\.unet\.diffusion_step_encoder\.1\.", "unet.time_encoder.0."),
    (r"^diffusion\.unet\.diffusion_step_encoder\.3\.", "unet.time_encoder.2."),
    (r"^diffusion\.unet\.mid_modules\.", "unet.middle."),
    (r"^diffusion\.unet\.(down|up)_modules\.(\d+)\.2\.", r"unet.\1.\2.resample."),
    (r"^diffusion\.unet\.(down|up)_modules\.(\d+)\.(\d+)\.", r"unet.\1.\2.blocks.\3."),
    (r"^diffusion\.unet\.final_conv\.0\.block\.0\.", "unet.final.convolution."),
    (r"^diffusion\.unet\.final_conv\.0\.block\.1\.", "unet.final.norm."),
    (r"^diffusion\.unet\.final_conv\.1\.", "unet.output."),
    (r"\.conv1\.block\.0\.", ".first.convolution."),
    (r"\.conv1\.block\.1\.", ".first.norm."),
    (r"\.conv2\.block\.0\.", ".second.convolution."),
    (r"\.conv2\.block\.1\.", ".second.norm."),
    (r"\.cond_encoder\.1\.", ".film."),
    (r"\.residual_conv\.", ".shortcut."),
)


def our_name(name):
    name = re.sub(r"(rgb_encoder\.\d+\.backbone)\.([4-7])\.", lambda m: f"{m[1]}.layer{int(m[2]) - 3}.", name)
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return re.sub(r"^diffusion\.rgb_encoder\.", "image_encoders.", name)


def hashed(name, count):
    """The 32-bit numbers that stand for large tensors in the golden files."""
    h = np.arange(count, dtype=np.uint64) + zlib.crc32(name.encode())
    h &= 0xFFFFFFFF
    h ^= h >> 16
    h = h * 0x7FEB352D & 0xFFFFFFFF
    h ^= h >> 15
    h = h * 0x846CA68B & 0xFFFFFFFF
    return h ^ (h >> 16)


def backbone_tensor(name, shape):
    u = hashed(name, math.prod(shape)) / 2**32
    if len(shape) == 4:
        values = math.sqrt(6 / math.prod(shape[1:])) * (2 * u - 1)
    else:
        values = 0.2 * (u - 0.5) if name.endswith("bias") else 0.5 + 0.5 * u
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "golden" / "lerobot_diffusion_small_gn16"


@pytest.fixture(scope="module")
def golden(folder):
    return load_file(folder / "io.safetensors")


@pytest.fixture(scope="module")
def weights(folder):
    """LeRobot's state dict, complete, under our names."""
    state = load_file(folder / "model.safetensors")
    for entry in json.loads((folder / "state_dict_index.json").read_text())["full_state_dict"]:
        if not entry["stored"]:
            state[entry["name"]] = backbone_tensor(entry["name"], entry["shape"])
    return {our_name(name): value for name, value in state.items() if not name.endswith("pos_grid")}


class LeRobotNormaliser(nn.Module):
    """As in its processor files; ours has another rule for elements that do not vary, and is float32 by design."""

    def __init__(self, folder):
        super().__init__()
        statistics = load_file(folder / "policy_preprocessor_step_3_normalizer_processor.safetensors")
        self.values = {key: (statistics[f"{key}.min"], statistics[f"{key}.max"]) for key in (STATE, "action")}
        self.dtype = torch.float32

    def range(self, key):
        low, high = (value.to(self.dtype) for value in self.values[key])
        span = high - low
        return low, torch.where(span == 0, torch.full_like(span, 1e-8), span)

    def normalize(self, key, value):
        low, span = self.range(key)
        return 2 * (value.to(self.dtype) - low) / span - 1

    def unnormalize(self, key, value):
        low, span = self.range(key)
        return (value + 1) / 2 * span + low


def golden_policy(folder, weights, **arguments):
    """Our policy with LeRobot's configuration, weights and statistics."""
    observations = {STATE: Feature((6,))} | {f"observation.images.{name}": Feature((3, 64, 64), "uint8") for name in CAMERAS}
    policy = DiffusionPolicy(
        execution_horizon=6,
        crop=(56, 52),
        keypoints=16,
        down_dims=[32, 64, 96],
        groups=16,
        time_embedding=32,
        denoising_steps=10,
        optimizer="adam",
        features=Features(observations, Feature((6,))).to_dict(),
        **arguments,
    )
    policy.configure_model()
    missing, unexpected = policy.load_state_dict(weights, strict=False)
    assert not unexpected
    assert {name.split(".")[-1] for name in missing} == {
        *("image_mean", "image_std", "action_scale", "action_offset"),
        *("observation_state_scale", "observation_state_offset"),
    }
    policy.normalizer = LeRobotNormaliser(folder)
    set_image_statistics(policy, folder)
    return policy


@pytest.fixture
def policy(folder, weights):
    return golden_policy(folder, weights)


def set_image_statistics(policy, folder):
    """After a change of type too: the original's are float32, its arithmetic on them is the run's."""
    statistics = load_file(folder / "policy_preprocessor_step_3_normalizer_processor.safetensors")
    dtype = next(policy.parameters()).dtype
    for name, encoder in zip(CAMERAS, policy.image_encoders):
        mean, deviation = (statistics[f"observation.images.{name}.{part}"].flatten().to(dtype) for part in ("mean", "std"))
        encoder.set_statistics(mean, deviation + 1e-8)


def raw(golden):
    return {name.removeprefix("raw."): value for name, value in golden.items() if name.startswith("raw.")}


def crops(corners, rows, steps=2):
    """(cameras, 2) of the whole call, as LeRobot crops, to (rows, steps, cameras, 2)."""
    return corners.expand(rows, steps, *corners.shape)


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs.view_as(ours), rtol=0, atol=tolerance)


@torch.no_grad()
def test_networks_when_acting(policy, golden):
    policy.eval()
    batch, encoder = raw(golden), policy.image_encoders[0]
    seen = []
    encoder.backbone.register_forward_hook(lambda module, inputs, output: seen.append(output))
    condition = policy.encode(batch)
    close(seen[0], golden["evalmode.enc0_backbone"], 2e-5)
    close(encoder.keypoints(seen[0]), golden["evalmode.enc0_keypoints"])
    close(encoder.output_of(seen[0]), golden["evalmode.enc0_out"])
    close(condition, golden["evalmode.global_cond"])
    timesteps, noise = golden["evalmode.timesteps"], golden["evalmode.noise"]
    close(policy.unet.embed_time(timesteps), golden["evalmode.step_embed"])
    clean = policy.normalizer.normalize("action", batch["action"])
    close(clean, golden["norm.action"])
    noisy = add_noise(clean, noise, timesteps, policy.alphas_cumprod)
    close(noisy, golden["evalmode.noisy_action"])
    inner = {}
    blocks = {"down0_res0": policy.unet.down[0].blocks[0], "mid1": policy.unet.middle[1]}
    for name, block in blocks.items():
        block.register_forward_hook(lambda module, inputs, output, name=name: inner.update({name: output}))
    close(policy.unet(noisy, policy.unet.conditioning(timesteps, condition)), golden["evalmode.unet_out"])
    for name, value in inner.items():
        close(value, golden[f"evalmode.unet_{name}"], 5e-5)  # values up to 10
    close(policy._loss(batch, noise, timesteps), golden["evalmode.loss"], 2e-6)


def test_loss_and_gradients(policy, golden):
    policy.train()
    batch = raw(golden) | {"crop_offsets": crops(golden["trainmode.crop_ijhw"][:, :2], 3)}
    loss = policy._loss(batch, golden["trainmode.noise"], golden["trainmode.timesteps"])
    close(loss, golden["trainmode.loss"], 2e-6)
    loss.backward()
    compared = 0
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
    parameters = dict(policy.named_parameters())
    for name, value in golden.items():
        if name.startswith("trainmode.grad."):
            gradient = parameters[our_name(name.removeprefix("trainmode.grad."))].grad
            close(gradient, value, 2e-5 * value.abs().max().item())
        elif name.startswith("trainmode.grad_norm."):
            gradient = parameters[our_name(name.removeprefix("trainmode.grad_norm."))].grad
            assert math.isclose(gradient.norm().item(), float(value), rel_tol=1e-4), name
        else:
            continue
        compared += 1
    assert compared


@torch.no_grad()
def test_sample(policy, golden):
    policy.eval()
    assert [step[0] for step in policy.denoising_plan] == golden["sample.timesteps"].tolist()
    noise = torch.cat((golden["sample.init_noise"][None], golden["sample.step_noise"]))
    chunk = policy._sample(policy.encode(raw(golden)), noise.__getitem__)
    close(chunk[:, 1:7], golden["sample.action_chunk"])
    close(policy.normalizer.unnormalize("action", chunk)[:, 1:7], golden["sample.action_chunk_unnormalized"], 1e-3)


def test_schedule(policy, golden):
    torch.testing.assert_close(policy.alphas_cumprod, golden["scheduler.alphas_cumprod"], rtol=1e-6, atol=0)


# Training curves


@pytest.fixture(scope="module")
def curve(shared):
    return torch.load(shared / "golden" / "curve_diffusion.pt", weights_only=True)


def pictures(camera, number, rows):
    low, fine = (
        (hashed(f"curve/diffusion/{camera}/{number}/{part}", rows * 3 * size * size) >> 24).reshape(rows, 3, size, size)
        for part, size in (("low", 8), ("fine", 64))
    )
    pixels = (7 * low.repeat(8, 2).repeat(8, 3) + fine) // 8
    return torch.from_numpy(pixels.astype(np.uint8)).unflatten(0, (-1, 2))


@pytest.fixture(scope="module")
def batches(curve):
    """One for every step of the run, draws included."""
    made, sizes = [], curve["config"]
    for number in range(sizes["K"]):
        images = {f"observation.images.{camera}": pictures(camera, number, 2 * sizes["B"]) for camera in sizes["cameras"]}
        sums = [int(value.long().sum()) for value in images.values()]
        assert sums == curve["check"]["image_sums"][number].tolist()
        vectors = {STATE: curve["state"][number], "action": curve["action"][number]}
        offsets = crops(curve["crop_top_left"][number], sizes["B"])
        made.append(images | vectors | {"crop_offsets": offsets, "noise": curve["noise"][number]})
    return [made[step % sizes["K"]] | {"timesteps": curve["timesteps"][step]} for step in range(sizes["steps"])]


def curve_policy(folder, weights, curve, run):
    """The published run takes the policy's own settings but for the length of the warm-up, and for Adam."""
    arguments, hyper = {}, curve["runs"][run]["hyper"]
    if run != "published":
        arguments = {
            "learning_rate": hyper["lr"],
            "betas": tuple(hyper["betas"]),
            "epsilon": hyper["eps"],
            "weight_decay": hyper["weight_decay"],
        }
    return golden_policy(folder, weights, warmup_steps=curve["config"]["warmup_steps"], **arguments)


def renamed(values):
    return {our_name(name): value for name, value in values.items()}


@pytest.mark.slow
@pytest.mark.parametrize("run", ["published", "probe"])
def test_training_curve_in_float64(folder, weights, curve, batches, run):
    """Nothing but the published arithmetic gives this."""
    policy = curve_policy(folder, weights, curve, run).double()
    policy.normalizer.dtype = torch.float64
    set_image_statistics(policy, folder)
    policy.alphas_cumprod = curve["alphas_cumprod"].double()
    policy.unet.sinusoids = curve["timestep_embedding_table"].double()
    found = follow(policy, batches, 50, clip=10.0)
    check_settings(policy.trainer.optimizers[0], curve["runs"][run]["hyper"])
    check(found, curve["runs"][run], FLOAT64, curve["parameter_names"], renamed)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["published", "probe"])
def test_training_curve_in_float32(folder, weights, curve, batches, run):
    found = follow(curve_policy(folder, weights, curve, run), batches, clip=10.0)
    check(found, curve["runs"][run], FLOAT32["diffusion", run], curve["parameter_names"], renamed)


@pytest.mark.slow
def test_training_curve_in_mixed_bfloat16(folder, weights, curve, batches):
    """50 steps: the loss departs by 3.5 % at most."""
    policy = curve_policy(folder, weights, curve, "probe")
    found = follow(policy, batches, 50, clip=10.0, precision="bf16-mixed")
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert 1e-4 < largest_gap(found, curve["runs"]["probe"]) < BFLOAT16["diffusion"]
