"""The command line. Only the standard library until the verb is known: help takes no time."""

from __future__ import annotations

import sys

TRAINER_COMMANDS = {
    "fit": "train a policy, with validation and simulation",
    "validate": "loss of a checkpoint on the validation data, and its success in simulation",
    "test": "loss of a checkpoint on the test data",
    "predict": "action chunks of a checkpoint for the validation data, into a file",
}
COMMANDS = {
    "evaluate": "success in simulation: of a checkpoint, of a sweep, or of two side by side",
    "convert": "convert recordings, stores and checkpoints",
    "generate": "record demonstrations of an expert or a policy in a simulator",
    "inspect": "a dataset at a glance: episodes, ranges, pictures, defects",
    "reproduce": "train and evaluate again what a claim of the ledger rests on",
}

EXAMPLES = """\
  python -m lightning_robot fit --config configs/dp3_calvin_debug.yaml
  python -m lightning_robot fit --config configs/dp3_calvin.yaml --config configs/overlays/bf16.yaml --data.root DATA
  python -m lightning_robot fit --resume latest
  python -m lightning_robot evaluate runs/latest/checkpoints/best.ckpt --episodes 100"""


def help_text() -> str:
    """The table of commands."""
    table = TRAINER_COMMANDS | COMMANDS
    lines = ["usage: python -m lightning_robot COMMAND [OPTIONS]", "", "commands:"]
    lines += [f"  {name:<10} {text}" for name, text in table.items()]
    lines += ["", "Options of a command: python -m lightning_robot COMMAND --help", "", "examples:", EXAMPLES]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if argv[0] == "--version":
        from lightning_robot import __version__

        print(__version__)
        return 0
    verb, rest = argv[0], argv[1:]
    if verb in TRAINER_COMMANDS:
        from lightning_robot.cli import main as run

        return run(argv)
    if verb in COMMANDS:
        from importlib import import_module

        return import_module(f"lightning_robot.commands.{verb}").main(rest)
    from difflib import get_close_matches

    near = get_close_matches(verb, [*TRAINER_COMMANDS, *COMMANDS], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join([*TRAINER_COMMANDS, *COMMANDS])}."
    print(f"error: no command {verb!r}; {hint}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
