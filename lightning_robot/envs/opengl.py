"""Pictures through OpenGL, also on machines without a display."""

from __future__ import annotations

import atexit
import importlib
import os
import sys
import weakref
from typing import Any

import mujoco

_HEADLESS = ("egl", "osmesa")
_HELP = (
    "No OpenGL for pictures: {reason}. On Debian or Ubuntu install one of\n"
    "  apt-get install libegl1 libgl1-mesa-dri    (EGL: uses a GPU where there is one)\n"
    "  apt-get install libosmesa6                 (software, no display)\n"
    "and, if it is not found by itself, set MUJOCO_GL=egl or MUJOCO_GL=osmesa before Python starts. renderer='rays' draws "
    "without OpenGL."
)


class NoOpenGL(RuntimeError):
    """Pictures through OpenGL are asked for, and no way to draw without a display works."""


def make_renderer(model: mujoco.MjModel, height: int, width: int) -> mujoco.Renderer:
    """A renderer of MuJoCo without shadows, reflections and multisampling (30 times faster in software).

    MUJOCO_GL chooses the kind of OpenGL; without it and without a display EGL is tried, then OSMesa.

    Raises:
        NoOpenGL: nothing works; says what to install.
    """
    chosen = os.environ.get("MUJOCO_GL", "").strip().lower()
    kinds: tuple[str, ...] = ("",)  # mujoco's own choice
    if not chosen and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        kinds = _HEADLESS
    reasons = []
    for kind in kinds:
        try:
            if kind:
                _use(kind)
            renderer = mujoco.Renderer(model, height, width)
        except Exception as error:  # each platform has exceptions of its own
            reasons.append(f"{kind or chosen or 'glfw'}: {type(error).__name__}: {str(error).strip().splitlines()[-1:] or ''}")
            continue
        flags: Any = renderer.scene.flags
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            flags[flag] = 0
        atexit.register(_close, weakref.ref(renderer))  # later its library is half gone, and it complains
        return renderer
    raise NoOpenGL(_HELP.format(reason="; ".join(reasons)))


def _close(renderer: weakref.ref[mujoco.Renderer]) -> None:
    if (alive := renderer()) is not None:
        alive.close()


def _use(kind: str) -> None:
    """Makes mujoco draw with this kind of OpenGL; it chooses for itself only once, when it is imported."""
    if kind != os.environ.get("PYOPENGL_PLATFORM", kind):
        raise NoOpenGL(f"PYOPENGL_PLATFORM is {os.environ['PYOPENGL_PLATFORM']}")
    context = importlib.import_module(f"mujoco.{kind}").GLContext
    importlib.import_module("mujoco.gl_context").GLContext = context  # type: ignore[attr-defined]
