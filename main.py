#!/usr/bin/env python3
"""Train an image classifier: ResNet-50 on ImageNet-1K streamed from the Hugging Face Hub, or any other image set.

    python main.py                                                     # digits: the first minute, nothing downloaded
    python run_lr_finder.py --dataset imagenet1k --batch_size 256      # which learning rate?
    python main.py --dataset imagenet1k --scheduler onecycle --amp     # train (needs HF_TOKEN and the licence)
    python main.py --dataset hf --dataset_name timm/mini-imagenet      # any image set on the Hub, or a parquet folder
    python main.py --dataset imagefolder --data_dir photos             # photos/train/CLASS/*.jpg and photos/val/
    python main.py --resume_from runs/NAME                             # resume after a kill, as if nothing happened
    python main.py ... --run_dir runs/NAME --resume_from auto          # the same command starts or resumes the run
    python main.py --resume_from runs/NAME --evaluate                  # evaluate.py on its newest snapshot
    python main.py --compare runs/ONE runs/OTHER                       # what differs, and what came of it
    python main.py --resume_from runs/NAME --extend_epochs 5           # a trapezoid, as if it had been planned longer
    python main.py ... --dry_run                                       # all but training: what the run would take
    python main.py ... --doctor                                        # is this machine ready? what will be slow?
    torchrun --nproc_per_node 8 main.py --dataset imagenet1k --amp     # one process per GPU

A run writes config.json, results.csv, metrics.jsonl, report.html, snapshots/ and plots/ to its folder. Exit status: 0
done; 2 bad arguments, or a resume whose settings changed; 3 data missing, unreachable, not authorised or too corrupt;
4 training diverged; 5 no usable snapshot, or no room to write one; 128 + signal after a signal, with a snapshot
written.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import beforehand
import config as configuration
import evaluate
import output
import ranks
import run_lr_finder
from config import FITTED, Config
from errors import SnapshotError, UsageError, complain, greet, leave, run_front_door
from flags import listed
from registry import load_extensions

if TYPE_CHECKING:
    from preprocess import Data
    from training.snapshot import Snapshot
    from training.sources import Source
    from training.state import Progress
    from training.step import Training


def main(argv: Sequence[str] | None = None) -> int:
    """The front door. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_front_door(lambda: _run(arguments), debug="--debug" in arguments)


def _run(argv: list[str]) -> None:
    load_extensions()
    given = configuration.parse("main.py", __doc__ or "", argv)
    if "compare" in given:
        _compare(given)
        return
    if given.get("find_lr"):
        raise SystemExit(run_lr_finder.main(argv))
    if given.get("doctor"):
        ranks.require_whole()
        wanted = configuration.resolve(given)
        from doctor import examine

        examine(wanted, given)
        return
    if given.get("evaluate"):
        if given.get("dry_run"):
            raise UsageError("--dry_run rehearses training; leave out --evaluate")
        source = beforehand.resumed(given) or given.get("use_pretrained")
        if source is None:
            raise UsageError("--evaluate needs weights: --resume_from a run, or --use_pretrained")
        evaluate.evaluate(evaluate.flags_of_main(given, str(source)))
        return

    notes = beforehand.look(given)
    output.outlive()
    greet(argv)
    import distributed
    from preflight import describe_data, fill_cache, in_passes_that_fit
    from preprocess import get_data_loaders
    from training.console import header
    from training.state import began_with
    from training.step import build_training

    distributed.be_quiet(bool(given.get("quiet")))
    with distributed.announced("for the snapshot or the weights to start from"):
        config, snapshot, source = _settings(given)
    device = distributed.init(config.device, patience=60 * config.network_patience)
    distributed.require_agreement(config.fixed())
    if config.recipe:
        distributed.print0(f"recipe    {config.recipe}")
    derived = FITTED - given.keys() if snapshot is None else ()
    pinned, classes = _pinned_revision(snapshot, config), _classes(snapshot, config)
    with distributed.announced(f"for the index or the files of {config.dataset_id}"):
        data = get_data_loaders(config, device, pinned, classes, derived)
    config = data.config
    header([*notes, *distributed.from_rank0(lambda: describe_data(config, data))], config)
    if config.fill_cache:
        fill_cache(config, data)
        return
    labels = data.train.dataset.all_labels
    training = build_training(
        config, len(data.classes), device, len(data.train), labels, source, began_with(snapshot, config)
    )
    if snapshot is not None:
        _compare_data(snapshot, data, config)
    if snapshot is None and "accumulate_steps" not in given:
        with distributed.announced("for a trial step, which tells whether a batch fits into memory"):
            config, data = in_passes_that_fit(config, data, training)
    _train(config, data, training, snapshot, argv)


def _compare(given: Mapping[str, Any]) -> None:
    import compare

    if others := sorted(given.keys() - {"compare", "debug"}):
        raise UsageError(f"--compare reads runs as they are; leave out --{others[0]}")
    compare.compare(configuration.resolve(given).compare)


def _settings(given: Mapping[str, Any]) -> "tuple[Config, Snapshot | None, Source | None]":
    """The settings of this run, and the snapshot it resumes from or the weights it starts from, if any."""
    if "extend_epochs" in given:
        from training.extension import extend

        return *extend(given), None
    source = beforehand.resumed(given)
    if source is None:
        from training.sources import resolve_with_weights

        config, weights = resolve_with_weights(given)
        return config, None, weights
    from training.snapshot import find

    snapshot, passed_over = find(source)
    for line in passed_over:
        complain(f"passed over: {line}")
    return configuration.resume(snapshot.state.get("config"), given), snapshot, None


def _pinned_revision(snapshot: "Snapshot | None", config: Config) -> str | None:
    """The commit that a resumed run stays on, unless an override names another revision."""
    moved = any(text.startswith("dataset_revision=") for text in config.override)
    return None if snapshot is None or moved else snapshot.state["revision"]


def _classes(snapshot: "Snapshot | None", config: Config) -> list[str] | None:
    """The classes of a snapshot's model, which labels are to count where other data than the run's is allowed."""
    told = snapshot.state.get("classes") if snapshot is not None else None
    allowed = config.expects_other_data
    return told if allowed and isinstance(told, list) and all(isinstance(name, str) for name in told) else None


def _compare_data(snapshot: "Snapshot", data: "Data", config: Config) -> None:
    """Print what differs from the snapshot's data. Raises UsageError unless an override allows it; SnapshotError."""
    from distributed import print0

    try:
        lines = data.changes(snapshot.state, _folder_of(snapshot))
    except (LookupError, TypeError) as error:
        raise SnapshotError(f"{snapshot.path} does not describe its data; give another") from error
    if lines and not config.expects_other_data:
        raise UsageError(
            f"the data is not what {snapshot.path} was trained on: {'; '.join(lines)}; give that data again, or go on "
            f"with this with --override {configuration.OTHER_DATA}"
        )
    for line in lines:
        print0(f"data      {line}")


def _train(
    config: Config, data: "Data", training: "Training", snapshot: "Snapshot | None", argv: Sequence[str]
) -> None:
    from distributed import from_rank0, print0
    from preflight import require_room
    from training.console import last_lines
    from training.logs import open_run_folder
    from training.state import Progress, restore
    from training.step import within_memory

    if snapshot is None:
        progress = Progress()
        progress.lr, lr_source = _known_lr(config)
    else:
        progress = restore(snapshot, training.model, training.optimizer, training.scaler, training.average)
        lr_source = f"{snapshot.path}"
        for line in _changes(snapshot, config, progress, len(data.train)):
            print0(line)
    if why := progress.why_over(config):
        print0(f"nothing left to do: {why}", always=True)
        return
    if config.dry_run:
        from dry_run import rehearse

        within_memory(training, config, lambda: rehearse(config, data, training, progress))
        return
    with open_run_folder(config, _folder_of(snapshot), argv) as folder:
        from_rank0(lambda: require_room(config, data, training, folder, progress.step))
        within_memory(training, config, lambda: _fit(config, data, training, progress, folder, snapshot, lr_source))
        print0(*last_lines(config, folder), sep="\n", always=True)
        print0(f"done      {folder}: report.html, results.csv, snapshots/", always=True)


def _folder_of(snapshot: "Snapshot | None") -> Path | None:
    """The run folder that holds the snapshot; None for a snapshot elsewhere, which is resumed in a new folder."""
    if snapshot is None or snapshot.path.parent.name != "snapshots":
        return None
    return snapshot.path.parent.parent


def _fit(
    config: Config,
    data: "Data",
    training: "Training",
    progress: "Progress",
    folder: Path,
    snapshot: "Snapshot | None",
    lr_source: str,
) -> None:
    import distributed
    from distributed import print0
    from tracking.runner import Trackers
    from train import Run, fit
    from training.console import header, plan_lines
    from training.journal import Journal
    from training.logs import UnreadableLog, note_resolved
    from training.optim import build_schedule, describe_schedule
    from training.signals import StopRequest
    from visualization import RunPictures

    stop, steps = StopRequest.listening(data.train, data.val), len(data.train)
    if snapshot is None and config.lr == "auto":
        progress.lr = run_lr_finder.search(config, data, training, folder, stop)
        lr_source = "the finder"
        print0(f"lr        {progress.lr:.4g} from {lr_source}")
    distributed.require_agreement({"the learning rate": progress.lr, "the step to go on from": progress.step})
    schedule = build_schedule(training.optimizer, config, progress.lr, steps, progress.step)
    on_rank0 = distributed.rank() == 0
    trackers = Trackers(listed(config.track) if on_rank0 else (), folder)
    plan = f"schedule  {describe_schedule(config, config.epochs * steps)}"
    header([plan, *plan_lines(config, steps, folder), *trackers.lines()], config)
    if config.plot_schedule and on_rank0:
        _draw_schedule(config, progress.lr, steps, folder / "plots" / "schedule.png")
    record: dict[str, Any] = {"config": asdict(config), "revision": data.revision, "classes": data.classes}
    record |= {"data": data.fingerprint, "steps_per_epoch": steps, **training.kept}
    pictures = RunPictures(folder, data.classes, trackers.picture) if on_rank0 else None
    for loader in (data.train, data.val):
        loader.report = UnreadableLog(folder / "unreadable.csv", progress)
    if on_rank0:
        data.keep_inventory(folder)
        sizes = {"steps_per_epoch": steps, "classes": len(data.classes), "ranks": distributed.world_size()}
        note_resolved(folder / "config.json", training.model, {"lr": progress.lr, "lr_source": lr_source, **sizes})
    own = folder if on_rank0 else None
    journal = Journal(config, training, progress, data.train, record, own, pictures, trackers)
    dropped = journal.rewind(snapshot.path if snapshot else None)
    if snapshot is not None:
        resumed = f"resumed   {snapshot.path}: step {progress.step}, epoch {progress.epoch + 1}"
        print0(resumed, *(f"dropped   {name}, a later step of the same run" for name in dropped), sep="\n")
    if config.extend_epochs:
        progress.best_top1 = -1.0  # whose file stays behind
        journal.save()  # the copy of the run's past becomes a run, to be resumed like any other
    trackers.start(progress.step, anew=bool(config.override))
    is_complete = False
    try:
        fit(Run(data, training, progress, schedule, config.epochs, stop, journal))
        is_complete = True
    finally:
        if pictures is not None:
            pictures.report()  # now that the last snapshot is written
        trackers.finish(folder / "report.html", complete=is_complete)


def _draw_schedule(config: Config, lr: float, steps_per_epoch: int, path: Path) -> None:
    from distributed import print0
    from visualization import drawn, plot_schedule

    if drawn(lambda: plot_schedule(config, lr, steps_per_epoch, path), path.parent):
        print0(f"schedule  {path}")


def _changes(snapshot: "Snapshot", config: Config, progress: "Progress", steps_per_epoch: int) -> list[str]:
    """A line for each thing that differs from the saved run: the learning rate after an override, the number of ranks.

    Raises UsageError for an override under which this run cannot continue.
    """
    import distributed
    from training.optim import compare_plans

    saved = snapshot.state
    if saved["steps_per_epoch"] != steps_per_epoch:
        raise UsageError(
            f"an epoch has {steps_per_epoch} steps now, not the {saved['steps_per_epoch']} that this run counts; "
            "go on with the data and the --batch_size that it had, or start a new run"
        )
    if (config.lr, config.lr_from) != (saved["config"]["lr"], saved["config"]["lr_from"]):
        if config.lr == "auto":
            raise UsageError("the finder starts from fresh weights, not from a snapshot; override lr with a number")
        progress.lr, _ = _known_lr(config)
    lines = compare_plans(saved["config"], saved["lr"], config, progress.lr, steps_per_epoch, progress.step)
    ranks = distributed.world_size()
    if ranks != saved["ranks"]:
        lines.append(
            f"ranks     {ranks}, {saved['ranks']} before: the same global batches, but BatchNorm sees "
            f"{config.batch_size // ranks} images at once, and sums run in another order"
        )
    return lines


def _known_lr(config: Config) -> tuple[float, str]:
    """The (peak) learning rate, or 0.0 when only the finder can tell it, and where it comes from, which it prints."""
    from distributed import print0

    if config.lr == "auto":
        return 0.0, ""
    if config.lr_from is not None:
        from lr_finder import load_suggestion

        lr = load_suggestion(Path(config.lr_from), config)
        why = f"{lr:.4g} from {config.lr_from}"
    elif config.lr is not None:
        lr, why = float(config.lr), f"{config.lr:g} as given{' or by the recipe' if config.recipe else ''}"
    else:
        from training.optim import default_lr

        lr, why = default_lr(config)
    print0(f"lr        {why}")
    return lr, why


if __name__ == "__main__":
    leave(main)
