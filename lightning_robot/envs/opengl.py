"""Pictures through OpenGL, also on machines without a display."""

from __future__ import annotations

import atexit
import ctypes.util
import importlib
import os
import sys
import weakref
from typing import Any

import mujoco

_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}
_HELP = (
    "No OpenGL for pictures: {reason}. On Debian or Ubuntu install one of\n"
    "  apt-get install libegl1 libgl1-mesa-dri    (EGL: uses a GPU where there is one)\n"
    "  apt-get install libosmesa6                 (software)\n"
    "and, if it is not found by itself, set MUJOCO_GL=egl or MUJOCO_GL=osmesa before Python starts. renderer='rays' draws "
    "without OpenGL."
)


class NoOpenGL(RuntimeError):
    """Pictures through OpenGL are asked for, and there is no way to draw them."""


def make_renderer(model: mujoco.MjModel, height: int, width: int) -> mujoco.Renderer:
    """A renderer of MuJoCo without shadows and reflections (many times faster in software).

    MUJOCO_GL chooses the kind of OpenGL. Without it and without a display EGL is taken, or else OSMesa.

    Raises:
        NoOpenGL: nothing works; says what to install.
    """
    try:
        if sys.platform == "linux" and not os.environ.get("MUJOCO_GL") and not os.environ.get("DISPLAY"):
            _draw_without_display()
        renderer = mujoco.Renderer(model, height, width)
    except Exception as error:  # every platform has exceptions of its own
        raise NoOpenGL(_HELP.format(reason=f"{type(error).__name__}: {error}")) from error
    flags: Any = renderer.scene.flags
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        flags[flag] = 0
    atexit.register(_close, weakref.ref(renderer))  # later its library is half gone, and it complains
    return renderer


def _close(renderer: weakref.ref[mujoco.Renderer]) -> None:
    if (alive := renderer()) is not None:
        alive.close()


def _draw_without_display() -> None:
    """Gives mujoco the context class that it would have chosen at its import had MUJOCO_GL been set then."""
    wanted = os.environ.get("PYOPENGL_PLATFORM")
    kinds = [kind for kind, library in _LIBRARIES.items() if ctypes.util.find_library(library) and wanted in (None, kind)]
    if not kinds:
        raise ImportError("neither libEGL nor libOSMesa is installed")
    context = importlib.import_module(f"mujoco.{kinds[0]}").GLContext
    renderers: Any = sys.modules[mujoco.Renderer.__module__]  # not the same module in all versions
    renderers.gl_context.GLContext = context
