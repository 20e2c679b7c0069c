import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import pytest
import typer.main

from memwise import Memory
from memwise.cli import app as command
from memwise.cli_memory import Place
from memwise.errors import InvalidKnob
from memwise.recall.api import VERBS, Verb, bank_names

pytest.importorskip("fastapi")
pytest.importorskip("mcp")

each_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=lambda verb: verb.name)

COMMON = set(Place.__dataclass_fields__)
"""Options that say which memory is meant; REST has the bank in its path and MCP in its server."""


def test_the_verbs_are_these() -> None:
    assert list(VERBS) == [
        "add", "search", "context", "facts", "timeline", "get", "update", "delete", "history",
        "forget", "undo", "report", "stats", "reflect", "rebuild", "banks", "import", "export",
    ]  # fmt: skip


@each_verb
def test_every_verb_and_parameter_is_described(verb: Verb) -> None:
    assert verb.summary.endswith(".")
    assert all(param.doc.endswith(".") for param in verb.params)


@each_verb
def test_what_only_reads_takes_nothing_away(verb: Verb) -> None:
    assert not (verb.hints.read_only and verb.hints.destructive)


def test_every_method_for_users_of_a_memory_is_a_verb() -> None:
    public = {name for name, _ in inspect.getmembers(Memory, inspect.isfunction) if name[0] != "_"}
    for_engines = {"view", "index_bytes", "ingest", "whole", "carry_out", "restore", "act"}
    assert public - for_engines - {"close"} == set(VERBS) - {"banks", "import", "export"}


@each_verb
def test_the_command_has_the_verb_with_its_parameters(verb: Verb) -> None:
    found = typer.main.get_command(command).commands[verb.name]  # type: ignore[attr-defined]
    options = {option.name: option for option in found.params if option.name != "help"}
    own = {param.name for param in verb.params}
    renamed = {"json": "as_json"}
    assert {renamed.get(name, name) for name in options} == own | COMMON
    assert found.help == verb.about
    for param in verb.params:
        assert options[param.name].help.startswith(param.doc)
        if not param.required and not isinstance(param.default, type(None)):
            assert options[param.name].default == param.default


@each_verb
def test_rest_has_the_verb_with_its_parameters(verb: Verb, openapi: Mapping[str, Any]) -> None:
    if verb.name == "banks":
        assert set(openapi["paths"]["/v1/banks"]) == {"get"}
        return
    routes = openapi["paths"][f"/v1/banks/{{bank}}/{verb.name}"]
    assert set(routes) == ({"get", "post"} if verb.hints.read_only else {"post"})
    body = _body(routes["post"], openapi)
    assert _described(body["properties"]) == {param.name: param.doc for param in verb.params}
    assert set(body.get("required", ())) == {p.name for p in verb.params if p.required}
    assert routes["post"]["description"] == verb.about
    if verb.hints.read_only:
        asked = {p["name"] for p in routes["get"]["parameters"] if p["in"] == "query"}
        assert asked == {param.name for param in verb.params}


@each_verb
def test_mcp_has_the_verb_with_its_parameters(verb: Verb, tools: Mapping[str, Any]) -> None:
    from memwise.serve.mcp import NAMES

    name = NAMES.get(verb.name, verb.name)
    if verb.hints.operator:
        assert name not in tools
        return
    schema = tools[name].input_schema
    limit = schema["properties"].pop("max_tokens")
    assert limit["default"] == 4000
    assert _described(schema["properties"]) == {param.name: param.doc for param in verb.params}
    assert set(schema.get("required", ())) == {p.name for p in verb.params if p.required}
    assert tools[name].description == verb.about
    told = tools[name].annotations
    assert told.read_only_hint == verb.hints.read_only
    assert told.destructive_hint == verb.hints.destructive
    assert told.idempotent_hint == verb.hints.idempotent


def test_every_result_is_json(tmp_path: Path) -> None:
    with Memory(tmp_path / "m.db", embedder="none") as memory:
        calls = {
            "add": {"content": [{"role": "user", "content": "Ana moved to Lisbon."}, "Hello."]},
            "search": {"query": "Lisbon"},
            "context": {"query": "Lisbon"},
            "timeline": {"entity": "Ana"},
            "get": {"id": "t1"},
            "update": {"id": "t1", "text": "Ana moved to Porto."},
            "history": {"id": "t1"},
            "forget": {"before": "1999-01-01"},
            "facts": {},
            "stats": {},
            "report": {},
            "banks": {},
            "reflect": {},
            "undo": {},
            "rebuild": {},
            "delete": {"id": "t2"},
        }
        for name, values in calls.items():
            result = VERBS[name].call(memory, **values)
            assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(VERBS) - set(calls) == {"import", "export"}


def test_what_is_exported_can_be_imported(tmp_path: Path) -> None:
    with Memory(tmp_path / "m.db", "ana", embedder="none") as memory:
        VERBS["add"].call(memory, "Ana moved to Lisbon.", at="2026-05-02", meta={"ref": 7})
        exported: Any = VERBS["export"].call(memory)
    with Memory(tmp_path / "copy.db", "ana", embedder="none") as memory:
        VERBS["import"].call(memory, **exported)
        assert VERBS["export"].call(memory) == exported


def test_a_hit_carries_its_sources_and_their_meta(tmp_path: Path) -> None:
    with Memory(tmp_path / "m.db", embedder="none") as memory:
        VERBS["add"].call(memory, "Ana moved to Lisbon.", at="2026-05-02", meta={"ref": 7})
        hits: Any = VERBS["search"].call(memory, "Where is Ana?")
        facts: Any = VERBS["facts"].call(memory, "Ana")
    assert hits[0]["at"] == "2026-05-02T00:00:00Z"
    assert hits[0]["sources"][0]["id"] == hits[0]["id"]
    assert facts[0]["sources"][0]["meta"] == {"ref": 7}


def test_listing_banks_makes_neither_file_nor_bank(tmp_path: Path) -> None:
    path = tmp_path / "m.db"
    with pytest.raises(InvalidKnob, match="no memory file"):
        bank_names(path)
    assert not path.exists()
    Memory(path, "ana", embedder="none").close()
    assert bank_names(path) == ["ana"]


@pytest.fixture(scope="module")
def openapi(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    from starlette.testclient import TestClient

    from memwise.serve import Options, Pool
    from memwise.serve.rest import create_app

    path = tmp_path_factory.mktemp("rest") / "m.db"
    app = create_app(Pool(path, Options(embedder="none")))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        found: Mapping[str, Any] = client.get("/openapi.json").json()
        return found


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    from memwise.serve.mcp import create_server

    path = tmp_path_factory.mktemp("mcp") / "m.db"
    with Memory(path, embedder="none") as memory:
        listed = anyio.run(create_server(memory, "all").list_tools)
    return {tool.name: tool for tool in listed}


def _body(route: Mapping[str, Any], openapi: Mapping[str, Any]) -> Mapping[str, Any]:
    schema = route["requestBody"]["content"]["application/json"]["schema"]
    name = schema.get("$ref", "").rpartition("/")[2]
    found: Mapping[str, Any] = openapi["components"]["schemas"][name] if name else schema
    return found if "properties" in found else {"properties": {}}


def _described(properties: Mapping[str, Any]) -> dict[str, str]:
    return {name: value["description"] for name, value in properties.items()}
