"""The pages of docs/: generated ones are up to date, and what hand-written ones say is so.

Every row in data.md goes through `encode_row`, every request in http.md to the app that replicas
run, and every field of a manifest that a run wrote stands in checkpoints.md.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args

import datasets
import httpx
import pytest
import yaml
from preferences_data import conversation_rows
from tiny import chatml_tokenizer, tiny_qwen2

from raywards import RewardConfig, RewardTrainer, Scorer, ServeConfig
from raywards.checkpoint import complete_checkpoints, read_manifest
from raywards.config import Objective
from raywards.errors import RowError
from raywards.groups import Rating, encode_group
from raywards.preferences import REASONS, Pair, encode_row
from raywards.rendering import Rendering
from raywards.rowset import RowRef
from raywards.schemas import NOT_BUILT, Message, RewardItem, RewardRequest, RewardResponse
from raywards.schemas import Timing as ReplyTiming
from raywards.schemas import Usage as ReplyUsage
from raywards.serve.app import DEPLOYMENT
from raywards.serve.http import create_app
from raywards.serve.replica import RewardService
from raywards.serve.traffic import taken_over
from raywards.train.runfolder import _MAY_CHANGE

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


class Block(NamedTuple):
    """A fenced block: what stands behind the language on its first line, and its text."""

    label: str
    text: str


def blocks(page: str, language: str) -> list[Block]:
    fences = re.findall(rf"^```{language}\b *(.*?)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [Block(label.strip(), text) for label, text in fences]


def words_in_code(text: str) -> set[str]:
    """Every name that stands in backquotes, alone or as the last part of `data[].reward`."""
    spans = re.findall(r"`([^`\n]+)`", text)
    return {*spans, *(span.rsplit(".", 1)[-1] for span in spans)}


# ---------------------------------------------------------------- generated pages


def generator() -> Any:
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["settings.md", "bad_rows.md", "trl.md"])
def test_a_generated_page_is_what_the_generator_writes_now(name: str) -> None:
    if name == "trl.md":
        pytest.importorskip("trl")
    written = (DOCS / name).read_text(encoding="utf-8")
    assert written == generator().pages()[name], "run: python docs/build.py"


def test_the_reference_has_every_setting_and_every_reason() -> None:
    pages = generator().pages()
    fields = [field for cls in generator().USED_BY for field in generator().field_names(cls)]
    assert len(fields) > 90
    rows = re.findall(r"^\| `(\w+)` \|", pages["settings.md"], re.MULTILINE)
    assert sorted(rows) == sorted([*fields, *generator().REFUSED])
    assert re.findall(r"^\| `(\w+)` \|", pages["bad_rows.md"], re.MULTILINE) == list(REASONS)


def beside_trl() -> Any:
    pytest.importorskip("trl")
    generator()  # puts the folder on the path
    return importlib.import_module("beside_trl")


def test_the_page_about_trl_has_everything_that_trl_has_once() -> None:
    """A setting, argument or method that TRL gets has to be decided on before the page is made."""
    made = beside_trl()
    import trl

    named = re.findall(r"^\| `(\w+)` \|", (DOCS / "trl.md").read_text(), re.MULTILINE)
    settings = [field.name for field in dataclasses.fields(trl.RewardConfig)]
    assert len(settings) > 100
    arguments = list(inspect.signature(trl.RewardTrainer.__init__).parameters)[1:]
    methods = [
        name
        for name in dir(trl.RewardTrainer)
        if not name.startswith("_") and callable(getattr(trl.RewardTrainer, name))
    ]
    assert len(methods) > 40
    assert named == [*settings, *arguments, *methods, *made.METRIC_NOTES]


def test_what_the_page_about_trl_says_is_of_things_that_are_there() -> None:
    """A note about a setting that is refused, or about no setting at all, is left over."""
    made = beside_trl()
    ours = set(generator().field_names(RewardConfig))
    assert made.other_defaults() == set(made.OTHER_DEFAULTS)
    assert set(made.BETTER) <= ours
    assert set(made.ARGUMENT_NOTES) <= set(made.arguments()) - set(made._NOT_SUPPORTED)
    methods = set(made.public_methods(RewardTrainer))
    assert set(made.METHOD_NOTES) <= methods
    assert set(made.REFUSED_METHODS) & methods == set()
    for name, advice in made.REFUSED_METHODS.items():
        with pytest.raises(AttributeError, match=re.escape(advice)):
            getattr(RewardTrainer.__new__(RewardTrainer), name)


# ---------------------------------------------------------------- data.md


DATA = (DOCS / "data.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rendering() -> Rendering:
    return Rendering(chatml_tokenizer())


def encode(row: Any, rendering: Rendering) -> Pair:
    return encode_row(row, RowRef("data.md", 0), rendering, max_length=1024, truncation="drop")


@pytest.mark.parametrize("block", blocks(DATA, "json"), ids=lambda block: block.label or "pair")
def test_every_row_of_the_page_is_what_it_says(block: Block, rendering: Rendering) -> None:
    for line in block.text.splitlines():
        row = json.loads(line)
        if not block.label:
            pair = encode(row, rendering)
            assert pair.chosen_ids != pair.rejected_ids
            continue
        assert block.label in REASONS
        with pytest.raises(RowError) as caught:
            encode(row, rendering)
        assert caught.value.reason == block.label


def test_the_page_shows_every_column_and_a_prompt_changes_nothing(rendering: Rendering) -> None:
    rows = [json.loads(line) for block in blocks(DATA, "json") for line in block.text.splitlines()]
    columns = {
        *("chosen", "rejected", "prompt", "margin", "probability", "tools", "chat_template_kwargs"),
        *("chosen_ids", "rejected_ids"),
    }
    assert {column for row in rows for column in row} == columns
    implicit, explicit = rows[:2]
    assert "prompt" in explicit
    assert encode(implicit, rendering) == encode(explicit, rendering)


# ---------------------------------------------------------------- objectives.md


OBJECTIVES = (DOCS / "objectives.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", blocks(OBJECTIVES, "json"), ids=lambda block: block.label)
def test_every_row_of_an_objective_is_taken_by_it(block: Block, rendering: Rendering) -> None:
    objective, *attributes = block.label.split()
    for line in block.text.splitlines():
        group = encode_group(
            json.loads(line),
            RowRef("objectives.md", 0),
            rendering,
            objective=cast(Any, objective),
            attributes=attributes,
            max_length=1024,
            truncation="drop",
        )
        if isinstance(group, Rating):
            assert len(group.scores) == len(attributes or ["score"])
        else:
            assert len(group.sequences) > 1


def test_every_objective_has_rows_on_one_of_the_pages() -> None:
    shown = {block.label.split()[0] for block in blocks(OBJECTIVES, "json")}
    named = set(get_args(Objective))
    assert shown == named - {"bradley_terry"}
    assert named <= words_in_code(OBJECTIVES)


# ---------------------------------------------------------------- checkpoints.md


CHECKPOINTS = (DOCS / "checkpoints.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RewardTrainer:
    """A finished run of three steps in this process."""
    folder = tmp_path_factory.mktemp("run")
    trainer = RewardTrainer(
        str(tiny_qwen2(folder / "model", num_labels=None)),
        RewardConfig(
            output_dir=str(folder / "reward-output"),
            num_workers=0,
            use_cpu=True,
            bf16=False,
            deepspeed=0,
            max_steps=3,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(conversation_rows(12)),
    )
    trainer.train()
    return trainer


@pytest.mark.trains
def test_every_field_of_the_manifests_is_described(run: RewardTrainer) -> None:
    [checkpoint] = complete_checkpoints(run.paths.run)
    known = words_in_code(CHECKPOINTS)
    manifest = read_manifest(checkpoint, kind="checkpoint")
    assert set(manifest) <= known
    assert any(name.startswith("engine/") for name in manifest["files"])
    assert "random-0.pt" in manifest["files"]
    assert re.fullmatch(r"checkpoint-\d{6}-[0-9a-f]{8}", checkpoint.name)
    export = read_manifest(run.paths.export, kind="export")
    assert set(export) <= known
    assert len(export["rewards"]) == 8
    assert {"fingerprint", "version", "control_tokens", "eos_rule"} <= export["rendering"].keys()


@pytest.mark.trains
def test_the_run_folder_is_as_drawn(run: RewardTrainer) -> None:
    names = {path.name for path in run.paths.run.iterdir()}
    drawn = {"run.json", "run.lock", "prepared", "metrics.jsonl", "tensorboard", "export"}
    assert drawn <= names
    assert all(name in CHECKPOINTS for name in drawn)
    assert {name for name in names - drawn if not name.startswith("checkpoint-")} == set()
    config = json.loads((run.paths.export / "config.json").read_text())
    assert config["problem_type"] == "regression"
    assert config["pad_token_id"] == read_manifest(run.paths.export, kind="export")["pad_token_id"]


@pytest.mark.trains
def test_prepared_json_is_described(run: RewardTrainer) -> None:
    [file] = run.paths.prepared.glob("train-*/prepared.json")
    assert json.loads(file.read_text()).keys() <= words_in_code(DATA)
    [shard] = file.parent.glob("pairs-*.arrow")
    assert set(datasets.Dataset.from_file(str(shard)).column_names) <= words_in_code(DATA)


def test_the_settings_that_may_change_are_listed() -> None:
    listed = re.search(r"order of the pairs:\n(.*?);\n", CHECKPOINTS, re.DOTALL)
    assert listed is not None
    assert set(re.findall(r"`(\w+)`", listed[1])) == _MAY_CHANGE


# ---------------------------------------------------------------- http.md


HTTP = (DOCS / "http.md").read_text(encoding="utf-8")
REQUESTS = [
    block for language in ("json", "text") for block in blocks(HTTP, language)
    if block.label != "reply"
]  # fmt: skip


class Server:
    """The app of a replica around a tiny model, without Serve and without a socket."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self._scorer = Scorer.from_pretrained(folder)
        self._config = ServeConfig(model=str(folder), **settings)

    def send(
        self, method: str, path: str, body: str | None = None, **headers: str
    ) -> httpx.Response:
        async def main() -> httpx.Response:
            service = RewardService(self._scorer, self._config)
            service.start()
            transport = httpx.ASGITransport(create_app(lambda: service))
            async with httpx.AsyncClient(transport=transport, base_url="http://rm") as client:
                kind = {"content-type": "application/json"}
                response = await client.request(
                    method, path, content=body, headers={**kind, **headers}
                )
            await service.close()
            return response

        return asyncio.run(main())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model") / "rm")


@pytest.fixture(scope="module")
def server(folder: Path) -> Server:
    return Server(folder)


def test_the_page_has_requests_that_succeed_and_requests_that_fail() -> None:
    labels = [block.label for block in REQUESTS]
    assert labels.count("200") >= 8
    assert len([label for label in labels if label != "200"]) >= 10


@pytest.mark.parametrize(
    "block", REQUESTS, ids=[f"{n}-{block.label}" for n, block in enumerate(REQUESTS)]
)
def test_every_request_is_answered_as_the_page_says(block: Block, server: Server) -> None:
    status, _, code = block.label.partition(" ")
    response = server.send("POST", "/v1/reward", block.text.strip())
    reply = response.json()
    assert response.status_code == int(status), reply
    if status != "200":
        assert reply["error"]["code"] == code
        assert f"| {status} | `{reply['error']['type']}` |" in HTTP
        return
    body = json.loads(block.text)
    assert len(reply["data"]) == RewardRequest.parse(body).count()
    refused = [row["index"] for row in reply["data"] if row["error"]]
    assert refused == ([1] if body.get("on_error") == "item" else [])
    assert all(row["reward"] is not None or row["error"] for row in reply["data"])


def test_the_page_names_every_field_of_request_message_and_reply() -> None:
    known = words_in_code(HTTP)
    for model in (RewardRequest, Message, RewardItem, RewardResponse, ReplyUsage, ReplyTiming):
        assert set(model.model_fields) <= known, model.__name__
    for name in NOT_BUILT:
        assert name in known


def test_fields_that_are_not_built_are_refused(server: Server) -> None:
    for name in NOT_BUILT:
        body = json.dumps({"input": "Hi!", name: True})
        response = server.send("POST", "/v1/reward", body)
        assert response.status_code == 422
        assert response.json()["error"]["code"] == "unsupported_field"


def test_the_page_has_every_error_code_of_the_server() -> None:
    sources = [*(ROOT / "raywards/serve").rglob("*.py"), ROOT / "raywards/schemas.py"]
    codes = {code for path in sources for code in re.findall(r'code="(\w+)"', path.read_text())}
    assert len(codes) > 10
    assert codes <= words_in_code(HTTP)


def test_the_error_body_of_the_page_is_the_one_that_comes(server: Server) -> None:
    [shown] = [json.loads(block.text) for block in blocks(HTTP, "json") if block.label == "reply"]
    body = json.dumps({"message": [{"role": "user", "content": "Hi!"}]})
    came = server.send("POST", "/v1/reward", body).json()
    assert came["error"].pop("request_id")
    assert shown["error"].pop("request_id")
    assert came == shown


def test_the_other_routes_and_the_key_are_as_the_page_says(folder: Path, server: Server) -> None:
    assert server.send("GET", "/health").json() == {"status": "healthy"}
    assert server.send("GET", "/ready").json() == {"status": "ready"}
    assert {"limits", "batcher", "revision", "rendering", "bound"} <= server.send(
        "GET", "/info"
    ).json().keys()
    assert server.send("GET", "/v1/reward").status_code == 405
    assert server.send("GET", "/nowhere").json()["error"]["code"] == "no_such_route"

    guarded = Server(folder, api_key="s3cret-key")
    body = json.dumps({"input": "Hi!"})
    refused = guarded.send("POST", "/v1/reward", body)
    assert refused.status_code == 401
    assert refused.json()["error"]["code"] == "invalid_api_key"
    accepted = guarded.send("POST", "/v1/reward", body, authorization="Bearer s3cret-key")
    assert accepted.status_code == 200
    key = {"authorization": "Bearer s3cret-key"}
    for path in ("/health", "/ready", "/ping"):
        assert f"`{path}`" in HTTP.partition("## API key")[2].partition("##")[0]
        assert guarded.send("GET", path).status_code == 200
    for path in ("/info", "/stats", "/v1/models", "/version", "/docs", "/openapi.json"):
        assert f"`{path}`" in HTTP.partition("## `GET /health`")[2].partition("\n## ")[0]
        assert guarded.send("GET", path).json()["error"]["code"] == "invalid_api_key"
        assert guarded.send("GET", path, authorization="Bearer wrong").status_code == 401
        assert guarded.send("GET", path, **key).status_code == 200
        assert server.send("GET", path).status_code == 200
    for path in ("/redoc", "/docs/oauth2-redirect"):  # FastAPI's, open by default
        assert guarded.send("GET", path).status_code == 404
    encoded = guarded.send("POST", "/v1/reward", body, **{"content-encoding": "gzip"})
    assert encoded.status_code == 401  # the key comes first


# ---- operations.md


def test_the_config_files_for_serve_are_taken_by_serve_and_by_us() -> None:
    from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

    page = (DOCS / "operations.md").read_text(encoding="utf-8")
    whole, traffic = [yaml.safe_load(block.text) for block in blocks(page, "yaml")]
    shipped = yaml.safe_load((ROOT / "jobs" / "serve.yaml").read_text(encoding="utf-8"))
    for config in (whole, shipped):
        ServeDeploySchema.model_validate(config)
        # Serve refuses no key that it does not know.
        assert set(config) <= set(ServeDeploySchema.model_fields)
        [application] = config["applications"]
        assert set(application) <= set(ServeApplicationSchema.model_fields)
        served = ServeConfig(**application["args"])
        assert (served.name, served.route_prefix) == (application["name"], "/")
    [deployment] = shipped["applications"][0]["deployments"]
    for one in (deployment, *traffic["deployments"]):
        assert one["name"] == DEPLOYMENT
        taken_over(ServeConfig(model="m"), one["user_config"])


def test_the_calls_of_the_page_are_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[ServeConfig] = []
    monkeypatch.setattr("raywards.serve.deploy", given.append)
    page = (DOCS / "operations.md").read_text(encoding="utf-8")
    for block in blocks(page, "python"):
        exec(block.text, {})
    assert [config.name for config in given] == ["rm-2", "rm", "helpful"]
    assert given[1].canary == given[0].name
    assert given[2].adapters.keys() == {"harmless", "terse"}
