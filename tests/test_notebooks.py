"""The notebooks run from top to bottom, in a kernel of their own; they are kept without output."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (extra dev), nothing runs notebooks")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed (extra dev), nothing runs notebooks")
    import nbformat

    for name, folder in (("TMPDIR", "tmp"), ("LIGHTNING_ROBOT_CACHE", "cache"), ("IPYTHONDIR", "ipython")):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("PYTHONPATH", str(path.parents[1]))  # the same code, wherever the kernel works
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    told = "".join(output.get("text", "") for output in outputs)
    assert pictures, "a notebook shows something"
    assert "Verified: " in told
    assert "95 % interval" in told
    assert "error:" not in told, "a command that fails only returns its code"


def test_there_are_notebooks_and_they_are_kept_without_output():
    assert [path.stem for path in NOTEBOOKS] == ["01_quick_start", "02_reading_an_evaluation"]
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text())
        for cell in notebook["cells"]:
            assert cell.get("outputs", []) == [], f"{path.name}: clear the outputs before a commit"
            assert cell.get("execution_count") is None
        assert notebook["metadata"]["kernelspec"]["name"] == "python3"
        assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}, "no traces of the machine that ran it"
