"""The Hub of the whole session is a port of this machine, at which a test may serve; nothing reaches the real one."""

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from shards import make_imagenet_like, make_small_set
from unrendered import unrendered as unrendered


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


HUB_PORT = _free_port()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{HUB_PORT}"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
    os.environ.pop(name, None)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _without_old_snapshots(request: pytest.FixtureRequest) -> Iterator[None]:
    """Frees the disk of a test's snapshots, 90 MB each, when the test is over."""
    folder = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    yield
    for path in folder.rglob("*.safetensors") if folder else ():
        path.unlink()


@pytest.fixture(scope="session")
def hub_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 training images in 30 files of one block each, 97 for validation."""
    root = tmp_path_factory.mktemp("hub")
    make_imagenet_like(root, files=30, rows_per_group=10)
    return root


@pytest.fixture(scope="session")
def image_set(hub_root: Path) -> Path:
    return hub_root / "datasets" / "ILSVRC" / "imagenet-1k"


@pytest.fixture(scope="session")
def small_hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hub with 8 images to train on and 8 for validation."""
    root = tmp_path_factory.mktemp("small_hub")
    make_small_set(root)
    return root


@pytest.fixture(scope="module")
def small_model() -> Iterator[None]:
    """Runs take a moment, and their snapshots no room."""
    from killable import small_with_dropout

    from training import sources, step

    with pytest.MonkeyPatch.context() as patch:
        for module in (step, sources):
            patch.setattr(module, "build_model", small_with_dropout(module.build_model))
        yield


@pytest.fixture
def hub_port() -> Iterator[int]:
    """The port that the Hub's clients of this process, and of those started from it, ask; their caches are empty."""
    from huggingface_hub import HfFileSystem

    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
    HfFileSystem.clear_instance_cache()
    yield HUB_PORT
    HfFileSystem.clear_instance_cache()
