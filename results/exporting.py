"""An export from its source to its folder: written beside it, loaded again, compared, and only then put in place."""

import contextlib
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from safetensors import SafetensorError

from beforehand import SIDECAR
from errors import SIGNALS, SnapshotError, complain, printable
from results.agreement import Agreement, compare, images_of
from results.card import model_card, origin
from results.folders import load_folder, write_folder
from results.formats import PROGRAMS, Order, class_names, require_place
from results.places import make_folder, require_free
from results.programs import load_program, write_program
from stream.files import sync
from training.preprocessing import PREPROCESSING
from training.sources import OPTIONS


def export(order: Order, tell: Callable[[str], None]) -> Agreement:
    """Make the export; `tell` prints a line. The folder appears complete and checked, or not at all.

    Raises UsageError for what the format has no place for and a folder that is in use, DisagreementError.
    """
    require_place(order.source, order.format, order.precision)
    require_free(order.out)
    make_folder(order.out.parent)
    with _ended_by_signals():
        temporary = Path(tempfile.mkdtemp(prefix=f".{order.out.name}.", dir=order.out.parent))
        try:
            agreement = _fill(order, temporary, tell)
            temporary.chmod(0o777 & ~_umask())
            _put_in_place(temporary, order.out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return agreement


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A context that SIGNALS end as Ctrl-C does, so that what was begun is removed."""

    def end(signum: int, frame: FrameType | None) -> None:
        complain(f"stopped by {signal.Signals(signum).name}")
        raise SystemExit(128 + signum)

    before = {signum: signal.getsignal(signum) for signum in SIGNALS if signum != signal.SIGINT}
    for signum, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(signum, end)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _fill(order: Order, folder: Path, tell: Callable[[str], None]) -> Agreement:
    source = order.source
    model = source.build()
    classes = source.count
    is_program = order.format in PROGRAMS
    try:
        (write_program if is_program else write_folder)(order, model, folder)
    except SafetensorError as error:  # of a full disk too
        raise SnapshotError(
            f"cannot write {order.out} ({printable(str(error))}); make room, or give another"
        ) from error
    loaded = (load_program if is_program else load_folder)(order, folder, classes)
    agreement = compare(order, loaded, *images_of(source))
    tell(f"compared  {agreement}")
    kept: dict[str, Any] = {
        "model": source.model,
        "options": {name: source.options.get(name) for name in OPTIONS},
        "layout": order.format,
        "classes": class_names(source, classes),
        "settings": {name: source.settings[name] for name in PREPROCESSING},
        "precision": order.precision,
        "source": origin(source),
    }
    (folder / SIDECAR).write_text(json.dumps(kept, indent=2), encoding="utf-8")
    curves = source.run / "plots" / "curves.png" if source.run else None
    if curves is not None and curves.is_file():
        shutil.copyfile(curves, folder / "curves.png")
    card = model_card(order, agreement, kept["classes"], sorted(path.name for path in folder.iterdir()))
    (folder / "README.md").write_text(card, encoding="utf-8")
    return agreement


def _put_in_place(temporary: Path, out: Path) -> None:
    """Give the finished folder its name, once it is on disk, in place of an earlier export."""
    try:
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        if out.exists():
            earlier = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            out.rename(earlier)
            try:
                temporary.rename(out)
            except BaseException:
                if not out.exists():
                    earlier.rename(out)
                raise
            shutil.rmtree(earlier)
        else:
            temporary.rename(out)
    except OSError as error:
        raise SnapshotError(f"cannot write {out} ({error.strerror}); give another --out") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
