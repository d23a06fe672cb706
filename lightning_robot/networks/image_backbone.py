"""ResNets that turn pictures into feature maps: timm's, without pooling and classifier."""

from __future__ import annotations

import socket
from functools import partial
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import Tensor, nn

from lightning_robot.console import say

Norm = Literal["frozen_batch", "batch", "group"]


def image_backbone(
    name: str = "resnet18",
    *,
    norm: Norm = "frozen_batch",
    pretrained: bool = False,
    in_channels: int = 3,
    last_stage: int = 4,
    dilate_last: bool = False,
    width: float = 1.0,
) -> Any:
    """A ResNet that returns its last feature map.

    Its modules have torchvision's and timm's names (``conv1``, ``bn1``, ``layer1`` ...); memory format is channels-last.

    Args:
        name: one of timm's ResNets, e.g. ``resnet18``, ``resnet34``, ``resnet50``, ``resnet10t``; with a tag after a dot
            (``resnet18.a1_in1k``) also which ImageNet weights.
        norm: ``frozen_batch``: batch norm whose statistics and affine values never change, for ImageNet weights;
            ``batch``: trainable batch norm; ``group``: group norm with 16 channels per group, for training from scratch.
        pretrained: fetch ImageNet weights, see `load_imagenet_weights`.
        in_channels: 3, or more: RGB and depth.
        last_stage: 1 to 4: the last group of blocks kept. The stride is 4, 8, 16, 32 after the first, second, third, fourth.
        dilate_last: the fourth stage keeps the third's stride and dilates its filters instead.
        width: share of the published channels, for small backbones without ImageNet weights; below 1 for deep stems
            (``resnet10t``) alone.

    Returns:
        A module, (B, `in_channels`, height, width) to (B, C, h, w), with the attributes ``channels`` (C), ``stride`` (between
        pixels and places of the feature map) and ``weights`` (``"random"``, or the name of the ImageNet weights).

    Raises:
        ValueError: no such ResNet, or options that do not go together.
    """
    import timm  # a second, and only policies that see pictures need it

    if not 1 <= last_stage <= 4:
        raise ValueError(f"last_stage={last_stage}: a ResNet has the stages 1 to 4 (of a policy: backbone_stages).")
    if in_channels < 3:
        raise ValueError(f"in_channels={in_channels}: pictures have 3 channels, with depth 4.")
    if pretrained and norm == "group":
        raise ValueError("ImageNet weights belong to batch norm: use norm='frozen_batch' or 'batch', or pretrained=False.")
    norms: dict[str, Any] = {"frozen_batch": FrozenBatchNorm, "batch": partial(nn.BatchNorm2d, eps=1e-5), "group": _group_norm}
    if norm not in norms:
        raise ValueError(f"Unknown norm {norm!r} of the image backbone; use {', '.join(norms)}.")
    if name.partition(".")[0] not in timm.list_models("*resnet*"):
        raise ValueError(f"backbone: timm has no ResNet {name!r}; it has resnet18, resnet34, resnet50, resnet10t and others.")
    options: dict[str, Any] = {}
    if width != 1:
        if pretrained or not name.endswith("t"):
            raise ValueError(
                f"width={width} (of a policy: backbone_width) is for ResNets whose names end in t, e.g. resnet10t, without "
                f"ImageNet weights; {name} has width 1."
            )
        if int(32 * width) < 1:
            raise ValueError(f"width={width} (of a policy: backbone_width) leaves the backbone no channel.")
        options = {"stem_width": int(32 * width), "channels": tuple(int(count * width) for count in (64, 128, 256, 512))}
    backbone: Any = timm.create_model(
        name.partition(".")[0],
        num_classes=0,
        global_pool="",
        norm_layer=norms[norm],
        output_stride=16 if dilate_last else 32,
        zero_init_last=False,  # with frozen norms these zeros would stay
        **options,
    )
    if not hasattr(backbone, "layer4"):
        raise ValueError(f"{name!r} has no stages layer1 to layer4: it is no plain ResNet.")
    for stage in range(last_stage + 1, 5):
        setattr(backbone, f"layer{stage}", nn.Identity())
    _widen_first(backbone, in_channels)
    information = backbone.feature_info[last_stage]
    backbone.channels, backbone.stride = information["num_chs"], information["reduction"]
    backbone.architecture, backbone.weights = name, "random"
    if pretrained:
        load_imagenet_weights(backbone)
    return backbone.to(memory_format=torch.channels_last)


def load_imagenet_weights(backbone: Any) -> bool:
    """Gives a backbone with batch norm ImageNet weights: torchvision's where timm has them, as published policies use.

    They come from timm's cache, or over the network. Where neither has them the backbone keeps its random weights, and a
    sentence says so.

    Args:
        backbone: made by `image_backbone`.

    Returns:
        Whether the backbone now has ImageNet weights, which its attribute ``weights`` then names.
    """
    import timm
    from safetensors.torch import load_file

    name = backbone.architecture
    if "." not in name and timm.is_model_pretrained(f"{name}.tv_in1k"):
        name = f"{name}.tv_in1k"
    try:
        state = load_file(_imagenet_file(name))
    except Exception as error:  # no network, no such weights, a broken file: each library below has its own errors
        say(
            f"No ImageNet weights: {name} is neither in the cache of huggingface_hub nor to be had over the network "
            f"({type(error).__name__}). The image backbone starts from RANDOM weights; with frozen batch norm it hardly "
            "learns so: train it with group norm or trainable batch norm, or bring the weights into that cache."
        )
        return False
    own = backbone.state_dict()
    first = _first_convolution(backbone)
    state[first] = _widened(state[first], own[first].shape[1])
    backbone.load_state_dict({key: state[key] for key in own})
    backbone.weights = name
    return True


class FrozenBatchNorm(nn.Module):
    """Batch norm that never changes: affine values and running statistics are buffers; eps 1e-5.

    Args:
        channels: C.
        device: as of torch's modules.
        dtype: likewise.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to the same."""
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift.view(-1, 1, 1).to(x.dtype), x, scale.view(-1, 1, 1).to(x.dtype))


def _imagenet_file(name: str) -> str:
    """Path of the weights of a timm model: from the cache, else over the network, given up quickly where there is none."""
    import timm
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    configuration: Any = timm.get_pretrained_cfg(name)
    place = configuration.hf_hub_id, "model.safetensors"
    try:
        return hf_hub_download(*place, local_files_only=True)
    except LocalEntryNotFoundError:
        if not getproxies():  # huggingface_hub itself tries for almost a minute
            url = urlsplit(constants.ENDPOINT)
            socket.create_connection((url.hostname or "", url.port or 443), timeout=5).close()
        return hf_hub_download(*place)


def _group_norm(channels: int, device: Any = None, dtype: Any = None) -> nn.GroupNorm:
    """16 channels per group, or the next larger even share."""
    groups = max(1, channels // 16)
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels, device=device, dtype=dtype)


def _first_convolution(backbone: nn.Module) -> str:
    """Name of the weights of the first convolution: stems differ in depth."""
    return next(f"{name}.weight" for name, module in backbone.named_modules() if isinstance(module, nn.Conv2d))


def _widen_first(backbone: nn.Module, in_channels: int) -> None:
    convolution: Any = backbone.get_submodule(_first_convolution(backbone).removesuffix(".weight"))
    convolution.weight = nn.Parameter(_widened(convolution.weight.detach(), in_channels))
    convolution.in_channels = in_channels


def _widened(filters: Tensor, in_channels: int) -> Tensor:
    """(O, 3, k, k) to (O, `in_channels`, k, k): further channels get the mean of the filters of red, green and blue."""
    mean = filters.mean(1, keepdim=True)
    return torch.cat((filters, *[mean] * (in_channels - filters.shape[1])), 1)
