"""Runs with every ingredient of the recipes: refused where they do not fit together, and resumed to the bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from program import assert_same_run, cut, ledger, run, train
from sklearn.utils.class_weight import compute_class_weight

from errors import UsageError
from training.losses import class_weights

SMALL = ("--max_samples", 64, "--batch_size", 16, "--epochs", 2)
ALL = (
    *("--mixup", 0.2, "--cutmix", 1, "--random_erasing", 0.5, "--auto_augment", "ta_wide", "--color_jitter", "0.4"),
    *("--ema_decay", 0.9, "--ema_every", 2, "--loss", "bce", "--bce_threshold", 0.2, "--label_smoothing", 0.1),
)


@pytest.mark.usefixtures("small_model")
def test_a_run_with_all_of_them_resumes_to_the_bit_and_trains_on_other_images(tmp_path: Path) -> None:
    keep = ("--ledger", "--snapshot_steps", 1, "--keep_snapshots", 20)
    train(*SMALL, *ALL, *keep, "--run_dir", tmp_path / "whole")
    train("--resume_from", cut(tmp_path / "whole", 3, tmp_path / "cut"))
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    losses = {}
    for left_out in ("none", "--mixup", "--random_erasing", "--auto_augment", "--color_jitter"):
        flags = [
            word for flag, value in zip(ALL[::2], ALL[1::2], strict=True) if flag != left_out for word in (flag, value)
        ]
        train(*SMALL, *flags, "--epochs", 1, "--ledger", "--run_dir", tmp_path / left_out)
        losses[left_out] = tuple(row["loss"] for row in ledger(tmp_path / left_out))
    assert len({*losses.values()}) == 5


@pytest.mark.usefixtures("small_model")
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--mixup", 0.2, "--streams", 16), "use fewer --streams or a larger --batch_size"),
        (("--auto_augment", "rand-q3"), "'rand-q3' is no automatic augmentation"),
        (("--color_jitter", "0.4,x"), "--color_jitter: 0.4,x is no list of up to four shares"),
        (("--color_jitter", "1,1,1,0.9"), "of which that of hue is 0.5 at most"),
        (("--color_jitter", "1,1,1,0.1,1"), "--color_jitter"),
        (("--loss", "bce", "--class_weights", "balanced"), "--class_weights are for --loss ce"),
        (("--bce_threshold", 0.2), "--bce_threshold 0.2 has no effect: it needs --loss bce"),
        (("--class_weights", "nowhere.txt"), "cannot be read"),
        (("--mixup", -1), "--mixup -1.0 is too small"),
        (("--random_erasing", 1.5), "--random_erasing 1.5 is too large"),
        (("--ema_decay", 0), "must be greater than 0"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(
    flags: tuple[object, ...], told: str, tmp_path: Path
) -> None:
    refused = run(*SMALL, *flags, "--run_dir", tmp_path / "run")
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert told in refused.err


def test_balanced_weights_are_scikit_learns_and_those_of_a_file_are_taken_as_they_are(tmp_path: Path) -> None:
    labels = np.array([0] * 5 + [1] * 3 + [2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert class_weights("balanced", labels, 3).tolist() == pytest.approx(expected.tolist())
    assert class_weights("balanced", labels, 4).tolist()[3] == 0
    path = tmp_path / "weights.txt"
    path.write_text("1\n0.5\n2\n")
    assert class_weights(str(path), None, 3).tolist() == [1, 0.5, 2]
    for wrong in ("1\n2\n", "1\n-1\n1\n", "1\nnan\n1\n", "0\n0\n0\n", "a\nb\nc\n"):
        path.write_text(wrong)
        with pytest.raises(UsageError, match="--class_weights"):
            class_weights(str(path), None, 3)


@pytest.mark.usefixtures("small_model")
def test_weights_of_classes_change_the_loss_and_balanced_ones_of_a_balanced_set_do_not(tmp_path: Path) -> None:
    path = tmp_path / "weights.txt"
    path.write_text("5\n" + "1\n" * 9)
    for name, flags in (
        ("plain", ()),
        ("file", ("--class_weights", path)),
        ("balanced", ("--class_weights", "balanced")),
    ):
        train(*SMALL, *flags, "--epochs", 1, "--ledger", "--run_dir", tmp_path / name)
    first = {name: float.fromhex(ledger(tmp_path / name)[0]["loss"]) for name in ("plain", "file", "balanced")}
    assert first["file"] != pytest.approx(first["plain"], rel=1e-4)
    assert first["balanced"] == pytest.approx(first["plain"], rel=0.1)


def test_targets_of_two_labels_have_the_sum_one_in_any_precision() -> None:
    from training.mixing import Mix

    labels = torch.tensor([0, 1, 2])
    for dtype in (torch.float32, torch.float64):
        targets = Mix(0.25).targets(labels, labels.roll(1), 4, dtype)
        assert targets.dtype == dtype
        assert targets.tolist() == [[0.25, 0, 0.75, 0], [0.75, 0.25, 0, 0], [0, 0.75, 0.25, 0]]
