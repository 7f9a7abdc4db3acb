"""--doctor tells each fact right, whatever is missing, and ends with status 0; nothing secret is printed."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hub import Hub
from program import ROOT, run

import doctor
import machine
import speed
from config import Config, parse, resolve
from doctor import NOTE, OK, WARNING, Facts, Line, Room
from machine import Gpu, Machine, cgroup_limits
from speed import Speed
from stream import reach
from stream.decode_pool import Job, WorkerDied
from stream.reach import Answer, Reach
from stream.shared import SharedMemory

MIB, GIB = 2**20, 2**30
TOKEN = "hf_" + "x" * 34
IMAGENET = "ILSVRC/imagenet-1k"
MACHINE = Machine(
    cores=8,
    core_limit=None,
    memory=64 * GIB,
    memory_limit=None,
    memory_free=60 * GIB,
    shared=32 * GIB,
    files=65536,
    files_most=65536,
    threads=None,
    cpu="a CPU",
    has_bf16=True,
)
GPU = Gpu("a GPU", 80 * GIB, 79 * GIB, has_bf16=True)
SPEED = Speed(processes=8, decoded=4000.0, batch=64, trained=2000.0, snapshot=200_000_000)
FACTS = Facts(
    machine=MACHINE,
    ask=lambda: Reach("https://hub", offline=False, has_token=True, hub=Answer(0.1), token_accepted=True),
    measure=lambda: SPEED,
    device="cuda",
    gpus=[GPU],
    cuda="13.2",
    driver="580.1",
    threads=8,
    jpeg_library="libturbojpeg.so",
    no_compiler=None,
    disks={"snapshots": Room(Path("runs"), 10**12, 0)},
    packages=dict.fromkeys((*doctor.PACKAGES, *doctor.OPTIONAL), "1.0"),
)


def settings(*argv: str) -> Config:
    return resolve(parse("main.py", "", ["--num_workers", "8", "--dataset", "imagenet1k", *argv]))


def lines(facts: Facts, *argv: str) -> list[Line]:
    config = settings(*argv)
    return list(doctor.report(facts, config, config))


def told(facts: Facts, topic: str, *argv: str) -> Line:
    """The one line about a topic."""
    (line,) = [line for line in lines(facts, *argv) if line.topic == topic]
    return line


def on(facts: Facts = FACTS, **changes: object) -> Facts:
    """These facts of another machine."""
    return replace(facts, machine=replace(facts.machine, **changes))  # type: ignore[arg-type]


def test_a_machine_that_has_everything_gets_no_warning_and_no_advice() -> None:
    assert [line for line in lines(FACTS, "--amp") if line.mark != OK] == []


def test_what_is_known_is_told_before_the_hub_is_asked_and_anything_measured() -> None:
    def hangs() -> Reach:
        raise TimeoutError

    told: list[str] = []
    config = settings()
    with pytest.raises(TimeoutError):
        told.extend(line.topic for line in doctor.report(replace(FACTS, ask=hangs), config, config))
    assert {"versions", "gpu", "cores", "memory", "jpeg", "compiler"} <= set(told)


def test_a_device_that_takes_days_for_an_epoch_is_told() -> None:
    line = told(replace(FACTS, measure=lambda: replace(SPEED, trained=0.04, decoded=None)), "steps")
    assert (line.mark, "0.04 images/s" in line.text, "a GPU" in line.text) == (NOTE, True, True)


def test_each_tracker_that_is_asked_for_is_told() -> None:
    here, missing = (True, "wandb 0.31.0; offline: no key is found"), (False, "mlflow is not here: pip install mlflow")
    found = [line for line in lines(replace(FACTS, trackers=[here, missing])) if line.topic == "track"]
    assert [(line.mark, line.text) for line in found] == [(OK, here[1]), (WARNING, missing[1])]


def test_64_mb_of_shared_memory_matter_only_to_several_gpus() -> None:
    small = on(shared=64 * MIB)
    line = told(small, "/dev/shm")
    assert (line.mark, "67.1 MB" in line.text, "memfd" in line.text) == (OK, True, True)
    line = told(replace(small, gpus=[GPU, GPU]), "/dev/shm")
    assert (line.mark, "--shm-size" in line.text) == (WARNING, True)
    assert told(replace(FACTS, gpus=[GPU, GPU]), "/dev/shm").mark == OK
    assert [line for line in lines(on(shared=None)) if line.topic == "/dev/shm"] == []


def test_open_files_that_may_be_asked_for_are_enough_or_too_few() -> None:
    few = on(files=1024, files_most=4096)
    assert told(few, "open files").mark == OK
    line = told(few, "open files", "--num_workers", "3000")
    assert (line.mark, "ulimit -Hn" in line.text) == (WARNING, True)


def test_cores_that_a_container_does_not_grant_are_not_counted() -> None:
    limited = on(core_limit=2.5)
    line = told(limited, "cores")
    assert (line.mark, "2.5" in line.text, "--num_workers 2" in line.text) == (WARNING, True, True)
    assert told(limited, "cores", "--num_workers", "2").mark == OK
    assert told(limited, "threads").mark == WARNING  # 8 threads on 2 cores
    one = replace(on(threads="1"), threads=1)
    assert told(one, "threads").mark == OK  # a GPU computes
    line = told(replace(one, device="cpu", gpus=[]), "threads")
    assert (line.mark, "OMP_NUM_THREADS is 1" in line.text) == (WARNING, True)


def test_memory_counts_the_containers_limit_the_processes_and_the_windows() -> None:
    line = told(on(memory_limit=2 * GIB), "memory")
    assert (line.mark, "--shuffle_window" in line.text, "limit" in line.text) == (WARNING, True, True)
    assert told(on(memory=2 * GIB), "memory").mark == WARNING
    assert told(on(memory_free=GIB), "memory").mark == WARNING
    assert told(on(memory=4 * GIB, memory_free=None), "memory").mark == OK


def test_a_disk_that_is_too_small_is_told_with_the_flag_that_moves_the_folder() -> None:
    full = replace(FACTS, disks={"snapshots": Room(Path("runs"), 10**8, 0), "cache": Room(Path("kept"), 10**10, 0)})
    assert (told(full, "snapshots").mark, "--run_dir" in told(full, "snapshots").text) == (WARNING, True)
    assert told(full, "cache").mark == WARNING
    assert told(full, "cache", "--cache_dir", "kept", "--cache_limit_gb", "5").mark == OK
    assert told(replace(full, disks={"cache": Room(Path("kept"), 10**10, 145 * 10**9)}), "cache").mark == OK
    unknown = replace(full, measure=lambda: replace(SPEED, snapshot=None))
    assert told(unknown, "snapshots").mark == OK


def test_amp_on_a_cpu_without_bfloat16_is_told_to_be_float32() -> None:
    cpu = replace(on(has_bf16=False), device="cpu", gpus=[], driver="")
    assert told(cpu, "bf16").mark == NOTE
    line = told(cpu, "bf16", "--amp")
    assert (line.mark, "float32" in line.text) == (NOTE, True)
    assert told(cpu, "gpu") == Line(NOTE, "gpu", "none: runs use cpu")
    old = replace(FACTS, gpus=[replace(GPU, has_bf16=False)])
    assert "float16" in told(old, "bf16").text


def test_a_gpu_that_pytorch_cannot_use_is_told_from_none() -> None:
    line = told(replace(FACTS, device="cpu", gpus=[], cuda=None), "gpu")
    assert (line.mark, "580.1" in line.text, "CPU only" in line.text) == (WARNING, True, True)
    busy = replace(FACTS, gpus=[replace(GPU, free=GIB)])
    assert (told(busy, "gpu").mark, "CUDA_VISIBLE_DEVICES" in told(busy, "gpu").text) == (WARNING, True)


def test_decoding_that_is_slower_than_the_gpu_is_told_with_the_share_of_time_lost() -> None:
    slow = replace(FACTS, measure=lambda: replace(SPEED, decoded=500.0))
    line = told(slow, "decoding")
    assert (line.mark, "75%" in line.text, "--num_workers" in line.text) == (WARNING, True, True)
    assert told(replace(slow, device="cpu"), "decoding").mark == OK
    failed = replace(FACTS, measure=lambda: Speed(8, None, 64, None, None, "no memory"))
    assert told(failed, "speed") == Line(WARNING, "speed", "no memory")


def test_what_is_missing_is_told_with_what_it_is_for() -> None:
    bare = replace(FACTS, jpeg_library=None, no_compiler="no g++", packages={})
    assert "turbojpeg" in told(bare, "jpeg").text
    assert told(bare, "compiler").mark == WARNING  # on a GPU it would be used
    assert told(bare, "compiler", "--no_compile").mark == NOTE
    assert told(replace(bare, device="cpu"), "compiler").mark == NOTE
    assert told(replace(bare, device="cpu"), "compiler", "--compile").mark == WARNING
    (line,) = [line for line in lines(bare) if line.topic == "package"]
    assert (line.mark, "timm (--model timm:NAME" in line.text) == (NOTE, True)


@pytest.mark.parametrize(
    ("found", "marks"),
    [
        (Reach("https://hub", True, False), {"hub": NOTE, "token": NOTE}),
        (Reach("https://hub", False, True, Answer(5.0, "cannot reach the Hub")), {"hub": WARNING, "token": NOTE}),
        (Reach("https://hub", False, True, Answer(0.1), False), {"hub": OK, "token": WARNING}),
        (
            Reach("https://hub", False, True, Answer(0.1), True, Answer(0.1, "not accepted")),
            {"hub": OK, "token": OK, "licence": WARNING},
        ),
        (
            Reach("https://hub", False, True, Answer(0.1), True, Answer(0.1)),
            {"hub": OK, "token": OK, "licence": OK},
        ),
    ],
)
def test_the_hub_the_token_and_the_licence_are_told_apart(found: Reach, marks: dict[str, str]) -> None:
    assert {line.topic: line.mark for line in doctor.of_hub(found, settings())} == marks


def test_passwords_and_tokens_are_not_printed() -> None:
    line = Line(WARNING, "hub", f"https://me:secret@hub answers {TOKEN} and https://hub/x?sig=secret2")
    assert not {"secret", "secret2", TOKEN} & set(str(line).replace("@", " ").replace(":", " ").split())
    assert "secret" not in str(line)


# ---- cgroups ---------------------------------------------------------------------------------------------------------


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_the_smallest_limit_on_the_way_to_the_root_counts(tmp_path: Path) -> None:
    write(tmp_path / "a" / "b", cpu__max="max 100000", memory__max="max")
    write(tmp_path / "a", cpu__max="150000 100000", memory__max=str(GIB))
    write(tmp_path, memory__max="max")
    assert cgroup_limits("0::/a/b\n", tmp_path) == (1.5, GIB)
    assert cgroup_limits("0::/elsewhere\n", tmp_path) == (None, None)
    assert cgroup_limits("", tmp_path) == (None, None)


def test_version_1_of_cgroups_is_read_too(tmp_path: Path) -> None:
    write(tmp_path / "cpu" / "job", cpu__cfs_quota_us="400000", cpu__cfs_period_us="100000")
    write(tmp_path / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    write(tmp_path / "memory" / "job", memory__limit_in_bytes=str(2 * GIB))
    write(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712")
    assert cgroup_limits("4:memory:/job\n1:cpu:/job\n0::/\n", tmp_path) == (4.0, 2 * GIB)
    assert cgroup_limits("4:memory:/\n1:cpu:/\n", tmp_path) == (None, None)
    in_container = "4:memory:/host/job\n1:cpu:/host/job\n"  # where the own group is the root
    write(tmp_path / "memory", memory__limit_in_bytes=str(GIB))
    assert cgroup_limits(in_container, tmp_path) == (None, GIB)


def test_this_machine_is_read() -> None:
    here = machine.look()
    assert 0 < here.cores <= (os.cpu_count() or 1)
    assert here.memory is not None
    assert here.files <= here.files_most


# ---- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def marks(found: Reach) -> dict[str, str]:
    return {line.topic: line.mark for line in doctor.of_hub(found, settings())}


@pytest.mark.usefixtures("token")
def test_a_gated_set_is_told_by_whether_its_licence_is_accepted(small_hub: Path, hub_port: int) -> None:
    with Hub(small_hub, token=TOKEN, gated=True, port=hub_port):
        assert marks(reach.ask(IMAGENET)) == {"hub": OK, "token": OK, "licence": OK}
    with Hub(small_hub, token=TOKEN, gated=True, accepted=False, port=hub_port):
        found = reach.ask(IMAGENET)
    assert marks(found) == {"hub": OK, "token": OK, "licence": WARNING}
    assert found.dataset is not None
    assert "accept it at" in str(found.dataset.problem)


@pytest.mark.usefixtures("token")
def test_a_refused_token_is_told(small_hub: Path, hub_port: int) -> None:
    with Hub(small_hub, token="hf_another", gated=True, port=hub_port):
        found = reach.ask(IMAGENET)
    assert marks(found) == {"hub": OK, "token": WARNING, "licence": WARNING}
    assert TOKEN not in str(found)


def test_no_token_is_told_and_what_a_gated_set_needs(small_hub: Path, hub_port: int) -> None:
    with Hub(small_hub, token=TOKEN, gated=True, port=hub_port):
        found = reach.ask(IMAGENET)
        assert marks(reach.ask(None)) == {"hub": OK, "token": NOTE}
    assert marks(found) == {"hub": OK, "token": NOTE, "licence": WARNING}
    assert found.dataset is not None
    assert "set HF_TOKEN" in str(found.dataset.problem)


@pytest.mark.usefixtures("token")
def test_a_mirror_that_does_not_know_the_questions_is_reached_all_the_same(small_hub: Path, hub_port: int) -> None:
    with Hub(small_hub, mirror=True, port=hub_port):
        found = reach.ask(IMAGENET)
    assert (found.token_accepted, found.dataset) == (None, None)
    assert marks(found) == {"hub": OK, "token": NOTE}


@pytest.mark.parametrize(("fault", "word"), [(503, "503"), ("reset", "network"), ("html", "web page")])
def test_a_hub_that_fails_is_no_hub(fault: int | str, word: str, small_hub: Path, hub_port: int) -> None:
    with Hub(small_hub, port=hub_port, fault=lambda method, path: fault):
        found = reach.ask(IMAGENET)
    assert found.dataset is None
    assert word in str(found.hub)
    assert marks(found)["hub"] == WARNING


def test_a_silent_hub_is_waited_for_briefly(small_hub: Path, hub_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reach, "SECONDS", 0.3)
    with Hub(small_hub, port=hub_port, fault=lambda method, path: "silence"):
        found = reach.ask(IMAGENET)
    assert marks(found)["hub"] == WARNING


def test_a_hub_that_is_not_there_or_not_to_be_asked_is_told(hub_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = reach.ask(IMAGENET)
    assert marks(found)["hub"] == WARNING
    assert "check the network" in str(found.hub)
    monkeypatch.setattr(reach.constants, "HF_HUB_OFFLINE", True)
    assert marks(reach.ask(IMAGENET)) == {"hub": NOTE, "token": NOTE}


# ---- the program -----------------------------------------------------------------------------------------------------


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements take a moment."""
    monkeypatch.setattr(speed, "DECODE_SECONDS", 0.05)
    monkeypatch.setattr(speed, "STEP_SECONDS", 0.05)


@pytest.mark.usefixtures("brief")
def test_the_report_is_a_success_without_network_token_gpu_libraries_and_compiler(
    tmp_path: Path, hub_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(machine, "package_version", lambda name: None)
    monkeypatch.setattr(doctor.jpeg, "can_decode_regions", lambda: False)
    done = run("--doctor", "--num_workers", 0, "--dataset", "imagenet1k", "--image_size", 32, "--model", "resnet18")
    assert (done.status, done.err) == (0, "")
    found = {line[8:19].strip(): line[:8].strip() for line in done.out.splitlines()}
    wanted = {"hub": WARNING, "token": NOTE, "jpeg": WARNING, "compiler": NOTE, "package": NOTE}
    assert {topic: found.get(topic) for topic in wanted} == wanted
    assert {"versions", "platform", "cores", "threads", "memory", "open files", "steps", "decoding"} <= found.keys()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("brief", "token")
def test_with_processes_and_a_hub_the_token_is_used_and_not_printed(small_hub: Path, hub_port: int) -> None:
    with Hub(small_hub, token=TOKEN, gated=True, port=hub_port):
        done = run("--doctor", "--num_workers", 2, "--dataset", "imagenet1k", "--image_size", 32, "--device", "cuda")
    assert done.status == 0
    assert TOKEN not in done.out + done.err
    assert f"{IMAGENET} may be read" in done.out
    assert "images/s: generated photographs of 500x375 decoded and cropped to 32, 2 processes" in done.out


@pytest.mark.usefixtures("brief")
def test_a_step_that_fails_costs_its_line_only(monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings("--num_workers", "0", "--model", "torchvision:no_such")
    found = speed.measure(config, doctor.torch.device("cpu"))
    assert (found.decoded is not None, found.trained, found.snapshot) == (True, None, None)
    assert "no_such" in str(found.problem)


@pytest.mark.usefixtures("brief")
def test_a_decoding_process_that_dies_costs_its_line_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying:
        memory = SharedMemory()

        def run(self, packed: bytes, jobs: list[Job], out: object) -> None:
            if jobs[0].seed[0]:  # all but the first, which waits for the others
                raise WorkerDied

    monkeypatch.setattr(speed, "shared_pool", lambda processes: Dying())
    config = settings("--num_workers", "3", "--model", "resnet18", "--image_size", "32")
    found = speed.measure(config, doctor.torch.device("cpu"))
    assert (found.decoded, found.trained is not None) == (None, True)
    assert "--num_workers" in str(found.problem)


def test_a_program_that_hangs_or_is_missing_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PATIENCE", 0.1)
    assert machine.told_by("sleep", "9") == ""
    assert machine.told_by("no-such-program") == ""
    assert machine.told_by("echo", "one") == "one"


def test_other_ranks_and_the_finder_do_not_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run("--doctor").out == ""
    monkeypatch.delenv("RANK")
    import run_lr_finder

    done = run("--doctor", entry=run_lr_finder.main)
    assert (done.status, "main.py" in done.err) == (2, True)


def test_photographs_are_as_large_as_those_of_imagenet() -> None:
    sizes = [len(speed.draw_photograph(number)) for number in range(4)]
    assert 70_000 < min(sizes) <= max(sizes) < 140_000
    assert speed.draw_photograph(1) == speed.draw_photograph(1)


def test_the_names_of_packages_are_those_of_this_program() -> None:
    declared = (ROOT / "pyproject.toml").read_text()
    assert [name for name in doctor.PACKAGES if name not in declared] == []
