"""How a flag is declared as a field of a dataclass, parsed with argparse, and held to its bounds."""

import argparse
import itertools
import math
import os
import re
import sys
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, field, fields
from typing import Any

from choices import DATASETS, MODELS, model_choice
from errors import UsageError
from hints import DASHES, NO, YES, inverse, nearest_flag, nearest_number, without_value
from registry import Registry

SIZE_STEP = 32  # pixels between sizes that a run grows through
TAKES_FILES = ("PATH", "DIR", "FILE", "RUN", "SOURCE", "IMAGE")  # metavars of what a shell completes with file names
DEVICES = ("auto", "cpu", "cuda", "mps")
MOST_JITTER = (1e9, 1e9, 1e9, 0.5)  # of brightness, contrast, saturation and hue
WHICH = ("best", "last", "ema")
FROM_PRESET: Any = object()  # the default of a flag whose value depends on the dataset


def flag(
    group: str,
    help: str,
    default: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    on_resume: str = "fixed",
    short: Any = None,
    names: Registry[Any] | None = None,
    offers: Collection[str] = (),
    is_path: bool = False,
    needs: Any = None,
    **argparse_options: Any,
) -> Any:
    """One flag: at least `least`, greater than `above`, at most `most`; `short` describes its default in the help.

    Its value is one of `names`, or a list of such, which the help lists; a shell completes these, or what it `offers`.
    Of what `is_path`, a leading ~ is expanded. `needs` is the `Need` without which the flag has no effect.
    `on_resume` is "fixed" for a flag that would change the result, "kept" for one whose saved value a resume may
    replace, and "forgotten" for one that concerns a single launch.
    """
    bounds = {"least": least, "above": above, "most": most}
    metadata = {"group": group, "help": help, "on_resume": on_resume, "short": short, "bounds": bounds, "names": names}
    metadata |= {"offers": offers, "needs": needs}
    if is_path:
        argparse_options = {"type": os.path.expanduser, "metavar": "PATH"} | argparse_options
    if names is not None:
        argparse_options = {"type": names.require, "metavar": "NAME"} | argparse_options
    return field(default=default, metadata=metadata | {"argparse": argparse_options})


def learning_rate(text: str) -> float | str:
    return text if text == "auto" else float(text)


def device_name(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", text):
        raise UsageError(f"--device {text} is no device; there are {', '.join(DEVICES)} and cuda:N")
    return text


def jitter(text: str) -> str:
    try:
        amounts = [float(part) for part in text.split(",")]
        if len(amounts) > len(MOST_JITTER) or not all(0 <= x <= y for x, y in zip(amounts, MOST_JITTER, strict=False)):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text} is no list of up to four shares such as 0.4,0.4,0.4,0.1, of which that of hue is 0.5 at most"
        ) from None
    return text


def epochs_list(text: str) -> str:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text} is no list of epochs such as 30,60")
    return text


def model_name(text: str) -> str:
    return text if model_choice(text) in MODELS else MODELS.require(text)


def several_of(names: Registry[Any]) -> Callable[[str], str]:
    """Takes a list of different names, with commas between."""

    def take(text: str) -> str:
        found = [names.require(name) for name in listed(text)]
        if len(set(found)) < len(found):
            raise argparse.ArgumentTypeError(f"{text} names something twice")
        return text

    return take


def listed(text: str | None) -> list[str]:
    """The names in a list with commas between, none if there is no list."""
    return text.split(",") if text else []


def sizes_list(text: str) -> str:
    try:
        sizes, fractions = zip(*size_points(text), strict=True)
        if list(fractions) != sorted(set(fractions)) or not 0 <= fractions[0] <= fractions[-1] <= 1:
            raise ValueError
        if any(size < SIZE_STEP or size % SIZE_STEP for size in sizes):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text} is no list such as 128:0,192:0.6, of multiples of {SIZE_STEP} at rising fractions of training"
        ) from None
    return text


def size_points(text: str) -> list[tuple[int, float]]:
    """The sizes of --progressive_size, pixels, and the fractions of training that they belong to. Raises ValueError."""
    pairs = [part.split(":") for part in text.split(",")]
    return [(int(size), float(fraction)) for size, fraction in pairs]


def channels(text: str) -> str:
    try:
        red, green, blue = channel_values(text)
        if not all(map(math.isfinite, (red, green, blue))):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no list of three numbers such as 0.485,0.456,0.406") from None
    return text


def channel_values(text: str) -> tuple[float, ...]:
    """The numbers of --mean and --std. Raises ValueError."""
    return tuple(map(float, text.split(",")))


def check_bounds(name: str, value: Any, bounds: Mapping[str, float | None]) -> None:
    if isinstance(value, str) and "://" in value:
        raise UsageError(f"{name} is a URL; give a Hub id or something on this machine")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    least, above, most = (bounds[kind] for kind in ("least", "above", "most"))
    if not math.isfinite(value):
        raise UsageError(f"{name} {value} is not a finite number")
    if least is not None and value < least:
        raise UsageError(f"{name} {value} is too small; it must be at least {least}")
    if above is not None and value <= above:
        raise UsageError(f"{name} {value} is too small; it must be greater than {above}")
    if most is not None and value > most:
        raise UsageError(f"{name} {value} is too large; it must be at most {most}")


def _default_text(item: Field[Any]) -> str:
    if item.metadata["short"]:
        return str(item.metadata["short"])
    if item.default is FROM_PRESET:
        values = {name: getattr(DATASETS[name].preset, item.name) for name in DATASETS.names()}
        if len(set(values.values())) == 1:
            return str(values["digits"])
        others = ", ".join(f"{name} {value}" for name, value in values.items() if value != values["hf"])
        return f"{values['hf']}; {others}"
    if item.default in (None, ()):
        return "none"
    if isinstance(item.default, bool):
        return f"on; --no_{item.name} turns it off" if item.default else "off"
    return str(item.default)


class CommandLine(argparse.ArgumentParser):
    """argparse's parser with our refusals, our two helps and what a shell completes."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.rare: dict[argparse.Action, str] = {}
        self.offers: dict[argparse.Action, Collection[str]] = {}

    def show_all(self) -> None:
        """Give the rare flags, which --help leaves out, their help."""
        for action, text in self.rare.items():
            action.help = text
        self.epilog = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, but a value after a flag that takes none, as --amp false, is refused with what to give."""
        words = sys.argv[1:] if args is None else [*args]
        for word, following in itertools.pairwise([*words, ""]):
            name, equals, value = word.partition("=")
            action = self._option_string_actions.get(name)
            told = value if equals else following
            if action is None or action.nargs != 0:
                continue
            if equals or (told.lower() in (*YES, *NO) and not os.path.exists(told)):
                instead = without_value(name, told, self._option_string_actions)
                raise UsageError(f"{name} takes no value, and {told or 'nothing'} is given; {instead}")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> typing.NoReturn:
        raise UsageError(f"{message}; {self._meant(message)}see --help")

    def _meant(self, message: str) -> str:
        """What may have been meant by the first thing that argparse's message is about."""
        found = ""
        if unknown := re.match(r"unrecognized arguments: (.*)", message):
            told = next((word for word in unknown[1].split() if word[0] in DASHES), unknown[1])
            found = nearest_flag(told, self._option_string_actions)
        elif number := re.match(r"argument .*: invalid (int|float|learning_rate) value: '(.*)'$", message):
            found = nearest_number(number[2], whole=number[1] == "int")
        return f"did you mean {found}? " if found else ""


class _HelpAll(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, CommandLine)
        parser.show_all()
        parser.print_help()
        parser.exit()


class _PrintCompletion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, _: Any, shell: Any, __: Any = None) -> None:
        import shtab

        assert isinstance(parser, CommandLine)
        parser.show_all()
        for action in parser._actions:
            if action.help is argparse.SUPPRESS:  # shtab leaves out what has no help
                action.help = f"not --{inverse(action.option_strings[0].lstrip('-'))}"
            if action in parser.offers:
                action.choices = parser.offers[action]
            elif action.metavar in TAKES_FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell))
        parser.exit()


def add_switch(group: Any, name: str, help: str, default: Any = argparse.SUPPRESS) -> argparse.Action:
    """Add a flag that is true when it is given, and false when the one of the inverse name is."""
    unset: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS, "dest": name}
    group.add_argument(f"--{inverse(name)}", action="store_false", **unset)
    return group.add_argument(f"--{name}", action="store_true", help=help, default=default)  # type: ignore[no-any-return]


def parser_of(
    settings: type,
    prog: str,
    description: str,
    only: Collection[str] | None = None,
    of_source: bool = False,
    common: Collection[str] | None = None,
    shown: str = "",
) -> CommandLine:
    """A parser for the fields of `settings`, which leaves out what is not given and raises UsageError.

    A field that is true or false has `--no_NAME` too (`no_streaming`: `--streaming`). `only` names the fields to take;
    the defaults of an `of_source` parser are those of the model source, where they outlive a launch. With `common`
    names of fields, `--help` shows these and the group `shown`, and `--help_all` the others too.
    """
    raw = argparse.RawDescriptionHelpFormatter
    result = CommandLine(
        prog, usage="%(prog)s [flags]", description=description, formatter_class=raw, allow_abbrev=False
    )
    once: dict[str, Any] = {"default": argparse.SUPPRESS, "dest": argparse.SUPPRESS}
    if common is not None:
        result.add_argument(
            "--help_all", action=_HelpAll, nargs=0, help="show every flag, not only the usual ones", **once
        )
    text = f'print what completes the flags of {prog} in bash, zsh or tcsh: eval "$(./{prog} --print_completion bash)"'
    once |= {"choices": ("bash", "zsh", "tcsh"), "metavar": "SHELL"}
    result.add_argument("--print_completion", action=_PrintCompletion, help=text, **once)
    hints = typing.get_type_hints(settings)
    groups: dict[str, Any] = {}
    for item in fields(settings):
        if only is not None and item.name not in only:
            continue
        title = item.metadata["group"]
        group = groups.get(title) or groups.setdefault(title, result.add_argument_group(title))
        default = "the source's own" if of_source and item.metadata["on_resume"] != "forgotten" else _default_text(item)
        names = item.metadata["names"]
        told = f": {', '.join(names.names()) or 'none is registered'}" if names is not None else ""
        text = f"{item.metadata['help']}{told} (default: {default})"
        if bool in (hints[item.name], *typing.get_args(hints[item.name])):
            action = add_switch(group, item.name, text)
        else:
            action = group.add_argument(f"--{item.name}", default=argparse.SUPPRESS, help=text, **_options(item, hints))
        if offers := item.metadata["offers"] or (names.names() if names is not None else ()):
            result.offers[action] = offers
        if common is not None and item.name not in common and title != shown:
            result.rare[action], action.help = text, argparse.SUPPRESS
    if result.rare:
        result.epilog = f"--help_all shows {len(result.rare)} more flags."
    return result


def _options(item: Field[Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """argparse's options of a field that takes a value."""
    options = dict(item.metadata["argparse"])
    if "action" not in options:
        kind = next(kind for kind in typing.get_args(hints[item.name]) or (hints[item.name],))
        options.setdefault("type", kind)
        if "choices" not in options:
            options.setdefault("metavar", {int: "N", float: "X"}.get(kind, "TEXT"))
    return options


def door_parser(
    settings: type, prog: str, description: str, only: Collection[str] = (), operands: str = ""
) -> CommandLine:
    """A parser for a front door to trained models: SOURCE, `--which`, `--model`, `--debug`, and the fields in `only`.

    `operands` are what the usage line names after SOURCE; the door itself adds them, and flags of its own, which leave
    out what is not given if their default is SUPPRESS.
    """
    result = parser_of(settings, prog, description, {*only, "debug"}, of_source=True)
    result.usage = f"%(prog)s SOURCE {operands}{' ' if operands else ''}[flags]"
    source = "a run, a snapshot, an exported, transformers or timm folder, a Hub id, or a .safetensors or .pth file"
    result.add_argument("source", metavar="SOURCE", type=os.path.expanduser, help=source)
    group = result.add_argument_group("source")
    unset: dict[str, Any] = {"default": argparse.SUPPRESS}
    which = "of a run: best, last, ema, or the number of a step (default: best if --save_best kept it, else last)"
    result.offers[group.add_argument("--which", metavar="TEXT", help=which, **unset)] = WHICH
    model = "of a bare weight file: its model, as --model of main.py (default: a ResNet by its weights)"
    result.offers[group.add_argument("--model", metavar="TEXT", help=model, **unset)] = MODELS.names()
    return result
