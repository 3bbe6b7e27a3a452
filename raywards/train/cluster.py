"""A job on Ray Train, from the driver's side: worker group, restarts, and the messages of rank 0.

Which restarts make sense is decided here: a lost worker, yes; an error that another attempt would
meet again, no.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from raywards.config import HUGE_PAGES, RewardConfig, worker_range
from raywards.errors import RaywardsError, TrainingError
from raywards.ray_cluster import connect, installed
from raywards.train.job import Job
from raywards.train.loop import train
from raywards.train.runlog import RunLog
from raywards.train.session import RaySession, Word
from raywards.train.storage import Storage

logger = logging.getLogger(__name__)

_START_TIMEOUT, _START_TIMEOUT_S = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15"


@contextlib.contextmanager
def ray_for_tasks(config: RewardConfig) -> Iterator[Callable[[], Any] | None]:
    """`connect`, where rows are to be encoded as Ray tasks; else None.

    Without workers, a Ray that was started for it alone is stopped again.
    """
    if config.dataset_num_proc == 1 or not (config.num_workers or config.dataset_num_proc):
        yield None
        return
    started = []

    def connect_and_tell() -> Any:
        started.append(not installed().is_initialized())
        return connect()

    try:
        yield connect_and_tell
    finally:
        if any(started) and config.num_workers == 0:
            installed().shutdown()


def run_on_ray(
    job: Job, log: RunLog, storage: Storage, *, explicit: Path | None, use_gpu: bool
) -> None:
    """Train `job` on a Ray Train worker group; `explicit` is a checkpoint to start from.

    Raises the worker's own error where starting again cannot mend it, what a callback raised, and
    `TrainingError` where the restarts are used up.
    """
    config, paths = job.config, job.paths
    fewest, most = worker_range(config)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray = connect()
    mailbox = _start_mailbox(ray)
    resources = dict(config.resources_per_worker or {})  # type: ignore[arg-type]
    cpus = int(resources.setdefault("CPU", 1))
    trainer = TorchTrainer(
        _run_worker,
        train_loop_config={
            "job": job, "storage": storage, "mailbox": mailbox, "explicit": explicit,
            "threads": max(1, cpus),
        },
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=config.ddp_timeout
        ),
        scaling_config=ScalingConfig(
            num_workers=fewest if fewest == most else (fewest, most),
            use_gpu=use_gpu,
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=config.elastic_resize_monitor_interval_s,
        ),
        run_config=RunConfig(
            name=paths.name,
            storage_path=config.storage_path or str(paths.storage),
            failure_config=FailureConfig(max_failures=config.max_failures),
            worker_runtime_env={"env_vars": _environment(cpus, use_gpu)},
        ),
    )  # fmt: skip
    _tell_if_it_must_wait(ray, log, fewest, resources, use_gpu)
    reader = _Reader(ray, mailbox, log)
    try:
        with _prompt_restarts(ray, elastic=fewest < most):
            trainer.fit()
    except Exception as error:
        reader.close()
        if reader.error is None:
            raise TrainingError(
                f"The run failed, after up to {config.max_failures} restarts: {_reason(error)}\n"
                f"Checkpoints so far are in {storage.where()}; started again, it goes on there."
            ) from error
    finally:
        reader.close()
        ray.kill(mailbox)
    if reader.error is not None:
        raise reader.error


@contextlib.contextmanager
def _prompt_restarts(ray: Any, *, elastic: bool) -> Iterator[None]:
    """Inside, workers that do not start are given up sooner, unless the environment says when.

    After a node is lost, Ray counts on it until the cluster has noticed (10 to 30 s), and waits for
    workers there as long as it waits for any: a minute, which leaves time to install packages. So
    it is shortened only where none are installed, and only where fewer workers would do.
    """
    environment = ray.get_runtime_context().runtime_env
    installs = any(environment.get(name) for name in ("pip", "uv", "conda", "image_uri"))
    if not elastic or installs or _START_TIMEOUT in os.environ:
        yield
        return
    os.environ[_START_TIMEOUT] = _START_TIMEOUT_S
    try:
        yield
    finally:
        del os.environ[_START_TIMEOUT]


def _environment(cpus: int, use_gpu: bool) -> dict[str, str]:
    """Environment of a worker. Without a GPU of its own it must not see any: DeepSpeed would take
    the first, and Ray no longer hides GPUs from actors that asked for none."""
    environment = {
        "OMP_NUM_THREADS": str(max(1, cpus)),
        HUGE_PAGES: os.environ.get(HUGE_PAGES, "1"),
    }
    if not use_gpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return environment


def _tell_if_it_must_wait(
    ray: Any, log: RunLog, num_workers: int, resources: dict[str, Any], use_gpu: bool
) -> None:
    """Ray waits for resources without limit; where it will have to, say for what."""
    needed = {**({"GPU": 1} if use_gpu else {}), **resources}
    there = ray.cluster_resources()
    short = [
        f"{num_workers * amount:g} {name} asked for, {there.get(name, 0):g} there"
        for name, amount in needed.items()
        if num_workers * amount > there.get(name, 0)
    ]
    if short:
        text = f"Waiting for the cluster to grow: {'; '.join(short)}. Ctrl-C gives up."
        log.take("note", {"text": text})


class _Mailbox:
    """An actor between rank 0 and the driver: keeps messages in order until they are fetched."""

    def __init__(self) -> None:
        self._messages: list[tuple[str, dict[str, Any]]] = []
        self._dropped = 0
        self._failed = self._stop = False

    def put(self, kind: str, record: dict[str, Any]) -> None:
        self._failed = self._failed or kind == "error"
        self._messages.append((kind, record))

    def take(self, seen: int) -> list[tuple[str, dict[str, Any]]]:
        """All messages but the first `seen`, which have arrived and are dropped."""
        del self._messages[: seen - self._dropped]
        self._dropped = seen
        return self._messages

    def failed(self) -> bool:
        """Whether a worker or the driver has met an error that starting again cannot mend."""
        return self._failed

    def stop(self, *, failed: bool) -> None:
        """The driver's wish: the run ends here, or with an error of the driver's own."""
        self._stop, self._failed = True, self._failed or failed

    def word(self) -> int:
        """What rank 0 asks for after each step."""
        return Word.GIVE_UP if self._failed else Word.STOP if self._stop else Word.GO


class _Reader:
    """A thread that moves messages from the mailbox into the log while `fit()` blocks."""

    def __init__(self, ray: Any, mailbox: Any, log: RunLog) -> None:
        self.error: Exception | None = None
        self._ray, self._mailbox, self._log = ray, mailbox, log
        self._told_to_stop = False
        self._seen = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._read, name="raywards-log", daemon=True)
        self._thread.start()

    def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            self._thread.join()

    def _read(self) -> None:
        while not self._closed.wait(0.25):
            self._fetch()
        for _ in range(3):  # here too: trackers keep their run by thread
            if self._fetch():
                break

    def _fetch(self) -> bool:
        """Take over what has come since the last time; False where the mailbox did not answer."""
        try:
            messages = self._ray.get(self._mailbox.take.remote(self._seen), timeout=30)
        except self._ray.exceptions.RayError as error:
            # Later, or never: the workers and checkpoints do not need us.
            logger.warning("the run's log could not be read: %s", error)
            return False
        self._seen += len(messages)
        for kind, record in messages:
            if kind == "error":
                self.error = self.error or record["error"]
                continue
            try:
                self._log.keep(kind, record)
            except OSError as error:  # a full disk must not end the thread, nor the run
                logger.warning("a %s record could not be kept: %s", kind, error)
            self._tell_callbacks(kind, record)
        return True

    def _tell_callbacks(self, kind: str, record: dict[str, Any]) -> None:
        """A callback that raises ends the run, as it does where there are no workers."""
        if self.error is not None:
            return
        try:
            self._log.tell(kind, record)
        except Exception as error:
            self.error = error
        if not self._told_to_stop and (self.error is not None or self._log.callbacks.stopping):
            self._told_to_stop = True
            self._mailbox.stop.remote(failed=self.error is not None)


def _run_worker(config: dict[str, Any]) -> None:
    """What Ray Train calls on every worker."""
    import ray

    mailbox, job = config["mailbox"], config["job"]
    if ray.get(mailbox.failed.remote()):
        return  # the last attempt met an error that another cannot mend
    torch.set_num_threads(config["threads"])
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    transformers.utils.logging.set_verbosity_error()

    def send(kind: str, record: dict[str, Any]) -> None:
        sent = mailbox.put.remote(kind, record)
        if kind == "finish":
            ray.get(sent)  # the run counts on this one: wait until it is there

    def ask() -> Word:
        try:
            return Word(ray.get(mailbox.word.remote()))
        except ray.exceptions.RayError:
            return Word.GO  # without the mailbox the log is lost, and nobody can ask

    try:
        storage = config["storage"].on_worker()
        session = RaySession(
            send,
            ask=ask,
            storage=storage,
            explicit=config["explicit"],
            keep=job.config.save_total_limit,
        )
        for name in job.in_run_folder():
            storage.pull(name)
        train(job.seen_from(storage.local), session)
        storage.leave()
    except RaywardsError as error:
        ray.get(mailbox.put.remote("error", {"error": error}))
        raise
    except (AttributeError, ImportError, LookupError, TypeError, ValueError) as error:
        # A setting or a model that does not fit: another attempt would end the same way. What a
        # lost peer, a full disk or a network does is none of these.
        where = traceback.format_exc(limit=-3)
        told = TrainingError(f"A worker failed: {type(error).__name__}: {error}\n{where}")
        ray.get(mailbox.put.remote("error", {"error": told}))
        raise


def _start_mailbox(ray: Any) -> Any:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's node: where it dies, the run dies with its driver anyway.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(_Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()


def _reason(error: Exception) -> str:
    """The last line of what the workers failed with."""
    failures = getattr(error, "worker_failures", None)
    causes = list(failures.values()) if failures else [error]
    return (
        str(causes[0]).strip().splitlines()[-1][:500] if str(causes[0]).strip() else repr(causes[0])
    )
