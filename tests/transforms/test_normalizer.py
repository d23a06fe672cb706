"""The normalizer equals the published one to the bit where it can, and cannot be given the wrong statistics silently."""

import copy

import numpy as np
import pytest
import torch

from lightning_robot.features import Feature, Features
from lightning_robot.transforms.normalizer import NormalizationError, Normalizer
from lightning_robot.transforms.statistics import Statistics, StatisticsAccumulator


def statistics_of(array) -> Statistics:
    accumulator = StatisticsAccumulator()
    accumulator.update(np.asarray(array))
    return accumulator.result()


@pytest.fixture(scope="module")
def golden(shared):
    return torch.load(shared / "golden" / "dp3_small.pt", weights_only=True)


@pytest.mark.parametrize(
    ("published", "mode", "cloud"),
    [
        ("normalizer_limits", "limits", "limits"),
        ("normalizer_limits_identity_cloud", "limits", "identity"),
        ("normalizer_gaussian", "mean_std", "mean_std"),
    ],
)
def test_values_equal_the_published_fit(golden, published, mode, cloud):
    data = {"action": "action", "observation.state": "agent_pos", "observation.point_cloud": "point_cloud"}
    statistics = {key: statistics_of(golden["dataset"][name]) for key, name in data.items()}
    normalizer = Normalizer(statistics, {"action": mode, "observation.state": mode, "observation.point_cloud": cloud})
    for key, name in data.items():
        scale, offset = (golden[published][f"params_dict.{name}.{value}"] for value in ("scale", "offset"))
        if normalizer.modes[key] == "identity":
            assert scale.tolist() == [1.0]
            assert offset.tolist() == [0.0]
            continue
        prefix = key.replace(".", "_")
        torch.testing.assert_close(normalizer.get_buffer(f"{prefix}_scale"), scale, rtol=1e-6, atol=0)
        torch.testing.assert_close(normalizer.get_buffer(f"{prefix}_offset"), offset, rtol=1e-6, atol=1e-6)
        if mode == "limits":
            assert torch.equal(normalizer.get_buffer(f"{prefix}_scale"), scale)
            assert torch.equal(normalizer.get_buffer(f"{prefix}_offset"), offset)
        for value in ("min", "max", "mean", "std"):
            expected = golden[published][f"params_dict.{name}.input_stats.{value}"]
            ours = torch.as_tensor(getattr(statistics[key], value)).float()
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_normalised_batch_equals_the_published_one(golden):
    statistics = {
        "action": statistics_of(golden["dataset"]["action"]),
        "observation.state": statistics_of(golden["dataset"]["agent_pos"]),
        "observation.point_cloud": statistics_of(golden["dataset"]["point_cloud"]),
    }
    normalizer = Normalizer(statistics, dict.fromkeys(statistics, "limits"))
    raw, published = golden["batch"], golden["normalized_batch"]
    assert torch.equal(normalizer.normalize("action", raw["action"]), published["action"])
    assert torch.equal(normalizer.normalize("observation.state", raw["obs"]["agent_pos"]), published["obs"]["agent_pos"])
    cloud = normalizer.normalize("observation.point_cloud", raw["obs"]["point_cloud"])
    assert torch.equal(cloud, published["obs"]["point_cloud"])
    torch.testing.assert_close(normalizer.unnormalize("action", published["action"]), raw["action"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["limits", "mean_std", "quantiles"])
def test_round_trip_and_range(mode):
    data = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e-2, 50.0]) + 7
    normalizer = Normalizer({"action": statistics_of(data)}, {"action": mode})
    normalised = normalizer.normalize("action", data)
    torch.testing.assert_close(normalizer.unnormalize("action", normalised), data, rtol=1e-5, atol=1e-5)
    if mode == "limits":
        torch.testing.assert_close(normalised.amin(0), -torch.ones(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(normalised.amax(0), torch.ones(3), atol=1e-4, rtol=0)


def test_near_constant_elements_are_named_in_one_message(capsys):
    data = np.random.default_rng(0).normal(size=(50, 4))
    data[:, 1] = 3.0
    data[:, 3] = 1e-6 * data[:, 3]
    normalizer = Normalizer(
        {"observation.state": statistics_of(data), "action": statistics_of(data)},
        {"observation.state": "limits", "action": "mean_std"},
        names={"observation.state": ("x", "y", "z", "w")},
    )
    printed = capsys.readouterr()
    lines = [line for line in (printed.out + printed.err).splitlines() if line]
    assert len(lines) == 1
    assert lines[0].endswith("not scaled: observation.state: y, w; action: element 1, element 3.")
    assert torch.isfinite(normalizer.normalize("action", torch.as_tensor(data))).all()


def test_wrong_sizes_are_refused_by_name():
    statistics = {"action": statistics_of(np.random.default_rng(0).normal(size=(9, 4)))}
    normalizer = Normalizer(statistics, {"action": "limits"})
    with pytest.raises(NormalizationError, match="action: statistics of size 4, data of size 14"):
        normalizer.normalize("action", torch.zeros(2, 8, 14))
    with pytest.raises(NormalizationError, match="action: statistics of size 4, data of size 2"):
        normalizer.unnormalize("action", torch.zeros(2, 2))  # the published code reshapes this silently
    with pytest.raises(NormalizationError, match="action: statistics of size 4, data of size 14"):
        Normalizer.from_sizes({"action": 14}, {"action": "limits"}).load_state_dict(normalizer.state_dict())
    with pytest.raises(NormalizationError, match="action: statistics of size 4, data of size 14"):
        Normalizer.from_sizes({"action": 14}, {"action": "limits"}).set_statistics(statistics)


def test_missing_statistics_and_unknown_words():
    with pytest.raises(NormalizationError, match=r"observation\.state: no statistics"):
        Normalizer({}, {"observation.state": "limits"})
    with pytest.raises(NormalizationError, match="unknown normalisation mode 'minmax'; use limits"):
        Normalizer.from_sizes({"action": 2}, {"action": "minmax"})
    with pytest.raises(NormalizationError, match="does not normalise it; it knows action"):
        Normalizer.from_sizes({"action": 2}, {"action": "identity"}).normalize("observation.state", torch.zeros(2))
    with pytest.raises(NormalizationError, match="has no statistics yet"):
        Normalizer.from_sizes({"action": 2}, {"action": "limits"}).unnormalize("action", torch.zeros(2))


def test_from_features_loads_by_shape():
    features = Features({"observation.state": Feature((3,)), "observation.point_cloud": Feature((8, 6))}, Feature((2,)))
    modes = {"observation.state": "mean_std", "observation.point_cloud": "limits", "action": "quantiles"}
    empty = Normalizer.from_features(features, modes)
    assert not empty.is_fitted
    rng = np.random.default_rng(0)
    sizes = {"observation.state": 3, "observation.point_cloud": 6, "action": 2}
    fitted = Normalizer({key: statistics_of(rng.normal(size=(40, size))) for key, size in sizes.items()}, modes)
    empty.load_state_dict(fitted.state_dict())
    assert empty.is_fitted
    cloud = torch.randn(2, 8, 6)
    assert torch.equal(empty.normalize("observation.point_cloud", cloud), fitted.normalize("observation.point_cloud", cloud))
    assert all("." not in name for name, _ in empty.named_buffers())


def test_stays_float32_and_keeps_its_values():
    statistics = {"action": statistics_of(np.random.default_rng(0).normal(size=(99, 4)) / 3)}
    network = torch.nn.ModuleDict({"normalizer": Normalizer(statistics, {"action": "limits"}), "linear": torch.nn.Linear(2, 2)})
    before = copy.deepcopy(network["normalizer"].state_dict())
    for change in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double(), lambda m: m.to("meta")):
        change(network)
    network.to_empty(device="cpu")
    for name, value in network["normalizer"].state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])
    assert network["normalizer"].normalize("action", torch.zeros(4, dtype=torch.bfloat16)).dtype == torch.float32


def test_is_built_with_values_under_a_meta_device_and_another_default_type():
    statistics = {"action": statistics_of(np.random.default_rng(0).normal(size=(99, 4)))}
    expected = Normalizer(statistics, {"action": "limits"})
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            normalizer = Normalizer(statistics, {"action": "limits"})
    finally:
        torch.set_default_dtype(torch.float32)
    assert normalizer.action_scale.device.type == "cpu"
    assert torch.equal(normalizer.action_scale, expected.action_scale)
    assert torch.equal(normalizer.action_offset, expected.action_offset)


def test_a_center_keeps_a_spread_far_below_the_value() -> None:
    modes = {"action": "limits"}
    normalizer = Normalizer.from_sizes({"action": 2}, modes)
    normalizer.set_values("action", scale=[2e8, 0.5], offset=[-1, 0], center=[12.7, 3.0])
    values = torch.tensor([12.7, 5.0])
    assert normalizer.normalize("action", values).tolist() == [-1.0, 1.0]
    torch.testing.assert_close(normalizer.unnormalize("action", torch.tensor([-1.0, 1.0])), values, rtol=0, atol=0)

    loaded = Normalizer.from_sizes({"action": 2}, modes)
    loaded.load_state_dict(normalizer.state_dict())
    assert loaded.normalize("action", values).tolist() == [-1.0, 1.0]
    normalizer.set_values("action", scale=[1, 1], offset=[0, 0])
    assert normalizer.state_dict().keys() == {"action_scale", "action_offset"}
