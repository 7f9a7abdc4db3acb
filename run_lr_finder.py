#!/usr/bin/env python3
"""Find a learning rate before training: parse -> build -> range test -> curve, JSON, suggestion.

    python run_lr_finder.py                                            # digits, a few seconds
    python run_lr_finder.py --dataset imagenet1k --batch_size 256      # streamed from the Hub, 100 steps

The flags are those of main.py: give the same ones as for training. Weights, optimiser and random number generators are
restored afterwards. The finder writes to lr_finder/ in the run folder: lr_finder.png to look at, lr_finder.json for
`main.py --lr_from`, and lr_finder.csv.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

import beforehand
import config as configuration
import output
from config import Config
from errors import Interrupted, UsageError, greet, run_front_door
from registry import load_extensions

if TYPE_CHECKING:
    from lr_finder import RangeTest
    from preprocess import Data
    from stream.loader import Batch
    from training.signals import StopRequest
    from training.step import Training


def main(argv: Sequence[str] | None = None) -> int:
    """The front door. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run_front_door(lambda: _run(arguments), debug="--debug" in arguments)


def _run(argv: list[str]) -> None:
    load_extensions()
    given = configuration.parse("run_lr_finder.py", __doc__ or "", argv, shown="finder")
    if given.get("resume_from"):
        raise UsageError("the finder starts from fresh weights; leave out --resume_from")
    for name in ("dry_run", "doctor", "evaluate", "override", "extend_epochs", "compare"):
        if given.get(name):
            raise UsageError(f"--{name} is for main.py; the finder only looks for the rate of a new run: leave it out")
    given["find_lr"] = True
    notes = beforehand.look(given)

    output.outlive()
    greet(argv)
    import distributed
    from preflight import describe_data, in_passes_that_fit
    from preprocess import get_data_loaders
    from training.console import command, header
    from training.logs import open_run_folder
    from training.signals import StopRequest
    from training.sources import resolve_with_weights
    from training.step import build_training, within_memory

    distributed.be_quiet(bool(given.get("quiet")))
    config, source = resolve_with_weights(given)
    device = distributed.init(config.device, patience=60 * config.network_patience)
    distributed.require_agreement(config.fixed())
    with distributed.announced(f"for the index or the files of {config.dataset_id}"):
        data = get_data_loaders(config, device, derived=configuration.FITTED - given.keys())
    config = replace(data.config, compile=bool(data.config.compile))  # by itself it would not pay in so few steps
    header([*notes, *distributed.from_rank0(lambda: describe_data(config, data))], config)
    labels = data.train.dataset.all_labels
    training = build_training(config, len(data.classes), device, labels=labels, source=source)
    if "accumulate_steps" not in given:
        with distributed.announced("for a trial step, which tells whether a batch fits into memory"):
            config, data = in_passes_that_fit(config, data, training)
    with open_run_folder(config, None, argv) as folder:
        stop = StopRequest.listening(data.train, data.val)
        lr = within_memory(training, config, lambda: search(config, data, training, folder, stop))
    with_rate, ranks = partial(command, "main.py", *_without_rate(argv)), distributed.world_size()
    found = folder / "lr_finder" / "lr_finder.json"
    distributed.print0(f"train with  {with_rate('--lr_from', found, ranks=ranks)}", always=True)
    distributed.print0(f"       or   {with_rate('--lr', f'{lr:.3g}', ranks=ranks)}", always=True)


def _without_rate(argv: Sequence[str]) -> list[str]:
    """The flags with which to train, without those that decide the learning rate or how it is found."""
    finders = {f"--{item.name}" for item in fields(Config) if item.metadata["group"] == "finder"}
    kept, arguments = [], iter(argv)
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if name not in finders | {"--lr", "--lr_from"}:
            kept.append(argument)
        elif not equals and name != "--find_lr":
            next(arguments)
    return kept


def search(config: Config, data: "Data", training: "Training", folder: Path, stop: "StopRequest") -> float:
    """Run the range test with the steps of training, write and plot the result, and return the schedule's rate.

    Nothing else changes. Raises Interrupted on all ranks when one of them was told to stop, and DivergedError when the
    curve shows no learning rate.
    """
    import torch

    import lr_finder
    from distributed import mean_over_ranks, print0, rank, world_size
    from stream.loader import Cancelled
    from train import evaluate
    from training.step import train_step

    print0(f"finder    up to {config.lr_iter} steps at rates from {config.lr_start:g} to {config.lr_end:g}")
    judges: list[Batch] = []
    steps = count()

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        stop.check()
        loss = mean_over_ranks(train_step(training, images, labels, training.mix(next(steps), images)).loss)
        if not config.lr_val or not loss.isfinite():
            return loss
        return torch.tensor(evaluate(training, judges, stop)["val_loss"])

    try:
        if config.lr_val:
            batches = iter(data.val)
            judges += islice(batches, -(-config.lr_val // (data.val.batch_size * world_size())))
            batches.close()  # type: ignore[attr-defined]  # a generator
        result = lr_finder.find_lr_advanced(
            training.model,
            training.optimizer,
            training.criterion,
            data.train,
            train_step=step,
            grad_scaler=training.scaler,
            start_lr=config.lr_start,
            end_lr=config.lr_end,
            num_iter=config.lr_iter,
            step_mode=config.lr_step_mode,
            smooth_f=config.lr_smooth_f,
            diverge_th=config.lr_diverge_th,
        )
    except (Interrupted, Cancelled) as error:
        print0("stopped in the finder, before anything was trained")
        if isinstance(error, Cancelled):  # while waiting for data: tell the other ranks
            stop.check()
        raise
    if rank() == 0:
        _write(result, config, folder / "lr_finder")
    values = "  ".join(f"{name} {'none' if lr is None else f'{lr:.3g}'}" for name, lr in result.suggestions.items())
    print0(f"finder    {result.sweeps} x {len(result.lr)} steps, {result.stopped}; {values}", always=True)
    lr = result.suggested_lr if config.scheduler == "onecycle" else result.constant_lr
    sure, why = result.confidence
    print0(f"finder    {result.method} is used; confidence {sure}: {why}", always=True)
    print0(f"finder    max_lr {result.suggested_lr:.3g} for onecycle, lr {result.constant_lr:.3g} for cosine and step")
    return lr


def _write(result: "RangeTest", config: Config, folder: Path) -> None:
    import lr_finder
    from visualization import drawn, plot_lr_finder

    lr_finder.save(result, folder, asdict(config))
    picture = folder / "lr_finder.png"
    drawn(lambda: plot_lr_finder(result, picture), folder)


if __name__ == "__main__":
    sys.exit(main())
