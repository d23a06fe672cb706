"""`reproduce NAME`: trains, evaluates, compares; its exit code says whether the claim holds."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest
import yaml

from lightning_robot.__main__ import main as command_line
from lightning_robot.commands import evaluate, reproduce
from lightning_robot.commands.reproduce import ABOVE, BELOW, REPRODUCED, Entry, LedgerError, judge, main, read_ledger
from lightning_robot.evaluation.result import EpisodeRecord, EvaluationResult, wilson

sys.path.insert(0, str(Path(__file__).parents[1] / "standins"))

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text()
SHIPPED = sorted((REPOSITORY / "reproductions").glob("*.yaml"))

ENTRY = {
    "claim": "a point stays where it is",
    "config": "configs/stub.yaml",
    "overrides": {"model.init_args.width": 4, "evaluation.env_kwargs": {"solved": 9}},
    "seeds": {"training": 7, "demonstrations": 0, "evaluation": 2_000_000},
    "episodes": 10,
    "measured": [{"training": 7, "successes": 9}],
    "expected": [59.6, 98.2],
    "minutes": 0.1,
}
CONFIG = {
    "model": {"class_path": "tiny_run.TinyPolicy", "init_args": {"width": 6}},
    "data": {"class_path": "tiny_run.TinyData"},
    "trainer": {"max_epochs": 1, "accelerator": "cpu"},
    "evaluation": {"env": "fake/Solved-v0", "env_kwargs": {"solved": 0}, "episodes": 1},
}


class Solved(gymnasium.Env):
    """Tells success at the first step of the first `solved` of ten seeds."""

    observation_space = gymnasium.spaces.Dict({"observation.state": gymnasium.spaces.Box(-1, 1, (3,))})
    action_space = gymnasium.spaces.Box(-9, 9, (2,))
    fingerprint = {"simulator": "fake 1"}  # noqa: RUF012
    control_rate, max_steps = 10.0, 2

    def __init__(self, solved: int, render_mode: str | None = None) -> None:
        from tiny_run import FEATURES

        self.solved, self.features, self.render_mode = solved, FEATURES, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.count = seed, 0
        self.state = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return {"observation.state": self.state}, {"success": False}

    def step(self, action):
        self.count += 1
        success = self.seed % 10 < self.solved
        return {"observation.state": self.state}, 0.0, success, self.count >= 2, {"success": success}


if "fake/Solved-v0" not in gymnasium.registry:
    gymnasium.register("fake/Solved-v0", entry_point=Solved)


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """A ledger with one entry whose two commands run in this process; returns what writes the entry."""
    for folder in ("configs", "reproductions"):
        (tmp_path / folder).mkdir()
    (tmp_path / "configs" / "stub.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "_cores", lambda: 0)

    def command(verb, *options):
        if code := command_line([verb, *options]):
            raise LedgerError(f"{verb} ended with exit code {code}; nothing is judged.")

    monkeypatch.setattr(reproduce, "_command", command)

    def write(**more):
        path = tmp_path / "reproductions" / "stub.yaml"
        path.write_text(yaml.safe_dump(ENTRY | more))
        return path

    write()
    return write


def test_a_claim_that_holds(ledger, tmp_path, capsys):
    assert main(["stub"]) == 0
    out = capsys.readouterr().out
    assert "stub: a point stays where it is. Expected 59.6 to 98.2 %" in out
    assert "Got: 9 of 10, 95 % interval 59.6 to 98.2 %." in out
    assert "Reproduced: the interval obtained reaches the expected one." in out
    run = (tmp_path / "runs" / "reproduce" / "stub" / "latest").resolve()
    assert run.name.endswith("_seed7")
    written = json.loads((run / "reproduction.json").read_text())
    assert (written["entry"], written["verdict"], written["successes"], written["episodes"]) == ("stub", REPRODUCED, 9, 10)
    assert written["expected_95"] == [0.596, 0.982]
    assert written["interval_95"] == list(wilson(9, 10))
    assert written["seeds"] == ENTRY["seeds"]
    assert (written["data"], bool(written["fingerprints"]["checkpoint"])) == ("tiny", True)
    table = json.loads((run / "evaluations" / "reproduce_stub" / "evaluation.json").read_text())
    assert [row["seed"] for row in table["episodes"]] == list(range(2_000_000, 2_000_010))
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["width"] == 4

    # The same run judged again, without training; then by an entry that it was not trained for.
    before = (run / "reproduction.json").read_text()
    assert main(["stub", "--run", str(run)]) == 0
    assert (run / "reproduction.json").read_text() == before
    assert len(list(run.parent.glob("*_seed7*"))) == 1
    ledger(
        overrides={"model.init_args.width": 5, "evaluation.env_kwargs": {"solved": 9}}, seeds=ENTRY["seeds"] | {"training": 8}
    )
    capsys.readouterr()
    assert main(["stub", "--run", str(run)]) == 2
    said = capsys.readouterr().err
    assert "was trained otherwise than" in said
    assert "model.init_args.width 4 for 5" in said
    assert "seed_everything 7 for 8" in said


@pytest.mark.parametrize(("solved", "code", "verdict"), [(0, 1, BELOW), (2, 1, BELOW), (3, 0, REPRODUCED)])
def test_a_claim_fails_when_the_interval_lies_wholly_below(ledger, capsys, tmp_path, solved, code, verdict):
    ledger(overrides={"evaluation.env_kwargs": {"solved": solved}})
    assert main(["stub", "--root", str(tmp_path / "elsewhere")]) == code
    assert ("NOT reproduced" in capsys.readouterr().out) == (code == 1)
    run = tmp_path / "elsewhere" / "reproduce" / "stub" / "latest"
    assert json.loads((run / "reproduction.json").read_text())["verdict"] == verdict


def test_more_than_claimed_is_said_and_no_failure(ledger, capsys):
    ledger(expected=[0, 20], overrides={"evaluation.env_kwargs": {"solved": 9}})
    assert main(["stub"]) == 0
    assert "claims too little" in capsys.readouterr().out


def test_a_command_that_fails_ends_with_2(ledger, capsys):
    ledger(overrides={"trainer.max_epochs": 0})
    assert main(["stub"]) == 2
    assert "fit ended with exit code 2; nothing is judged." in capsys.readouterr().err


def test_the_commands_are_processes_of_this_package(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    reproduce._command("--version")
    with pytest.raises(LedgerError, match="dance ended with exit code 2"):
        reproduce._command("dance", "a b")
    assert "+ python -m lightning_robot dance 'a b'" in capfd.readouterr().out


def test_an_unfinished_run_is_refused(ledger, tmp_path, capsys):
    assert main(["stub"]) == 0
    run = (tmp_path / "runs" / "reproduce" / "stub" / "latest").resolve()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"total_steps": 1000}))
    assert main(["stub", "--run", str(run)]) == 2
    assert f"of 1000. Finish it first: python -m lightning_robot fit --resume {run}" in capsys.readouterr().err
    assert main(["stub", "--run", str(tmp_path)]) == 2
    assert "is no run that was trained" in capsys.readouterr().err


def test_other_demonstrations_are_refused(ledger, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    entry = Entry.read(ledger(overrides={}))
    config = CONFIG | {"seed_everything": 7}
    for init_args, first in (({"generation_seed": 3}, 3), ({"generate": {"seed": 5}}, 5), ({"generate": {"seed": 0}}, None)):
        (run / "config.yaml").write_text(yaml.safe_dump(config | {"data": CONFIG["data"] | {"init_args": init_args}}))
        (run / "run.json").write_text("{}")
        import torch

        torch.save({"format": 1, "global_step": 1}, run / "checkpoints" / "last.ckpt")
        if first is None:
            reproduce.check_run(entry, run)
        else:
            with pytest.raises(LedgerError, match=f"seed of the demonstrations {first} for 0"):
                reproduce.check_run(entry, run)


def test_a_missing_extra_and_a_wrong_name_are_said_before_any_work(ledger, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "_command", None)
    ledger(requires={"extra": "moon", "module": "no_such_module"})
    assert main(["stub"]) == 2
    assert 'stub needs no_such_module, which is not installed: pip install "lightning_robot[moon]".' in capsys.readouterr().err
    assert main(["stab"]) == 2
    assert "no entry 'stab'; did you mean 'stub'?" in capsys.readouterr().err
    assert main(["reproductions/none.yaml"]) == 2
    assert main([]) == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"minuets": 3}, "no field 'minuets'; did you mean 'minutes'?"),
        ({"expected": [0.972, 199]}, "an interval in per cent is meant"),
        ({"seeds": {"training": 1, "evaluation": 2_000_000}}, "seeds are those of training, demonstrations and evaluation"),
        ({"seeds": ENTRY["seeds"] | {"evaluation": 5}}, "reporting those from 2000000 on; the entry says 0 and 5"),
        ({"seeds": 3}, "seeds is 3, meant is training, demonstrations and evaluation, each a whole number"),
        ({"expected": 80}, "expected is 80, meant is an interval in per cent"),
        ({"expected": ["low", "high"]}, "expected is ['low', 'high'], meant is an interval"),
        ({"episodes": "many"}, "episodes is 'many', meant is a whole number"),
        ({"episodes": 0}, "it must be at least 1"),
        ({"config": "configs/none.yaml"}, "there is no configuration"),
    ],
)
def test_a_wrong_entry_is_named(ledger, more, said):
    with pytest.raises(LedgerError, match=re.escape(said)):
        Entry.read(ledger(**more))


def test_an_entry_must_be_whole(tmp_path):
    path = tmp_path / "some.yaml"
    for text, said in (("claim: it works", "does not say config, seeds"), ("[1, 2]", "holds no entry"), ("{", "is no YAML")):
        path.write_text(text)
        with pytest.raises(LedgerError, match=said):
            Entry.read(path)


def _result(successes: int, episodes: int) -> EvaluationResult:
    rows = [EpisodeRecord(n, None, n < successes, None, 1, 0.0, False, str(n), 1, 0) for n in range(episodes)]
    return EvaluationResult(rows)


def test_intervals_that_touch_agree():
    entry = SimpleNamespace(expected=(30, 60.3))
    assert [judge(entry, _result(n, 10)) for n in (0, 3, 10)] == [BELOW, REPRODUCED, ABOVE]
    # 3 of 10: 10.8 to 60.3 %; 1 of 10: at most 40.4 %, 0 of 10 at most 27.8 %
    assert judge(SimpleNamespace(expected=(60.3, 70)), _result(3, 10)) == REPRODUCED
    assert judge(SimpleNamespace(expected=(60.4, 70)), _result(3, 10)) == BELOW


# --- the ledger that is shipped --------------------------------------------------------------------------------------------


def test_the_list_is_a_table(capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    for entry in read_ledger():
        assert f" {entry.name} " in out
    assert "199 of 200" in out
    assert "97.2 to 99.9 %" in out


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_is_expected_follows_from_what_was_measured(path):
    entry = Entry.read(path)
    assert entry.measured, "a claim rests on a measurement"
    intervals = [wilson(run["successes"], entry.episodes) for run in entry.measured]
    lowest, highest = min(low for low, _ in intervals), max(high for _, high in intervals)
    assert entry.expected == (round(100 * lowest, 1), round(100 * highest, 1))
    assert entry.seeds["training"] in [run["training"] for run in entry.measured]
    assert judge(entry, _result(0, entry.episodes)) == BELOW
    for run in entry.measured:
        assert judge(entry, _result(run["successes"], entry.episodes)) == REPRODUCED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_the_entry_says_is_what_fit_understands(path, capsys, tmp_path):
    entry = Entry.read(path)
    with pytest.raises(SystemExit) as ended:
        command_line(["fit", *reproduce.fit_options(entry), "--print_config"])
    assert ended.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    have = reproduce._leaves(config)
    assert {name: have[name] for name in entry.settings()} == entry.settings()
    data = config["data"]["init_args"]
    assert data.get("generation_seed", (data.get("generate") or {}).get("seed")) == entry.seeds["demonstrations"]
    assert config["evaluation"]["episodes"] > 0


def test_every_success_rate_in_the_readme_has_its_entry():
    rows = re.findall(r"^\|.*?(\d+) of (\d+)[^|]*?95 % interval ([\d.]+) to ([\d.]+) %.*$", README, flags=re.MULTILINE)
    assert rows, "no row of the README tells a success rate"
    for episodes, lines in re.findall(
        r"^\| [^|]*\| solved of (\d+) \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", README, flags=re.MULTILINE
    ):
        found = re.findall(r"^\|[^|]*\| (\d+) \| ([\d.]+) to ([\d.]+) % \|$", lines, flags=re.MULTILINE)
        assert len(found) == lines.count("\n")
        rows += [(successes, episodes, low, high) for successes, low, high in found]
    entries = [Entry.read(path) for path in SHIPPED]
    for successes, episodes, low, high in rows:
        found = [
            entry.name
            for entry in entries
            if entry.episodes == int(episodes)
            and int(successes) in [run["successes"] for run in entry.measured]
            and entry.expected == (float(low), float(high))
        ]
        assert found, f"no entry for {successes} of {episodes}, {low} to {high} %"
