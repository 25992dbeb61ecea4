"""The table of options (`config.OPTIONS`) as arguments of the command line."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from quantopt.train.config import OPTIONS, Option


def add_options(parser: argparse.ArgumentParser, command: str, table: Mapping[str, Option] = OPTIONS) -> None:
    """Adds the options of the table that `command` has."""
    for option in table.values():
        if command in option.commands:
            add_option(parser, option)


def add_option(parser: argparse.ArgumentParser, option: Option) -> None:
    """Adds one option. Where a recipe may set it, the argument's default is None."""
    default = None
    text = option.otherwise
    if option.recipe:
        text = option.otherwise or ("" if option.default is None else str(option.default))
        text = f"recipe's; else {text}" if text else "recipe's"
    else:
        default = option.default if option.argument_default is None else option.argument_default
    settings: dict[str, Any] = {
        "help": f"{option.help} ({text})" if text else option.help,
        "default": default,
    }
    if option.types == (bool,):
        parser.add_argument(option.flag, action=argparse.BooleanOptionalAction, **settings)
        return
    if option.types == (list,):
        settings["nargs"] = "+"
    parser.add_argument(
        option.flag,
        type=_parser(option),
        choices=option.offered or option.choices,
        metavar=option.metavar,
        **settings,
    )


def add_from_report(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds an option whose default is in the report of a run, if there is one."""
    option = OPTIONS[name]
    add_option(parser, replace(option, recipe="", otherwise=f"the report's; else {option.otherwise}"))


def _parser(option: Option) -> Callable[[str], Any]:
    """From the text of an argument to a value in the option's range."""
    number = next((kind for kind in (int, float) if kind in option.types), None)

    def parse(text: str) -> Any:
        if number is None:
            return nonempty(text)
        try:
            value = number(text)
        except ValueError:
            if str in option.types:
                return text
            kind = "whole number" if number is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {kind}") from None
        if expected := option.expected(value):
            raise argparse.ArgumentTypeError(f"must be {expected}, not {text}")
        return value

    return parse


def nonempty(text: str) -> str:
    """The type of an argument that is a name or a path: an empty one is mostly a variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def given(arguments: argparse.Namespace, table: Mapping[str, Option] = OPTIONS) -> dict[str, Any]:
    """The options of the table that have a value in `arguments`."""
    values = {name: getattr(arguments, name, None) for name in table}
    if values["skip"] == ["none"]:
        values["skip"] = []
    return {name: value for name, value in values.items() if value is not None}


def passed_on(arguments: argparse.Namespace, command: str) -> list[str]:
    """The options of `command` that have a value in `arguments`, as they are written on a command line."""
    words = []
    for name, value in given(arguments).items():
        option = OPTIONS[name]
        if command not in option.commands:
            continue
        if option.types == (bool,):
            words.append(option.flag if value else option.flag.replace("--", "--no-", 1))
        else:
            words += [option.flag, str(value)]
    return words
