"""docs/dialects.md: its bodies are answered as it says, and its lists are those of the code."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
from served import Served

from raywards.serve.dialects import nim, openrlhf, rerank, sglang, slime, tei, vllm
from raywards.serve.http import ROUTES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "dialects.md").read_text(encoding="utf-8")
MODULES: dict[str, ModuleType] = {
    "OpenRLHF": openrlhf,
    "vLLM": vllm,
    "SGLang": sglang,
    "text-embeddings-inference and the inference API": tei,
    "Rerankers: Cohere, Jina, vLLM, infinity": rerank,
    "slime": slime,
    "NVIDIA NIM": nim,
}
LISTED = [name for name, module in MODULES.items() if "IGNORED" in vars(module)]


def sections() -> dict[str, str]:
    _, *found = re.split(r"^## (.*)\n", PAGE, flags=re.MULTILINE)
    return dict(zip(found[::2], found[1::2], strict=True))


def fenced(language: str) -> list[tuple[str, str]]:
    """Label and text of each block."""
    return re.findall(rf"^```{language}\b *(.*?)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


BODIES = [(label, text) for label, text in fenced("json") if label != "reply"]


@pytest.mark.parametrize(("label", "text"), BODIES, ids=[label for label, _ in BODIES])
def test_a_body_is_answered_with_the_status_beside_it(label: str, text: str, rm: Served) -> None:
    method, path, status = label.split()
    response = rm.http.request(method, path, json=json.loads(text))
    assert response.status_code == int(status), response.text


def test_the_page_has_a_body_for_every_dialect_and_some_that_are_refused() -> None:
    statuses = [label.split()[-1] for label, _ in BODIES]
    assert statuses.count("200") >= 18
    assert len(statuses) - statuses.count("200") >= 4
    for name in MODULES:
        assert re.search(r"^```json POST \S+ 200$", sections()[name], re.MULTILINE), name


def test_the_reply_to_openrlhf_has_the_fields_that_it_shows(rm: Served) -> None:
    [(_, shown)] = [block for block in fenced("json") if block[0] == "reply"]
    reply = rm.post("/get_reward", {"query": ["Hi!"]})
    expected = json.loads(shown)
    assert set(reply) == set(expected)
    assert set(reply["extra_logs"]) == set(expected["extra_logs"])


def test_the_table_of_routes_has_each_of_them_once() -> None:
    table = PAGE.partition("|---|")[2].partition("\n\n")[0]
    named = [
        path
        for row in table.splitlines()[1:]
        for path in re.findall(r"`(/\S*?)`", row.split("|")[1])
    ]
    assert sorted(named) == sorted({route.path for route in ROUTES})


def test_the_routes_that_are_not_there_are_not_there(rm: Served) -> None:
    rows = re.findall(r"^\| (`/.*?) \|", sections()["Routes that are not there"], re.MULTILINE)
    paths = re.findall(r"`(/\S*?)`", " ".join(rows))
    assert len(paths) >= 10
    for path in paths:
        for method in ("GET", "POST"):
            response = rm.http.request(method, path, json={})
            assert response.status_code == 404, path
            assert response.json()["error"]["code"] == "no_such_route"


@pytest.mark.parametrize("name", LISTED)
def test_what_is_ignored_is_what_the_code_ignores(name: str) -> None:
    listed = re.search(r"^- Ignored.*?: (.*?)\.$", sections()[name], re.MULTILINE | re.DOTALL)
    assert listed is not None
    assert set(re.findall(r"`(\w+)`", listed[1])) == MODULES[name].IGNORED


@pytest.mark.parametrize("name", LISTED)
def test_what_is_refused_is_what_the_code_refuses(name: str) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", sections()[name], re.MULTILINE))
    assert rows == MODULES[name].NOT_BUILT
    assert list(rows) == sorted(rows)


def test_the_other_dialects_ignore_what_the_page_says() -> None:
    assert set(MODULES) - set(LISTED) == {
        "OpenRLHF",
        "slime",
        "text-embeddings-inference and the inference API",
    }
    assert openrlhf.GetRewardRequest.model_config["extra"] == "ignore"
    assert set(openrlhf.GetRewardRequest.model_fields) == {"query"}
    assert set(slime.RemoteRmRequest.model_fields) == {"prompt", "response", "label"}
    assert tei.PredictRequest.model_config["extra"] == "forbid"


def test_the_python_on_the_page_is_python() -> None:
    blocks = fenced("python")
    assert len(blocks) >= 5
    for _, text in blocks:
        ast.parse(text)


@pytest.mark.parametrize("page", ["README.md", "docs/http.md"])
def test_the_page_is_found_from(page: str) -> None:
    assert "dialects.md" in (ROOT / page).read_text(encoding="utf-8")
