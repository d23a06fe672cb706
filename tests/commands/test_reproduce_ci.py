"""Two claims of the ledger, trained and judged from nothing through the real command line: about two minutes."""

import json

import pytest

from lightning_robot.__main__ import main


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ci_dp3_play_table", "ci_act_so101"])
def test_a_small_claim_is_reproduced(name, tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_ROBOT_CACHE", str(tmp_path / "cache"))
    assert main(["reproduce", name, "--root", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "reproduce" / name / "latest" / "reproduction.json").read_text())
    assert written["verdict"] in ("reproduced", "above")
