"""ResNets without heads: names, sizes, norms, further channels, ImageNet weights."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from lightning_robot.networks import image_backbone as module
from lightning_robot.networks.image_backbone import FrozenBatchNorm, image_backbone, load_imagenet_weights


@pytest.mark.parametrize(
    ("stage", "channels", "stride", "size"),
    [(4, 512, 32, (2, 3)), (3, 256, 16, (3, 5)), (2, 128, 8, (6, 10)), (1, 64, 4, (12, 20))],
)
def test_feature_maps(stage, channels, stride, size):
    backbone = image_backbone(last_stage=stage)
    features = backbone(torch.rand(2, 3, 48, 80))
    assert (backbone.channels, backbone.stride, backbone.weights) == (channels, stride, "random")
    assert features.shape == (2, channels, *size)
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert not any(name.startswith((f"layer{stage + 1}", "fc")) for name in backbone.state_dict())


def test_frozen_resnet18_is_torchvisions():
    from torchvision.models import resnet18
    from torchvision.ops.misc import FrozenBatchNorm2d

    torch.manual_seed(0)
    theirs = resnet18(norm_layer=FrozenBatchNorm2d).eval()
    state = {
        name: torch.rand_like(value) + 0.5 if "bn" in name or "downsample.1" in name else value
        for name, value in theirs.state_dict().items()
    }
    theirs.load_state_dict(state)
    theirs.avgpool = theirs.fc = torch.nn.Identity()
    ours = image_backbone("resnet18", norm="frozen_batch")
    ours.load_state_dict({name: value for name, value in state.items() if not name.startswith("fc.")})
    assert sum(parameter.numel() for parameter in ours.parameters()) == 11_166_912
    pictures = torch.rand(2, 3, 64, 64)
    expected = theirs(pictures).view(2, 512, 2, 2)
    torch.testing.assert_close(ours(pictures), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_dilation_is_torchvisions():
    from torchvision.models import resnet50

    torch.manual_seed(0)
    theirs = resnet50(replace_stride_with_dilation=[False, False, True]).eval()
    theirs.avgpool = theirs.fc = torch.nn.Identity()
    ours = image_backbone("resnet50", norm="batch", dilate_last=True).eval()
    ours.load_state_dict(theirs.state_dict())
    pictures = torch.rand(1, 3, 64, 64)
    assert ours.stride == 16
    torch.testing.assert_close(ours(pictures).flatten(1), theirs(pictures), rtol=1e-3, atol=1e-3)


def test_norms():
    frozen, batch, group = (image_backbone(norm=norm, last_stage=2) for norm in ("frozen_batch", "batch", "group"))
    assert {name for name, _ in frozen.named_parameters() if "bn" in name} == set()
    assert frozen.state_dict().keys() == {name for name in batch.state_dict() if not name.endswith("num_batches_tracked")}
    groups = {norm.num_channels: norm.num_groups for norm in group.modules() if isinstance(norm, torch.nn.GroupNorm)}
    assert groups == {64: 4, 128: 8}
    before = {name: value.clone() for name, value in frozen.state_dict().items()}
    frozen.train()(torch.rand(2, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())


def test_frozen_norm():
    norm = FrozenBatchNorm(4)
    norm.weight.uniform_(0.5, 1.5)
    norm.bias.normal_()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 1.5)
    x = torch.randn(2, 4, 3, 3)
    expected = torch.nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-5)
    torch.testing.assert_close(norm(x), expected)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_depth_as_a_fourth_channel():
    torch.manual_seed(0)
    color = image_backbone(last_stage=1)
    torch.manual_seed(0)
    depth = image_backbone(last_stage=1, in_channels=4)
    assert torch.equal(depth.conv1.weight[:, :3], color.conv1.weight)
    torch.testing.assert_close(depth.conv1.weight[:, 3], color.conv1.weight.mean(1))
    pictures = torch.rand(1, 3, 32, 32)
    without = torch.cat((pictures, torch.zeros(1, 1, 32, 32)), 1)
    torch.testing.assert_close(depth(without), color(pictures))
    assert image_backbone("resnet10t", in_channels=4, last_stage=1)(without).shape == (1, 64, 8, 8)


def test_narrow_backbones():
    backbone = image_backbone("resnet10t", norm="group", width=0.25)
    assert backbone.channels == 128
    assert backbone(torch.rand(1, 3, 40, 40)).shape == (1, 128, 2, 2)
    assert sum(parameter.numel() for parameter in backbone.parameters()) < 4e5
    with pytest.raises(ValueError, match="resnet10t"):
        image_backbone("resnet18", width=0.5)


def test_what_there_is_not():
    with pytest.raises(ValueError, match="no ResNet 'resnet17'"):
        image_backbone("resnet17")
    with pytest.raises(ValueError, match="stages 1 to 4"):
        image_backbone(last_stage=0)
    with pytest.raises(ValueError, match="Unknown norm 'layer'"):
        image_backbone(norm="layer")
    with pytest.raises(ValueError, match="ImageNet weights belong to batch norm"):
        image_backbone(norm="group", pretrained=True)
    with pytest.raises(ValueError, match="3 channels"):
        image_backbone(in_channels=1)


def test_no_weights_are_said(capsys):
    """The tests run offline (conftest.py), with whatever the cache holds: a name that it cannot hold."""
    backbone = image_backbone("resnet14t", pretrained=True, last_stage=1)
    assert backbone.weights == "random"
    said = capsys.readouterr().out
    assert "RANDOM weights" in said
    assert "resnet14t" in said


def test_imagenet_weights_from_a_file(tmp_path, monkeypatch):
    weights = timm.create_model("resnet18").state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr(module, "_imagenet_file", lambda name: asked.append(name) or str(tmp_path / "model.safetensors"))
    backbone = image_backbone(pretrained=True, in_channels=4, last_stage=3)
    assert asked == ["resnet18.tv_in1k"]  # torchvision's, as the published policies use
    assert backbone.weights == "resnet18.tv_in1k"
    assert torch.equal(backbone.layer3[0].conv1.weight, weights["layer3.0.conv1.weight"])
    torch.testing.assert_close(backbone.conv1.weight[:, 3], weights["conv1.weight"].mean(1))
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert not load_imagenet_weights(backbone)
