import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from math import ceil
from pathlib import Path
from typing import Any

import anyio
import pytest

from memwise import Memory
from memwise.errors import InvalidKnob

pytest.importorskip("mcp")

from mcp.client import Client

from memwise.serve.mcp import create_server, fitted

SRC = Path(__file__).parents[2] / "src"
Talk = Callable[[Client], Awaitable[None]]


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    with Memory(tmp_path / "m.db", embedder="none") as made:
        yield made


def test_few_tools_are_offered_by_default(memory: Memory) -> None:
    async def talk(client: Client) -> None:
        names = [tool.name for tool in (await client.list_tools()).tools]
        assert set(names) == {
            "remember", "search", "context", "facts", "timeline", "forget", "update", "status",
        }  # fmt: skip

    meet(memory, talk)


def test_what_is_remembered_is_found(memory: Memory) -> None:
    async def talk(client: Client) -> None:
        told = {"content": "Ana moved to Lisbon.", "at": "2026-05-02", "actor": "ben"}
        assert (await call(client, "remember", **told))["ids"] == ["t1"]
        (hit,) = await call(client, "search", query="Lisbon?", k=1)
        assert (hit["text"], hit["at"]) == ("Ana moved to Lisbon.", "2026-05-02T00:00:00Z")
        packed = await client.call_tool("context", {"query": "Lisbon?"})
        assert text(packed).startswith("<memory>\n2026-05-02\nben: Ana moved to Lisbon.")
        assert (await call(client, "status"))["items"]["turn"] == 1

    meet(memory, talk)


def test_both_handshakes_of_the_protocol_are_spoken(memory: Memory) -> None:
    async def talk(client: Client) -> None:
        assert (await call(client, "status"))["bank"] == "default"

    meet(memory, talk, mode="legacy")
    meet(memory, talk, mode="auto")


@pytest.mark.parametrize("max_tokens", [64, 100, 1000, 4000])
def test_a_result_never_has_more_tokens_than_allowed(memory: Memory, max_tokens: int) -> None:
    memory.add([f'Tea no. {i} is "very good", said Ana.' for i in range(200)], actor="ana")
    memory.add("A long story about tea. " * 80)

    async def talk(client: Client) -> None:
        for name, asked in (
            ("search", {"query": "tea", "k": 200}),
            ("search", {"query": "long story", "k": 1}),
            ("timeline", {"entity": "tea", "k": 200}),
            ("context", {"query": "tea", "tokens": 100_000}),
        ):
            result = await client.call_tool(name, {**asked, "max_tokens": max_tokens})
            assert not result.is_error
            assert len(result.content) == 1
            assert result.structured_content is None
            assert 0 < ceil(len(text(result)) / 4) <= max_tokens

    meet(memory, talk)


def test_what_did_not_fit_is_counted(memory: Memory) -> None:
    memory.add([f"tea {i}" for i in range(100)])

    async def talk(client: Client) -> None:
        found = await call(client, "search", query="tea", k=100, max_tokens=500)
        assert len(found["results"]) + found["left_off"] == 100

    meet(memory, talk)


def test_a_list_that_goes_on_says_where_the_next_page_begins(memory: Memory) -> None:
    memory.add([f"Person{i} moved to Rome." for i in range(60)], actor="ana")
    whole = [hit.id for hit in memory.facts()]
    assert len(whole) >= 60

    async def talk(client: Client) -> None:
        for name, asked in (
            ("facts", {"max_tokens": 600}),
            ("timeline", {"entity": "rome", "k": 7}),
        ):
            seen: list[str] = []
            page: Any = {"next_skip": 0}
            while isinstance(page, dict) and "next_skip" in page:
                page = await call(client, name, **asked, skip=page["next_skip"])
                listed = page if isinstance(page, list) else page["results"]
                assert len(listed) < len(whole)
                seen += [hit["id"] for hit in listed]
            assert seen == whole

    meet(memory, talk)


def test_a_large_graph_is_read_page_by_page_with_whole_texts(memory: Memory) -> None:
    ring = [f"node {i}" for i in range(80)]
    entities = [{"name": n, "entityType": "place", "observations": [f"{n} is old"]} for n in ring]
    relations = [
        {"from": a, "to": b, "relationType": "near"}
        for a, b in zip(ring, ring[1:] + ring[:1], strict=True)
    ]

    async def talk(client: Client) -> None:
        await call(client, "create_entities", entities=entities, max_tokens=10_000)
        await call(client, "create_relations", relations=relations, max_tokens=10_000)
        shown, edges, skip, pages = [], [], 0, 0
        while skip is not None:
            page = await call(client, "read_graph", max_tokens=500, skip=skip)
            shown += page["entities"]
            edges += [edge for edge in page["relations"] if edge not in edges]
            skip, pages = page.get("next_skip"), pages + 1
        assert pages > 5
        assert shown == entities
        assert sorted(edges, key=str) == sorted(relations, key=str)

    meet(memory, talk, profile="memory-server")


def test_the_banks_facts_and_bytes_are_resources(memory: Memory) -> None:
    memory.add("I live in Lisbon.", actor="ana", at="2026-05-02")

    async def talk(client: Client) -> None:
        listed = (await client.list_resources()).resources
        assert {str(one.uri) for one in listed} == {"memwise://facts", "memwise://report"}
        assert {one.mime_type for one in listed} == {"application/json"}
        (facts,) = (await client.read_resource("memwise://facts")).contents
        assert json.loads(facts.text)[0]["text"] == "ana lives in Lisbon."  # type: ignore[union-attr]
        (report,) = (await client.read_resource("memwise://report")).contents
        assert json.loads(report.text)["bytes"] > 0  # type: ignore[union-attr]

    meet(memory, talk)


def test_a_resource_is_cut_like_every_result(memory: Memory) -> None:
    memory.add([f"Person{i} moved to Rome." for i in range(1500)], actor="ana")

    async def talk(client: Client) -> None:
        (facts,) = (await client.read_resource("memwise://facts")).contents
        told = json.loads(facts.text)  # type: ignore[union-attr]
        assert len(facts.text) <= 4 * 16_000  # type: ignore[union-attr]
        assert told["next_skip"] == len(told["results"])
        assert told["left_off"] + len(told["results"]) == len(memory.facts())

    meet(memory, talk)


def test_a_single_long_text_is_cut_visibly() -> None:
    shown = json.loads(fitted({"id": "t1", "text": "x" * 10_000}, 100))
    assert shown["text"].endswith("…")
    assert shown["id"] == "t1"


def test_errors_are_errors(memory: Memory) -> None:
    async def talk(client: Client) -> None:
        for name, asked, message in (
            ("search", {"query": " "}, "the query is empty"),
            ("search", {}, "Field required"),
            ("search", {"query": "tea", "max_tokens": 3}, "greater than or equal to 64"),
            ("remember", {"content": "tea", "at": "someday"}, "not a time"),
            ("update", {"id": "t9", "text": "x"}, "no item 't9'"),
            ("update", {"id": "nonsense", "text": "x"}, "ids look like 't12'"),
            ("facts", {"skip": -1}, "skip=-1"),
            ("timeline", {"entity": ""}, "the entity is empty"),
            ("forget", {}, "either budget="),
            ("nonesuch", {}, "Unknown tool"),
        ):
            result = await client.call_tool(name, asked)
            assert result.is_error
            assert message in text(result)

    meet(memory, talk)


def test_unknown_arguments_are_ignored_with_a_warning(memory: Memory) -> None:
    async def talk(client: Client) -> None:
        result = await client.call_tool("remember", {"content": "tea", "importance": 9})
        assert not result.is_error
        assert "ignored unknown arguments importance" in result.content[1].text  # type: ignore[union-attr]
        assert memory.stats() == {"turn": 1}

    meet(memory, talk)


def test_mappings_may_come_as_json_text(memory: Memory) -> None:
    async def talk(client: Client) -> None:
        await call(client, "remember", content="tea", meta='{"ref": 7}')
        (hit,) = await call(client, "search", query="tea", where='{"ref": 7}')
        assert hit["meta"] == {"ref": 7}

    meet(memory, talk)


def test_an_agent_sees_its_own_bank_only(memory: Memory) -> None:
    with Memory(memory.path, "ben") as other:
        other.add("My password is swordfish.")

    async def talk(client: Client) -> None:
        tools = (await client.list_tools()).tools
        assert not {"banks", "import", "export"} & {tool.name for tool in tools}
        for name, asked in (
            ("search", {"query": "swordfish"}),
            ("context", {"query": "swordfish"}),
            ("timeline", {"entity": "swordfish"}),
            ("status", {}),
        ):
            assert "swordfish" not in text(await client.call_tool(name, asked))

    meet(memory, talk, profile="all")


def test_the_tools_of_the_memory_server_work_on_a_bank(memory: Memory) -> None:
    ana = {"name": "Ana", "entityType": "person", "observations": ["likes tea", "plays chess"]}
    lisbon = {"name": "Lisbon", "entityType": "city", "observations": []}
    lives = {"from": "Ana", "to": "Lisbon", "relationType": "lives_in"}

    async def talk(client: Client) -> None:
        assert await call(client, "create_entities", entities=[ana, lisbon]) == [ana, lisbon]
        assert await call(client, "create_entities", entities=[ana]) == []
        assert await call(client, "create_relations", relations=[lives]) == [lives]
        assert await call(client, "create_relations", relations=[lives]) == []
        more = {"entityName": "Ana", "contents": ["likes tea", "has a cat"]}
        added = await call(client, "add_observations", observations=[more])
        assert added == [{"entityName": "Ana", "addedObservations": ["has a cat"]}]

        ana["observations"] = ["likes tea", "plays chess", "has a cat"]
        whole = {"entities": [ana, lisbon], "relations": [lives]}
        assert await call(client, "read_graph") == whole
        found = await call(client, "search_nodes", query="Who drinks tea?")
        assert found == {"entities": [ana], "relations": [lives]}
        assert (await call(client, "open_nodes", names=["Lisbon"]))["entities"] == [lisbon]

        gone = {"entityName": "Ana", "observations": ["likes tea"]}
        await call(client, "delete_observations", deletions=[gone])
        await call(client, "delete_relations", relations=[lives])
        await call(client, "delete_entities", entityNames=["Lisbon"])
        ana["observations"] = ["plays chess", "has a cat"]
        assert await call(client, "read_graph") == {"entities": [ana], "relations": []}

    meet(memory, talk, profile="memory-server")


def test_an_imported_graph_can_be_read(memory: Memory, tmp_path: Path) -> None:
    from memwise.recall.interchange import import_file

    path = tmp_path / "memory.jsonl"
    ana = {"name": "Ana", "entityType": "person", "observations": ["likes tea"]}
    lives = {"from": "Ana", "to": "Ana", "relationType": "knows"}
    lines = ({"type": "entity", **ana}, {"type": "relation", **lives})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    import_file(memory, path)

    async def talk(client: Client) -> None:
        assert await call(client, "read_graph") == {"entities": [ana], "relations": [lives]}

    meet(memory, talk, profile="memory-server")


def test_an_unknown_profile_is_refused(memory: Memory) -> None:
    with pytest.raises(InvalidKnob, match="default, all, memory-server"):
        create_server(memory, "everything")


def test_the_command_speaks_mcp_over_stdio(tmp_path: Path) -> None:
    hello = {
        "jsonrpc": "2.0", "id": 1, "method": "initialize",
        "params": {
            "protocolVersion": "2025-06-18", "capabilities": {},
            "clientInfo": {"name": "test", "version": "0"},
        },
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "memwise.cli", "mcp", "--db", str(tmp_path / "m.db"),
         "--embedder", "none"],
        input=json.dumps(hello) + "\n", capture_output=True, encoding="utf-8", timeout=60,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[0])
    assert answer["result"]["serverInfo"]["name"] == "memwise"


def meet(memory: Memory, talk: Talk, profile: str = "default", mode: str = "auto") -> None:
    async def main() -> None:
        async with Client(create_server(memory, profile), mode=mode) as client:
            await talk(client)

    anyio.run(main)


async def call(client: Client, name: str, **asked: Any) -> Any:
    result = await client.call_tool(name, asked)
    assert not result.is_error, text(result)
    return json.loads(text(result))


def text(result: Any) -> str:
    return str(result.content[0].text)
