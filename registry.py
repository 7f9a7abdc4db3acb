"""What flags choose by name, and the user's own choices: the Python files in extensions/."""

import contextlib
import difflib
import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Generic, TypeVar

from errors import Interrupted, UsageError, UserError, printable

EXTENSIONS = Path(__file__).parent / "extensions"
LOADED: dict[str, str] = {}
"""The extensions of this process: the name of each file, and its digest."""
Choice = TypeVar("Choice")


class Registry(Generic[Choice]):
    """The choices of one kind, by name. `register` and `define` are decorators."""

    def __init__(self, flag: str, built_in: Iterable[str] = ()) -> None:
        """`flag` is the one that takes these names; the `built_in` ones are known before `define` gives them a meaning,
        so that --help need not import what they stand for.
        """
        self.flag = flag
        self._names = dict.fromkeys(built_in)
        self._choices: dict[str, Choice] = {}

    def define(self, name: str) -> Callable[[Choice], Choice]:
        """A decorator that says what a built-in name stands for."""

        def add(choice: Choice) -> Choice:
            self._choices[name] = choice
            return choice

        return add

    def register(self, name: str) -> Callable[[Choice], Choice]:
        """A decorator that adds what it decorates under a new name. Raises UsageError for a name that is taken."""

        def add(choice: Choice) -> Choice:
            if not re.fullmatch(r"[\w.+-]+", name):
                raise UsageError(f"{self.flag} cannot have the choice {printable(name)}; use letters, digits and _.+-")
            if name in self._names:
                raise UsageError(f"{self.flag} has the choice {name} already; register another name")
            self._names[name] = None
            self._choices[name] = choice
            return choice

        return add

    def names(self) -> list[str]:
        """The names, in the order in which they were registered."""
        return list(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Choice:
        """The choice of this name. Raises UsageError, which names the nearest one."""
        return self._choices[self.require(name)]

    def require(self, name: str) -> str:
        """The name itself, if it is one of these. Raises UsageError, which names the nearest one."""
        if name not in self._names:
            near = difflib.get_close_matches(name, self._names, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            there = f"there are {', '.join(self._names)}" if self._names else "none is registered in extensions/"
            raise UsageError(f"{self.flag} has no choice {printable(name)}; {hint}{there}")
        return name


@contextlib.contextmanager
def naming(
    flag: str,
    name: str,
    kind: type[UserError] = UsageError,
    passing: Callable[[Exception], bool] = lambda error: False,
) -> Iterator[None]:
    """A context in which what was registered is called: its own errors become one of this kind, a line.

    Those that are `passing` stay as they are.
    """
    try:
        yield
    except (UserError, Interrupted):
        raise
    except Exception as error:
        if passing(error):
            raise
        why = printable(f"{type(error).__name__}: {error}")[:200]
        raise kind(f"{flag} {name} failed ({why}); mend it: --debug shows where") from error


def load_extensions(folder: Path = EXTENSIONS) -> list[Path]:
    """Import the Python files in a folder, in the order of their names, each once in a process, and return them.

    Raises UsageError, which names the file, for one that cannot be imported.
    """
    found = sorted(path for path in folder.glob("*.py") if not path.name.startswith(("_", ".")))
    for path in found:
        name = f"extensions.{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        if path.name in LOADED or spec is None or spec.loader is None:  # there is a loader for every name in .py
            continue
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
            if getattr(sys.modules.get(name), "__file__", None) != str(path):  # else another file imported it
                sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
                spec.loader.exec_module(sys.modules[name])
        except Exception as error:
            why = printable(f"{type(error).__name__}: {error}")[:200]
            raise UsageError(f"{path} cannot be imported ({why}); mend it, or move it away") from error
        LOADED[path.name] = f"sha256:{digest}"
    return found
