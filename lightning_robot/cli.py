"""Wiring of the commands that need a Trainer: fit, validate, test, predict."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import traceback
import warnings
from contextlib import suppress
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from lightning_robot.callbacks.checkpoints import AtomicCheckpointIO, Checkpoints, read_checkpoint
from lightning_robot.callbacks.compile import Compile
from lightning_robot.callbacks.ema import EMA
from lightning_robot.callbacks.evaluation import SimulationEvaluation
from lightning_robot.callbacks.guards import Guards, NonFiniteError
from lightning_robot.callbacks.host_memory import HostMemory
from lightning_robot.callbacks.initial_weights import InitialWeights, class_path_of, require_class
from lightning_robot.callbacks.metrics_file import MetricsFile
from lightning_robot.callbacks.predictions import Predictions
from lightning_robot.callbacks.progress import PlainProgress, silence_tips
from lightning_robot.callbacks.run_directory import HANDED_OVER, RunDirectory, find_run, name_run
from lightning_robot.callbacks.signals import StopSignals
from lightning_robot.callbacks.step_seeds import StepSeeds
from lightning_robot.callbacks.throughput import Throughput
from lightning_robot.console import is_first_process, say
from lightning_robot.data.store import StoreError
from lightning_robot.evaluation.stepping import EnvironmentFault
from lightning_robot.features import IncompatibleFeatures

# Parts of every run: groups of the parser, so that no overlay's list of callbacks can replace them. Averaging comes before
# evaluation; Lightning itself moves checkpoints to the end.
PARTS: dict[str, type[Callback]] = {
    "run": RunDirectory,
    "guards": Guards,
    "compile": Compile,
    "ema": EMA,
    "evaluation": SimulationEvaluation,
    "throughput": Throughput,
    "checkpoints": Checkpoints,
}

# What a resumed run may change: where it runs, not what it does.
RESUME_MAY_SET = (
    "--trainer.accelerator",
    "--trainer.devices",
    "--trainer.num_nodes",
    "--trainer.strategy",
    "--trainer.enable_progress_bar",
    "--data.num_workers",
)


class Stopped(Exception):
    """A signal ended the run in order."""

    def __init__(self, number: int, run: Path | None) -> None:
        saved = run is not None and (run / "checkpoints" / "last.ckpt").exists()
        more = f"Continue with: python -m lightning_robot fit --resume {run}" if saved else "Nothing was saved yet."
        super().__init__(f"Stopped by signal {number}. {more}")
        self.number = number


class CommandLineError(Exception):
    """Something in the command line or a configuration is wrong; the message is one useful line."""


class Parser(LightningArgumentParser):
    """Errors are one line that names the key and the nearest right one; exit code 2."""

    _file = "<unicode string>"  # the configuration that is read, as YAML's errors call a text of no file

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Any:
        self._file = str(path)
        return super().parse_path(path, *args, **kwargs)

    def parse_args(self, args: Any = None, *more: Any, **kwargs: Any) -> Any:
        # jsonargparse hands a null of a setting inside a setting (data.generate.tasks) down as the text None.
        args = [re.sub("^(--[^=]+)=None$", r"\1=null", item) for item in args] if args is not None else None
        return super().parse_args(args, *more, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> Any:
        print(f"error: {self._useful_line(message, ex)}", file=sys.stderr)
        sys.exit(2)

    def _useful_line(self, message: str, ex: Exception | None) -> str:
        parser = getattr(ex, "subcommand_parser", self)
        if found := re.search(r"unrecognized arguments: (\S+)", message):
            flag = found.group(1).split("=")[0]
            return f"no option {flag}{_nearest(flag.lstrip('-'), self._keys(), '--')}"
        if found := re.search(r"(?:[Oo]ption|key) '([^']+)' is not accepted|does not accept option '([^']+)'", message):
            key = found.group(1) or found.group(2)
            return f"no setting {key!r}{_nearest(key, parser._keys())}"
        if found := re.search(r"Problem with given class_path '([^']+)':\s*(.+)", message):
            return f"class_path {found.group(1)!r}: {found.group(2).strip().rstrip('.')}"
        lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
        if not lines:
            return message
        if "Problems parsing config" in lines[0]:  # where the file is no YAML stands in the last line
            return " ".join(lines).replace("<unicode string>", self._file)
        expected = [line for line in lines[1:] if line.startswith("Expected")]
        given = [line for line in lines[1:] if line.startswith("Given value:")]
        if expected:
            return " ".join([lines[0], "; or ".join(dict.fromkeys(expected)), *given])
        return lines[0]

    def _keys(self) -> list[str]:
        """Every key that this parser, or the command's parser inside it, accepts."""
        keys = []
        for action in self._actions:
            if action.dest not in ("help", "==SUPPRESS=="):
                keys.append(action.dest)
            for inner in (getattr(action, "_name_parser_map", None) or {}).values():
                keys += inner._keys()
        return keys


def _nearest(key: str, keys: list[str], prefix: str = "") -> str:
    """``; did you mean …?`` with the nearest key: one that it abbreviates, else by the whole path, else by the last part."""
    near = sorted((other for other in keys if other.startswith(key)), key=len)[:1]
    near = near or get_close_matches(key, keys, n=1, cutoff=0.6)
    if not near:
        last = key.split(".")[-1]
        ends = {other.split(".")[-1]: other for other in keys}
        near = [ends[end] for end in get_close_matches(last, list(ends), n=1, cutoff=0.7)]
    return f"; did you mean {prefix}{near[0]}?" if near else ""


class CommandLine(LightningCLI):
    """LightningCLI with the parts of a run that are always there.

    Args:
        argv: command and options.
        resumed: the run that is taken up again, None for a new one.
    """

    def __init__(self, argv: list[str], resumed: Path | None = None) -> None:
        self.resumed = resumed
        self.run_path: Path | None = None
        self.signals = StopSignals()
        super().__init__(
            model_class=LightningModule,
            datamodule_class=LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,  # the run directory keeps it
            auto_configure_optimizers=False,  # a policy brings its own; a flag must not replace it
            parser_class=Parser,
            seed_everything_default=42,
            trainer_defaults={
                "inference_mode": False,  # steering needs gradients while evaluating
                "use_distributed_sampler": False,  # the data modules shard episodes themselves
                "log_every_n_steps": 10,
            },
            args=argv,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("prog", "python -m lightning_robot")
        return super().init_parser(**kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        commands = LightningCLI.subcommands()
        commands["fit"] = commands["fit"] | {"ckpt_path"}  # --resume and --init_from instead: they say which is meant
        return {name: skipped | {"weights_only"} for name, skipped in commands.items()}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for name, part in PARTS.items():
            parser.add_lightning_class_args(part, name)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        options = {
            "--init_from": "Checkpoint whose weights (averaged ones where there are any) a new run starts from.",
            "--resume": "Run directory to take up again with its own settings, or 'latest'.",
        }
        for flag, text in options.items():  # the others accept a run's config.yaml, where these stand
            parser.add_argument(flag, type=str | None, default=None, help=text if subcommand == "fit" else argparse.SUPPRESS)
        return parser

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            with self.signals.watching(self.trainer):
                super()._run_subcommand(subcommand)
        except SIGTERMException as error:
            raise Stopped(self.signals.received or signal.SIGTERM, self.run_path) from error

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Nothing: a checkpoint never changes the settings of the command line."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if config.trainer.use_distributed_sampler:
            raise CommandLineError(
                "trainer.use_distributed_sampler must stay false: the data modules give each process its own episodes; "
                "Lightning's sampler would shuffle and repeat them."
            )
        for logger in _as_list(config.trainer.logger):
            if getattr(logger, "class_path", "").endswith(".WandbLogger") and find_spec("wandb") is None:
                raise CommandLineError('Weights & Biases is not installed: pip install "lightning_robot[wandb]".')
        make_absolute(config)
        if self.subcommand != "fit":
            config["ckpt_path"] = resolve_checkpoint(config.ckpt_path, config.run.root)
            if config.ckpt_path is None:
                raise CommandLineError(
                    f"{self.subcommand} needs weights: --ckpt_path with a checkpoint file, a run directory (its best), or "
                    "best or last of the newest run."
                )
            return
        if self.resumed is not None:
            self.run_path = self.resumed
            return
        if config.resume is not None:
            raise CommandLineError(
                f"A configuration cannot ask to resume ({config.resume}): a run is taken up with its own settings, by fit "
                "--resume alone."
            )
        for name in ("max_epochs", "max_steps", "limit_train_batches"):
            if config.trainer[name] == 0:
                raise CommandLineError(f"trainer.{name} is 0: nothing would be trained.")
        try:
            if config.init_from is not None:
                config["init_from"] = resolve_checkpoint(config.init_from, config.run.root)
                require_class(read_checkpoint(config.init_from), config.model.class_path, config.init_from)
            self.run_path = name_run(config.run.root, config.run.experiment, int(config.seed_everything))
        except ValueError as error:
            raise CommandLineError(str(error)) from error

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:  # a constructor refuses a setting; jsonargparse wraps its words in what it tried
            first: BaseException = error
            while isinstance(cause := first.__cause__ or first.__context__, ValueError):
                first = cause
            raise CommandLineError(str(first)) from error

    def _set_seed(self) -> None:
        try:
            super()._set_seed()
        except ValueError as error:
            raise CommandLineError(f"seed_everything: {error}.") from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        settings = self.config[self.subcommand]
        run = next(callback for callback in callbacks if isinstance(callback, RunDirectory))
        # A part that a configuration also lists among the callbacks would run twice.
        listed = [type(callback) for callback in _as_list(config.get("callbacks"))]
        for name, part in PARTS.items():
            if part in listed:
                raise CommandLineError(f"trainer.callbacks lists {part.__name__}, which every run has; set {name}.* instead.")
        callbacks = [StepSeeds(int(settings.seed_everything)), *callbacks]
        if self.subcommand == "fit":
            assert self.run_path is not None
            callbacks += [self.signals, InitialWeights(settings.init_from), HostMemory()]
            # Initial weights before averaging: the average starts from them.
            callbacks.sort(key=lambda callback: not isinstance(callback, StepSeeds | RunDirectory | InitialWeights))
            config["logger"] = self._loggers(config.get("logger"), run)
            config["default_root_dir"] = str(self.run_path)
            text = self._parser("fit").dump(settings, skip_none=False)
            text = re.sub(r"(?m)^resume: .*$", "resume: null", text)
            run.begin(self.run_path, text, int(settings.seed_everything), self.resumed is not None, settings.init_from)
        else:
            if self.subcommand == "predict":
                callbacks.append(Predictions())
            config["logger"] = _as_list(config.get("logger")) or False
            config["default_root_dir"] = str(evaluation_folder(settings.ckpt_path, settings.run.root, str(self.subcommand)))
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks.append(RichProgressBar(refresh_rate=20) if sys.stderr.isatty() else PlainProgress())
        if config.get("enable_model_summary") is None:
            config["enable_model_summary"] = sys.stderr.isatty()  # a log has the guards' one line
        config["plugins"] = [*_as_list(config.get("plugins")), AtomicCheckpointIO()]
        try:
            return super()._instantiate_trainer(config, callbacks)
        except TypeError as error:  # what Lightning raises for a number of devices that a CPU cannot have
            if "`devices`" not in str(error):
                raise
            raise MisconfigurationException(f"trainer.devices is {config.get('devices')}: {error}") from error

    def _loggers(self, asked: Any, run: RunDirectory) -> list[Logger]:
        """The metrics file always, TensorBoard unless switched off, then what the configuration asks for."""
        first_step = unlogged = None
        if self.resumed is not None:
            checkpoint = read_checkpoint(self.resumed / "checkpoints" / "last.ckpt")
            first_step, unlogged = checkpoint.get("next_logged_step"), checkpoint.get("unlogged")
        assert self.run_path is not None
        loggers: list[Logger] = [MetricsFile(self.run_path, first_step, unlogged)]
        if run.tensorboard:
            loggers.append(
                TensorBoardLogger(self.run_path, name="", version="tensorboard", default_hp_metric=False, purge_step=first_step)
            )
        for logger in _as_list(asked):
            if isinstance(logger, Logger):
                if isinstance(logger, WandbLogger):  # Weights & Biases: inside the run directory, one entry per run
                    logger._save_dir = str(self.run_path)
                    logger._wandb_init.update(dir=str(self.run_path), id=self.run_path.name, resume="allow")
                    logger._id = self.run_path.name
                loggers.append(logger)
        return loggers

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand == "predict":
            arguments["return_predictions"] = False  # they are written; nobody here would read them
        if self.resumed is not None:
            arguments["ckpt_path"] = str(self.resumed / "checkpoints" / "last.ckpt")
        if arguments.get("ckpt_path"):
            path = arguments["ckpt_path"]
            try:
                checkpoint = read_checkpoint(path)
                require_class(checkpoint, class_path_of(self.model), path)
            except ValueError as error:
                raise CommandLineError(str(error)) from error
            adopt_features(self.model, checkpoint)
        return arguments


def adopt_features(model: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Gives a policy the features (and task table) of its checkpoint, so that data are checked against them."""
    saved = checkpoint.get("hyper_parameters", {})
    for name in ("features", "language"):
        if name in model.hparams and model.hparams[name] is None and saved.get(name) is not None:
            model.hparams[name] = saved[name]


def resolve_checkpoint(name: str | None, root: str) -> str | None:
    """Finds the checkpoint that `--ckpt_path` or `--init_from` means.

    A file, a run directory (its best), or ``best`` or ``last`` of the newest run; without links, since ``latest`` moves on.

    Raises:
        FileNotFoundError: names where was looked.
    """
    if name is None:
        return None
    if name in ("best", "last"):
        path = (Path(root).expanduser() / "latest").resolve() / "checkpoints" / f"{name}.ckpt"
    else:
        path = Path(name).expanduser().absolute()
        if path.is_dir():
            path = path / "checkpoints" / "best.ckpt"
    path = path.resolve()
    if not path.is_file():
        beside = sorted(str(item) for item in path.parent.glob("*.ckpt"))
        raise FileNotFoundError(f"No checkpoint at {path}." + (f" There is: {', '.join(beside)}." if beside else ""))
    return str(path)


def evaluation_folder(checkpoint: str | None, root: str, subcommand: str) -> Path:
    """Where validate, test and predict write: beside the checkpoint's run, or under the runs' root."""
    if checkpoint is not None and (run := Path(checkpoint).parent.parent) and (run / "run.json").exists():
        return run / subcommand
    return Path(root).expanduser().absolute() / subcommand


def make_absolute(config: Any) -> None:
    """Makes the paths of the data absolute: the saved configuration works from any folder."""
    arguments = (config.get("data") or {}).get("init_args") or {}
    for key in ("root", "store"):
        value = arguments.get(key)
        if isinstance(value, str) and (key == "store" or Path(value).expanduser().exists()):
            arguments[key] = str(Path(value).expanduser().absolute())
    config["run"]["root"] = str(Path(config["run"]["root"]).expanduser().absolute())


def resumed_arguments(argv: list[str]) -> tuple[list[str], Path | None]:
    """Replaces ``--resume RUN`` by the run's own configuration.

    Returns:
        the arguments to parse, and the run directory (None where nothing is resumed).

    Raises:
        CommandLineError: settings are given besides `--resume`.
        FileNotFoundError: there is nothing to resume.
    """
    name, rest, root, experiment = None, [], "runs", None
    items = iter(argv[1:])
    for item in items:
        flag, equals, value = item.partition("=")
        if flag in ("--resume", "--run.root", "--run.experiment"):
            value = value if equals else next(items, "")
            if flag == "--resume":
                name = value
            elif flag == "--run.root":
                root = value
            else:
                experiment = value
            if flag != "--resume":
                rest += [flag, value]
        else:
            rest.append(item)
    if name is None or name == "null":
        return argv, None
    if not name:
        raise CommandLineError("--resume needs a run directory, or 'latest'.")
    run = find_run(name, Path(root) / experiment if experiment and name == "latest" else root)
    kept: list[str] = []
    refused: list[str] = []
    items = iter(rest)
    for item in items:
        flag, equals, value = item.partition("=")
        if flag in ("--run.root", "--run.experiment"):
            next(items, None)
        elif flag in RESUME_MAY_SET:
            kept += [item] if equals else [item, next(items, "")]
        elif flag.startswith("-") or not refused:  # what follows a refused flag is its value
            refused.append(flag)
    if refused:
        raise CommandLineError(
            f"--resume takes up {run} with its own settings; {', '.join(refused)} would change them. New settings make a new "
            f"run: fit --config {run / 'config.yaml'} --init_from {run / 'checkpoints' / 'last.ckpt'} and your options. "
            f"A resumed run may set {', '.join(RESUME_MAY_SET)}."
        )
    return ["fit", "--config", str(run / "config.yaml"), *kept], run


def with_the_runs_settings(argv: list[str]) -> list[str]:
    """Puts the run's own configuration first where a checkpoint is named and no configuration is."""
    flags = [item.partition("=")[0] for item in argv]
    if "--config" in flags or "-c" in flags or "--ckpt_path" not in flags:
        return argv
    place = flags.index("--ckpt_path")
    name = argv[place].partition("=")[2] or "".join(argv[place + 1 : place + 2])
    if not name:
        return argv  # the parser says what is missing
    root = "runs"
    for flag, item, following in zip(flags, argv, [*argv[1:], ""], strict=True):
        if flag == "--run.root":
            root = item.partition("=")[2] or following
    config = Path(resolve_checkpoint(name, root) or "").parent.parent / "config.yaml"
    return [argv[0], "--config", str(config), *argv[1:]] if config.is_file() else argv


def _as_list(value: Any) -> list[Any]:
    if value is None or isinstance(value, bool):
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _is_refusal(error: Exception) -> bool:
    """Whether the package raised the error itself, with a sentence about a setting or the data.

    What torch, numpy or a dictionary raises is a fault, and needs its traceback.
    """
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).is_relative_to(Path(__file__).parent) and (last.line or "").startswith("raise ")


def main(argv: list[str]) -> int:
    """Runs fit, validate, test or predict.

    Args:
        argv: the command and its options.

    Returns:
        the exit code: 0, 1 for a failure that is explained in one line, 2 for a wrong command line, 128 + n after signal n.
    """
    silence_tips()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*overridden `on_before_batch_transfer`.*")  # as meant: noise is the policy's
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable.*")
    # Its successor, forward_sync_buffers, is unknown to torch before 2.13.
    warnings.filterwarnings("ignore", message=".*`broadcast_buffers` is deprecated.*")
    warnings.filterwarnings("ignore", message=".*number of training batches.*smaller than the logging interval.*")
    try:
        argv, resumed = resumed_arguments(argv) if argv[0] == "fit" else (with_the_runs_settings(argv), None)
        CommandLine(argv, resumed)
    except Stopped as stopped:
        say(str(stopped))
        return 128 + stopped.number
    except (CommandLineError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (IncompatibleFeatures, StoreError, EnvironmentFault, NonFiniteError, OSError, MisconfigurationException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, KeyError) as error:
        if not _is_refusal(error):
            raise
        print(f"error: {error.args[0]}", file=sys.stderr)
        return 1
    finally:
        run = os.environ.pop(HANDED_OVER, None)
        if run is not None and is_first_process():
            with suppress(OSError):  # goes only where it is empty: the run never began
                os.rmdir(run)
    return 0
