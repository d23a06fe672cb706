"""Gymnasium environments; importing this package registers them under the namespace ``lightning_robot/``."""

from importlib import import_module
from typing import Any

import gymnasium

gymnasium.register("lightning_robot/PlayTable-v0", entry_point="lightning_robot.envs.play_table:PlayTable")
gymnasium.register("lightning_robot/Calvin-v0", entry_point="lightning_robot.envs.calvin:Calvin")
gymnasium.register("lightning_robot/SO101PickPlace-v0", entry_point="lightning_robot.envs.so101:SO101PickPlace")
gymnasium.register("lightning_robot/Adapted-v0", entry_point="lightning_robot.envs.adapters:Adapted")
gymnasium.register("lightning_robot/MetaWorld-v0", entry_point="lightning_robot.envs.metaworld:MetaWorld")
gymnasium.register("lightning_robot/Aloha-v0", entry_point="lightning_robot.envs.gym_aloha:Aloha")
gymnasium.register("lightning_robot/PushT-v0", entry_point="lightning_robot.envs.gym_pusht:PushT")


def make_environment(environment: str, **arguments: Any) -> gymnasium.Env:
    """`gymnasium.make` without its wrappers' checks, for any id.

    Gymnasium knows an id once the package that registers it is imported. For an unknown id the package of the same name as
    its namespace is imported first (``gym_pusht/PushT-v0`` imports ``gym_pusht``).

    Args:
        environment: an id such as ``lightning_robot/PlayTable-v0``, or ``module:id``.
        arguments: passed to the environment's constructor.

    Raises:
        ModuleNotFoundError: the namespace's package is not installed.
    """
    namespace = environment.partition("/")[0] if "/" in environment and ":" not in environment else None
    if namespace and environment not in gymnasium.registry:
        try:
            import_module(namespace)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"No environment {environment!r}: no package {namespace!r} is installed to register it. Known here: "
                f"{', '.join(name for name in gymnasium.registry if name.startswith('lightning_robot/'))}."
            ) from error
    return gymnasium.make(environment, disable_env_checker=True, **arguments)
