"""What is sent to the Hub is the export, byte for byte, and nothing else; a dry run sends nothing."""

from pathlib import Path

import pytest
from exports import make_run, run_export
from push_hub import TOKEN, PushHub

from results import agreement


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "birds")


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "IMAGES", 4)


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.usefixtures("token")
def test_the_files_arrive_byte_for_byte_with_no_secret_in_them(
    private: bool, source: Path, hub_port: int, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    flags = ["--private"] if private else []
    with PushHub(hub_port) as hub:
        done = run_export(source, "--to", "transformers", "--out", out, "--push_to_hub", "me/birds", *flags)
    assert done.status == 0, done.err
    assert hub.files == contents(out)
    assert {"README.md", "model.safetensors", "config.json", "preprocessor_config.json"} <= hub.files.keys()
    assert hub.private == {"me/birds": private}
    assert f"pushed    {hub.url}/me/birds" in done.out
    for text in (*hub.files.values(), done.out.encode(), done.err.encode()):
        assert TOKEN.encode() not in text
        assert str(source.parent).encode() not in text.replace(done.out.encode(), b"")


@pytest.mark.usefixtures("token")
def test_a_dry_run_tells_the_files_and_the_card_and_sends_nothing(source: Path, hub_port: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with PushHub(hub_port) as hub:
        done = run_export(source, "--to", "torchvision", "--out", out, "--push_to_hub", "me/birds", "--dry_run")
    assert (done.status, hub.requests) == (0, [])
    for name, data in contents(out).items():
        assert f"{name:<24} {len(data):>14,} bytes" in done.out
    assert (out / "README.md").read_text() in done.out


def test_a_missing_token_is_one_line_and_the_export_stays(source: Path, hub_port: int, tmp_path: Path) -> None:
    with PushHub(hub_port) as hub:
        done = run_export(source, "--to", "torchvision", "--out", tmp_path / "out", "--push_to_hub", "me/birds")
    assert (done.status, done.err.count("\n"), hub.requests) == (3, 1, [])
    assert "HF_TOKEN" in done.err
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(("status", "told"), [(401, "make a new one"), (403, "permissions"), (422, "status 422")])
@pytest.mark.usefixtures("token")
def test_a_refusal_is_one_line_without_the_token(
    status: int, told: str, source: Path, hub_port: int, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with PushHub(hub_port, status) as hub:
        done = run_export(source, "--to", "torchvision", "--out", out, "--push_to_hub", "me/birds")
    assert (done.status, done.err.count("\n"), hub.files) == (3, 1, {})
    assert told in done.err
    assert TOKEN not in done.err
    assert (out / "model.safetensors").exists()


@pytest.mark.usefixtures("token")
def test_a_hub_that_is_not_there_is_one_line(source: Path, hub_port: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_export(source, "--to", "torchvision", "--out", out, "--push_to_hub", "me/birds")
    assert (done.status, done.err.count("\n")) == (3, 1)
    assert "cannot reach me/birds" in done.err
    assert (out / "model.safetensors").exists()


@pytest.mark.usefixtures("token")
def test_a_public_repository_does_not_get_what_is_to_be_private(source: Path, hub_port: int, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with PushHub(hub_port, open_already=True) as hub:
        done = run_export(source, "--to", "torchvision", "--out", out, "--push_to_hub", "me/birds", "--private")
    assert (done.status, hub.files) == (3, {})
    assert "is public already" in done.err
