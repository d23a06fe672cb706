"""Gymnasium environments. Importing gymnasium registers them through the package's entry point."""


def register() -> None:
    """Registers the environments under the namespace ``lightning_robot/`` (called by gymnasium's plug-in loader)."""
    import gymnasium

    gymnasium.register("PlayTable-v0", entry_point="lightning_robot.envs.play_table:PlayTable")
    gymnasium.register("Calvin-v0", entry_point="lightning_robot.envs.calvin:Calvin")
