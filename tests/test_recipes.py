"""A recipe's settings are taken, flags win over them, and what is wrong with a file is told in one line."""

import json
from pathlib import Path

import pytest
from program import run, train

from config import parse, resolve
from errors import UsageError


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


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("epoch = 3", "the key epoch, which no recipe may set; did you mean epochs"),
        ("quux = 3", "the key quux, which no recipe may set; its keys are the names of flags"),
        ('run_dir = "x"', "the key run_dir"),
        ('recipe = "digits"', "the key recipe"),
        ('epochs = "many"', "argument --epochs: invalid int value: 'many'"),
        ('scheduler = "sine"', "argument --scheduler: invalid choice: 'sine'"),
        ("epochs = ", "is not TOML"),
        ("[training]\nepochs = 3", "the key training"),
        ("amp = 3", "argument --amp: ignored explicit argument '3'"),
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
