"""Lightning Robot: a PyTorch Lightning collection for robot learning.

Importing the package costs nothing: torch and lightning are imported by the modules that need them.
"""

import importlib.abc
import sys
from typing import Any

__version__ = "0.1.0"


class _TorchvisionGuard(importlib.abc.MetaPathFinder):
    """Lets the Python part of a CUDA-built torchvision import beside a CPU build of torch.

    torchmetrics, lightning and timm import torchvision whenever it is installed. Beside a torch without CUDA its compiled
    part cannot load, and the import fails with "operator torchvision::nms does not exist". Declaring the two operator
    schemas first is enough. The guard acts at the first import of torchvision, so that `import lightning_robot` stays free
    of torch.
    """

    library: Any = None  # kept alive: torch forgets the schemas with the object

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None and not _torchvision_operators_load():
                _TorchvisionGuard.library = torch.library.Library("torchvision", "DEF")
                for name in ("nms", "qnms"):
                    self.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None  # the ordinary finders load torchvision


def _torchvision_operators_load() -> bool:
    """True if torchvision's compiled operators can be loaded, tried without importing torchvision itself."""
    import ctypes
    from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
    from pathlib import Path

    spec = PathFinder.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True  # nothing to guard
    folder = Path(next(iter(spec.submodule_search_locations)))
    for suffix in EXTENSION_SUFFIXES:
        if (file := folder / f"_C{suffix}").exists():
            try:
                ctypes.CDLL(str(file))
            except OSError:
                return False
            return True
    return False


if "torchvision" not in sys.modules:
    sys.meta_path.insert(0, _TorchvisionGuard())
