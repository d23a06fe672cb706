import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lightning_robot.callbacks.checkpoints import read_checkpoint
from lightning_robot.features import Feature, Features
from lightning_robot.policies.base import ImitationPolicy, load_policy
from lightning_robot.transforms.normalizer import Normalizer
from lightning_robot.transforms.text import HashedTextEncoder

TEXTS = ["open the drawer", "close the drawer"]


class Linear(ImitationPolicy):
    """Predicts the chunk linearly from the newest state."""

    observation_keys = ("observation.state",)

    def __init__(self, uses_task: bool = False, features: dict | None = None, language: dict | None = None) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.observation_steps, self.action_horizon, self.execution_horizon = 1, 4, 2
        self.normalization = {"observation.state": "limits", "action": "limits"}
        self.uses_task = uses_task

    def build(self):
        self.network = nn.Linear(self.features.observations["observation.state"].shape[0], 4 * self.features.action.shape[0])

    def compute_loss(self, batch):
        state = self.normalizer.normalize("observation.state", batch["observation.state"][:, -1])
        prediction = self.network(state).unflatten(1, (4, -1))
        return (prediction - self.normalizer.normalize("action", batch["action"])).square().mean(), {}

    def _predict(self, observation, noise_seeds, num_samples, guidance):
        state = self.normalizer.normalize("observation.state", observation["observation.state"][:, -1])
        return self.normalizer.unnormalize("action", self.network(state).unflatten(1, (4, -1)))[:, None]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Data:
    """What `configure_model` asks of a data module."""

    def __init__(self, state_size=3, language=None):
        names = tuple(f"s{index}" for index in range(state_size))
        self.features = Features(
            {"observation.state": Feature((state_size,), names=names), "observation.depth.static": Feature((1, 8, 8))},
            Feature((2,)),
        )
        self.language = language

    def statistics(self, keys):
        from lightning_robot.transforms.statistics import StatisticsAccumulator

        found = {}
        for key in keys:
            size = (self.features.observations | {"action": self.features.action})[key].shape[-1]
            accumulator = StatisticsAccumulator()
            accumulator.update(np.random.default_rng(0).normal(size=(100, size)).astype(np.float32) * 5)
            found[key] = accumulator.result()
        return found


def built(policy, data):
    policy._trainer = SimpleNamespace(datamodule=data, strategy=None)
    policy.configure_model()
    policy._trainer = None
    return policy


def save(policy, path, **extra):
    checkpoint = {"state_dict": policy.state_dict(), "hyper_parameters": dict(policy.hparams)} | extra
    policy.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return path


def test_a_checkpoint_alone_is_enough_to_act(tmp_path):
    policy = built(Linear(), Data())
    observation = {"observation.state": torch.randn(5, 1, 3)}
    loaded = load_policy(save(policy, tmp_path / "policy.ckpt"))
    assert not loaded.training
    torch.testing.assert_close(loaded.predict_action_chunk(observation), policy.predict_action_chunk(observation))
    assert set(loaded.features.observations) == {"observation.state"}  # only what the policy reads


def test_averaged_weights_are_taken_unless_raw_ones_are_asked_for(tmp_path):
    policy = built(Linear(), Data())
    averaged = {name: torch.zeros_like(value) for name, value in policy.named_parameters()}
    path = save(policy, tmp_path / "policy.ckpt", ema_state_dict=averaged)
    assert load_policy(path).network.weight.abs().sum() == 0
    torch.testing.assert_close(load_policy(path, weights="raw").network.weight, policy.network.weight)
    with pytest.raises(ValueError, match="weights='raw'"):
        load_policy(save(policy, tmp_path / "plain.ckpt"), weights="ema")
    del averaged["network.weight"]
    with pytest.raises(ValueError, match=r"averaged weights lack network\.weight"):
        load_policy(save(policy, tmp_path / "changed.ckpt", ema_state_dict=averaged))


def test_configure_model_may_be_called_again():
    policy = built(Linear(), Data())
    network = policy.network
    built(policy, Data())
    assert policy.network is network


def test_missing_features_are_explained():
    with pytest.raises(RuntimeError, match="load_policy"):
        Linear().configure_model()
    policy = Linear()
    data = Data()
    data.features = Features({"observation.depth.static": Feature((1, 8, 8))}, Feature((2,)))
    with pytest.raises(KeyError, match=r"reads observation\.state.*offers observation\.depth\.static"):
        built(policy, data)


def test_data_that_do_not_fit_a_loaded_policy_are_refused(tmp_path):
    features = built(Linear(), Data()).hparams["features"]
    with pytest.raises(ValueError, match=r"trained on shape \(3,\), offered \(4,\)"):
        built(Linear(features=features), Data(state_size=4))


def test_hyper_parameters_equal_the_signature():
    assert set(Linear().hparams) == {"uses_task", "features", "language"}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": 99}, "format 1"), ({"class_path": "collections.OrderedDict"}, "no policy")],
)
def test_other_files_are_refused(tmp_path, change, message):
    path = save(built(Linear(), Data()), tmp_path / "policy.ckpt")
    checkpoint = torch.load(path, weights_only=True) | change
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=message):
        load_policy(path)


def test_a_missing_checkpoint_names_what_lies_beside_it(tmp_path):
    save(built(Linear(), Data()), tmp_path / "best.ckpt")
    with pytest.raises(FileNotFoundError, match=r"There is: best\.ckpt"):
        load_policy(tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda content: content["hyper_parameters"].update(depth=3),
            r"unexpected keyword argument 'depth'\): it is of another",
        ),
        (lambda content: content["state_dict"].pop("network.bias"), r'weights do not fit .*Missing key\(s\).*"network.bias"'),
        (lambda content: content["state_dict"].update({"network.bias": torch.zeros(1)}), "size mismatch for network.bias"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_class_is_refused_in_a_sentence(tmp_path, change, said):
    content = torch.load(save(built(Linear(), Data()), tmp_path / "policy.ckpt"), weights_only=True)
    change(content)
    torch.save(content, tmp_path / "changed.ckpt")
    with pytest.raises(ValueError, match=said) as refusal:
        load_policy(tmp_path / "changed.ckpt")
    assert "\n" not in str(refusal.value)


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    torch.save([1, 2], tmp_path / "list.ckpt")
    for read in (load_policy, read_checkpoint):
        with pytest.raises(ValueError, match=r"list.ckpt is no checkpoint: it holds a list"):
            read(tmp_path / "list.ckpt")


def test_another_policys_checkpoint_is_refused():
    with pytest.raises(ValueError, match=r"The checkpoint is of somewhere\.Else"):
        Linear().on_load_checkpoint({"class_path": "somewhere.Else"})


def language(encoder):
    embeddings = torch.eye(2, 384)
    return {"encoder": encoder, "texts": TEXTS, "tasks": ["open_drawer", "close_drawer"], "embeddings": embeddings}


def test_task_embeddings_come_from_the_table_and_survive_the_checkpoint(tmp_path):
    policy = built(Linear(uses_task=True), Data(language=language("paraphrase-MiniLM-L6-v2")))
    policy = load_policy(save(policy, tmp_path / "policy.ckpt"))
    torch.testing.assert_close(policy.task_embedding({"task": TEXTS[::-1]}), torch.eye(2, 384).flip(0))
    with pytest.raises(KeyError, match="table holds 2 sentences of the encoder 'paraphrase"):
        policy.task_embedding({"task": ["dance"]})
    with pytest.raises(KeyError, match="'task' or 'task_embedding'"):
        policy.task_embedding({})


def test_trained_tasks_survive_the_checkpoint(tmp_path):
    policy = built(Linear(uses_task=True), Data(language=language("e") | {"trained_tasks": ["open_drawer"]}))
    assert load_policy(save(policy, tmp_path / "a.ckpt")).trained_tasks == ("open_drawer",)
    assert Linear().trained_tasks == ()


def test_unknown_sentences_are_encoded_where_the_encoder_runs_here():
    policy = built(Linear(uses_task=True), Data(language=language(HashedTextEncoder.name)))
    expected = torch.from_numpy(HashedTextEncoder().encode(["pull the drawer open"]))
    torch.testing.assert_close(policy.task_embedding({"task": ["pull the drawer open"]}), expected)


def test_a_task_conditioned_policy_wants_tasks():
    with pytest.raises(ValueError, match="segments"):
        built(Linear(uses_task=True), Data())


def test_window_seeds_depend_on_epoch_and_window_alone(monkeypatch):
    policy = built(Linear(), Data())
    monkeypatch.setitem(os.environ, "PL_GLOBAL_SEED", "3")
    rows = {"episode_index": torch.tensor([0, 1]), "segment_index": torch.tensor([-1, -1]), "frame_index": torch.tensor([5, 5])}
    flipped = {key: value.flip(0) for key, value in rows.items()}
    policy._trainer = SimpleNamespace(current_epoch=0)
    first = policy.window_seeds(rows)
    assert first[0] != first[1]
    torch.testing.assert_close(policy.window_seeds(flipped), first.flip(0))
    policy._trainer = SimpleNamespace(current_epoch=1)
    assert not torch.equal(policy.window_seeds(rows), first)
    evaluated = policy.eval().window_seeds(rows)
    policy._trainer = SimpleNamespace(current_epoch=7)
    torch.testing.assert_close(policy.window_seeds(rows), evaluated)


def test_normalizer_is_part_of_the_policy():
    assert isinstance(built(Linear(), Data()).normalizer, Normalizer)
