"""Checkpoints written by LeRobot act here as they do there, survive the way back, and are refused when they would not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "standins"))
from lerobot_golden import complete_folder, copy_folder

from lightning_robot.evaluation.controller import Controller
from lightning_robot.features import Feature, Features
from lightning_robot.policies import action_diffusion
from lightning_robot.policies.act import ACT
from lightning_robot.policies.base import load_policy
from lightning_robot.policies.diffusion_policy import DiffusionPolicy
from lightning_robot.policies.lerobot_checkpoints import export_lerobot_policy, load_lerobot_policy
from lightning_robot.policies.lerobot_normalizers import NEEDED, LeRobotCheckpointError, Scaling

ACT_NAME, OLD_NAME, DIFFUSION_NAME = "lerobot_act_small_2cam", "lerobot_act_old033", "lerobot_diffusion_small_gn16"
LEROBOT = os.environ.get("LEROBOT_PYTHON")  # Python of an environment made by benchmarks/lerobot_environment.py


@pytest.fixture(scope="module")
def folders(shared, tmp_path_factory):
    place = tmp_path_factory.mktemp("lerobot")
    return {name: complete_folder(shared / "golden" / name, place / name) for name in (ACT_NAME, OLD_NAME, DIFFUSION_NAME)}


@pytest.fixture(scope="module")
def outputs(shared):
    return {name: load_file(shared / "golden" / name / "io.safetensors") for name in (ACT_NAME, OLD_NAME, DIFFUSION_NAME)}


@pytest.fixture
def damaged(folders, tmp_path):
    """Copies of the ACT checkpoint, or another, to be changed."""
    return lambda name=ACT_NAME: copy_folder(folders[name], tmp_path / "damaged")


def raw(golden, steps_axis=False):
    batch = {name.removeprefix("raw."): value for name, value in golden.items() if name.startswith("raw.")}
    if steps_axis:
        batch = {key: value.unsqueeze(1) if key.startswith("observation") else value for key, value in batch.items()}
    return batch


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs.view_as(ours), rtol=0, atol=tolerance)


def closed_loop(policy, golden, inference_batch=1):
    """Actions of the controller for the recorded observations, from a reset on."""
    controller = Controller(policy, inference_batch=inference_batch)
    controller.reset([0], [0])
    keys = [name for name in golden if name.startswith("seq.observation")]
    actions = []
    for step in range(len(golden["seq.actions"])):
        observation = {name.removeprefix("seq."): golden[name][step].numpy() for name in keys}
        actions += controller.act([observation], [step])
    return torch.from_numpy(np.stack(actions))


@pytest.mark.parametrize("name", [ACT_NAME, OLD_NAME])
def test_act_computes_what_lerobot_does(folders, outputs, name):
    golden, policy = outputs[name], load_policy(folders[name])
    assert isinstance(policy, ACT)
    batch = raw(golden, steps_axis=True)
    with torch.no_grad():
        close(policy.predict_action_chunk(batch), golden["eval.action_chunk_unnormalized"])
    policy.train()
    actions = policy.normalizer.normalize("action", batch["action"])
    loss, parts = policy._loss(policy.observed(batch), actions, batch["action_is_pad"], golden["train.latent_noise"])
    close(loss.detach(), golden["train.loss"], 2e-6 * float(golden["train.loss"]))
    close(parts["l1"], golden["train.l1_loss"], 2e-6)
    close(parts["kl"], golden["train.kld_loss"], 2e-6)


def test_act_acts_as_lerobot_does(folders, outputs):
    golden = outputs[ACT_NAME]
    close(closed_loop(load_lerobot_policy(folders[ACT_NAME]), golden), golden["seq.actions"])


def test_old_act_executes_as_many_actions(folders, outputs):
    golden, policy = outputs[OLD_NAME], load_lerobot_policy(folders[OLD_NAME])
    batch, expected = raw(golden), golden["eval.select_action"]  # five calls with one observation
    controller = Controller(policy, num_envs=len(expected), inference_batch=len(expected))
    controller.reset(range(len(expected)), range(len(expected)))
    for step in range(expected.shape[1]):
        observations = [
            {key: value[row].numpy() for key, value in batch.items() if key.startswith("observation")}
            for row in range(len(expected))
        ]
        actions = controller.act(observations, [step] * len(expected))
        close(torch.from_numpy(np.stack(actions)), expected[:, step])


def test_diffusion_computes_what_lerobot_does(folders, outputs):
    golden, policy = outputs[DIFFUSION_NAME], load_policy(folders[DIFFUSION_NAME])
    assert isinstance(policy, DiffusionPolicy)
    batch = raw(golden)
    with torch.no_grad():
        close(policy._loss(batch, golden["evalmode.noise"], golden["evalmode.timesteps"]), golden["evalmode.loss"])
        noise = torch.cat((golden["sample.init_noise"][None], golden["sample.step_noise"]))
        chunk = policy._sample(policy.encode(batch), noise.__getitem__)[:, 1:7]
    close(chunk, golden["sample.action_chunk"])
    close(policy.normalizer.unnormalize("action", chunk), golden["sample.action_chunk_unnormalized"], 1e-4)


def test_diffusion_acts_as_lerobot_does(folders, outputs, monkeypatch):
    golden, policy = outputs[DIFFUSION_NAME], load_lerobot_policy(folders[DIFFUSION_NAME])
    chunks: list[int] = []  # seeds of the queries, in order

    def recorded(seeds, sample, draw, shape):
        if int(seeds[0]) not in chunks:
            chunks.append(int(seeds[0]))
        plan = chunks.index(int(seeds[0]))
        return golden["seq.init_noise"][plan] if draw == 0 else golden["seq.step_noise"][plan][min(draw, 9) - 1]

    monkeypatch.setattr(action_diffusion, "seeded_normal", recorded)
    close(closed_loop(policy, golden), golden["seq.actions"], 1e-4)
    assert len(chunks) == len(golden["seq.replan_steps"])


@pytest.mark.parametrize("name", [ACT_NAME, OLD_NAME, DIFFUSION_NAME])
def test_the_way_back_is_exact(folders, tmp_path, name):
    policy = load_lerobot_policy(folders[name])
    export_lerobot_policy(policy, tmp_path)
    again = load_lerobot_policy(tmp_path)
    ours, back = policy.state_dict(), again.state_dict()
    assert ours.keys() == back.keys()
    assert all(torch.equal(ours[key], back[key]) for key in ours)
    differing = {key for key, value in policy.hparams.items() if again.hparams[key] != value}
    assert differing == ({"reduction"} if name == OLD_NAME else set())  # newer LeRobot averages otherwise

    stored, written = (load_file(folder / "model.safetensors") for folder in (folders[name], tmp_path))
    stored = {key: value for key, value in stored.items() if "normalize_" not in key}
    assert stored.keys() == written.keys()
    assert all(torch.equal(stored[key], written[key]) for key in stored)
    config, old = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, folders[name]))
    assert set(config) - set(old) <= {"use_peft", "pretrained_path"} | ({"resize_shape"} if name == OLD_NAME else set())
    assert not {"pretrained_revision", "gradient_checkpointing"} & set(config)  # which LeRobot 0.4 refuses
    changed = {key for key in config if config[key] != old.get(key)} - {"use_peft", "pretrained_path"}
    assert changed <= {"drop_n_last_frames"}


def tiny_features(cameras=("wrist", "front")):
    observations = {f"observation.images.{name}": Feature((3, 40, 48), dtype="uint8") for name in cameras}
    return Features({"observation.state": Feature((3,)), **observations}, Feature((2,)))


def tiny_policy(kind, **options):
    """A small policy of ours with random weights and values of normalisation."""
    torch.manual_seed(0)
    features = tiny_features()
    if kind == "act":
        settings = {"action_horizon": 6, "hidden_size": 16, "heads": 2, "feedforward_size": 20, "encoder_layers": 1}
        settings |= {"posterior_layers": 1, "latent_size": 3, "pretrained": False, "state_normalization": "limits"}
        policy = ACT(**settings | options, features=features.to_dict())
    else:
        settings = {"action_horizon": 8, "execution_horizon": 4, "down_dims": [16, 24], "groups": 4, "keypoints": 4}
        settings |= {"time_embedding": 8, "denoising_steps": 5, "action_normalization": "mean_std"}
        policy = DiffusionPolicy(**settings | options, features=features.to_dict())
    policy.configure_model()
    for key, mode in policy.normalization.items():
        size = policy.normalizer.sizes[key]
        if mode != "identity":
            policy.normalizer.set_values(key, torch.rand(size) + 0.1, torch.randn(size))
    return policy.eval()


def tiny_observation(policy, cameras=("wrist", "front")):
    torch.manual_seed(1)
    rows, steps = 2, policy.observation_steps
    pictures = {
        f"observation.images.{name}": torch.randint(256, (rows, steps, 3, 40, 48), dtype=torch.uint8) for name in cameras
    }
    return {"observation.state": torch.randn(rows, steps, 3), **pictures}


VARIANTS = [
    ("act", {}),
    ("act", {"ensembling": {"coefficient": 0.2, "direction": "newest"}, "pre_norm": True, "use_vae": False}),
    ("act", {"execution_horizon": 3, "activation": "gelu", "state_normalization": "quantiles"}),
    ("diffusion", {}),
    ("diffusion", {"separate_encoders": False, "resize": (32, 36), "crop": (30, 34), "sampler": "ddim"}),
    ("diffusion", {"backbone_norm": "batch", "crop": None, "film_scale": False, "clip_range": None, "prediction": "sample"}),
]


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_our_policies_survive_as_lerobot_checkpoints(kind, options, tmp_path):
    policy = tiny_policy(kind, **options)
    export_lerobot_policy(policy, tmp_path)
    again = load_lerobot_policy(tmp_path)
    observation, seeds = tiny_observation(policy), torch.arange(2)
    expected = policy.predict_action_chunk(observation, noise_seeds=seeds)
    close(again.predict_action_chunk(observation, noise_seeds=seeds), expected)
    assert again.ensembling == policy.ensembling
    assert again.execution_horizon == (1 if policy.ensembling else policy.execution_horizon)
    close(again.normalizer.unnormalize("action", expected), policy.normalizer.unnormalize("action", expected), 1e-4)


@pytest.mark.skipif(LEROBOT is None, reason="LEROBOT_PYTHON names no Python that has LeRobot")
@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_lerobot_computes_what_our_exported_policy_does(kind, options, tmp_path):
    policy = tiny_policy(kind, **options)
    export_lerobot_policy(policy, tmp_path)
    observation, shape = tiny_observation(policy), (2, policy.action_horizon, 2)
    noise = torch.randn(6, *shape)
    save_file({**observation, "noise": noise}, tmp_path / "inputs.safetensors")
    script = Path(__file__).parents[1] / "standins" / "lerobot_acts.py"
    subprocess.run([str(LEROBOT), str(script), str(tmp_path)], check=True, timeout=120)
    theirs = load_file(tmp_path / "outputs.safetensors")["chunk"]
    with torch.no_grad():
        if kind == "act":
            ours = policy.predict_action_chunk(observation)[:, 0]
        else:
            chunk = policy.normalizer.unnormalize("action", policy._sample(policy.encode(observation), noise.__getitem__))
            ours = chunk[:, 1 : 1 + policy.execution_horizon]
    close(ours[:, : theirs.shape[1]], theirs)


def test_renamed_cameras_come_under_the_names_of_the_data(damaged, outputs, tmp_path):
    folder, golden = damaged(), outputs[ACT_NAME]
    change_json(folder / "policy_preprocessor.json", rename("observation.images.cam_high", "observation.images.front"))
    policy = load_lerobot_policy(folder)
    assert list(policy.features.observations)[:2] == ["observation.images.wrist", "observation.images.cam_high"]
    batch = raw(golden, steps_axis=True)
    batch["observation.images.cam_high"] = batch.pop("observation.images.front")
    close(policy.predict_action_chunk(batch), golden["eval.action_chunk_unnormalized"])
    export_lerobot_policy(policy, tmp_path / "out")
    steps = json.loads((tmp_path / "out" / "policy_preprocessor.json").read_text())["steps"]
    assert steps[0]["config"]["rename_map"] == {"observation.images.cam_high": "observation.images.front"}
    close(load_lerobot_policy(tmp_path / "out").predict_action_chunk(batch), golden["eval.action_chunk_unnormalized"])


def test_a_camera_without_a_name_keeps_its_key_for_lerobot(damaged, tmp_path):
    folder = damaged(OLD_NAME)
    change_json(folder / "config.json", lambda config: swap_key(config["input_features"], "observation.images.top"))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "images_top" in name]:
        tensors[name.replace("observation_images_top", "observation_image")] = tensors.pop(name)
    rewrite(folder, tensors)
    policy = load_lerobot_policy(folder)
    assert "observation.images.image" in policy.features.observations
    export_lerobot_policy(policy, tmp_path / "out")
    assert "observation.image" in json.loads((tmp_path / "out" / "config.json").read_text())["input_features"]


def swap_key(features, old):
    features["observation.image"] = features.pop(old)


def test_device_compiled_names_and_formats_of_the_writer_do_not_matter(damaged, folders):
    folder = damaged(DIFFUSION_NAME)
    for file in ("config.json", "policy_preprocessor.json", "policy_postprocessor.json"):
        (folder / file).write_text((folder / file).read_text().replace('"cpu"', '"cuda"'))
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.replace("diffusion.unet.", "diffusion.unet._orig_mod."): value for name, value in tensors.items()}
    rewrite(folder, tensors)
    policy, expected = load_lerobot_policy(folder), load_lerobot_policy(folders[DIFFUSION_NAME])
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in policy.state_dict().items())


def change_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def rewrite(folder, tensors):
    """Writes weights to a file of their own: the one that is there is a link to another checkpoint's."""
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")


def rename(old, new):
    def change(processor):
        processor["steps"][0]["config"]["rename_map"] = {old: new}

    return change


def without(*names):
    return lambda content: [content.pop(name) for name in names]


def test_tensors_that_do_not_fit_are_listed(damaged, shared):
    with pytest.raises(LeRobotCheckpointError, match=r"100 of 185 tensors(.|\n)*missing +model.backbone.bn1.bias \(64,\)"):
        load_lerobot_policy(shared / "golden" / ACT_NAME)
    folder = damaged()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.action_head.weight"] = torch.zeros(7, 64)
    tensors["model.second_head.bias"] = tensors.pop("model.action_head.bias")
    rewrite(folder, tensors)
    with pytest.raises(LeRobotCheckpointError) as raised:
        load_lerobot_policy(folder)
    table = str(raised.value)
    assert "3 of " in table
    for line in (
        "missing      model.action_head.bias",
        "(7, 64), not model.action_head.weight",
        "unexpected   model.second_head",
    ):
        assert line in table


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda c: c.update(type="smolvla"), "'smolvla'; act and diffusion can be loaded"),
        ("config.json", lambda c: c.update(attention_sinks=4), "unknown here: attention_sinks=4"),
        ("config.json", without("dim_model", "kl_weight"), "lacks dim_model, kl_weight"),
        ("config.json", lambda c: c.update(use_peft=True), "use_peft"),
        ("config.json", lambda c: c.update(feedforward_activation="glu"), "glu"),
        ("config.json", lambda c: c.update(n_obs_steps=2), "n_obs_steps=2: ACT reads one observation"),
        ("config.json", lambda c: c.update(n_heads=3), "config.json: hidden_size=64 .* heads=3.*heads is n_heads there"),
        ("config.json", lambda c: c.update(dim_model="big"), "config.json: .*not supported between"),
        ("config.json", lambda c: c.update(dim_feedforward=64), r"\(128,\), not +model.decoder.layers.0.linear1.bias"),
        ("policy_preprocessor.json", lambda p: p["steps"].append({"registry_name": "tokenizer_processor"}), "tokenizer"),
        ("policy_preprocessor.json", lambda p: p["steps"][3].update(state_file="x.safetensors"), "x.safetensors"),
        (
            "policy_preprocessor.json",
            lambda p: p["steps"][3]["config"]["norm_map"].update(STATE="QUANTILE10"),
            "observation.state is normalised by QUANTILE10, but its q10 and q90 are not stored",
        ),
        (
            "policy_postprocessor.json",
            lambda p: p["steps"][0]["config"]["norm_map"].update(ACTION="MIN_MAX"),
            "action is normalised in training .MEAN_STD. otherwise than it is un-normalised",
        ),
    ],
)
def test_what_is_unknown_or_contradictory_is_named(damaged, file, change, message):
    folder = damaged()
    change_json(folder / file, change)
    with pytest.raises(LeRobotCheckpointError, match=message):
        load_lerobot_policy(folder)


def test_missing_statistics_are_an_error(damaged):
    folder = damaged()
    (folder / "policy_preprocessor.json").unlink()
    with pytest.raises(LeRobotCheckpointError, match="holds no statistics"):
        load_lerobot_policy(folder)


def test_a_camera_without_statistics_is_an_error(damaged):
    folder = damaged()
    file = folder / "policy_preprocessor_step_3_normalizer_processor.safetensors"
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if "front.std" not in name}, file)
    with pytest.raises(LeRobotCheckpointError, match=r"observation.images.front is normalised by MEAN_STD, but its std"):
        load_lerobot_policy(folder)


def test_statistics_never_set_are_an_error(damaged):
    folder = damaged(OLD_NAME)
    tensors = load_file(folder / "model.safetensors")
    tensors["normalize_inputs.buffer_observation_state.std"].fill_(torch.inf)
    rewrite(folder, tensors)
    with pytest.raises(LeRobotCheckpointError, match=r"std of observation.state were never set"):
        load_lerobot_policy(folder)


def test_missing_and_damaged_files_are_named(tmp_path, damaged):
    with pytest.raises(FileNotFoundError, match=r"config.json is missing"):
        load_lerobot_policy(tmp_path)
    folder = damaged()
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"beside it are config.json"):
        load_lerobot_policy(folder)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(LeRobotCheckpointError, match="damaged"):
        load_lerobot_policy(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(LeRobotCheckpointError, match="damaged"):
        load_lerobot_policy(folder)


RESIZE = {"class_path": "lightning_robot.transforms.named.Resize", "init_args": {"height": 32, "width": 32}}


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("act", {"backbone_norm": "group"}, "backbone_norm: group"),
        ("act", {"backbone_stages": 3}, "backbone_stages: 3"),
        ("act", {"backbone": "resnet10t"}, "backbone: resnet10t"),
        ("act", {"transforms": [RESIZE]}, "Resize"),
        ("act", {"postprocess": [{"class_path": "lightning_robot.transforms.postprocess.Clip"}]}, "postprocess"),
        ("diffusion", {"network": "transformer", "width": 16, "layers": 1}, "network: transformer"),
        ("diffusion", {"keypoints": None}, "keypoints: null"),
        ("diffusion", {"action_horizon": 6}, "action_horizon: 6"),
        ("diffusion", {"resize": (32, 36), "crop": (30, 20)}, "a crop of .30, 20. after resize"),
    ],
)
def test_what_lerobot_cannot_express_is_refused_by_name(kind, options, reason, tmp_path):
    with pytest.raises(LeRobotCheckpointError, match=reason):
        export_lerobot_policy(tiny_policy(kind, **options), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10"])
def test_scalings_are_lerobots_arithmetic(mode):
    generator = np.random.default_rng(0)
    first = generator.normal(0, 20, 1000).astype(np.float32)
    second = generator.lognormal(0, 3, 1000).astype(np.float32)
    second[::10] = 0  # constant elements
    if mode != "MEAN_STD":
        second += first
    low, high = torch.from_numpy(first), torch.from_numpy(second)
    x, y = low + torch.randn(1000), torch.randn(1000)
    x[::20] = low[::20]
    if mode == "MEAN_STD":
        expected, back = (x - low) / (high + 1e-8), y * high + low
    else:
        width = torch.where(high == low, 1e-8, high - low)
        expected, back = 2 * (x - low) / width - 1, (y + 1) / 2 * width + low
    scaling = Scaling.from_statistics(mode, dict(zip(NEEDED[mode], (first, second))))
    scale, offset, center = (torch.from_numpy(getattr(scaling, name)) for name in ("scale", "offset", "center"))
    torch.testing.assert_close((x - center) * scale + offset, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close((y - offset) / scale + center, back, rtol=1e-6, atol=1e-5)

    known = Scaling.from_scale(scaling.scale, scaling.offset, scaling.center)  # what a policy knows
    again = Scaling.from_statistics(mode, known.statistics(mode))
    for name in ("scale", "offset", "center"):
        np.testing.assert_array_equal(getattr(again, name), getattr(scaling, name))


def test_convert_writes_a_checkpoint_for_lerobot(folders, tmp_path, capsys):
    from lightning_robot.commands.convert import main

    assert main(["lerobot-policy", str(folders[ACT_NAME]), str(tmp_path / "out")]) == 0
    assert "for LeRobot" in capsys.readouterr().out
    assert load_lerobot_policy(tmp_path / "out").action_horizon == 12
    assert main(["lerobot-policy", str(tmp_path / "none.ckpt"), str(tmp_path / "out")]) == 1
    assert "No checkpoint at" in capsys.readouterr().err
