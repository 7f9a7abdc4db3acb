"""What flags choose by name, and the user's own choices: the Python files in extensions/."""

import difflib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from errors import UsageError, printable

EXTENSIONS = Path(__file__).parent / "extensions"
Choice = TypeVar("Choice")


class Registry(Generic[Choice]):
    """The choices of one kind, by name. Registering is done with a decorator: `@TRACKERS.register("name")`."""

    def __init__(self, flag: str) -> None:
        """`flag` is the one that takes these names."""
        self.flag = flag
        self._choices: dict[str, Choice] = {}

    def register(self, name: str) -> Callable[[Choice], Choice]:
        """A decorator that adds what it decorates under a new name. Raises UsageError for a name that is taken."""

        def add(choice: Choice) -> Choice:
            if name in self._choices:
                raise UsageError(f"{self.flag} has the choice {name} already; register another name")
            self._choices[name] = choice
            return choice

        return add

    def names(self) -> list[str]:
        """The names, in the order in which they were registered."""
        return list(self._choices)

    def __contains__(self, name: object) -> bool:
        return name in self._choices

    def __getitem__(self, name: str) -> Choice:
        """The choice of this name. Raises UsageError, which names the nearest one."""
        if name not in self._choices:
            near = difflib.get_close_matches(name, self._choices, 1)
            hint = f"did you mean {near[0]}" if near else f"give one of {', '.join(self._choices)}"
            raise UsageError(f"{self.flag} has no choice {name}; {hint}")
        return self._choices[name]


def load_extensions(folder: Path = EXTENSIONS) -> list[Path]:
    """Import the Python files in a folder, in the order of their names, and return them.

    Raises UsageError, which names the file, for one that cannot be imported.
    """
    found = sorted(path for path in folder.glob("*.py") if not path.name.startswith(("_", ".")))
    for path in found:
        spec = importlib.util.spec_from_file_location(f"extensions.{path.stem}", path)
        if spec is None or spec.loader is None:
            continue  # never for a name that ends in .py
        try:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
        except Exception as error:
            why = printable(f"{type(error).__name__}: {error}")[:200]
            raise UsageError(f"{path} cannot be imported ({why}); mend it, or move it away") from error
    return found
