"""How an automatic augmentation is named."""

import re

BINS = 31
SECTIONS: dict[str, dict[str, type[int] | type[float]]] = {
    "ta_wide": {},
    "ra": {"n": int, "m": int},
    "rand": {"n": int, "m": int, "mmax": int, "inc": int, "p": float, "mstd": float},
}


def read_policy(text: str) -> tuple[str, dict[str, float]]:
    """The kind in a name such as ta_wide, ra-n2-m9 or rand-m7-n2-mstd0.5-inc1, and the numbers. Raises ValueError."""
    name, *sections = text.split("-")
    kinds = SECTIONS.get(name, {})
    try:
        pairs = [re.fullmatch(r"([a-z]+)([\d.]+)", section) for section in sections]
        given = {pair[1]: kinds[pair[1]](pair[2]) for pair in pairs if pair}
        if name not in SECTIONS or len(given) < len(sections):
            raise KeyError
    except (KeyError, ValueError):
        raise ValueError(
            f"{text!r} is no automatic augmentation; there are ta_wide, ra (as ra-n2-m9) and rand (as "
            "rand-m7-n2-mstd0.5-inc1, p and mmax too)"
        ) from None
    if given.get("n", 1) < 1 or given.get("p", 0) > 1 or (name == "ra" and given.get("m", 0) >= BINS):
        raise ValueError(f"{text!r} is out of bounds; n is 1 or more, p is 1 or less, and ra's m is less than {BINS}")
    return name, given
