"""Class and file names, shortened for a picture or a line."""

from errors import printable

NAME_LENGTH = 32


def short(name: str, length: int = NAME_LENGTH) -> str:
    """A class or file name in one line of at most `length` characters: its first name, cut in the middle if need be."""
    name = printable(name)
    name = name.split(",")[0].strip() or name
    if len(name) <= length:
        return name
    end = (length - 1) // 3
    return f"{name[: length - 1 - end]}…{name[-end:]}"
