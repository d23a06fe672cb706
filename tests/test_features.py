import json
from dataclasses import replace

import pytest

from lightning_robot.features import Feature, Features, IncompatibleFeatures, check_compatible


@pytest.fixture
def features():
    return Features(
        observations={
            "observation.state": Feature((2,), names=("x", "gripper"), kinds=("position", "gripper"), frame="world"),
            "observation.point_cloud": Feature((64, 3), unit="m", frame="world"),
        },
        action=Feature((2,), names=("x", "gripper")),
        action_semantics="relative; commanded; world; gripper +1 open -1 closed",
        control_rate=30.0,
        cloud={"points": 64},
    )


def with_observation(features, key, **changes):
    return replace(features, observations=features.observations | {key: replace(features.observations[key], **changes)})


def test_features_survive_json(features):
    assert Features.from_dict(json.loads(json.dumps(features.to_dict()))) == features


def test_equal_features_are_compatible(features):
    assert check_compatible(features, features) == []


def test_missing_key_is_named_with_what_is_offered(features):
    offered = replace(features, observations={"observation.state": features.observations["observation.state"]})
    with pytest.raises(IncompatibleFeatures, match=r"observation\.point_cloud.*offered are observation\.state"):
        check_compatible(features, offered)
    assert check_compatible(features, offered, keys=("observation.state",)) == []


@pytest.mark.parametrize(
    ("key", "changes", "message"),
    [
        ("observation.state", {"shape": (3,), "names": ()}, r"trained on shape \(2,\), offered \(3,\)"),
        ("observation.state", {"names": ("gripper", "x")}, "element names differ"),
        ("observation.state", {"frame": "base"}, "'world', offered in 'base'"),
        ("observation.point_cloud", {"shape": (32, 3)}, "set the number of points"),
        ("observation.point_cloud", {"unit": "mm"}, "trained in 'm', offered in 'mm'"),
        ("observation.state", {"dtype": "uint8"}, "trained on float32, offered uint8"),
    ],
)
def test_differences_are_refused_by_name(features, key, changes, message):
    with pytest.raises(IncompatibleFeatures, match=message):
        check_compatible(features, with_observation(features, key, **changes))


def test_a_camera_of_another_name_is_refused_with_both_names_and_the_remedy(features):
    trained = replace(features, observations={"observation.images.top": Feature((3, 8, 8), dtype="uint8")})
    offered = replace(features, observations={"observation.images.overhead": Feature((3, 8, 8), dtype="uint8")})
    with pytest.raises(
        IncompatibleFeatures, match=r"images\.top: .*offered are observation\.images\.overhead\..*RenameCameras"
    ):
        check_compatible(trained, offered)


def test_actions_in_other_units_are_refused(features):
    degrees, radians = (replace(features, action=replace(features.action, unit=unit)) for unit in ("deg", "rad"))
    with pytest.raises(IncompatibleFeatures, match="action: trained in 'deg', offered in 'rad'"):
        check_compatible(degrees, radians)


def test_coloured_cloud_serves_a_policy_without_colours(features):
    coloured = with_observation(features, "observation.point_cloud", shape=(64, 6))
    assert check_compatible(features, coloured) == []
    with pytest.raises(IncompatibleFeatures):
        check_compatible(coloured, features)


def test_action_form_is_refused_and_provenance_noted(features):
    absolute = replace(features, action_semantics=features.action_semantics.replace("relative", "absolute"))
    with pytest.raises(IncompatibleFeatures, match="trained on 'relative', offered 'absolute'"):
        check_compatible(features, absolute)
    achieved = replace(features, action_semantics=features.action_semantics.replace("commanded", "achieved"))
    assert "recorded motion against command" in check_compatible(features, achieved)[0]


def test_another_rate_is_refused(features):
    with pytest.raises(IncompatibleFeatures, match="trained at 30 Hz, offered 10 Hz: every action would last 3 times as long"):
        check_compatible(features, replace(features, control_rate=10.0))


def test_cloud_recipe_is_noted(features):
    notes = check_compatible(features, replace(features, control_rate=29.97, cloud={"points": 32}))
    assert any("point cloud points" in note for note in notes)


def test_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="Unknown kind"):
        Feature((1,), kinds=("angle",))


def mounted(position, mount="world"):
    return {"mount": mount, "position": position, "rotation": [1.0, 0.0, 0.0, 0.0], "fov": 45.0}


def test_cameras_that_stand_elsewhere_are_noted(features):
    images = {f"observation.images.{name}": Feature((3, 4, 4), "uint8") for name in ("top", "wrist")}
    here = {"top": mounted([0, 0, 1]), "wrist": mounted([0, 0.1, 0], "hand")}
    trained = replace(features, observations=images, cameras=here)
    assert check_compatible(trained, trained) == []
    assert check_compatible(replace(trained, cameras={}), trained) == []  # nobody knows
    (note,) = check_compatible(trained, replace(trained, cameras={"top": here["wrist"], "wrist": here["top"]}))
    assert "top stands where wrist stood, wrist stands where top stood in the demonstrations (by their poses)" in note
    (note,) = check_compatible(trained, replace(trained, cameras=here | {"top": mounted([0, 0.03, 1.04])}))
    assert note.startswith("camera top: on world in the demonstrations, on world here; moved by 5.0 cm, turned by 0 degrees")
    elsewhere = replace(trained, cameras=here | {"top": mounted([9, 9, 9])})
    assert check_compatible(trained, elsewhere, ("observation.images.wrist",)) == []
    assert Features.from_dict(trained.to_dict()) == trained
    assert "cameras" not in features.to_dict()
