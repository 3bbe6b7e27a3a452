"""The README is true: its commands run, its file map is whole, its links lead somewhere.

`RUN_BY` says for each command what runs it. A command that is not in the table fails a test, and so
does an entry of the table that is not in the README any more.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import httpx
import psutil
import pytest
from ports import free_port
from preferences_data import conversation_rows
from tiny import tiny_qwen2

from raywards import RewardClient, Scorer
from raywards.checkpoint import read_manifest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
JOBS = "tests/integration/test_jobs.py"
BIN = Path(sys.prefix) / "bin"

TALK = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]


class Elsewhere(NamedTuple):
    """A test in another file runs this command, with other paths."""

    file: str
    test: str


class NotRun(NamedTuple):
    """No test runs this."""

    reason: str


# A block of Python is named by its first line.
RUN_BY: dict[str, str | Elsewhere | NotRun] = {
    "make demo": "test_make_demo_does_what_it_promises_and_leaves_no_process",
    "pip install 'raywards[train]'": NotRun("needs a package registry"),
    "pip install 'raywards[serve]'": NotRun("needs a package registry"),
    "pip install 'raywards[score]'": NotRun("needs a package registry"),
    "pip install raywards": NotRun("needs a package registry"),
    "from datasets import load_dataset": "test_the_training_script_runs_on_one_cpu",
    "raywards train --config jobs/configs/tiny_cpu.yaml --model_name_or_path ./model "
    "--dataset_name pairs.jsonl --output_dir reward-output": (
        "test_the_training_command_leaves_an_export"
    ),
    "ray up cluster.yaml": NotRun(
        "needs a cloud; tests/test_cluster_yaml.py checks the file with Ray's own code"
    ),
    "ray job submit --working-dir . -- python jobs/train.py --config jobs/configs/tiny_cpu.yaml "
    "--model_name_or_path /shared/model --dataset_name /shared/pairs.jsonl "
    "--output_dir /shared/reward-output": Elsewhere(
        JOBS, "test_a_submitted_job_trains_and_leaves_a_complete_export"
    ),
    "from raywards import Scorer": "test_the_scorer_block_scores",
    "raywards score --model reward-output/export --input conversations.jsonl "
    "--output scored.jsonl": "test_the_scoring_command_gives_the_rewards_of_the_scorer",
    "from transformers import AutoModelForSequenceClassification, AutoTokenizer": (
        "test_plain_transformers_give_the_reward_of_the_scorer"
    ),
    "raywards serve --model reward-output/export --port 8000 --max_replicas 2": (
        "test_the_served_model_answers_curl_and_client_as_the_scorer_does"
    ),
    "serve run raywards.serve:build model=/shared/reward-output/export": (
        "test_serve_run_serves_the_export"
    ),
    "ray job submit --working-dir . --no-wait -- python jobs/serve.py "
    "--model /shared/reward-output/export --host 0.0.0.0": Elsewhere(
        JOBS, "test_a_submitted_job_serves_until_it_is_stopped"
    ),
    "curl -s localhost:8000/v1/reward -H 'content-type: application/json' -d '"
    + json.dumps({"messages": TALK})
    + "'": "test_the_served_model_answers_curl_and_client_as_the_scorer_does",
    "from raywards import RewardClient": (
        "test_the_served_model_answers_curl_and_client_as_the_scorer_does"
    ),
}

# ---------------------------------------------------------------- what the README holds

PROGRAMS = ("make", "pip install", "raywards", "ray", "serve", "curl", "git clone", "python")
IS_COMMAND = re.compile(rf"(?:{'|'.join(PROGRAMS)}) +[\w'./-]")


def python_blocks(page: str) -> dict[str, str]:
    found = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return {block.splitlines()[0]: block for block in found}


def commands(page: str) -> list[str]:
    """Every command line: in `bash` blocks, in indented blocks, and in running text."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        found += [line for line in block.splitlines() if line.strip()]
    text = re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^    +(\S.*)$", text, re.MULTILINE)
    # An explanation may stand two spaces and more behind the command.
    found += [re.split(r" {2,}", line)[0] for line in indented if IS_COMMAND.match(line)]
    prose = re.sub(r"^    +\S.*$", "", text, flags=re.MULTILINE)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    return found + [span for span in spans if IS_COMMAND.match(span)]


def test_every_command_is_run_by_a_test_or_says_why_not() -> None:
    blocks = python_blocks(README)
    assert len(blocks) == README.count("```python\n")
    held = {*commands(README), *blocks}
    assert not (unknown := held - RUN_BY.keys()), f"enter in RUN_BY: {unknown}"
    assert not (gone := RUN_BY.keys() - held), f"no longer in the README: {gone}"


def test_what_the_table_names_exists() -> None:
    for command, entry in RUN_BY.items():
        if isinstance(entry, Elsewhere):
            assert f"def {entry.test}(" in (ROOT / entry.file).read_text(), command
        elif isinstance(entry, str):
            assert entry in globals(), command


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("```bash\nraywards train --x 1\n```\n", ["raywards train --x 1"]),
        ("    make demo\n    pip install raywards     the client\n",
         ["make demo", "pip install raywards"]),
        ("Type `ray up\ncluster.yaml`, or `make`; see `raywards/cli.py`, `raywards[train]`.\n",
         ["ray up cluster.yaml"]),
        ("    raywards/\n      cli.py    raywards train\n    serve/   batcher.py\n", []),
        ("```text\nmake nothing\n```\n", []),
    ],
)  # fmt: skip
def test_commands_are_found(page: str, expected: list[str]) -> None:
    assert commands(page) == expected


def test_the_file_map_lists_every_module_and_no_other() -> None:
    tree = README.partition("## Where things are")[2].partition("    jobs/")[0]
    listed = re.findall(r"\b(\w+\.py)\b", tree)
    modules = [
        path
        for path in (ROOT / "raywards").rglob("*.py")
        if "dialects" not in path.parts
        and (path.name != "__init__.py" or path.parent.name == "raywards")
    ]
    assert len(modules) > 25
    assert sorted(listed) == sorted(path.name for path in modules)
    assert "dialects/" in tree
    folders = re.findall(r"^    (\w+)/ ", README.partition("## Where things are")[2], re.MULTILINE)
    assert {"jobs", "bench", "docs", "tests"} <= set(folders)
    assert all((ROOT / folder).is_dir() for folder in folders)


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"
    for path in re.findall(r"`((?:raywards|tests|docs|jobs|bench)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / path).exists(), f"{page.name}: {path}"


def test_the_tables_of_speed_are_made_from_the_results() -> None:
    report = subprocess.run(
        [sys.executable, "bench/report.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for page in ("README.md", "docs/data.md", "docs/operations.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        tables = text.partition("<!-- made by bench/report.py -->\n")[2].partition("<!-- end of")[0]
        assert tables.count("|") > 30
        assert tables.strip() in report.stdout, "run: python bench/report.py --write"


def test_there_are_links_to_follow() -> None:
    assert README.count("](") > 5


# ---------------------------------------------------------------- running it


def command(beginning: str) -> str:
    """The one command of the README that begins so."""
    [found] = [line for line in commands(README) if line.startswith(beginning)]
    return found


def evaluated(block: str) -> list[Any]:
    """Run a block of Python here; the values of the expressions that stand as statements in it."""

    class Keep(ast.NodeTransformer):
        def visit_Expr(self, node: ast.Expr) -> ast.Expr:
            keep = ast.Call(ast.Name("_keep", ast.Load()), [node.value], [])
            return ast.Expr(keep)

    values: list[Any] = []
    tree = ast.fix_missing_locations(Keep().visit(ast.parse(block)))
    exec(compile(tree, "README.md", "exec"), {"_keep": values.append})
    return values


def shell(line: str, folder: Path, timeout_s: float = 240) -> str:
    """Run a command line as the README has it, in `folder`; what it printed."""
    run = subprocess.run(
        line, shell=True, cwd=folder, text=True, timeout=timeout_s,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    return run.stdout


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the README's commands expect: `jobs/`, `./model` and `pairs.jsonl`."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "jobs").symlink_to(ROOT / "jobs")
    tiny_qwen2(folder / "model", num_labels=None)
    rows = conversation_rows(40)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines: list[dict[str, Any]] = [
        {"messages": TALK, "note": "kept"},
        {"prompt": "Is 91 prime?", "response": "No: 7 x 13."},
        {"text": "plain text"},
    ]
    (folder / "conversations.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return folder


@pytest.fixture(scope="module")
def trained(desk: Path) -> str:
    """What the README's script printed; the export is in `desk/reward-output/export` then."""
    block = python_blocks(README)["from datasets import load_dataset"]
    for theirs, ours in (
        ('"Qwen/Qwen2.5-0.5B-Instruct"', '"./model"'),
        ("num_workers=8, use_gpu=True", "num_workers=0, use_cpu=True, bf16=False"),
    ):
        assert block.count(theirs) == 1
        block = block.replace(theirs, ours)
    calls = []

    def load_dataset(*names: str, **options: str) -> datasets.Dataset:
        calls.append((names, options))
        return datasets.Dataset.from_list(conversation_rows(40))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        patch.setattr(datasets, "load_dataset", load_dataset)
        evaluated(block)
    return str(calls)


@pytest.fixture(scope="module")
def export(desk: Path, trained: str) -> Path:
    return desk / "reward-output" / "export"


@pytest.fixture(scope="module")
def scorer(export: Path) -> Scorer:
    return Scorer.from_pretrained(export)


@pytest.mark.trains
def test_the_training_script_runs_on_one_cpu(trained: str, export: Path) -> None:
    assert trained == "[(('trl-lib/ultrafeedback_binarized',), {'split': 'train'})]"
    assert read_manifest(export, kind="export")["training"]["step"] > 1


@pytest.mark.trains
def test_the_scorer_block_scores(
    export: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(export.parents[1])
    one, several = evaluated(python_blocks(README)["from raywards import Scorer"])
    assert one == scorer.score([TALK])
    assert len(several) == 2
    assert several[0] != several[1]


@pytest.mark.trains
def test_plain_transformers_give_the_reward_of_the_scorer(
    export: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(export.parents[1])
    first = "from transformers import AutoModelForSequenceClassification, AutoTokenizer"
    [value] = evaluated(python_blocks(README)[first])
    assert value == pytest.approx(scorer.score([TALK])[0], abs=scorer.info["bound"])


@pytest.mark.trains
def test_the_scoring_command_gives_the_rewards_of_the_scorer(
    desk: Path, export: Path, scorer: Scorer
) -> None:
    assert "3 rows scored, 0 without a reward" in shell(command("raywards score"), desk)
    rows = [json.loads(line) for line in (desk / "scored.jsonl").read_text().splitlines()]
    expected = [
        *scorer.score([TALK]),
        *scorer.score_responses("Is 91 prime?", ["No: 7 x 13."]),
        *scorer.score(["plain text"]),
    ]
    assert [row["reward"] for row in rows] == pytest.approx(expected, abs=scorer.info["bound"])
    assert rows[0]["note"] == "kept"


@pytest.mark.ray
def test_the_training_command_leaves_an_export(desk: Path, tmp_path: Path) -> None:
    for name in ("jobs", "model", "pairs.jsonl"):
        (tmp_path / name).symlink_to(desk / name)
    screen = shell(command("raywards train"), tmp_path)
    assert "40 pairs, 2 workers on CPU" in screen
    folder = tmp_path / "reward-output"
    assert read_manifest(folder / "export", kind="export")["training"]["step"] == 40
    named = ("metrics.jsonl", "tensorboard", "run.json", "prepared", "export")
    assert all(f"`{name}" in README for name in named)
    assert all((folder / name).exists() for name in named)
    assert list(folder.glob("checkpoint-*"))


@contextmanager
def running(line: str, folder: Path, port: int) -> Iterator[None]:
    """A command of the README as a child process, once what it serves at `port` is ready."""
    log = folder / "serve.log"
    with log.open("wb") as output:
        child = subprocess.Popen(
            shlex.split(line), cwd=folder, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 120
        while not answers(port):
            assert child.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.25)
        yield
    finally:
        below = psutil.Process(child.pid).children(recursive=True)
        child.send_signal(signal.SIGINT)
        try:
            child.wait(60)
        finally:
            _, alive = psutil.wait_procs(below, timeout=20)
            for process in (*alive, child):
                process.kill()
    assert len(below) > 3
    assert not alive, f"{line!r} left {[process.name() for process in alive]}"


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def at_port(text: str, port: int) -> str:
    """8000 may be taken on this machine."""
    assert text.count("8000") == 1
    return text.replace("8000", str(port))


@pytest.mark.ray
def test_the_served_model_answers_curl_and_client_as_the_scorer_does(
    desk: Path, export: Path, scorer: Scorer
) -> None:
    port = free_port()
    [expected] = scorer.score([TALK])
    with running(at_port(command("raywards serve"), port), desk, port):
        line = at_port(command("curl"), port)
        if shutil.which("curl"):
            reply = json.loads(shell(line, desk, timeout_s=60))
        else:
            _, _, url, _, header, _, body = shlex.split(line)
            kind = dict([header.split(": ")])
            reply = httpx.post(f"http://{url}", content=body, headers=kind).json()
        [[value]] = evaluated(
            at_port(python_blocks(README)["from raywards import RewardClient"], port)
        )
    bound = scorer.info["bound"]
    assert reply["data"][0]["reward"] == pytest.approx(expected, abs=bound)
    assert value == pytest.approx(expected, abs=bound)


@pytest.mark.ray
@pytest.mark.slow
def test_serve_run_serves_the_export(
    desk: Path, export: Path, scorer: Scorer, tmp_path: Path
) -> None:
    line = command("serve run").replace("/shared/reward-output/export", str(export))
    port = free_port()
    # Serve's own command has no flag for the port.
    start = tmp_path / "start.py"
    start.write_text(
        f"from ray import serve\nserve.start(http_options={{'port': {port}}})\n"
        "from ray.serve.scripts import cli\ncli()\n"
    )
    line = line.replace("serve run", f"{sys.executable} {start} run")
    with running(line, desk, port), RewardClient(f"http://127.0.0.1:{port}") as client:
        [value] = client.score([TALK])
    assert value == pytest.approx(scorer.score([TALK])[0], abs=scorer.info["bound"])


@pytest.mark.ray
@pytest.mark.slow
def test_make_demo_does_what_it_promises_and_leaves_no_process(tmp_path: Path) -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\ndemo:")[2].splitlines()[1].strip()
    assert recipe == "python jobs/quickstart.py"
    mark = f"RAYWARDS_DEMO_{uuid.uuid4().hex}"
    run = subprocess.run(
        [sys.executable, str(ROOT / "jobs/quickstart.py")], cwd=tmp_path, text=True, timeout=400,
        env={**os.environ, mark: "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    accuracy = re.search(r"^Held-out accuracy over HTTP: ([\d.]+) \(100 pairs\)$", run.stdout, re.M)
    assert accuracy is not None, run.stdout
    assert float(accuracy[1]) >= 0.95
    off = re.search(r"plain transformers: (\S+) \(bound (\S+)\)", run.stdout)
    assert off is not None
    assert float(off[1]) <= float(off[2])
    # What the README shows of it, up to the figures.
    shown = [line for line in README.splitlines() if line.startswith(("Held-out", "Largest"))]
    assert len(shown) == 2
    for line in shown:
        assert line.partition(":")[0] in run.stdout
    assert (tmp_path / "demo-output" / "run" / "export" / "config.json").is_file()

    deadline = time.monotonic() + 20
    while left := with_environment(mark):
        assert time.monotonic() < deadline, f"the demonstration left {left}"
        time.sleep(0.5)


def with_environment(name: str) -> list[str]:
    """The processes that have an environment variable of this name."""
    found = []
    for process in psutil.process_iter():
        try:
            if name in process.environ() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.name()} ({process.pid})")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_a_process_is_found_by_its_environment() -> None:
    mark = f"RAYWARDS_MARK_{uuid.uuid4().hex}"
    child = subprocess.Popen(["sleep", "30"], env={**os.environ, mark: "1"})
    try:
        deadline = time.monotonic() + 10
        while not with_environment(mark):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        child.kill()
        child.wait()
    assert with_environment(mark) == []
