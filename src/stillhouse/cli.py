"""The command `stillhouse`, made from the typed signatures of the functions it calls; holds no logic of its own.

The list of commands is argparse's, so that `stillhouse --help` answers at once; each command's own flags are jsonargparse's, read from the
function's signature and docstring. Flags that are not given are not passed on: defaults stand in one place, the signature.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from stillhouse import __version__

COMMANDS = {
    "distill": "distil a student from a teacher; without arguments, the embedded job",
    "methods": "what there is; with a name, one method's card",
    "check": "is the teacher any good, frozen, normalised; do the shapes meet?",
    "estimate": "what a step of each method would cost here",
    "evaluate": "a run's student, or any network, on data; what its features are worth",
    "compare": "runs side by side",
    "reproduce": "a method's evidence: method, baselines, ablation, over seeds",
    "export": "the student alone, for timm, transformers, onnx or torch",
}

EXIT_CODES = """exit codes: 0 done; 1 refused or failed, one sentence on the error stream says why;
130 stopped by Ctrl-C (SIGINT), 143 by SIGTERM: `stillhouse distill --resume --out RUN` goes on."""

POSITIONALS: dict[str, dict[str, dict[str, Any]]] = {
    "methods": {"name": {"nargs": "?", "help": "a method; all by default"}},
    "evaluate": {"run": {"help": "a run folder, the folder of a network in it, or a network by name"}},
    "compare": {"runs": {"nargs": "+", "help": "run folders"}},
    "reproduce": {"name": {"help": "a method that has evidence"}},
    "export": {"run": {"help": "a run folder"}},
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code, which `EXIT_CODES` tells."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="stillhouse",
        description="Distils: a small model out of a large one, by the published ways.",
        epilog=f"stillhouse COMMAND --help shows a command's flags.\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"stillhouse {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, help_text in COMMANDS.items():
        commands.add_parser(name, help=help_text, add_help=False)
    name = parser.parse_args(arguments[:1]).command
    return _run(name, arguments[1:])


def _run(name: str, arguments: Sequence[str]) -> int:
    from stillhouse import commands
    from stillhouse.errors import UserError
    from stillhouse.interrupted import Interrupted
    from stillhouse.report.terminal import show

    main_process = os.environ.get("RANK", "0") == "0"
    _show_log(main_process)
    try:
        function: Callable[..., Any] = getattr(commands, name)
        result = function(**_given(name, function, arguments))
        if main_process:
            show(name, result)
    except UserError as error:
        print(f"stillhouse {name}: {error}", file=sys.stderr)
        return 1
    except (MemoryError, ImportError) as error:
        if isinstance(error, ImportError) and "failed to map segment" not in str(error):
            raise
        reason = str(error) or "MemoryError"
        print(f"stillhouse {name}: memory ran out ({reason}): free some, or raise the limit, which `ulimit -v` shows", file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"stillhouse {name}: {str(error) or 'stopped'}", file=sys.stderr)
        return 128 + getattr(error, "signal", signal.SIGINT)
    return 0


def _given(name: str, function: Callable[..., Any], arguments: Sequence[str]) -> dict[str, Any]:
    """The values that were given, by the names of the function's parameters."""
    parser = _parser(name)
    flags: set[str] = set()
    for positional, how in POSITIONALS.get(name, {}).items():
        parser.add_argument(positional, **how)
    if name == "distill":
        flags = _add_distill(parser, function, arguments)
    else:
        _add_function(parser, function, skip=set(POSITIONALS.get(name, {})))
        flags = _switches(function)
    given = parser.parse_args(_spelled_out(arguments, flags), defaults=False).as_dict()
    return {key: value for key, value in given.items() if key != "config"}


def check_settings(settings: dict[str, Any], path: Path) -> None:
    """Refuses settings that were read from a file, which may come from anybody, where a flag would not take their values.

    Names that are no flags are left to those who know them; the settings of a user's own method are not known here.

    Raises:
        UserError: naming the first one.
    """
    from stillhouse import distillers
    from stillhouse.errors import UserError
    from stillhouse.run import distill

    method = settings.get("method")  # None for a class of the user's own
    if not isinstance(method, (str, type(None))):
        raise UserError(f"{path}: method is {method}, expected a name")
    if method not in distillers.modules():
        return
    parser = _parser("distill")
    _add_distill(parser, distill, ["--method", method])
    flags = {action.dest for action in parser._actions}
    try:
        parser.parse_object({name: value for name, value in settings.items() if name in flags and value is not None}, defaults=False)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _parser(name: str) -> Any:
    from jsonargparse import ArgumentParser

    from stillhouse.errors import UserError, nearest

    class Parser(ArgumentParser):
        """Shows flags with dashes; underscores are understood too."""

        def format_help(self, *arguments: Any) -> str:
            return re.sub(r"--[a-z_.]+", lambda flag: flag[0].replace("_", "-"), super().format_help(*arguments))

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            message = " ".join(message.split())
            chosen = re.search(r'Parser key "(\w+)":.*?Literal\[(.*?)\].*(?:Got|Given) value: (.+)', message)
            if chosen:
                name, choices, value = chosen[1], chosen[2].replace("'", "").split(", "), chosen[3]
                raise UserError(f"{name} is '{value}'{nearest(value, choices) or ', expected one of ' + ', '.join(choices)}")
            unknown = re.search(r"--\w+", message)
            flags = [f"--{action.dest}" for action in self._actions]
            near = nearest(unknown[0], flags).replace("_", "-") if unknown and unknown[0] not in flags else ""
            raise UserError(f"{message}{near}; `{self.prog} --help` shows all flags")

    return Parser(prog=f"stillhouse {name}", description=COMMANDS[name], default_env=False, print_config=None, allow_abbrev=False)


def _add_distill(parser: Any, function: Callable[..., Any], arguments: Sequence[str]) -> set[str]:
    """`distill`'s own flags, the method's, the loop's and the augmentation's; returns which are switches."""
    from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]

    from stillhouse import distillers
    from stillhouse.data.transforms import train_transform
    from stillhouse.training.recipe import Recipe

    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file of settings, such as a run's settings.yaml")
    method = _method(arguments)
    kind, others = distillers.find(method), set(distillers.others(method))
    idle = {"judge": "generate" not in kind.tasks, "unlabelled": not kind.unlabelled}
    _add_function(parser, function, skip={"settings", *(name for name, unused in idle.items() if unused)})
    texts = _texts(kind)
    for network in sorted(others):
        parser.add_argument(f"--{network}", type=str, help=texts.get(network))
    parser.add_class_arguments(kind, skip={"student", "teacher"} | others)
    parser.add_class_arguments(Recipe)
    _add_function(parser, train_transform, skip={"preprocessing", "data"})
    return _switches(function) | _switches(Recipe)


def _add_function(parser: Any, function: Callable[..., Any], skip: set[str]) -> None:
    """A function's parameters as flags; where Python also takes an object, the command line takes its name."""
    parameters = {name: each for name, each in inspect.signature(function).parameters.items() if name not in skip}
    named = {name: each for name, each in parameters.items() if re.search(r"nn\.Module|Data\b|Path|type\[", str(each.annotation))}
    texts = _texts(function)
    for name, parameter in named.items():
        parser.add_argument(f"--{name}", type=str, required=parameter.default is inspect.Parameter.empty, help=texts.get(name))
    parser.add_function_arguments(function, skip=skip | set(named))


def _texts(documented: Any) -> dict[str, str | None]:
    """What a docstring says about each parameter."""
    import docstring_parser

    return {each.arg_name: each.description for each in docstring_parser.parse(documented.__doc__ or "").params}


def _switches(function: Callable[..., Any]) -> set[str]:
    return {name for name, parameter in inspect.signature(function).parameters.items() if parameter.annotation == "bool"}


def _spelled_out(arguments: Sequence[str], switches: set[str]) -> list[str]:
    """Dashes in flags as the underscores of the parameters, and `--resume` as `--resume true`."""
    words: list[str] = []
    for word, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            flag = "--" + flag[2:].replace("-", "_")
        words.append(flag + equals + value)
        if flag[2:] in switches and not equals and following not in ("true", "false"):
            words.append("true")
    return words


def _method(arguments: Sequence[str]) -> str:
    """The method named by `--method` or in the `--config` file, whose settings become flags."""
    from stillhouse.run import default_method
    from stillhouse.run_folder import read_settings

    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--method", "--task", "--data"):
        early.add_argument(flag)
    early.add_argument("--config")
    early.add_argument("--out")
    early.add_argument("--resume", nargs="?", const="true")
    named, _ = early.parse_known_args(list(arguments))
    if named.config and Path(named.config).is_file():
        read_settings(Path(named.config))  # refuses what the flags' own reader would follow
    stored = named.config or (Path(named.out) / "settings.yaml" if named.resume and named.out else None)
    if named.method is None and stored is not None and Path(stored).is_file():
        return str(read_settings(Path(stored)).get("method", default_method(None, None)))
    return named.method or default_method(named.task, named.data)


def _show_log(main_process: bool) -> None:
    import logging

    from stillhouse.errors import printable

    class Printable(logging.Formatter):
        """Names of files and classes steer no terminal."""

        def format(self, record: logging.LogRecord) -> str:
            return "\n".join(map(printable, super().format(record).split("\n")))

    handler = logging.StreamHandler()
    handler.setFormatter(Printable("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("stillhouse").setLevel(logging.INFO if main_process else logging.WARNING)
