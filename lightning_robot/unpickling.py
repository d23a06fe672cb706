"""Reading pickles without running what they name: only listed globals are resolved, anything else is refused by name."""

from __future__ import annotations

import collections
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


class ForbiddenPickle(ValueError):
    """A pickle asks for something that a data file has no business to ask for: it may hold code."""


class Inert:
    """Stands in for a class that is not imported: keeps what the pickle gives it and does nothing.

    Attributes:
        arguments: what its constructor was called with.
        state: what ``__setstate__`` was given, None if nothing.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments = arguments
        self.named = named
        self.state: Any = None

    def __new__(cls, *arguments: Any, **named: Any) -> Inert:
        made = super().__new__(cls)
        made.arguments, made.named, made.state = arguments, named, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


class RestrictedUnpickler(pickle.Unpickler):
    """Unpickler that resolves the globals in `allowed` to what stands there and refuses every other one.

    Args:
        file: open for reading bytes.
        allowed: (module, name) -> the object to use, a real one or a stub.
        source: what the file is called in an error.
    """

    def __init__(self, file: BinaryIO, allowed: Mapping[tuple[str, str], Any], source: str = "the file", **options: Any):
        super().__init__(file, **options)
        self._allowed, self._source = allowed, source

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise ForbiddenPickle(
                f"{self._source} asks for the global {module}.{name}, which does not belong into such a file and was not "
                "loaded: it may hold code. Fetch the file again from its original place; do not unpickle it by other means."
            )
        return self._allowed[module, name]

    def persistent_load(self, identity: Any) -> Any:
        raise ForbiddenPickle(f"{self._source} refers to an object outside of itself ({identity!r:.80}); it was not loaded.")


def restricted_load(
    source: BinaryIO | bytes, allowed: Mapping[tuple[str, str], Any], name: str = "the file", **options: Any
) -> Any:
    """The first object of a pickle in which only the globals in `allowed` are resolved.

    Args:
        source: bytes, or a file open for reading bytes.
        allowed: (module, name) -> the object to use, a real one or a stub such as `Inert`.
        name: what the source is called in an error.
        options: for `pickle.Unpickler`, e.g. ``encoding``.

    Raises:
        ForbiddenPickle: names the first global that is not in `allowed`.
        ValueError: the pickle is damaged.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        return RestrictedUnpickler(file, allowed, name, **options).load()
    except ForbiddenPickle:
        raise
    except Exception as error:  # a damaged stream raises nearly anything
        raise ValueError(f"{name} is damaged: {type(error).__name__}: {error}") from error


def _numpy_globals() -> dict[tuple[str, str], Any]:
    """What pickled arrays and numpy scalars name, under numpy 1 and 2."""
    from numpy._core import multiarray, numeric

    allowed: dict[tuple[str, str], Any] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    for package in ("numpy.core", "numpy._core"):
        allowed[f"{package}.multiarray", "_reconstruct"] = multiarray._reconstruct
        allowed[f"{package}.multiarray", "scalar"] = multiarray.scalar
        if hasattr(numeric, "_frombuffer"):
            allowed[f"{package}.numeric", "_frombuffer"] = numeric._frombuffer
    return allowed


def _encode(text: str, encoding: str = "utf-8") -> bytes:
    """`_codecs.encode` for bytes written by old pickle protocols; no other codec is looked up."""
    if encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise ForbiddenPickle(f"the pickle asks for the codec {encoding!r}")
    return text.encode(encoding)


# The sentences of CALVIN's embeddings.npy are configuration objects (omegaconf) that drag their parents along.
_CONFIGURATION = {
    ("omegaconf.listconfig", "ListConfig"),
    ("omegaconf.dictconfig", "DictConfig"),
    ("omegaconf.nodes", "AnyNode"),
    ("omegaconf.base", "ContainerMetadata"),
    ("omegaconf.base", "Metadata"),
}


def load_object_array(path: str | Path) -> Any:
    """What an ``.npy`` file of Python objects holds: CALVIN's annotations, scene information and sentence vectors.

    Files without objects are read as the arrays they are. Configuration lists come back as plain lists.

    Returns:
        The object itself where the array has no axes (the usual case), else the array.

    Raises:
        ForbiddenPickle: the file names a global that such files do not need; nothing of it was run.
        ValueError: the file is damaged or no ``.npy`` file.
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            dtype = read_header(file)[2]
            if not dtype.hasobject:
                file.seek(0)
                return np.load(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is damaged or no .npy file: {error}. Fetch it again.") from error
        allowed = _numpy_globals() | {
            ("_codecs", "encode"): _encode,
            ("builtins", "dict"): dict,
            ("builtins", "list"): list,
            ("builtins", "int"): int,
            ("collections", "defaultdict"): collections.defaultdict,
            ("typing", "Any"): None,
        }
        allowed |= {(module, name): type(name, (Inert,), {}) for module, name in _CONFIGURATION}
        array = restricted_load(file, allowed, str(path))
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} holds a {type(array).__name__} where an array of objects is expected. Fetch it again.")
    return plain_values(array.item() if array.shape == () else array)


def plain_values(value: Any) -> Any:
    """Replaces configuration objects by the plain values they carry."""
    if isinstance(value, Inert):
        state = value.state if isinstance(value.state, dict) else {}
        if "_content" in state:
            return plain_values(state["_content"])
        return plain_values(state.get("_val"))
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain_values(item) for item in value]
    if isinstance(value, tuple):
        return tuple(plain_values(item) for item in value)
    return value
