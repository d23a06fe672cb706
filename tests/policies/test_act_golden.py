"""ACT against values that LeRobot 0.6.1 and 0.3.3 computed (facts/lerobot.md §2, facts/training_curves.md)."""

import json
import math
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "standins"))

from curves import BFLOAT16, FLOAT32, FLOAT64, check, check_settings, follow, largest_gap

from lightning_robot.features import Feature, Features
from lightning_robot.policies.act import ACT, STATE

RENAMES = (
    ("model.", "network."),
    ("vae_encoder_cls_embed.weight", "posterior.token"),
    ("vae_encoder_robot_state_input_proj", "posterior.state"),
    ("vae_encoder_action_input_proj", "posterior.action"),
    ("vae_encoder_latent_output_proj", "posterior.distribution"),
    ("vae_encoder.", "posterior.encoder."),
    ("backbone", "cameras.backbone"),
    ("encoder_img_feat_input_proj", "cameras.projection"),
    ("encoder_latent_input_proj", "latent"),
    ("encoder_robot_state_input_proj", "state"),
    ("encoder_1d_feature_pos_embed.weight", "positions"),
    ("decoder_pos_embed.weight", "queries"),
    ("action_head", "action"),
)


def our_name(name):
    for theirs, ours in RENAMES:
        name = name.replace(theirs, ours)
    return name


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
    elif name.endswith("running_var"):
        values = 0.75 + 0.5 * u
    else:
        values = 0.2 * (u - 0.5) if name.endswith(("bias", "running_mean")) else 0.5 + 0.5 * u
    return torch.from_numpy(values.astype(np.float32)).reshape(shape)


def complete_state(folder):
    """LeRobot's state dict, the tensors that follow the formula included."""
    state = load_file(folder / "model.safetensors")
    for entry in json.loads((folder / "state_dict_index.json").read_text())["full_state_dict"]:
        if not entry["stored"] and entry["name"] not in state and ".backbone." in entry["name"]:
            state[entry["name"]] = backbone_tensor(entry["name"], entry["shape"])
    return state


class LeRobotNormaliser(nn.Module):
    """Mean and deviation as in LeRobot's files; ours has another rule for elements that do not vary, and is float32."""

    def __init__(self, values, dtype=torch.float32):
        super().__init__()
        self.values = {key: tuple(part.to(dtype) for part in pair) for key, pair in values.items()}

    def normalize(self, key, value):
        mean, deviation = self.values[key]
        return (value.to(mean.dtype) - mean) / (deviation + 1e-8)

    def unnormalize(self, key, value):
        mean, deviation = self.values[key]
        return value * deviation + mean


def golden_policy(folder, statistics, dtype=torch.float32, **arguments):
    """Our policy with LeRobot's configuration, weights and statistics (key → mean, deviation)."""
    config = json.loads((folder / "config.json").read_text())
    sizes = {key: tuple(entry["shape"]) for key, entry in (config["input_features"] | config["output_features"]).items()}
    observations = {key: Feature(size, "uint8" if "images" in key else "float32") for key, size in sizes.items()}
    action = observations.pop("action")
    policy = ACT(
        action_horizon=config["chunk_size"],
        execution_horizon=config["n_action_steps"],
        pretrained=False,
        hidden_size=config["dim_model"],
        heads=config["n_heads"],
        feedforward_size=config["dim_feedforward"],
        encoder_layers=config["n_encoder_layers"],
        decoder_layers=config["n_decoder_layers"],
        latent_size=config["latent_dim"],
        posterior_layers=config["n_vae_encoder_layers"],
        dropout=config["dropout"],
        kl_weight=config["kl_weight"],
        features=Features(observations, action).to_dict(),
        **arguments,
    )
    policy.configure_model()
    state = complete_state(folder)
    table = state.pop("model.vae_encoder_pos_enc")
    assert torch.equal(policy.network.posterior.positions[None], table)
    ours = {our_name(name): value for name, value in state.items() if name.startswith("model.")}
    missing, unexpected = policy.load_state_dict(ours, strict=False)
    assert not unexpected
    assert {name for name in missing if not name.startswith("normalizer.")} == {
        "network.cameras.image_mean",
        "network.cameras.image_std",
    }
    policy.normalizer = LeRobotNormaliser({key: statistics[key] for key in (STATE, "action")}, dtype)
    policy.to(dtype)
    pictures = [statistics[key] for key in policy.image_keys]
    policy.set_image_statistics(*(np.stack([pair[i].flatten().double() for pair in pictures]) for i in (0, 1)))
    if dtype == torch.float64:  # the original adds it in the run's type
        policy.network.cameras.image_std.add_(1e-8)
    return policy


def batch_of(values):
    """(B, ...) of LeRobot to (B, T, ...) of ours."""
    return {key: value.unsqueeze(1) if key.startswith("observation.") else value for key, value in values.items()}


def part(values, prefix):
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs.view_as(ours), rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "golden" / "lerobot_act_small_2cam"


@pytest.fixture(scope="module")
def golden(folder):
    return load_file(folder / "io.safetensors")


@pytest.fixture(scope="module")
def statistics(folder):
    values = load_file(folder / "policy_preprocessor_step_3_normalizer_processor.safetensors")
    keys = {name.rpartition(".")[0] for name in values}
    return {key: (values[f"{key}.mean"], values[f"{key}.std"]) for key in keys}


def test_loss_inner_values_and_gradients(folder, golden, statistics):
    policy = golden_policy(folder, statistics).train()
    assert policy.image_keys == ["observation.images.wrist", "observation.images.front"]  # as listed there
    network, expected = policy.network, part(golden, "train.")
    seen = {}
    for name, module in {
        "backbone": network.cameras.backbone,
        "encoder_out": network.encoder,
        "decoder_out": network.decoder,
        "posterior": network.posterior,
        "actions_hat": network,
    }.items():
        module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
    batch = batch_of(part(golden, "raw.")) | {"latent_noise": expected["latent_noise"]}
    loss, parts = policy.compute_loss(batch)
    rows = len(batch["action"])
    close(seen["backbone"].unflatten(0, (rows, 2))[:, 1], expected["backbone_last_cam"])
    close(seen["posterior"][0], expected["mu"])
    close(seen["posterior"][1], expected["log_sigma_x2"])
    close(seen["encoder_out"].transpose(0, 1), expected["encoder_out"])
    close(seen["decoder_out"].transpose(0, 1), expected["decoder_out"])
    close(seen["actions_hat"], expected["actions_hat"])
    close(loss, expected["loss"])
    close(parts["l1"], expected["l1_valid_mean"], 2e-6)
    close(parts["kl"], expected["kld_loss"], 2e-6)
    assert not parts["l1"].requires_grad
    loss.backward()
    parameters = dict(policy.named_parameters())
    assert all(parameter.grad is not None for parameter in parameters.values())
    for name, value in part(expected, "grad.").items():
        close(parameters[our_name(name)].grad, value, 1e-5 * max(1, value.abs().max().item()))
    for name, value in part(expected, "grad_norm.").items():
        norm = parameters[our_name(name)].grad.norm().item()
        assert math.isclose(norm, value.item(), rel_tol=1e-4, abs_tol=1e-5), name


def test_reduction_over_all_actions(folder, golden, statistics):
    policy = golden_policy(folder, statistics, reduction="all").train()
    batch = batch_of(part(golden, "raw.")) | {"latent_noise": golden["train.latent_noise"]}
    _, parts = policy.compute_loss(batch)
    close(parts["l1"], golden["train.l1_all_positions_mean_padding_zeroed"], 2e-6)


@torch.no_grad()
def test_chunk_and_validation_loss(folder, golden, statistics):
    policy = golden_policy(folder, statistics).eval()
    batch = batch_of(part(golden, "raw."))
    close(policy.network(None, **policy.observed(batch)), golden["eval.action_chunk"])
    close(policy.predict_action_chunk(batch)[:, 0], golden["eval.action_chunk_unnormalized"], 1e-4)
    loss, parts = policy.compute_loss(batch)
    close(loss, golden["eval.loss"])
    assert set(parts) == {"l1"}


@torch.no_grad()
def test_checkpoint_of_lerobot_03(shared):
    folder = shared / "golden" / "lerobot_act_old033"
    state, golden = complete_state(folder), load_file(folder / "io.safetensors")
    statistics = {}
    for key in (STATE, "observation.images.top", "action"):
        buffer = f"normalize_{'targets' if key == 'action' else 'inputs'}.buffer_{key.replace('.', '_')}"
        statistics[key] = (state[f"{buffer}.mean"], state[f"{buffer}.std"])
    policy = golden_policy(folder, statistics, reduction="all")
    batch = batch_of(part(golden, "raw."))
    loss, parts = policy.train().compute_loss(batch | {"latent_noise": golden["train.latent_noise"]})
    close(loss, golden["train.loss"].squeeze())
    close(parts["l1"], golden["train.l1_loss"].squeeze())
    close(parts["kl"], golden["train.kld_loss"].squeeze())
    close(policy.eval().predict_action_chunk(batch)[:, 0], golden["eval.action_chunk_unnormalized"], 1e-4)


# Training curves


@pytest.fixture(scope="module")
def curve(shared):
    return torch.load(shared / "golden" / "curve_act.pt", weights_only=True)


def pictures(camera, number, rows):
    low, fine = (
        (hashed(f"curve/act/{camera}/{number}/{part}", rows * 3 * size * size) >> 24).reshape(rows, 3, size, size)
        for part, size in (("low", 8), ("fine", 64))
    )
    pixels = (7 * low.repeat(8, 2).repeat(8, 3) + fine) // 8
    return torch.from_numpy(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def batches(curve):
    """One for every step of the run, draws included."""
    made, sizes = [], curve["config"]
    for number in range(sizes["K"]):
        images = {f"observation.images.{camera}": pictures(camera, number, sizes["B"]) for camera in sizes["cameras"]}
        assert [int(value.long().sum()) for value in images.values()] == curve["check"]["image_sums"][number].tolist()
        names = {STATE: "state", "action": "action", "action_is_pad": "action_is_pad", "latent_noise": "noise"}
        made.append(batch_of(images | {key: curve[name][number] for key, name in names.items()}))
    return [made[step % sizes["K"]] for step in range(sizes["steps"])]


def curve_policy(folder, statistics, curve, run, dtype=torch.float32):
    """The published run takes the policy's own settings."""
    arguments, hyper = {}, curve["runs"][run]["hyper"]
    if run != "published":
        arguments = {
            "learning_rate": hyper["lr"],
            "backbone_learning_rate": hyper["lr_backbone"],
            "betas": tuple(hyper["betas"]),
            "epsilon": hyper["eps"],
            "weight_decay": hyper["weight_decay"],
            "decay": hyper["scheduler"],
            "warmup_steps": curve["config"]["warmup_steps"],
        }
    return golden_policy(folder, statistics, dtype, **arguments)


def renamed(values):
    return {our_name(name): value for name, value in values.items()}


@pytest.mark.slow
@pytest.mark.parametrize("run", ["published", "probe"])
def test_training_curve_in_float64(folder, statistics, curve, batches, run):
    """Nothing but the published arithmetic gives this."""
    policy = curve_policy(folder, statistics, curve, run, torch.float64)
    table = curve["position_2d"].double().squeeze(0).permute(1, 2, 0).flatten(0, 1)
    close(policy.network.cameras.positions, table.repeat(2, 1), 2e-6)
    policy.network.cameras.positions.copy_(table.repeat(2, 1))
    found = follow(policy, batches, 50, clip=10.0)
    check_settings(policy.trainer.optimizers[0], curve["runs"][run]["hyper"])
    check(found, curve["runs"][run], FLOAT64, curve["parameter_names"], renamed)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["published", "probe"])
def test_training_curve_in_float32(folder, statistics, curve, batches, run):
    policy = curve_policy(folder, statistics, curve, run)
    found = follow(policy, batches, clip=10.0)
    check(found, curve["runs"][run], FLOAT32["act", run], curve["parameter_names"], renamed)


@pytest.mark.slow
def test_training_curve_in_mixed_bfloat16(folder, statistics, curve, batches):
    """100 steps: the loss departs by 0.8 % at most."""
    policy = curve_policy(folder, statistics, curve, "published")
    found = follow(policy, batches, 100, clip=10.0, precision="bf16-mixed")
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert 1e-4 < largest_gap(found, curve["runs"]["published"]) < BFLOAT16["act"]


def test_the_backbone_has_a_group_of_its_own(folder, statistics, curve):
    """Of the same learning rate, as published, or another."""
    policy = curve_policy(folder, statistics, curve, "probe")
    policy._trainer = SimpleNamespace(precision_plugin=None, estimated_stepping_batches=200)
    rest, backbone = policy.configure_optimizers()["optimizer"].param_groups
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    theirs = [our_name(name) for name in curve["parameter_names"]]
    assert {names[id(p)] for p in backbone["params"]} == {name for name in theirs if ".backbone." in name}
    assert {names[id(p)] for p in rest["params"]} == {name for name in theirs if ".backbone." not in name}
