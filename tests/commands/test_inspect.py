"""The ``inspect`` command: tables, the page, errors."""

import re
from html.parser import HTMLParser

import numpy as np

from lightning_robot.commands.inspect import main
from lightning_robot.data.store import StoreWriter


def store(path):
    arrays = {"observation.images.static": ((32, 40, 3), "uint8"), "action": ((2,), "float32")}
    writer = StoreWriter(path, arrays, 40)
    rng = np.random.default_rng(0)
    writer.append(
        {
            "observation.images.static": rng.integers(0, 255, (40, 32, 40, 3), dtype=np.uint8),
            "action": np.stack([np.zeros(40), np.linspace(0, 1, 40)], axis=1),
        }
    )
    writer.finish(np.array([15, 40]))
    return path


class Tags(HTMLParser):
    """Checks that tags close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.images = [], []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_terminal_and_page(tmp_path, capsys):
    path, page = store(tmp_path / "some<b>.zarr"), tmp_path / "page" / "a.html"
    assert main([str(path), "--html", str(page)]) == 0
    output = capsys.readouterr().out
    assert "2 episodes, 40 frames" in output
    assert "not stated" in output
    assert re.search(r"constant.*action\[0\].*always 0", output)
    text = page.read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert len(tags.images) == 16
    assert all(source.startswith("data:image/jpeg;base64,") for source in tags.images)
    assert "<script" not in text
    assert "http" not in text
    assert "some&lt;b&gt;.zarr" in text
    assert list(page.parent.iterdir()) == [page]


def test_what_is_no_dataset_is_said_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none.zarr")]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("inspect: There is no store at")
    assert "Traceback" not in errors
