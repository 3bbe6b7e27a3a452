"""A run folder in object storage: the run is the one on a disk, and nothing is lost on the way."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from s3_server import ObjectStore, object_store
from test_train_here import ROWS, losses, settings, weights
from tiny import tiny_qwen2

from raywards import RewardConfig, RewardTrainer, Scorer
from raywards.checkpoint import write_manifest
from raywards.errors import CheckpointError, ConfigError
from raywards.train import object_storage
from raywards.train.object_storage import ObjectStorage
from raywards.train.storage import SharedFolder, Storage, checkpoint_of, newest_checkpoint, retain

pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model"), num_labels=None)


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    with pytest.MonkeyPatch.context() as patched, object_store(patched) as server:
        yield server


@pytest.fixture
def store(
    server: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[ObjectStore]:
    """The server, empty, and workers' copies below `tmp_path`."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node"))
    (tmp_path / "node").mkdir()
    yield server
    for name in server.files():
        server.delete(name)


@pytest.fixture
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds are seen through sooner."""
    monkeypatch.setattr(object_storage, "_BEAT_S", 0.3)


def trainer(
    model: Path, output: Path, store: ObjectStore | None = None, **changes: Any
) -> RewardTrainer:
    """Twelve steps, a checkpoint after every fourth; the run is called "rm"."""
    where = {} if store is None else {"storage_path": store.address, "run_name": "rm"}
    options = {"save_strategy": "steps", "save_steps": 4, **where, **changes}
    held_out = options.pop("eval_dataset", None)
    return RewardTrainer(
        str(model),
        RewardConfig(**settings(output, **options)),
        train_dataset=datasets.Dataset.from_list(ROWS),
        eval_dataset=held_out,
    )


def run(*args: Any, **changes: Any) -> RewardTrainer:
    one = trainer(*args, **changes)
    one.train()
    return one


# ---------------------------------------------------------------- the verbs


@pytest.fixture(params=["folder", "objects"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, store: ObjectStore) -> Storage:
    if request.param == "folder":
        return SharedFolder(tmp_path / "run")
    return ObjectStorage(store.address, "rm", tmp_path / "run")


def part(folder: Path, step: int, **files: str) -> Path:
    (folder / "engine").mkdir(parents=True)
    for name, text in files.items():
        (folder / "engine" / name).write_text(text)
    sizes = {f"engine/{name}": len(text) for name, text in files.items()}
    write_manifest(folder, {"kind": "checkpoint", "step": step}, sizes)
    return folder


def checkpoint(storage: Storage, folder: Path, step: int) -> str:
    name = f"checkpoint-{step:06d}-{step:08x}"
    own = part(folder / name, step, weights="w" * step)
    storage.put_part(own, name)
    storage.complete(own, name)
    return name


def test_a_text_is_read_as_it_was_written(storage: Storage) -> None:
    assert storage.read("run.json") is None
    storage.write("run.json", '{"a": "ä"}\n')
    storage.write("run.json", '{"b": "ß"}\n')
    assert storage.read("run.json") == '{"b": "ß"}\n'.encode()


def test_checkpoints_are_listed_opened_kept_and_removed(storage: Storage, tmp_path: Path) -> None:
    assert storage.checkpoints() == []
    assert newest_checkpoint(storage) is None
    names = {step: checkpoint(storage, tmp_path / "parts", step) for step in (3, 1, 2, 5, 4)}
    assert storage.checkpoints() == [(step, names[step]) for step in (1, 2, 3, 4, 5)]
    assert newest_checkpoint(storage) == names[5]
    assert checkpoint_of(storage, 2) == names[2]
    assert checkpoint_of(storage, 7) is None
    storage.pull(names[4])
    assert (storage.local / names[4] / "engine" / "weights").read_text() == "wwww"
    retain(storage, 2, best_step=2)
    assert storage.checkpoints() == [(2, names[2]), (5, names[5])]


def test_a_checkpoint_is_there_with_its_last_file(storage: Storage, tmp_path: Path) -> None:
    name = "checkpoint-000003-0000abcd"
    first = part(tmp_path / "0", 3, weights="ww", moments="m")
    second = tmp_path / "1"
    (second / "engine").mkdir(parents=True)
    (first / "engine" / "moments").rename(second / "engine" / "moments")
    storage.put_part(first, name)
    done = threading.Thread(target=storage.complete, args=(first, name))
    done.start()
    time.sleep(0.5)
    assert done.is_alive()
    assert storage.checkpoints() == []
    storage.put_part(second, name)
    done.join(timeout=30)
    assert storage.checkpoints() == [(3, name)]


def test_what_was_cut_off_or_lost_a_file_is_no_checkpoint(
    storage: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = checkpoint(storage, tmp_path / "parts", 1)
    cut_off = "checkpoint-000002-00000002"
    storage.put_part(part(tmp_path / "parts" / cut_off, 2, weights="ww"), cut_off)
    storage.put_part(part(tmp_path / "parts" / "by-hand", 9, weights="w"), "checkpoint-best")
    lost = checkpoint(storage, tmp_path / "parts", 3)
    if isinstance(storage, SharedFolder):
        (storage.local / lost / "engine" / "weights").unlink()
    else:
        storage.delete(f"{lost}/engine/weights")
    assert storage.checkpoints() == [(1, whole)]
    assert "engine/weights is missing" in caplog.text
    storage.remove_cut_off()
    for name in (cut_off, "checkpoint-best"):
        storage.pull(name)
    assert not (storage.local / cut_off).exists()
    assert (storage.local / "checkpoint-best" / "engine" / "weights").exists()


def test_a_checkpoint_of_a_newer_version_is_not_passed_over(
    storage: Storage, tmp_path: Path
) -> None:
    name = checkpoint(storage, tmp_path / "parts", 1)
    manifest = json.loads(storage.read(f"{name}/raywards.json") or b"")
    storage.write(f"{name}/raywards.json", json.dumps({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match="Update raywards"):
        storage.checkpoints()


# ---------------------------------------------------------------- objects alone


def test_a_copy_is_brought_once_and_again_where_asked(tmp_path: Path, store: ObjectStore) -> None:
    driver = ObjectStorage(store.address, "rm", tmp_path / "driver")
    (driver.local / "export").mkdir(parents=True)
    (driver.local / "export" / "a").write_text("first")
    (driver.local / "export" / "old").write_text("old")
    write_manifest(driver.local / "export", {"kind": "export"}, {"a": 5, "old": 3})
    driver.push("export")
    other = ObjectStorage(store.address, "rm", tmp_path / "other")
    other.pull("export")
    (driver.local / "export" / "old").unlink()
    (driver.local / "export" / "a").write_text("later")
    write_manifest(driver.local / "export", {"kind": "export"}, {"a": 5})
    driver.push("export")
    assert {name for name in store.files() if "export" in name} == {
        "rm/export/a", "rm/export/raywards.json"
    }  # fmt: skip
    other.pull("export", again=True)
    assert sorted(f.name for f in (other.local / "export").iterdir()) == ["a", "raywards.json"]
    assert (other.local / "export" / "a").read_text() == "later"
    before = (other.local / "export").stat().st_mtime_ns
    other.pull("export")
    assert (other.local / "export").stat().st_mtime_ns == before
    driver.push("nothing-of-that-name")
    other.pull("nothing-of-that-name")
    assert not (other.local / "nothing-of-that-name").exists()


def test_what_is_half_replaced_is_not_complete(
    tmp_path: Path, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = ObjectStorage(store.address, "rm", tmp_path / "driver")
    export = driver.local / "export"
    export.mkdir(parents=True)
    (export / "a").write_text("first")
    write_manifest(export, {"kind": "export"}, {"a": 5})
    driver.push("export")
    assert driver.read("export/raywards.json") is not None

    def fails(*_: Any) -> None:
        raise OSError("no connection")

    monkeypatch.setattr(ObjectStorage, "_upload", fails)
    with pytest.raises(OSError, match="no connection"):
        driver.push("export")
    assert driver.read("export/raywards.json") is None


def test_a_worker_has_a_copy_of_this_start_alone(tmp_path: Path, store: ObjectStore) -> None:
    first = ObjectStorage(store.address, "rm", tmp_path / "driver")
    copies = {pickle.loads(pickle.dumps(first)).on_worker().local for _ in range(2)}
    [copy] = copies
    assert copy != first.local
    (copy / "initial-model").mkdir(parents=True)
    second = ObjectStorage(store.address, "rm", tmp_path / "driver").on_worker()
    assert second.local != copy
    assert not copy.exists()


def test_an_address_is_told_without_its_keys(tmp_path: Path) -> None:
    address = "s3://me:very-secret@bucket/rewards/?region=us-east-1&endpoint_override=x"
    one = ObjectStorage(address, "rm", tmp_path)
    assert one.where("export") == "s3://bucket/rewards/rm/export"


@pytest.mark.parametrize("address", ["weird://bucket/x", "https://bucket/x", "s3://"])
def test_an_address_of_no_storage_is_refused(address: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"storage_path: .*such as s3://bucket/rewards"):
        trainer(model, tmp_path / "out", storage_path=address)


@pytest.mark.parametrize("missing", ["bucket", "server"])
def test_a_storage_that_cannot_be_reached_is_told_of_before_anything_is_done(
    missing: str, store: ObjectStore, model: Path, tmp_path: Path
) -> None:
    wrong = {
        "bucket": store.address.replace("@bucket", "@another"),
        "server": store.address.replace(f":{store.port}", ":1"),
    }[missing]
    one = trainer(model, tmp_path / "out", storage_path=wrong)
    with pytest.raises(ConfigError, match=r"storage_path: s3://\w+/rewards/out cannot be reached"):
        one.train()
    assert not one.paths.run.exists()


def test_a_checkpoint_is_named_by_a_folder(store: ObjectStore, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint='s3://.*copy a checkpoint"):
        trainer(model, tmp_path / "out", store).train(resume_from_checkpoint="s3://bucket/x")


# ---------------------------------------------------------------- one folder, two runs


def test_a_folder_in_use_is_refused(store: ObjectStore, tmp_path: Path, quick_beats: None) -> None:
    first = ObjectStorage(store.address, "rm", tmp_path / "a")
    second = ObjectStorage(store.address, "rm", tmp_path / "b")
    with first.hold():
        with (
            pytest.raises(ConfigError, match=f"another run trains .*process {os.getpid()}"),
            second.hold(),
        ):
            pass
        with ObjectStorage(store.address, "another", tmp_path / "c").hold():
            pass
    assert store.files() == {}
    with second.hold():
        assert [*store.files()] == ["rm/run.lock"]


def test_a_hold_of_a_killed_process_is_seen_through(
    store: ObjectStore, tmp_path: Path, quick_beats: None
) -> None:
    left = ObjectStorage(store.address, "rm", tmp_path / "a")
    for text in (json.dumps({"by": "x", "beats": 7, "holder": "process 1"}), "damaged", ""):
        left.write("run.lock", text)
        with ObjectStorage(store.address, "rm", tmp_path / "b").hold():
            pass
        assert store.files() == {}


def test_a_hold_that_another_took_over_is_left_to_it(
    store: ObjectStore, tmp_path: Path, quick_beats: None, caplog: pytest.LogCaptureFixture
) -> None:
    ours = ObjectStorage(store.address, "rm", tmp_path / "a")
    theirs = json.dumps({"by": "x", "beats": 1, "holder": "process 1 elsewhere"})
    with ours.hold():
        ours.write("run.lock", theirs)
        time.sleep(1)
    assert ours.read("run.lock") == theirs.encode()
    assert "another run trains into this folder now (process 1 elsewhere)" in caplog.text


def test_of_two_that_begin_at_once_one_goes_on(
    store: ObjectStore, tmp_path: Path, quick_beats: None
) -> None:
    held, refused, both = [], [], threading.Barrier(2)

    def begin(name: str) -> None:
        storage = ObjectStorage(store.address, "rm", tmp_path / name)
        both.wait()
        try:
            with storage.hold():
                held.append(name)
                time.sleep(3)
        except ConfigError:
            refused.append(name)

    threads = [threading.Thread(target=begin, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 1)


# ---------------------------------------------------------------- runs


def same(left: Path, right: Path) -> None:
    ours, theirs = weights(left), weights(right)
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_a_run_is_the_one_on_a_disk_and_its_export_is_in_storage(
    store: ObjectStore, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    on_disk = run(model, tmp_path / "disk")
    options = {"save_total_limit": 1, "save_steps": 3}
    one = run(model, tmp_path / "here" / "rm", store, **options)
    assert losses(one) == losses(on_disk)
    same(one.paths.run, on_disk.paths.run)
    files = store.files()
    assert {name.split("/")[1] for name in files if "/checkpoint-" in name} == {
        newest_checkpoint(one.storage)
    }
    assert "rm/run.lock" not in files
    assert "very-secret" not in caplog.text
    assert all(b"very-secret" not in store.read(name) for name in files)
    assert not list(one.paths.run.glob("checkpoint-*"))

    elsewhere = ObjectStorage(store.address, "rm", tmp_path / "elsewhere")
    elsewhere.pull("export")
    same(elsewhere.local, on_disk.paths.run)
    Scorer.from_pretrained(elsewhere.local / "export").verify()
    assert (elsewhere.local / "export" / "README.md").read_text().startswith("---")
    records = [json.loads(line) for line in store.read("rm/metrics.jsonl").splitlines()]
    assert len([r for r in records if "loss" in r]) == 12
    assert any(name.startswith("rm/tensorboard/events") for name in files)


def test_pairs_that_are_gone_from_storage_are_put_there_again(
    store: ObjectStore, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run(model, tmp_path / "rm", store, max_steps=2)
    prepared = {name: size for name, size in store.files().items() if "/prepared/" in name}
    assert len(prepared) == 3
    for name in list(prepared)[:2]:
        store.delete(name)
    run(model, tmp_path / "rm", store, max_steps=2)
    assert "prepared already" in caplog.text
    assert prepared.items() <= store.files().items()


DRIVER = """
    import sys, time
    import datasets
    from raywards import RewardConfig, RewardTrainer
    from raywards.train import loop
    from test_train_here import ROWS, settings

    update = loop.update
    def slowly(*args):
        time.sleep(0.2)
        update(*args)
    loop.update = slowly
    model, output, address = sys.argv[1:]
    config = settings(output, storage_path=address, run_name="rm", save_strategy="steps")
    RewardTrainer(
        model,
        RewardConfig(**config, save_steps=4),
        train_dataset=datasets.Dataset.from_list(ROWS),
    ).train()
"""


def test_a_killed_run_goes_on_from_another_machine(
    store: ObjectStore,
    model: Path,
    tmp_path: Path,
    quick_beats: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, script, model, tmp_path / "first" / "rm", store.address]
    child = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not any(name.endswith("/raywards.json") for name in store.files()):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert "rm/run.lock" in store.files()
    caplog.set_level(logging.INFO)
    again = run(model, tmp_path / "second" / "rm", store)
    assert "prepared already" in caplog.text
    assert f"Going on after step {again.storage.checkpoints()[0][0]} of 12" in caplog.text
    whole = run(model, tmp_path / "disk")
    assert losses(again) == losses(whole)
    same(again.paths.run, whole.paths.run)


def test_the_best_checkpoint_is_brought_back(
    store: ObjectStore, model: Path, tmp_path: Path
) -> None:
    # Held-out pairs the wrong way round: the more is learned, the worse.
    rows = [{"chosen": r["rejected"], "rejected": r["chosen"]} for r in ROWS]
    options: dict[str, Any] = {
        "eval_dataset": datasets.Dataset.from_list(rows),
        "eval_strategy": "steps",
        "eval_steps": 4,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
    }
    one = run(model, tmp_path / "rm", store, **options)
    on_disk = run(model, tmp_path / "disk", **options)
    best = one.state.best_global_step
    assert best is not None
    assert best < 12, "the best is the last: proves nothing"
    assert one.state.best_model_checkpoint.startswith(
        f"s3://bucket/rewards/rm/checkpoint-{best:06}"
    )
    assert [step for step, _ in one.storage.checkpoints()] == [best, 12]
    same(one.paths.run, on_disk.paths.run)


def test_another_run_is_refused_its_folder(store: ObjectStore, model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "rm", store, max_steps=2)
    other = trainer(model, tmp_path / "other", store, max_steps=2, learning_rate=0.5)
    with pytest.raises(CheckpointError, match=r"s3://bucket/rewards/rm: holds .*of another run"):
        other.train()


@pytest.mark.slow  # pyarrow tries again for 25 seconds
def test_a_storage_that_goes_away_ends_the_run_and_spares_its_checkpoints(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_beats: None
) -> None:
    with object_store(monkeypatch) as own:
        one = trainer(model, tmp_path / "rm", own)
        put_part, put = one.storage.put_part, []

        def put_once(folder: Path, name: str) -> None:
            put.append(name)
            if len(put) == 2:
                own.kill()
            put_part(folder, name)

        monkeypatch.setattr(one.storage, "put_part", put_once)
        with pytest.raises(
            OSError, match=rf"{put[1:] or 'checkpoint-000008'}.* could not be written"
        ):
            one.train()
        assert not one.paths.export.exists()
