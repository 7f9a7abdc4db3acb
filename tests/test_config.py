"""The flags: what --help says, what is refused, what a resume may change, and where the learning rate comes from."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from config import COMMON, FROM_PRESET, Config, parse, resolve, resume
from errors import UsageError
from training.optim import default_lr

ROOT = Path(__file__).resolve().parent.parent
OF_HELP = ["help_all", "print_completion"]
NAMES = [item.name for item in dataclasses.fields(Config)]
HEAVY = {"torch", "torchvision", "numpy", "datasets", "albumentations", "cv2", "sklearn", "matplotlib", "transformers"}
RELIED_ON = set(
    re.findall(
        r"\w+",
        """dataset dataset_name data_dir batch_size streams shuffle_window block_mb max_bad_fraction run_dir resume_from
        override ledger debug model image_size eval_size use_pretrained epochs lr lr_from momentum weight_decay
        label_smoothing scheduler warmup_epochs step_size gamma onecycle_pct_start onecycle_div_factor
        onecycle_final_div_factor onecycle_anneal_strategy onecycle_three_phase amp amp_dtype max_grad_norm
        accumulate_steps max_samples no_streaming num_workers seed deterministic device find_lr lr_start lr_end lr_iter
        lr_step_mode lr_smooth_f lr_diverge_th save_best snapshot_steps keep_snapshots log_steps evaluate dry_run
        doctor compare""",
    )
)


def settings(*argv: str) -> Config:
    return resolve(parse("main.py", "", argv))


def saved(*argv: str) -> dict[str, Any]:
    return dataclasses.asdict(settings(*argv))


def refusal(*argv: str) -> str:
    """What is said against these flags, nothing if they are taken."""
    try:
        settings(*argv)
    except UsageError as error:
        return str(error)
    return ""


# ---- --help ----------------------------------------------------------------------------------------------------------


def help_text(capsys: pytest.CaptureFixture[str], flag: str = "--help_all", **options: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse("main.py", "What it is.", [flag], **options)
    assert stop.value.code == 0
    return capsys.readouterr().out


def flags_in(text: str) -> list[str]:
    return re.findall(r"^  --(\w+)", text, flags=re.MULTILINE)


def test_help_all_shows_every_flag_once_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys)
    entries = dict(re.findall(r"^  --(\w+)(.*?)(?=^  -|^\w|\Z)", text, flags=re.DOTALL | re.MULTILINE))
    assert flags_in(text) == [*OF_HELP, *NAMES]
    assert {name for name, entry in entries.items() if entry.count("(default:") != 1} == set(OF_HELP)


def test_help_shows_the_usual_flags_and_how_many_more_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_text(capsys, "--help")
    assert flags_in(text) == [*OF_HELP, *(name for name in NAMES if name in COMMON)]
    assert set(COMMON) <= set(NAMES)
    assert text.endswith(f"--help_all shows {len(NAMES) - len(COMMON)} more flags.\n")
    of_finder = [name for name in flags_in(help_text(capsys, "--help", shown="finder")) if name not in COMMON]
    assert of_finder == [
        *OF_HELP,
        *(item.name for item in dataclasses.fields(Config) if item.metadata["group"] == "finder"),
    ]


def test_help_is_grouped_and_no_group_is_split(capsys: pytest.CaptureFixture[str]) -> None:
    titles = re.findall(r"^([a-z]+):$", help_text(capsys), flags=re.MULTILINE)
    groups = list(dict.fromkeys(item.metadata["group"] for item in dataclasses.fields(Config)))
    assert titles == ["options", *groups]
    assert groups == ["data", "augmentation", "model", "training", "schedule", "finder", "run"]


def test_no_name_that_other_programs_rely_on_is_missing() -> None:
    assert RELIED_ON - set(NAMES) == set()


@pytest.mark.parametrize("front_door", ["main", "run_lr_finder"])
def test_help_and_config_import_nothing_heavy(front_door: str) -> None:
    program = (
        f"import sys, config\nassert not {HEAVY} & sys.modules.keys()\nimport {front_door}\n"
        f"try: {front_door}.main(['--help'])\nexcept SystemExit as stop: assert stop.code == 0\n"
        f"print('heavy:', sorted({HEAVY} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"
    assert "--batch_size" in done.stdout


# ---- defaults --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "image_size", "batch_size", "epochs", "weight_decay"),
    [
        ([], 8, 64, 10, 5e-4),
        (["--dataset", "digits"], 8, 64, 10, 5e-4),
        (["--dataset", "cifar10"], 32, 128, 30, 5e-4),
        (["--dataset", "cifar100"], 32, 128, 30, 5e-4),
        (["--dataset", "imagenet1k"], 224, 256, 90, 1e-4),
        (["--dataset", "imagefolder", "--data_dir", "photos"], 224, 256, 90, 1e-4),
        (["--data_dir", "photos"], 224, 256, 90, 1e-4),
        (["--dataset_name", "a/b"], 224, 256, 90, 1e-4),
        (["--dataset", "hf", "--dataset_name", "timm/mini-imagenet"], 224, 256, 90, 1e-4),
    ],
)
def test_each_dataset_has_its_defaults(
    argv: list[str], image_size: int, batch_size: int, epochs: int, weight_decay: float
) -> None:
    config = settings(*argv)
    found = (config.image_size, config.eval_size, config.batch_size, config.epochs, config.weight_decay, config.streams)
    assert found == (image_size, image_size, batch_size, epochs, weight_decay, 8)


def test_every_preset_default_is_resolved() -> None:
    assert [name for name, value in saved().items() if value is FROM_PRESET] == []


def test_flags_given_win_over_the_datasets_defaults() -> None:
    config = settings("--dataset", "cifar10", "--image_size", "40", "--epochs", "3", "--weight_decay", "0.1")
    assert (config.image_size, config.eval_size, config.epochs, config.weight_decay) == (40, 40, 3, 0.1)
    assert settings("--image_size", "16", "--eval_size", "24").eval_size == 24


def test_parse_returns_only_the_flags_that_were_given() -> None:
    assert parse("main.py", "", ["--amp", "--lr", "auto", "--seed", "0"]) == {"amp": True, "lr": "auto", "seed": 0}


def test_workers_are_shared_among_the_processes_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = settings().num_workers
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert settings().num_workers == max(1, whole // 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100000")
    assert settings().num_workers == 1


def test_pretrained_without_a_name_is_microsofts_resnet50() -> None:
    assert settings("--use_pretrained").use_pretrained == "microsoft/resnet-50"
    assert settings("--use_pretrained", "folder").use_pretrained == "folder"
    assert settings().use_pretrained is None


# ---- what is refused -------------------------------------------------------------------------------------------------


OUT_OF_RANGE = [
    *("--epochs 0", "--epochs 1.5", "--epochs many", "--batch_size 0", "--batch_size -8", "--accumulate_steps 0"),
    *("--streams 0", "--num_workers -1", "--seed -1", "--max_samples 0", "--image_size 0", "--eval_size 0"),
    *("--shuffle_window 0", "--block_mb 0", "--log_steps 0", "--keep_snapshots 0", "--snapshot_steps -1", "--lr 0"),
    *("--lr -1", "--lr nan", "--lr inf", "--lr fast", "--momentum 1.1", "--momentum nan", "--weight_decay -1"),
    *("--weight_decay nan", "--weight_decay inf", "--label_smoothing -0.1", "--max_bad_fraction 2"),
    *("--max_grad_norm 0", "--gamma 0", "--step_size 0", "--warmup_epochs -1", "--warmup_epochs nan"),
    *("--warmup_epochs 10", "--onecycle_pct_start 1.5", "--onecycle_div_factor 0"),
    *("--onecycle_final_div_factor -1", "--onecycle_max_momentum 2", "--onecycle_anneal_strategy exp"),
    *("--scheduler poly", "--lr_iter 1", "--lr_start 0", "--lr_end 1e-6", "--lr_end inf", "--lr_end nan"),
    *("--lr_smooth_f 0", "--lr_smooth_f 1.5", "--lr_diverge_th 1", "--lr_diverge_th nan", "--amp_dtype fp8"),
    *("--dataset svhn", "--crop none"),
]
UNKNOWN_OR_ABBREVIATED = ["--learning_rate 1", "--batch-size 64", "--epoch 3", "--batch 64", "--sched step", "x"]
REFUSED: dict[str, tuple[str, ...]] = {
    **{line: (line.split()[0],) for line in (*OUT_OF_RANGE, *UNKNOWN_OR_ABBREVIATED)},
    "--dataset svhn": ("--dataset", "svhn", "imagenet1k"),
    "--lr 1 --lr_from lr_finder.json": ("--lr ", "--lr_from"),
    "--freeze_backbone 10": ("--freeze_backbone 10", "--epochs 10"),
    "--lr_start 1 --lr_end 0.1": ("--lr_end", "--lr_start"),
    "--dry_run --evaluate": ("--dry_run", "--evaluate"),
    "--dry_run --find_lr": ("--dry_run", "--find_lr"),
    "--dry_run --doctor": ("--dry_run", "--doctor"),
    "--doctor --evaluate": ("--doctor", "--evaluate"),
    "--doctor --find_lr": ("--doctor", "--find_lr"),
    "--doctor --resume_from runs/x": ("--doctor", "--resume_from"),
    "--dataset hf": ("--dataset_name",),
    "--dataset digits --dataset_name a/b": ("--dataset_name", "--dataset hf"),
    "--dataset cifar10 --dataset_name a/b": ("--dataset_name", "cifar10"),
    "--dataset imagefolder": ("--data_dir", "train/", "val/"),
    "--dataset digits --data_dir photos": ("--dataset digits", "--data_dir"),
    "--dataset hf --dataset_name a/b --data_dir photos": ("--dataset hf", "--data_dir", "--dataset_name"),
    "--epoch 3": ("--epoch 3", "did you mean --epochs? see --help"),
    "--seed 1 --batchsize=8 --epochs 3": ("--batchsize=8", "did you mean --batch_size? see --help"),
    "--epochs 0": ("--epochs 0", "1"),
    "--warmup_epochs 10": ("--warmup_epochs 10", "--epochs 10"),
    "--batch_size 60 --streams 8": ("60", "8", "56 or 64"),
    "--batch_size 6 --streams 8": ("6", "8", "use 8"),
    "--batch_size 100 --streams 8": ("100", "--streams 8", "96", "104"),
    "--batch_size 100 --streams 6": ("100", "6", "96 or 102"),
}


def test_what_is_wrong_with_the_flags_is_refused_in_one_line_that_names_them() -> None:
    told = {line: refusal(*line.split()) for line in REFUSED}
    assert {line: text for line, text in told.items() if any(word not in text for word in REFUSED[line])} == {}
    assert [text for text in told.values() if "\n" in text] == []


@pytest.mark.parametrize(
    ("argv", "world", "named"),
    [
        ([], 3, ["64", "3"]),
        (["--batch_size", "60"], 4, ["6", "4"]),
        ([], 16, ["8", "16"]),
        (["--batch_size", "64", "--accumulate_steps", "5"], 1, ["64", "5"]),
        (["--batch_size", "64", "--accumulate_steps", "64"], 1, ["BatchNorm"]),
        (["--batch_size", "8"], 8, ["BatchNorm"]),
        (["--batch_size", "1", "--streams", "1"], 1, ["BatchNorm"]),
    ],
)
def test_a_batch_that_the_ranks_cannot_share_is_refused(argv: list[str], world: int, named: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        settings(*argv).check_world(world)
    assert [text for text in named if text not in str(error.value)] == []


def test_every_divisor_of_the_streams_is_a_fitting_number_of_ranks() -> None:
    for world in (1, 2, 4, 8):
        settings("--accumulate_steps", "2").check_world(world)


# ---- resume ----------------------------------------------------------------------------------------------------------


def test_a_resume_without_flags_keeps_the_saved_settings() -> None:
    before = saved("--dataset", "cifar10", "--lr", "0.3", "--epochs", "4", "--amp")
    after = dataclasses.asdict(resume(before, {"resume_from": "runs/x"}))
    assert after.pop("resume_from") == "runs/x"
    before.pop("resume_from")
    assert after == before


def test_drift_is_refused_with_the_name_old_and_new_of_each_setting() -> None:
    given = parse("main.py", "", ["--epochs", "9", "--lr", "0.7", "--seed", "0"])
    with pytest.raises(UsageError) as error:
        resume(saved("--lr", "0.5"), given)
    first, *rows = str(error.value).splitlines()
    assert "--override epochs=9" in first
    assert "--override lr=0.7" in first
    table = {tuple(row.split()) for row in rows}
    assert table == {("--epochs", "saved", "10", "now", "9"), ("--lr", "saved", "0.5", "now", "0.7")}


def test_a_flag_given_with_its_saved_value_is_no_drift() -> None:
    assert resume(saved("--epochs", "9"), {"epochs": 9}).epochs == 9


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("epochs=9", "epochs", 9),
        ("lr=0.25", "lr", 0.25),
        ("amp=true", "amp", True),
        ("deterministic=false", "deterministic", False),
        ("scheduler=step", "scheduler", "step"),
        ("weight_decay=1e-3", "weight_decay", 1e-3),
        ("max_samples=99", "max_samples", 99),
    ],
)
def test_an_override_insists_with_or_without_the_flag_itself(override: str, name: str, value: Any) -> None:
    before = saved("--deterministic")
    assert getattr(resume(before, {"override": [override]}), name) == value
    assert getattr(resume(before, {"override": [override], name: value}), name) == value


def test_an_override_excuses_only_the_value_it_names() -> None:
    with pytest.raises(UsageError, match="epochs"):
        resume(saved(), {"override": ["epochs=9"], "epochs": 11})
    with pytest.raises(UsageError, match="momentum"):
        resume(saved(), {"override": ["epochs=9"], "momentum": 0.5})


def test_an_override_that_says_nothing_sensible_is_refused() -> None:
    for override in (
        "epochs",
        "epoch=9",
        "log_steps=5",
        "epochs=many",
        "epochs=0",
        "scheduler=poly",
        "=9",
        "amp=maybe",
    ):
        with pytest.raises(UsageError):
            resume(saved(), {"override": [override]})
    with pytest.raises(UsageError):
        resume(saved(), {"override": ["epochs="]})


def test_an_override_unsets_what_may_be_unset() -> None:
    assert resume(saved("--max_grad_norm", "1"), {"override": ["max_grad_norm=none"]}).max_grad_norm is None
    with pytest.raises(UsageError, match="invalid int value"):
        resume(saved(), {"override": ["epochs=none"]})


def test_every_setting_is_fixed_kept_or_forgotten() -> None:
    """A new flag must be placed: this table is what users are promised."""
    kinds: dict[str, set[str]] = {"fixed": set(), "kept": set(), "forgotten": set()}
    for item in dataclasses.fields(Config):
        kinds[item.metadata["on_resume"]].add(item.name)
    assert kinds["forgotten"] == {
        *(
            "num_workers",
            "fill_cache",
            "find_lr",
            "plot_schedule",
            "extend_epochs",
            "run_dir",
            "resume_from",
            "override",
            "evaluate",
            "compare",
            "profile",
            "dry_run",
            "doctor",
            "quiet",
            "verbose",
            "debug",
        )
    }
    assert kinds["kept"] == {
        *("data_dir", "no_streaming", "max_bad_fraction", "save_best", "snapshot_steps", "keep_snapshots", "log_steps"),
        "track",
        "early_stop",
        "device",
        *("cache_dir", "cache_limit_gb", "stall_timeout", "network_patience", "max_bad_steps", "val_labels"),
        *(
            "recipe",
            "ledger",
            "lr_start",
            "lr_end",
            "lr_iter",
            "lr_step_mode",
            "lr_smooth_f",
            "lr_diverge_th",
            "lr_val",
        ),
    }


def test_kept_settings_may_change_on_a_resume_and_stay_otherwise() -> None:
    before = saved("--log_steps", "7", "--ledger", "--data_dir", "photos")
    assert resume(before, {}).log_steps == 7
    after = resume(before, {"log_steps": 9, "data_dir": "elsewhere", "save_best": True})
    assert (after.log_steps, after.data_dir, after.save_best, after.ledger) == (9, "elsewhere", True, True)


def test_forgotten_settings_do_not_outlive_their_launch() -> None:
    before = saved("--num_workers", "99", "--run_dir", "there", "--debug", "--evaluate")
    after = resume(before, {"resume_from": "there"})
    assert (after.num_workers, after.run_dir, after.debug, after.evaluate) == (
        settings().num_workers,
        None,
        False,
        False,
    )
    assert resume(before, {"num_workers": 0}).num_workers == 0


# ---- the default learning rate ---------------------------------------------------------------------------------------

FFCV = "ffcv-imagenet's 1.7 for 4,096 at momentum 0.9, at OneCycle's 0.85"
GOYAL = "Goyal et al. 2017: 0.1 for 256 at momentum 0.9"
RSB, DEIT = "Wightman et al. 2021, ResNet strikes back", "Touvron et al. 2021, DeiT"
CIFAR = "weiaicunzai's and Random-Erasing's 0.1 for 128"


@pytest.mark.parametrize(
    ("argv", "lr", "text"),
    [
        (["--dataset", "imagenet1k"], 0.16, f"0.16 = 0.16 x 256 / 256 ({FFCV})"),
        (["--dataset", "imagenet1k", "--batch_size", "1024"], 0.64, f"0.64 = 0.16 x 1024 / 256 ({FFCV})"),
        (["--dataset", "imagenet1k", "--scheduler", "cosine"], 0.1, f"0.1 = 0.1 x 256 / 256 ({GOYAL})"),
        (
            [*["--dataset", "imagenet1k", "--scheduler", "step", "--batch_size", "64"]],
            0.025,
            f"0.025 = 0.1 x 64 / 256 ({GOYAL})",
        ),
        (["--dataset", "cifar10"], 0.1, f"0.1 = 0.2 x 128 / 256 ({CIFAR})"),
        (["--dataset", "cifar100", "--scheduler", "step"], 0.1, f"0.1 = 0.2 x 128 / 256 ({CIFAR})"),
        ([], 0.1, "0.1 = 0.4 x 64 / 256 (measured here)"),
        (
            ["--dataset", "imagenet1k", "--optimizer", "lamb", "--batch_size", "2048"],
            5e-3,
            f"0.005 = 0.005 x sqrt(2048 / 2048) ({RSB})",
        ),
        (["--dataset", "imagenet1k", "--optimizer", "adamw"], 5e-4, f"0.0005 = 0.001 x sqrt(256 / 1024) ({DEIT})"),
        (["--scheduler", "cosine"], 0.025, "0.025 = 0.1 x 64 / 256 (a quarter of OneCycle's peak)"),
    ],
)
def test_the_default_rate_scales_with_the_batch_and_names_its_source(argv: list[str], lr: float, text: str) -> None:
    assert default_lr(settings(*argv)) == (lr, text)


def test_one_cycles_peak_on_imagenet_is_ffcvs_in_terms_of_the_momentum() -> None:
    """Its rate over 1 - momentum is 1.0625 for 256 images; OneCycle's momentum at the peak is 0.85."""
    config = settings("--dataset", "imagenet1k", "--batch_size", "4096")
    published = 1.7 / (1 - 0.9) * (1 - config.onecycle_base_momentum)
    assert default_lr(config)[0] == pytest.approx(published, rel=0.01)
    fixed = settings("--dataset", "imagenet1k", "--batch_size", "4096", "--onecycle_fixed_momentum")
    assert default_lr(fixed)[0] == pytest.approx(1.7, rel=0.01)
