"""report.html tells what a run's folder holds, loads nothing from elsewhere, and harms neither reader nor run."""

import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from logs_of_runs import write_evaluation, write_logs
from program import results, run, train

import evaluate
import visualization
from errors import UsageError
from pages.history import read_steps
from report import write_report
from visualization import RunPictures

SMALL = ("--max_samples", 48, "--batch_size", 16, "--num_workers", 0, "--epochs", 2)
EVIL = "<script>document.title = 'hacked'</script>"
QUOTES = "\" onmouseover=\"document.title = 'hacked'\" x='"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")


class Page(HTMLParser):
    """The tags of a page, each with its attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory, small_model: None) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    train(*SMALL, "--lr", 0.02, "--run_dir", folder)
    return folder


def in_browser(path: Path, script: str, tmp_path: Path) -> str:
    """The page as it is after a script ran at its end."""
    copy = tmp_path / "copy.html"
    copy.write_text(path.read_text().replace("</html>", f"<script>{script}</script></html>"))
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}", "--dump-dom")
    command = [str(BROWSER), *options, copy.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


# ---- what it tells ---------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_report_of_its_results_settings_snapshots_and_next_commands(digits: Path) -> None:
    page = Page(digits / "report.html")
    last = results(digits)[-1]
    assert f"{float(last['val_top1']):.2%}" in page.text
    assert "all of 2 epochs" in page.text
    assert re.search(r"batch_size\s*16\s*64", page.text)
    assert "weight_decay" not in page.text.split("Settings that differ")[1].split("All settings")[0]
    assert "step-000000006.safetensors" in page.text
    assert f" --lr 0.02 --run_dir {digits}" in page.text
    for door in ("evaluate.py", "predict.py", "export.py", "main.py --dataset digits --use_pretrained"):
        assert f"python {door} {digits}" in page.text
    assert "--resume_from" not in page.text.split("What to do next")[-1]
    assert page.count("svg") > 6


def test_an_evaluation_adds_its_classes_confusions_and_pictures(digits: Path) -> None:
    before = Page(digits / "report.html").text
    assert "precision" not in before
    done = run(digits, "--num_workers", 0, entry=evaluate.main)
    assert done.status == 0, done.err
    assert f"wrote     {digits / 'report.html'}" in done.out
    page = Page(digits / "report.html")
    assert "precision" in page.text
    assert any("filter" in (attributes.get("placeholder") or "") for _, attributes in page.tags)
    assert any(attributes.get("class") == "heat" for tag, attributes in page.tags if tag == "table")


def test_a_run_that_has_not_finished_an_epoch_has_a_report_and_is_told_how_to_go_on(tmp_path: Path) -> None:
    folder = write_logs(tmp_path / "run", done=0)
    text = Page(write_report(folder)).text
    assert "No epoch is finished yet" in text
    assert f"python main.py --resume_from {folder}" in text
    for name in ("metrics.jsonl", "results.csv"):
        (folder / name).unlink()
    assert "0 of 3 epochs" in Page(write_report(folder)).text


def test_skipped_steps_unreadable_images_and_the_worse_last_epoch_are_told(tmp_path: Path) -> None:
    folder = write_logs(tmp_path / "run", scheduler="trapezoid", recipe="torchvision_v1")
    with open(folder / "results.csv", "a") as file:
        file.write("4,80,1,0.9,90,0.05,0.1,0.1,9000,150\n")
    (folder / "unreadable.csv").write_text("image,reason,epoch\na.jpg,cut off,1\na.jpg,cut off,2\nb.jpg,empty,2\n")
    text = Page(write_report(folder)).text
    assert "Steps that were skipped: 1" in text
    assert "Images that could not be read: 2" in text
    assert "(epoch 3)" in text
    assert "--extend_epochs" in text
    assert "torchvision_v1" in text


def test_only_some_steps_are_read_from_a_long_log_and_all_from_a_short_one(tmp_path: Path) -> None:
    folder = write_logs(tmp_path / "run", epochs=3, steps=20)
    assert [row["step"] for row in read_steps(folder)] == list(range(1, 61))
    assert 8 <= len(read_steps(folder, 10)) <= 10


# ---- what it must not do ---------------------------------------------------------------------------------------------


def evil_run(folder: Path) -> Path:
    run = write_logs(folder / EVIL.replace("/", ""), data_dir=f"{EVIL}{QUOTES}", dataset="imagefolder")
    write_evaluation(run, [EVIL, QUOTES, "a & b", "\x1b[31m\nred"])
    (run / "unreadable.csv").write_text(f"image,reason,epoch\n{EVIL},{EVIL},1\n")
    return write_report(run)


def test_names_of_classes_folders_and_images_are_shown_and_never_become_html(tmp_path: Path) -> None:
    path = evil_run(tmp_path)
    page = Page(path)
    assert page.count("script") == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    for told in (EVIL, QUOTES, "a & b", r"\x1b[31m\nred"):
        assert told in page.text
    assert "\x1b" not in path.read_text()


@needs_browser
def test_a_browser_runs_nothing_that_a_name_says(tmp_path: Path) -> None:
    told = in_browser(evil_run(tmp_path), "document.body.dataset.ran = 'ours'", tmp_path)
    assert 'data-ran="ours"' in told
    assert "<title>hacked" not in told


def test_the_report_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    folder = write_logs(tmp_path / "run")
    write_evaluation(folder, ["cat", "dog"])
    path = write_report(folder)
    page = Page(path)
    loads = [attributes[name] for _, attributes in page.tags for name in ("src", "href") if attributes.get(name)]
    assert {load for load in loads if load and not load.startswith(("data:", "#"))} == set()
    assert page.count("link") == page.count("iframe") == 0
    assert re.findall(r"url\(|@import|fetch\(", path.read_text()) == []


def test_logs_that_cannot_be_read_are_warned_of_once_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_logs(tmp_path / "run")
    (folder / "results.csv").write_text("epoch,step\nnot a number,1\n")
    monkeypatch.setattr(visualization, "plot_curves", lambda folder: None)
    pictures = RunPictures(folder, [])
    pictures.curves(1)
    pictures.close()
    pictures.report()
    err = capsys.readouterr().err
    assert err.count("\n") == err.count(f"report.html in {folder}") == 1


def test_the_folder_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no config\.json"):
        write_report(tmp_path)


# ---- a long run of many classes --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_logs(tmp_path_factory.mktemp("runs") / "imagenet", 90, 5004, dataset="imagenet1k", amp=True)
    write_evaluation(folder, [f"class {number}, with a second name as ImageNet has" for number in range(1000)])
    return folder


def test_the_report_of_90_epochs_on_imagenet_is_below_3_mb(imagenet: Path) -> None:
    start = time.perf_counter()
    path = write_report(imagenet)
    print(f"{path.stat().st_size / 1e6:.2f} MB in {time.perf_counter() - start:.2f} s")
    assert path.stat().st_size < 3e6
    assert Page(path).count("tr") > 1000


@needs_browser
def test_a_thousand_classes_are_sorted_and_filtered(imagenet: Path, tmp_path: Path) -> None:
    script = """
    const rows = () => [...document.querySelectorAll("table.sorts tbody tr")];
    const numbers = () => rows().map((row) => Number(row.cells[2].dataset.key));
    const ordered = (list) => list.every((value, at) => !at || list[at - 1] <= value);
    const button = document.querySelectorAll("table.sorts th button")[2];
    button.click();
    const up = ordered(numbers());
    button.click();
    const down = ordered(numbers().reverse());
    const input = document.querySelector(".filters input");
    input.value = "CLASS 99";
    input.dispatchEvent(new Event("input"));
    document.body.dataset.found = [up, down, rows().filter((row) => !row.hidden).length].join();
    document.body.dataset.wide = document.documentElement.scrollWidth <= window.innerWidth;
    """
    told = in_browser(write_report(imagenet), script, tmp_path)
    assert 'data-found="true,true,11"' in told
    assert 'data-wide="true"' in told
