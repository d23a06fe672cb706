"""The notebooks run from top to bottom, in a kernel of their own; they are kept without output."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
RUN = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": "."}}).execute()
nbformat.write(notebook, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path):
    pytest.importorskip("nbclient", reason="nbclient is not installed (extra dev), nothing runs notebooks")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed (extra dev), nothing runs notebooks")
    import nbformat

    environment = os.environ | {"PYTHONPATH": str(path.parents[1])}  # the same code, wherever the kernel works
    environment["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    for name, folder in (("TMPDIR", "tmp"), ("LIGHTNING_ROBOT_CACHE", "cache"), ("IPYTHONDIR", "ipython")):
        (tmp_path / folder).mkdir()
        environment[name] = str(tmp_path / folder)
    # In a process of its own: what other tests have opened and closed in this one is no business of the kernel's sockets.
    command = [sys.executable, "-c", RUN, str(path), str(tmp_path / "run.ipynb")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    notebook = nbformat.read(tmp_path / "run.ipynb", as_version=4)
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
