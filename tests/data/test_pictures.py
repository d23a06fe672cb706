"""Encoded pictures: both decoders, other formats, damage, and how they travel."""

import builtins
import io
import pickle

import numpy as np
import pytest
from PIL import Image

from lightning_robot.data import pictures
from lightning_robot.data.pictures import Pictures, png_decoder, sampled_rows
from lightning_robot.data.store import StoreError
from lightning_robot.data.video import DepthCode


def encode(picture, form="PNG", **options):
    with io.BytesIO() as buffer:
        Image.fromarray(picture).save(buffer, form, **options)
        return buffer.getvalue()


def packed(contents, shape=(12, 16, 3), depth=None):
    offsets = np.cumsum([0, *map(len, contents)])
    return Pictures(np.frombuffer(b"".join(contents), np.uint8), offsets, shape, "here", depth)


@pytest.fixture(params=["kornia_rs", "Pillow"])
def decoder(request, monkeypatch):
    if request.param == "Pillow":
        monkeypatch.setattr(pictures, "png_decoder", lambda: None)
    else:
        pytest.importorskip("kornia_rs")


def test_any_kind_of_picture_and_any_order(decoder):
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 256, (5, 12, 16, 3)).astype(np.uint8)
    smooth = np.broadcast_to(np.linspace(20, 200, 16)[:, None], (12, 16, 3)).astype(np.uint8)
    contents = [encode(picture) for picture in colour]
    contents += [encode(colour[0], "TIFF"), encode(smooth, "JPEG", quality=95), encode(colour[1, ..., 0])]
    contents += [encode(np.dstack([colour[2], np.full((12, 16), 255, np.uint8)]))]
    frames = packed(contents)
    rows = np.array([4, 0, 5, 6, 7, 0, 8, 4])
    found = frames.gather(rows)
    np.testing.assert_array_equal(found[[0, 1, 2, 5, 7]], colour[[4, 0, 0, 0, 4]])
    assert np.abs(found[3].astype(int) - smooth).max() <= 4
    np.testing.assert_array_equal(found[4], np.repeat(colour[1, ..., :1], 3, -1))
    np.testing.assert_array_equal(found[6], colour[2])
    again = pickle.loads(pickle.dumps(frames))
    np.testing.assert_array_equal(again.gather(rows), found)


def test_damage_and_size_are_named(decoder):
    good = encode(np.random.default_rng(0).integers(0, 256, (12, 16, 3)).astype(np.uint8))
    frames = packed([good, good[: len(good) // 2], b"nothing"])
    for row in (1, 2):
        with pytest.raises(StoreError, match=rf"here: the picture of frame {row} cannot be decoded .*again"):
            frames.gather(np.array([0, row]))
    with pytest.raises(
        StoreError, match=r"the picture of frame 0 has the shape \(12, 16, 3\), meta/info\.json says \(16, 12, 3\)"
    ):
        packed([good], (16, 12, 3)).gather(np.array([0]))


def test_depth_pictures_become_metres():
    depth = np.random.default_rng(0).integers(0, 5000, (12, 16)).astype(np.uint16)
    found = packed([encode(depth), encode(depth, "TIFF")], (12, 16), DepthCode(unit=0.001)).gather(np.array([0, 1]))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.stack([depth, depth]) / 1000, rtol=1e-6)


def test_a_missing_decoder_is_said_once(monkeypatch, capsys):
    real = builtins.__import__

    def fails(name, *arguments, **keywords):
        if name.startswith("kornia_rs"):
            raise ImportError
        return real(name, *arguments, **keywords)

    png_decoder.cache_clear()
    monkeypatch.setattr(builtins, "__import__", fails)
    assert png_decoder() is png_decoder() is None
    assert capsys.readouterr().out.count("pip install kornia_rs") == 1
    png_decoder.cache_clear()


def test_rows_that_statistics_look_at():
    assert sampled_rows(10, 50).tolist() == list(range(10, 50))
    rows = sampled_rows(100, 1100)
    assert len(rows) == 177  # 1000^0.75
    assert (rows[0], rows[-1]) == (100, 1099)
