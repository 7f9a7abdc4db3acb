"""The stand-in hub answers the real clients as the Hub does; the made image sets are what `datasets` would write."""

import http.client
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from hub import Hub
from shards import REPO_ID, class_names, make_imagenet_like

TOKEN = "hf_right"
SHARD = "data/train-00001-of-00002.parquet"

READ = f"""
import json, sys
import datasets, pyarrow.parquet as pq
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download

repo = "{REPO_ID}"
sha = HfApi().dataset_info(repo).sha
HfApi().auth_check(repo, repo_type="dataset")
builder = datasets.load_dataset_builder(repo, revision=sha)
files = {{str(split): list(paths) for split, paths in builder.config.data_files.items()}}
hub = HfFileSystem()
with hub.open(files["train"][1], cache_type="none") as file:
    footer = pq.ParquetFile(file).metadata
with hub.open(files["train"][1], cache_type="none") as file:
    parquet = pq.ParquetFile(file, metadata=footer, pre_buffer=True)
    table = parquet.read_row_groups([1, 2], columns=["image.bytes", "label"])
print(json.dumps({{
    "sha": sha,
    "files": files,
    "names": builder.info.features["label"].names,
    "labels": table["label"].to_pylist(),
    "file": hf_hub_download(repo, "{SHARD}", repo_type="dataset", revision=sha),
    "folder": snapshot_download(repo, repo_type="dataset"),
    "paths": [info.path for info in HfApi().get_paths_info(repo, ["data", "README.md", "none"], repo_type="dataset")],
}}))
"""

REFUSE = f"""
import json, sys
import datasets
from huggingface_hub import HfApi

def outcome(call):
    try:
        call()
    except Exception as error:
        response = getattr(error, "response", None)
        return [type(error).__name__, response.status_code if response is not None else None]

print(json.dumps([
    outcome(lambda: HfApi().dataset_info("{REPO_ID}")),
    outcome(lambda: HfApi().auth_check("{REPO_ID}", repo_type="dataset")),
    outcome(lambda: datasets.load_dataset_builder("{REPO_ID}")),
]))
"""

MODEL = """
import json
from transformers import ResNetForImageClassification
print(json.dumps(ResNetForImageClassification.from_pretrained("org/tiny").config.depths))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    make_imagenet_like(root, train=90, validation=9, test=5, files=2, rows_per_group=10)
    return root


def ask(script: str, hub: Hub, home: Path, token: str | None) -> Any:
    """What `script` prints as JSON, run in a process of its own as a user of `hub`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= hub.env() | {"HF_HOME": str(home)} | ({"HF_TOKEN": token} if token else {})
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def fetch(hub: Hub, path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=10)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response, response.read()


def test_the_clients_read_what_lies_in_the_folder(root: Path, tmp_path: Path) -> None:
    local = root / "datasets" / REPO_ID
    with Hub(root, token=TOKEN, gated=True) as hub:
        sha = hub.repos["datasets", REPO_ID].sha
        seen = ask(READ, hub, tmp_path, TOKEN)
    assert seen["sha"] == sha
    assert seen["files"]["train"][1] == f"hf://datasets/{REPO_ID}@{sha}/{SHARD}"
    assert list(seen["files"]) == ["train", "validation", "test"]
    assert seen["names"] == class_names(10)
    assert seen["labels"] == pq.read_table(local / SHARD)["label"].to_pylist()[10:30]
    assert Path(seen["file"]).read_bytes() == (local / SHARD).read_bytes()
    assert (Path(seen["folder"]) / SHARD).read_bytes() == (local / SHARD).read_bytes()
    assert set(seen["paths"]) == {"data", "README.md"}
    footer, block = (request for request in hub.requests if request.range)
    first, end = (int(bound) for bound in (block.range or "").removeprefix("bytes=").split("-"))
    groups = [pq.read_metadata(local / SHARD).row_group(group) for group in (1, 2)]
    assert [request.status for request in (footer, block)] == [206, 206]
    assert first == groups[0].column(0).dictionary_page_offset
    assert block.sent == end + 1 - first <= sum(g.column(c).total_compressed_size for g in groups for c in range(3))


@pytest.mark.parametrize(
    ("hub_is", "token", "expected"),
    [
        ({"gated": True}, None, [None, ["GatedRepoError", 401], ["DatasetNotFoundError", None]]),
        ({"gated": True}, "hf_wrong", [["HfHubHTTPError", 401]] * 3),
        ({"gated": True, "accepted": False}, TOKEN, [None, ["GatedRepoError", 403], ["DatasetNotFoundError", None]]),
        ({}, None, [["RepositoryNotFoundError", 401]] * 2 + [["DatasetNotFoundError", None]]),
    ],
    ids=["no token", "wrong token", "licence not accepted", "private"],
)
def test_each_refusal_reaches_the_clients_as_the_hubs_would(
    root: Path, tmp_path: Path, hub_is: dict[str, Any], token: str | None, expected: list[Any]
) -> None:
    with Hub(root, token=TOKEN, **hub_is) as hub:
        assert ask(REFUSE, hub, tmp_path, token) == expected


@pytest.mark.slow
def test_transformers_loads_a_model_without_a_token(tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1, 1, 1, 1])
    ResNetForImageClassification(config).save_pretrained(tmp_path / "models" / "org" / "tiny")
    with Hub(tmp_path, token=TOKEN, gated=True) as hub:
        assert ask(MODEL, hub, tmp_path / "home", None) == [1, 1, 1, 1]


def test_ranges_are_exact_and_past_the_end_refused(root: Path) -> None:
    data = (root / "datasets" / REPO_ID / SHARD).read_bytes()
    url = f"/datasets/{REPO_ID}/resolve/main/{SHARD}"
    with Hub(root) as hub:
        part, body = fetch(hub, url, Range="bytes=100-199")
        rest, tail = fetch(hub, url, Range=f"bytes={len(data) - 5}-")
        past, _ = fetch(hub, url, Range=f"bytes={len(data)}-")
        whole, everything = fetch(hub, url)
    assert (part.status, rest.status, past.status, whole.status) == (206, 206, 416, 200)
    assert (body, tail, everything) == (data[100:200], data[-5:], data)
    assert part.getheader("Content-Range") == f"bytes 100-199/{len(data)}"
    assert [request.sent for request in hub.requests if request.status != 416] == [100, 5, len(data)]


def test_the_commit_changes_with_the_files_and_only_then(root: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(root / "datasets" / REPO_ID, tmp_path / "datasets" / REPO_ID)
    with Hub(root) as one, Hub(tmp_path) as copy:
        assert one.repos["datasets", REPO_ID].sha == copy.repos["datasets", REPO_ID].sha
    (folder / "README.md").write_text("changed")
    with Hub(tmp_path) as changed:
        assert one.repos["datasets", REPO_ID].sha != changed.repos["datasets", REPO_ID].sha


def test_a_closed_hub_answers_no_kept_connection(root: Path) -> None:
    with Hub(root) as hub:
        connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=10)
        connection.request("GET", f"/api/datasets/{REPO_ID}")
        connection.getresponse().read()
    connection.request("GET", f"/api/datasets/{REPO_ID}")
    with pytest.raises(ConnectionError):
        connection.getresponse()


def test_the_image_set_is_what_datasets_would_write(root: Path, tmp_path: Path) -> None:
    import datasets

    local = root / "datasets" / REPO_ID
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=class_names(10)))
    schema = pq.read_schema(local / SHARD)
    assert schema == features.arrow_schema
    assert json.loads(schema.metadata[b"huggingface"]) == json.loads(features.arrow_schema.metadata[b"huggingface"])
    assert set(pq.read_table(local / "data" / "test-00000-of-00001.parquet")["label"].to_pylist()) == {-1}
    images = [image["bytes"] for image in pq.read_table(local / SHARD)["image"].to_pylist()]
    for image in images:
        pixels = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
        assert pixels is not None
        assert all(80 <= side <= 160 for side in pixels.shape[:2])
    again = make_imagenet_like(tmp_path, train=90, validation=9, test=5, files=2, rows_per_group=10)
    assert (again / SHARD).read_bytes() == (local / SHARD).read_bytes()
