"""The rooms of the package and what each may import (CONTRIBUTING.md, "Rooms")."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_robot"
LEAVES = {"features", "geometry", "points", "unpickling", "console"}
ROOMS = {
    "networks": LEAVES,
    "transforms": LEAVES,
    "policies": LEAVES | {"networks", "transforms"},
    "data": LEAVES | {"transforms"},
    "envs": LEAVES,
    "evaluation": LEAVES | {"transforms", "policies.base"},
    "generation": LEAVES | {"transforms", "data", "envs", "evaluation"},
    "callbacks": LEAVES | {"evaluation", "policies.base"},
    "commands": None,  # anything
    "cli": None,
    "__main__": None,
    "__init__": set(),
    **dict.fromkeys(LEAVES, LEAVES),
}
FORBIDDEN_PACKAGES = {
    "networks": {"lightning", "mujoco", "zarr", "diffusers", "transformers"},
    "envs": {"lightning", "zarr", "torch"},
    "data": {"mujoco"},
    "evaluation": {"mujoco", "zarr"},
}


def imported_modules(path: Path) -> list[tuple[int, str]]:
    """Every import of the file, those inside functions included, as (line, dotted name)."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            # `from a.b import c` may name a module c: keep the longest dotted name, prefixes are matched below
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def violations(package: Path) -> list[str]:
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        room = parts[0]
        assert room in ROOMS, f"{path} lies in no room; see CONTRIBUTING.md"
        allowed = ROOMS[room]
        for line, name in imported_modules(path):
            top, _, inner = name.partition(".")
            where = f"{path.relative_to(package.parent)}:{line} imports {name}"
            if top in FORBIDDEN_PACKAGES.get(room, ()):
                found.append(where)
            if top == "lightning_robot" and allowed is not None and inner and not inner.startswith("__version__"):
                own_room = inner.split(".")[0] == room
                if not own_room and not any(inner == item or inner.startswith(item + ".") for item in allowed):
                    found.append(where)
    return found


def test_rooms_import_only_what_they_may():
    assert not violations(PACKAGE), "\n".join(violations(PACKAGE))


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("networks", "from lightning_robot.data.store import EpisodeStore"),
        ("policies", "def f():\n    import lightning_robot.evaluation.rollout"),
        ("evaluation", "from lightning_robot.policies import dp3"),
        ("envs", "import torch"),
    ],
)
def test_a_violation_is_found(tmp_path, room, line):
    package = tmp_path / "lightning_robot"
    (package / room).mkdir(parents=True)
    (package / room / "bad.py").write_text(line + "\n")
    assert len(violations(package)) == 1


def test_importing_the_package_imports_neither_torch_nor_lightning():
    code = "import sys, lightning_robot; sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
