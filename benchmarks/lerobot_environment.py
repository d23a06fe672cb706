"""Builds an environment with LeRobot, apart from this project's own, for side-by-side benchmarks and checks.

python benchmarks/lerobot_environment.py FOLDER [--version 0.6.1]

The environment is made by the interpreter that runs this script and uses that interpreter's torch, torchvision and torchcodec,
so that both programs of a comparison run the same ones; everything else is installed at versions that LeRobot declares.
LeRobot 0.6 declares Python 3.12: below that, its few definitions in 3.12's syntax for generics (five files) are rewritten
after installation, which changes no behaviour. Beside a torch without CUDA the operators that torchvision's compiled part
would declare are declared by a start-up file. LeRobot 0.4.4 runs on Python 3.10 and newer as it is.

Reading video by torchcodec needs the shared libraries of ffmpeg (Debian: `apt-get install ffmpeg`).
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = {
    "0.6.1": (
        "numpy<2.3 opencv-python-headless<4.14 Pillow<13 einops draccus==0.11.6 huggingface-hub==1.33.0 requests gymnasium "
        "safetensors packaging termcolor tqdm datasets==4.8.5 pandas<3 pyarrow==26.* av==15.1.0 jsonlines diffusers==0.39.*"
    ),
    "0.4.4": (
        "numpy<2.3 opencv-python-headless<4.13 Pillow<13 einops draccus==0.10.0 huggingface-hub<0.36 requests gymnasium "
        "safetensors packaging termcolor tqdm datasets<4.2 pandas<3 pyarrow av==15.1.0 jsonlines diffusers<0.36 deepdiff "
        "imageio[ffmpeg] cachebox pyserial psutil"
    ),
}
BESIDE_TORCH = {"0.6.1": [], "0.4.4": ["accelerate<2"]}  # installed without their requirements, among them torch

# Imported at every start of the environment's Python: an import hook, so that starting stays cheap.
START_UP = '''"""Declares torchvision's operators beside a torch without CUDA, at the first import of torchvision."""

import sys


class _Guard:
    library = None

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                _Guard.library = torch.library.Library("torchvision", "DEF")
                for name in ("nms", "qnms"):
                    self.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _Guard())
'''


def build(folder: Path, version: str) -> Path:
    """Makes the environment and returns its Python.

    Raises:
        RuntimeError: this interpreter has no torch or no torchvision to share.
        subprocess.CalledProcessError: pip could not install.
    """
    for needed in ("torch", "torchvision"):
        if importlib.util.find_spec(needed) is None:
            raise RuntimeError(f"{sys.executable} has no {needed}: run this script with the Python of this project.")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "install", *REQUIREMENTS[version].split()], check=True)
    wheel_folder = folder / "wheel"
    anywhere = ["--no-deps", "--python-version", "3.12", "--only-binary=:all:"]
    # declared for another Python and an older torch: downloaded as for 3.12, installed without its requirements
    subprocess.run([*pip, "download", f"lerobot=={version}", *anywhere, "-d", str(wheel_folder)], check=True)
    (wheel,) = wheel_folder.glob("lerobot-*.whl")
    again = ["--no-deps", "--force-reinstall", "--ignore-requires-python"]
    subprocess.run([*pip, "install", *again, str(wheel), *BESIDE_TORCH[version]], check=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    if sys.version_info < (3, 12):
        for file in (site / "lerobot").rglob("*.py"):
            source = file.read_text(encoding="utf-8")
            if (rewritten := without_new_generics(source)) != source:
                file.write_text(rewritten, encoding="utf-8")
    shared = Path(importlib.util.find_spec("torch").origin).parents[1]  # type: ignore[union-attr, arg-type]
    (site / "lerobot_start_up.py").write_text(START_UP, encoding="utf-8")
    (site / "zz_lerobot.pth").write_text(f"{shared}\nimport lerobot_start_up\n", encoding="utf-8")
    return python


def without_new_generics(source: str) -> str:
    """`source` with ``type A = ...``, ``class C[T](B):`` and ``def f[T: B](...)`` in the syntax of Python 3.11."""
    rewritten = re.sub(r"^type (\w+) = ", r"\1 = ", source, flags=re.MULTILINE)
    pattern = re.compile(r"^((?:@.*\n)*)(class|def) (\w+)\[([^\]]+)\](\()?(.*)$", re.MULTILINE)

    def old(match: re.Match[str]) -> str:
        decorators, kind, name, parameters, bracket, rest = match.groups()
        names = [parameter.split(":")[0].strip() for parameter in parameters.split(",")]
        variables = "".join(f'{each} = __import__("typing").TypeVar("{each}")\n' for each in names) + decorators
        if kind == "def":
            return f"{variables}def {name}({rest}"
        generic = f'__import__("typing").Generic[{", ".join(names)}]'
        if bracket is None:
            return f"{variables}class {name}({generic}){rest}"
        bases, _, rest = rest.partition(")")
        return f"{variables}class {name}({bases}, {generic}){rest}"

    return pattern.sub(old, rewritten)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--version", default="0.6.1", choices=list(REQUIREMENTS))
    args = parser.parse_args()
    python = build(args.folder, args.version)
    report = "import lerobot, torch; print('LeRobot', lerobot.__version__, 'beside torch', torch.__version__)"
    subprocess.run([str(python), "-c", report], check=True)
    print(python)


if __name__ == "__main__":
    main()
