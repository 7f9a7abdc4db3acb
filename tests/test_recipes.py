"""A recipe's settings are taken, flags win over them, and what is wrong with a file is told in one line.

Every recipe that is kept here plans what was published, and trains.
"""

import json
import math
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import test_mnist
import tiny_cifar
from huggingface_hub import constants
from program import ROOT, results, run, train

import recipe
from checks import require_effect
from config import Config, parse, resolve, resume
from errors import UsageError
from stream import synthetic
from training.optim import schedule_at

RECIPES = sorted(path.stem for path in recipe.FOLDER.glob("*.toml"))
CERTIFICATE = ("source", "top-1", "epochs", "GPU-hours", "checked", "open")
STEPS = 1000  # of an epoch


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_flags_win_over_a_recipe_whose_rate_follows_the_batch(tmp_path: Path) -> None:
    path = written(tmp_path, 'lr = 0.5\nbatch_size = 1024\nepochs = 7\nnesterov = false\nscheduler = "cosine"\n')

    def of(*flags: str) -> dict[str, object]:
        return vars(resolve(parse("main.py", "", ["--recipe", str(path), *flags])))

    plain = of()
    assert [plain[name] for name in ("lr", "batch_size", "epochs", "nesterov", "scheduler")] == [
        *(0.5, 1024, 7, False, "cosine")
    ]
    assert str(plain["recipe"]).startswith("mine sha256:")
    assert of("--epochs", "3", "--nesterov")["nesterov"] is True
    assert of("--epochs", "3")["epochs"] == 3
    assert of("--batch_size", "256")["lr"] == 0.125
    assert of("--batch_size", "256", "--lr", "0.3")["lr"] == 0.3
    assert (of("--lr_from", "x")["lr"], of("--lr_from", "x")["lr_from"]) == (None, "x")


def test_a_place_of_images_that_is_given_wins_over_the_dataset_of_a_recipe(tmp_path: Path) -> None:
    def of(recipe: str, *flags: str) -> tuple[str, str | None]:
        config = resolve(parse("main.py", "", ["--recipe", recipe, *flags]))
        return config.dataset, config.data_dir or config.dataset_name

    assert of("resnet50-v2") == ("imagenet1k", None)
    assert of("resnet50-v2", "--data_dir", "photos") == ("imagefolder", "photos")
    assert of("resnet50-v2", "--dataset_name", "a/b") == ("hf", "a/b")
    assert of("cifar10-resnet18", "--data_dir", "files") == ("cifar10", "files")
    path = written(tmp_path, 'dataset = "imagefolder"\ndata_dir = "photos"\n')
    assert of(str(path), "--data_dir", "others") == ("imagefolder", "others")
    assert of(str(path), "--dataset_name", "a/b") == ("hf", "a/b")


def test_what_a_recipe_sets_in_vain_is_left_out_and_told_and_what_a_flag_does_is_refused() -> None:
    given = parse("main.py", "", ["--recipe", "resnet50-a2", "--no_amp", "--model", "timm:resnet50d"])
    config = resolve(given)
    assert (config.amp_dtype, config.zero_init_gamma, config.lr) == ("auto", None, 0.005)
    told = "\n".join(require_effect(config, given))
    assert re.findall(r"--(\w+)[^-\n]* of the recipe", told) == ["zero_init_gamma", "amp_dtype"]
    assert "--amp_dtype fp16 of the recipe has no effect" in told
    other = resolve(parse("main.py", "", ["--recipe", "resnet50-a2", "--loss", "ce"]))
    assert (other.loss, other.bce_threshold) == ("ce", None)
    saved = vars(config)
    assert vars(resume(saved, given)) == saved | {"num_workers": config.num_workers}
    with pytest.raises(UsageError, match="--amp_dtype fp16 has no effect: it needs --amp; "):
        require_effect(config, parse("main.py", "", ["--recipe", "resnet50-a2", "--no_amp", "--amp_dtype", "fp16"]))


def test_a_recipe_may_turn_off_what_its_name_says_is_off(tmp_path: Path) -> None:
    path = written(tmp_path, "no_streaming = false\n")
    assert not resolve(parse("main.py", "", ["--recipe", str(path), "--dataset", "imagenet1k"])).no_streaming


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("epoch = 3", "the key epoch, which no recipe may set; did you mean epochs"),
        ("quux = 3", "the key quux, which no recipe may set; its keys are the names of flags"),
        ('run_dir = "x"', "the key run_dir"),
        ('recipe = "digits"', "the key recipe"),
        ('epochs = "many"', "argument --epochs: invalid int value: 'many'"),
        ('scheduler = "sine"', "--scheduler has no choice sine; "),
        ("epochs = ", "is not TOML"),
        ("[training]\nepochs = 3", "the key training"),
        ("amp = 3", "--amp takes no value, and 3 is given; --no_amp turns it off"),
        ("epochs = 0", "--epochs 0 is too small"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_told_in_one_line(text: str, told: str, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        resolve(parse("main.py", "", ["--recipe", str(path)]))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "told"), [("digit", "did you mean digits"), ("x.toml", "No such file"), (".", "or one of")]
)
def test_an_unknown_recipe_is_refused_with_the_nearest_name(name: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse("main.py", "", ["--recipe", name])


@pytest.mark.usefixtures("small_model")
def test_a_run_says_and_records_its_recipe_and_resumes_with_or_without_it(tmp_path: Path) -> None:
    path = written(tmp_path, "max_samples = 64\nbatch_size = 16\nepochs = 2\nsnapshot_steps = 3\nlr = 0.02\n")
    done = train("--recipe", path, "--run_dir", tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["recipe"].startswith("mine sha256:")
    assert f"recipe    {config['recipe']}" in done.out.splitlines()
    train("--resume_from", tmp_path / "run")
    train("--recipe", path, "--resume_from", tmp_path / "run")
    written(tmp_path, "epochs = 3\n")
    refused = run("--recipe", path, "--resume_from", tmp_path / "run")
    assert refused.status == 2
    assert "--epochs" in refused.err


# ---- the recipes that are kept here ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """What a recipe is known for: `decays` of weights, norms and biases, and the `rate` after so many epochs."""

    top1: str
    lr: float
    batch: int
    epochs: int
    sizes: tuple[int, int]
    decays: tuple[float, float, float]
    rate: Callable[[float], float]


def falling(lr: float, share: float, least: float = 0.0) -> float:
    """A cosine from `lr` to `least`."""
    return least + (lr - least) * (1 + math.cos(math.pi * share)) / 2


def ffcv(top1: str, epochs: int) -> Published:
    def rate(epoch: float) -> float:
        return 1.7 * (1e-4 + (1 - 1e-4) * epoch / 2) if epoch < 2 else 1.7 * (epochs - epoch) / (epochs - 2)

    return Published(top1, 1.7, 4096, epochs, (192, 256), (1e-4, 0, 1e-4), rate)


def nvidia(top1: str, epochs: int) -> Published:
    def rate(epoch: float) -> float:
        return 0.256 * (int(epoch) + 1) if epoch < 8 else falling(2.048, (int(epoch) - 8) / (epochs - 8))

    return Published(top1, 2.048, 2048, epochs, (224, 224), (2**-15, 0, 2**-15), rate)


def rsb(top1: str, epochs: int, lr: float, size: int, decay: float) -> Published:
    def rate(epoch: float) -> float:
        whole = int(epoch)
        return lr * (1e-4 + (1 - 1e-4) * whole / 5) if whole < 5 else falling(lr, whole / epochs, 1e-6)

    return Published(top1, lr, 2048, epochs, (size, 224), (decay, 0, 0), rate)


def stepped(top1: str, epochs: int, size: int, decay: float, ends: tuple[int, ...], gamma: float = 0.1) -> Published:
    def rate(epoch: float) -> float:
        return 0.1 * gamma ** sum(epoch >= end for end in ends)

    return Published(top1, 0.1, 128, epochs, (size, size), (decay, decay, decay), rate)


def v2_rate(epoch: float) -> float:
    return 0.5 * (0.01 + 0.99 * int(epoch) / 5) if epoch < 5 else falling(0.5, (int(epoch) - 5) / 595)


def cifar100_rate(epoch: float) -> float:
    return 0.1 * epoch if epoch < 1 else 0.1 * 0.2 ** sum(epoch >= end for end in (60, 120, 160))


PUBLISHED = {
    "resnet50-v1": Published("76.130", 0.1, 256, 90, (224, 224), (1e-4, 1e-4, 1e-4), lambda e: 0.1 / 10 ** (e // 30)),
    "resnet50-v2": Published("80.858", 0.5, 1024, 600, (176, 224), (2e-5, 0, 2e-5), v2_rate),
    "resnet50-a1": rsb("80.4", 600, 5e-3, 224, 0.01),
    "resnet50-a2": rsb("79.8", 300, 5e-3, 224, 0.02),
    "resnet50-a3": rsb("78.1", 100, 8e-3, 160, 0.02),
    "resnet50-ffcv-16": ffcv("73.8", 16),
    "resnet50-ffcv-24": ffcv("75.6", 24),
    "resnet50-ffcv-32": ffcv("76.6", 32),
    "resnet50-ffcv-40": ffcv("77.2", 40),
    "resnet50-ffcv-56": ffcv("78.0", 56),
    "resnet50-ffcv-88": ffcv("78.4", 88),
    "resnet50-nvidia-50": nvidia("75.81", 50),
    "resnet50-nvidia-90": nvidia("77.12", 90),
    "resnet50-nvidia-250": nvidia("78.43", 250),
    "cifar10-resnet18": stepped("94.82", 200, 32, 1e-4, (100, 150)),
    "cifar100-resnet34": Published("76.76", 0.1, 128, 200, (32, 32), (5e-4, 5e-4, 5e-4), cifar100_rate),
    "fashion-mnist-resnet18": stepped("96.0", 300, 28, 5e-4, (150, 225)),
}


def planned(name: str) -> Config:
    return resolve(parse("main.py", "", ["--recipe", name]))


def test_every_recipe_is_known_to_this_table_and_to_the_guide() -> None:
    assert sorted([*PUBLISHED, "digits"]) == RECIPES
    rows = re.findall(r"^\| `([\w`, -]+)` \| ([\d., /]+) \|", (ROOT / "docs" / "RECIPES.md").read_text(), re.MULTILINE)
    told = {
        name: top1
        for names, values in rows
        for name, top1 in zip(names.split("`, `"), values.split(" / "), strict=True)
    }
    assert told == {name: published.top1 for name, published in PUBLISHED.items()} | {"digits": "98.5"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_its_certificate_and_no_setting_of_another_schedule(name: str) -> None:
    text = (recipe.FOLDER / f"{name}.toml").read_text()
    lines = re.findall(r"^# ([\w-]+)  +(.+)$", text, re.MULTILINE)
    assert tuple(key for key, _ in lines if key in CERTIFICATE) == CERTIFICATE
    told, keys = dict(lines), tomllib.loads(text).keys()
    assert re.match(r"measured here|parity of losses|carried over", told["checked"])
    config = planned(name)
    assert told["epochs"].startswith(f"{config.epochs}, batch {config.batch_size}")
    if name in PUBLISHED:
        assert told["top-1"].startswith(PUBLISHED[name].top1)
    assert ("benchmarks/parity.py" in told["checked"]) == (name in ("resnet50-v1", "resnet50-v2", "resnet50-a3"))
    assert config.scheduler == "onecycle" or not any(key.startswith("onecycle") for key in keys)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_plans_what_was_published(name: str) -> None:
    config, published = planned(name), PUBLISHED[name]
    assert (config.lr, config.batch_size, config.epochs) == (published.lr, published.batch, published.epochs)
    assert (config.image_size, config.eval_size) == published.sizes
    assert (config.weight_decay, config.norm_weight_decay, config.bias_weight_decay) == published.decays
    assert config.optimizer == "lamb" or not config.nesterov
    thirds = [round(published.epochs * share / 3, 1) for share in (1, 2)]
    for epoch in (0, 0.5, 1, 1.5, 4, 5, 7.9, 8, 30, 60, 100, 119, 120, 150, 160, 225, *thirds, published.epochs - 1):
        if epoch < published.epochs:
            found, momentum = schedule_at(config, published.lr, STEPS, round(epoch * STEPS))
            assert found == pytest.approx(published.rate(epoch), rel=1e-12), epoch
            assert momentum == (0.875 if "nvidia" in name else 0.9)


def test_the_averages_decay_is_torchvisions_after_its_adjustment() -> None:
    config = planned("resnet50-v2")
    assert config.ema_decay == pytest.approx(1 - (1 - 0.99998) * 1024 * config.ema_every / 600, rel=1e-12)


@pytest.fixture(scope="module")
def little_data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Files of CIFAR and Fashion-MNIST with few images in them, and as few images that are generated."""
    folder = tmp_path_factory.mktemp("data")
    _, facts = tiny_cifar.write(folder)
    test_mnist.write(folder / "FashionMNIST" / "raw", packed=False, images=16)
    with pytest.MonkeyPatch.context() as patch:
        tiny_cifar.adopt(facts, patch.setattr)
        patch.setattr(constants, "HF_HOME", str(folder / "home"))
        patch.setattr(synthetic, "IMAGES", {"train": 32, "validation": 16})
        yield folder


@pytest.mark.slow
@pytest.mark.usefixtures("small_model")
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name: str, little_data: Path, tmp_path: Path) -> None:
    batch, flags = 4, ["--epochs", 1, "--warmup_epochs", 0, "--num_workers", 0, "--streams", 1, "--no_amp"]
    if name.startswith("resnet50"):
        batch = 16
        flags += ["--dummy_data", "--model", "resnet18", "--image_size", 64, "--eval_size", 64]
        flags += ["--progressive_size", "32:0,64:1"] if "ffcv" in name else []
    elif name != "digits":
        batch = 2 if "cifar" in name else 8
        flags += ["--data_dir", little_data]
    done = train(
        "--recipe", name, *flags, "--max_samples", 2 * batch, "--batch_size", batch, "--run_dir", tmp_path / "run"
    )
    assert f"recipe    {name} sha256:" in done.out
    assert [row["step"] for row in results(tmp_path / "run")] == ["2"]
