"""Plants faults of one line in a copy of the program, one at a time, and sees whether the tests find each of them.

    uv run python tests/mutation_check.py

Prints a row a fault; the exit status is 1 when one survives. A fault whose place is no longer in the code, and tests
that fail without any fault, end the check with a line that says so.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "data", "runs", "wandb")
TIMEOUT = 400  # seconds that the tests of one fault may take
FIRST = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Fault:
    """In the file `path`, `new` in place of `old`, which is part of one line; `tests` are what pytest is to run."""

    path: str
    words: str
    old: str
    new: str
    tests: str


FAULTS = (
    Fault(
        "stream/loader.py",
        "a rank counts the steps of its own share",
        "len(dataset) // (batch_size * ranks)",
        "sum(map(len, order(0))) // batch_size",
        "tests/test_resident.py -k whole_batches",
    ),
    Fault(
        "distributed.py",
        "ranks compare rank 0 with itself",
        "if told[rank][name] != told[0][name]",
        "if told[0][name] != told[0][name]",
        "tests/test_distributed.py -k agree_say",
    ),
    Fault(
        "stream/label_column.py",
        "only the first file's class names are compared",
        "{file: self._naming_of(file, classes, from_card)",
        "{file: self._naming_of(0, classes, from_card)",
        "tests/test_classes.py -k other_class_names",
    ),
    Fault(
        "stream/ranges.py",
        "an answer is believed to be the range that was asked for",
        'if response.status_code == 206 and told != f"bytes {first}-{end - 1}/{size}":',
        "if response.status_code == 206 and told is None:",
        "tests/test_misbehaving.py -k 'odd_answers_for_files or stays_odd'",
    ),
    Fault(
        "stream/ranges.py",
        "what the footer tells of a block is not compared with what came",
        "check(mine.written())",
        "trust(mine.written())",
        "tests/test_misbehaving.py -k 'odd_answers_for_files or stays_odd'",
    ),
    Fault(
        "stream/ranges.py",
        "the Hub's checksum of a whole file is not compared",
        "if told and digest.hexdigest() != told:",
        "if told and len(digest.hexdigest()) != len(told):",
        "tests/test_misbehaving.py -k wrong_bit",
    ),
    Fault(
        "stream/client.py",
        "a link that ran out is taken for a refusal by the Hub",
        "if status >= 400 and status not in",
        "if status >= 600 and status not in",
        "tests/test_misbehaving.py -k 'odd_answers_for_files or stays_odd'",
    ),
    Fault(
        "stream/allowance.py",
        "each rank spreads its requests as if it were alone",
        "seconds * ranks / left if left > 0",
        "seconds / left if left > 0",
        "tests/test_faults.py -k eight_ranks",
    ),
    Fault(
        "open_data.py",
        "validation may have more classes than training",
        "unknown = [name for name in val.classes if name not in trained]",
        "unknown = []",
        "tests/test_classes.py -k other_class_names",
    ),
    Fault(
        "stream/local.py",
        "a fingerprint looks into every 256th file, not into 256 files",
        "if number % spread == 0:",
        "if number % FILES_READ == 0:",
        "tests/test_other_data.py -k image_folder",
    ),
    Fault(
        "stream/local.py",
        "the lock of the CIFAR download is not taken",
        "with FileLock(lock):",
        'with open(lock, "w"):',
        "tests/test_distributed.py -k cifar",
    ),
    Fault(
        "stream/images.py",
        "an image is blurred along the wrong axis",
        "sigmas[1], sigmaY=sigmas[0]",
        "sigmas[0], sigmaY=sigmas[1]",
        "tests/test_preprocess.py -k one_axis",
    ),
    Fault(
        "stream/decode_pool.py",
        "a decoding process does not see that its arena has grown",
        "if os.fstat(arena).st_size > len(memory):",
        "if os.fstat(arena).st_size < len(memory):",
        "tests/test_decoding.py -k no_room",
    ),
    Fault(
        "training/signals.py",
        "an epoch that ends early passes for a whole one",
        "if given != expected:",
        "if given > expected:",
        "tests/test_train.py -k ends_early",
    ),
    Fault(
        "lr_finder.py",
        "a rate found for new weights is taken for pretrained ones",
        '"use_pretrained", ',
        "",
        "tests/test_lr_finder.py -k found_for_something_else",
    ),
    Fault(
        "training/snapshot.py",
        "going back to the best snapshot drops it",
        "if _step_of(path) > step]",
        "if _step_of(path) >= step]",
        "tests/test_snapshot.py -k going_back",
    ),
    Fault(
        "training/snapshot.py",
        "a snapshot's digest is not compared",
        "zeroed.hexdigest().encode() != data[_DIGEST]",
        "len(zeroed.hexdigest()) != len(data[_DIGEST])",
        "tests/test_snapshot.py -k flipped",
    ),
    Fault(
        "stream/files.py",
        "the file is synced twice, and its folder not at all",
        "sync(path.parent)",
        "sync(path)",
        "tests/test_durable.py -k before_it_prunes",
    ),
    Fault(
        "training/state.py",
        "momentum is not put back",
        '"SGD": ("momentum_buffer",),',
        '"SGD": (),',
        "tests/test_resume.py -k nothing_happened",
    ),
    Fault(
        "training/state.py",
        "half of a pair of Python's normal numbers is not put back",
        "python_gauss if has_python_gauss else None",
        "None",
        "tests/test_snapshot.py -k random_numbers",
    ),
    Fault(
        "training/state.py",
        "steps that the scaler skips are not counted as bad",
        "0 if finite and not skipped else",
        "0 if finite else",
        "tests/test_train.py -k bad_steps",
    ),
    Fault(
        "stream/order.py",
        "every epoch has the order of the first",
        "seeded(seed, use, epoch, *stream)",
        "seeded(seed, use, *stream)",
        "tests/test_order.py -k orders_of_their_own",
    ),
    Fault(
        "stream/order.py",
        "a sample moves as far as the whole window, not a stream's share",
        "bits * (window / streams / 2**64)",
        "bits * (window / 2**64)",
        "tests/test_order.py -k share_of_the_window",
    ),
    Fault(
        "preprocess.py",
        "the streams of the ranks overlap",
        "first, images = distributed.rank() * share, int(block_rows.sum())",
        "first, images = distributed.rank(), int(block_rows.sum())",
        "tests/test_resident.py -k global_batches",
    ),
    Fault(
        "preprocess.py",
        "batches that the ranks do not divide are not evaluated",
        "batches * (rank + 1) // world",
        "batches // world * (rank + 1)",
        "tests/test_resident.py -k global_batches",
    ),
    Fault(
        "open_data.py",
        "validation with its classes in another order is taken as it is",
        "    return dataset if dataset.classes == [*classes] else dataset.with_classes(classes)",
        "    return dataset",
        "tests/test_classes.py -k another_order_is_mapped",
    ),
    Fault(
        "stream/dataset.py",
        "a stored label is not mapped to the class of a model",
        "return labels if self._numbers is None else self._numbers[labels]",
        "return labels",
        "tests/test_classes.py -k another_order_is_mapped",
    ),
    Fault(
        "stream/picks.py",
        "a sample is spread over the images, not over the classes",
        "quotas = 1 + _shares(counts - 1, limit - len(classes))",
        "quotas = _shares(counts, limit)",
        "tests/test_fair.py -k room_for",
    ),
    Fault(
        "stream/picks.py",
        "what is held out depends on nothing but the order",
        "order = np.lexsort((hashes, labels))",
        "order = np.lexsort((np.arange(len(labels)), labels))",
        "tests/test_fair.py -k held_out",
    ),
    Fault(
        "stream/loader.py",
        "a label that is no class is handed on",
        "if not 0 <= label < len(dataset.classes):",
        "if False:",
        "tests/test_loader.py -k no_class",
    ),
    Fault(
        "stream/jpeg.py",
        "the decoder's verdict on a damaged JPEG is dropped",
        "raise DamagedJPEG(message)",
        "return pixels",
        "tests/test_jpeg.py",
    ),
    Fault(
        "stream/inventory.py",
        "a file that was renamed counts as removed and added",
        "if left[mark]:",
        "if False:",
        "tests/test_other_data.py -k counted_by_kind",
    ),
    Fault(
        "training/state.py",
        "a snapshot lacks the averaged weights",
        "average.state_dict().items()} if average else {}",
        "average.state_dict().items()} if None else {}",
        "tests/test_ema.py -k resumed",
    ),
    Fault(
        "config.py",
        "the size of images starts anew after a resume",
        "now = epoch / self.epochs",
        "now = 0 * epoch / self.epochs",
        "tests/test_sizes.py -k linear",
    ),
    Fault(
        "stream/order.py",
        "the copies of an image are changed alike",
        "copies = images * np.arange(repeats)[:, None]",
        "copies = 0 * np.arange(repeats)[:, None]",
        "tests/test_sizes.py -k copies",
    ),
    Fault(
        "training/sources.py",
        "the best snapshot gives the weights and not their average",
        'part = "ema." if averaged and which in (None, "best", "ema")',
        'part = "ema." if averaged and which in ("ema",)',
        "tests/test_sources.py -k weights_that_are_asked_for",
    ),
    Fault(
        "training/freezing.py",
        "BatchNorm of a frozen backbone goes on counting",
        "module.train(not frozen)",
        "module.train()",
        "tests/test_sources.py -k resume_needs_them_no_more",
    ),
    Fault(
        "training/weight_files.py",
        "a zip of weights may unpack to any size",
        "if unpacked > MOST_UNPACKED * path.stat().st_size:",
        "if unpacked > 1e30 * path.stat().st_size:",
        "tests/test_sources.py -k made_to_harm",
    ),
    Fault(
        "results/heatmap.py",
        "a heatmap shows maps and not what the class owes to them",
        "gradient.mean((2, 3), keepdim=True) * maps[0]",
        "maps[0]",
        "tests/test_predict.py -k warm_where",
    ),
    Fault(
        "results/figures.py",
        "macro figures count classes without images",
        "seen = there > 0",
        "seen = there >= 0",
        "tests/test_results.py",
    ),
    Fault(
        "results/sampling.py",
        "a filter grows narrow where an image is enlarged",
        "stretch = scale.clamp(min=1.0)",
        "stretch = scale",
        "tests/test_export_graph.py",
    ),
)


def check_place(fault: Fault) -> None:
    """Raises SystemExit unless the fault changes one line, and there is one place for it."""
    count = (ROOT / fault.path).read_text().count(fault.old)
    if count != 1 or fault.old == fault.new or "\n" in fault.old + fault.new:
        raise SystemExit(f"{fault.path} has {count} places for the fault that {fault.words}: {fault.old!r}; mend it")


def first_failure(folder: Path, tests: str) -> str | None:
    """The first of these tests that fails in a copy of the program, or None. Raises SystemExit when none can be run."""
    flags = ("-q", "-x", "-rfE", "-p", "no:cacheprovider", "-n", "0")
    command = [sys.executable, "-m", "pytest", *flags, *shlex.split(tests)]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}  # two versions of a file may be of one second and size
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        printed, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return f"no end after {TIMEOUT} s"
    if process.returncode == 0:
        return None
    found = FIRST.search(printed)
    if process.returncode != 1 or found is None:
        raise SystemExit(f"{printed}\npytest ended with status {process.returncode} for {tests}")
    return found[1].removeprefix("tests/").partition("[")[0]


def with_fault(folder: Path, fault: Fault) -> str | None:
    """The first test that finds the fault in this copy, which is whole again afterwards; or None."""
    place, sound = folder / fault.path, (ROOT / fault.path).read_text()
    place.write_text(sound.replace(fault.old, fault.new))
    try:
        return first_failure(folder, fault.tests)
    finally:
        place.write_text(sound)


def check_soundness(folder: Path, sets: list[str]) -> None:
    """Runs each set of tests by itself in a copy without a fault. Raises SystemExit when one fails."""
    for number, tests in enumerate(sets, 1):
        failure = first_failure(folder, tests)
        if failure:
            raise SystemExit(f"{failure} fails without a fault; mend it first")
        print(f"without a fault: {number} of {len(sets)} sets of tests pass", file=sys.stderr, flush=True)


def check(faults: list[tuple[int, Fault]], sound_first: bool) -> int:
    """Prints what found each of the numbered faults; returns how many were not found."""
    for _, fault in faults:
        check_place(fault)
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "copy"
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
        if sound_first:
            check_soundness(folder, list(dict.fromkeys(fault.tests for _, fault in faults)))
        print("|  # | file | fault | caught by | seconds |\n|---:|---|---|---|---:|")
        for number, fault in faults:
            began = time.monotonic()
            failure = with_fault(folder, fault)
            survivors += failure is None
            row = (f"{number:2}", fault.path, fault.words, failure or "SURVIVED", f"{time.monotonic() - began:.0f}")
            print(f"| {' | '.join(row)} |", flush=True)
    print(f"{len(faults) - survivors} of {len(faults)} faults were found")
    return survivors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="the numbers of the faults to plant")
    parser.add_argument("--skip_sound", action="store_true", help="do not first run the tests without a fault")
    given = parser.parse_args()
    numbered = list(enumerate(FAULTS, 1))
    chosen = [(number, fault) for number, fault in numbered if given.only is None or number in given.only]
    return 1 if check(chosen, not given.skip_sound) else 0


if __name__ == "__main__":
    sys.exit(main())
