"""The package beside a torch without CUDA, and the environment that the tests run in."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
@pytest.mark.parametrize("module", ["torchmetrics", "timm"])
def test_torchvision_imports_beside_this_torch(module):
    code = f"import lightning_robot, {module}, torchvision.transforms"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(not os.environ.get("CI"), reason="concerns the continuous-integration machine, which has no GPU")
def test_no_cuda_package_is_installed():
    import torch

    assert torch.version.cuda is None
    names = [distribution.metadata["Name"] or "" for distribution in importlib.metadata.distributions()]
    assert not [name for name in names if name.startswith("nvidia-")]


def test_environments_are_registered_without_torch():
    code = "import sys, gymnasium, lightning_robot.envs; gymnasium.spec('lightning_robot/PlayTable-v0')"
    code += "; sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_unknown_environment_names_the_missing_package():
    from lightning_robot.envs import make_environment

    with pytest.raises(ModuleNotFoundError, match="no package 'no_such_package'"):
        make_environment("no_such_package/Env-v0")
