"""In and out: memwise's own export and the files of other programs."""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memwise import Memory
from memwise.errors import InvalidKnob, MemwiseError
from memwise.recall.foreign import sniff
from memwise.recall.interchange import export_bank, export_markdown, export_mcp, import_file

STAMP = 1_650_000_000


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Memory]:
    ticks = itertools.count(1_700_000_000)
    with Memory(tmp_path / "m.db", embedder="none", clock=lambda: next(ticks)) as opened:
        yield opened


def _write(path: Path, content: Any, *, lines: bool = False) -> Path:
    if not isinstance(content, str):
        dump = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
        content = dump + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, "utf-8")
    os.utime(path, (STAMP, STAMP))
    return path


def _rows(memory: Memory) -> list[tuple[str, str, str, str]]:
    hits = [memory.get(item.id) for item in memory.view().scan("turn", "chunk", "row")]
    return [(hit.actor, hit.text, hit.at, hit.session) for hit in hits]


# ---------------------------------------------------------------- memwise's own


@pytest.fixture
def lines(memory: Memory) -> list[str]:
    memory.add("I live in Lisbon.", actor="ana", session="s", meta={"a": [1, {"b": 2.5}]})
    memory.add("I have a dög.", actor="ana", at="2020-01-01", session="s")
    memory.update("t1", "I live in Porto.")
    memory.add("Forgettable.")
    memory.delete(memory.search("forgettable")[0].id)
    return list(export_bank(memory))


def _export(path: Path, lines: list[str]) -> Path:
    return _write(path, "".join(f"{line}\n" for line in lines))


def test_an_export_is_canonical_and_complete(lines: list[str]) -> None:
    values = [json.loads(line) for line in lines]
    header, *items = values
    assert header == {
        "format": "memwise", "version": 1, "bank": "default", "policy": "", "next": 8,
        "embedder": "none/0", "n_items": len(items),
    }  # fmt: skip
    for line, value in zip(lines, values, strict=True):
        assert line == json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert [i["id"] for i in items if "expired" in i] == ["t1", "f2"]
    assert "vector" not in lines[1]


def test_a_new_bank_gets_the_same_ids_clocks_and_answers(
    memory: Memory, tmp_path: Path, lines: list[str]
) -> None:
    file = _export(tmp_path / "e.jsonl", lines)
    seen: list[tuple[int, int]] = []
    with Memory(tmp_path / "copy.db", embedder="none") as copy:
        receipt = import_file(copy, file, progress=lambda done, n: seen.append((done, n)))
        assert receipt.added == len(lines) - 1
        assert seen[-1] == (len(lines) - 1, len(lines) - 1)
        assert list(export_bank(copy)) == lines
        assert copy.search("Porto") == memory.search("Porto")
        assert copy.history("t1") == memory.history("t1")
        assert copy.add("Next.").ids == ("t8",)
        assert not import_file(copy, file).added
        copy.undo()
        copy.undo(receipt.operation)
        assert copy.stats() == {}


def test_a_used_bank_gets_new_ids_and_the_links_follow(tmp_path: Path, lines: list[str]) -> None:
    file = _export(tmp_path / "e.jsonl", lines)
    with Memory(tmp_path / "used.db", embedder="none") as used:
        used.add("I was here first.")
        import_file(used, file)
        (fact,) = used.facts("ana", "live in")
        assert fact.text == "ana lives in Porto."
        assert [s.text for s in fact.sources] == ["I live in Porto."]
        assert "superseded by" in [e["event"] for e in used.history("t2")]
        count = len(list(export_bank(used)))
        assert not import_file(used, file).added
        assert len(list(export_bank(used))) == count


def test_an_export_can_be_taken_while_the_memory_is_written(memory: Memory) -> None:
    memory.add([f"Number {i}." for i in range(100)])
    export = export_bank(memory)
    first = next(export)
    memory.add("Written in between.")
    assert len([first, *export]) == 101


def test_an_export_of_a_memory_in_ram(tmp_path: Path, lines: list[str]) -> None:
    with Memory(":memory:", embedder="none") as memory:
        import_file(memory, _export(tmp_path / "e.jsonl", lines))
        assert list(export_bank(memory)) == lines


def test_the_policy_of_an_export_is_adopted_by_a_new_bank(tmp_path: Path) -> None:
    with Memory(tmp_path / "a.db", embedder="none", policy="memorybank") as one:
        one.add("Something.")
        lines = list(export_bank(one))
    file = _export(tmp_path / "e.jsonl", lines)
    with Memory(tmp_path / "b.db", embedder="none") as two:
        (note,) = import_file(two, file).notes
        assert "memorybank from the next time" in note
        assert list(export_bank(two)) == lines
    with Memory(tmp_path / "b.db") as three:
        assert three.policy.name == "memorybank"
    unknown = [lines[0].replace("memorybank", "sorcery"), *lines[1:]]
    with Memory(tmp_path / "c.db", embedder="none") as four:
        (note,) = import_file(four, _export(tmp_path / "u.jsonl", unknown)).notes
        assert "'sorcery' of the export is not known" in note


def _spoilt(lines: list[str]) -> dict[str, list[str]]:
    header = json.loads(lines[0])
    newer = json.dumps({**header, "version": 99})
    return {
        "holds 4 of 6 items; it was cut off": lines[:-2],
        "line 3: it is not JSON": [*lines[:2], lines[2][:-5], *lines[3:]],
        "line 4: it is not an item": [*lines[:3], '{"id":"t1"}', *lines[4:]],
        "ids are not in order": [lines[0], lines[2], lines[1], *lines[3:]],
        "newer memwise": [newer, *lines[1:]],
        "not the first line of an export": ['{"format":"memwise"}', *lines[1:]],
        "id 'f1' of a 'turn'": [line.replace('"id":"t1"', '"id":"f1"') for line in lines],
        "link 'hates'": [line.replace('"derived_from"', '"hates"') for line in lines],
        "not a 64-bit number": [line.replace('"at":', '"at":1e3,"x":') for line in lines],
    }


@pytest.mark.parametrize("n", range(9))
def test_a_spoilt_export_is_refused_whole(tmp_path: Path, lines: list[str], n: int) -> None:
    words, spoilt = list(_spoilt(lines).items())[n]
    with Memory(tmp_path / "new.db", embedder="none") as memory:
        with pytest.raises(InvalidKnob, match=words):
            import_file(memory, _export(tmp_path / "e.jsonl", spoilt))
        assert len(list(export_bank(memory))) == 1
        assert json.loads(next(export_bank(memory)))["next"] == 1


# ---------------------------------------------------------------- other memories

GRAPH = [
    {"type": "entity", "name": "Ana", "entityType": "person", "observations": ["Sings well."]},
    {"type": "entity", "name": "Acme", "entityType": "company", "observations": []},
    {"type": "relation", "from": "Ana", "to": "Acme", "relationType": "works_at"},
]


def test_a_graph_of_the_mcp_server_comes_in_and_goes_out_as_it_was(
    memory: Memory, tmp_path: Path
) -> None:
    file = _write(tmp_path / "memory.jsonl", GRAPH, lines=True)
    assert sniff(file) == "mcp"
    import_file(memory, file)
    (fact,) = memory.facts("Ana", "works_at")
    assert (fact.meta["object"], fact.sources[0].kind) == ("Acme", "row")
    assert memory.search("sings", k=1)[0].actor == "Ana"
    assert [json.loads(line) for line in export_mcp(memory)] == GRAPH
    assert not import_file(memory, file).added
    memory.undo()
    assert memory.stats() == {}


def test_turns_and_facts_go_out_as_a_graph(memory: Memory) -> None:
    memory.add("I live in Lisbon.", actor="ana")
    graph = [json.loads(line) for line in export_mcp(memory)]
    assert {"type": "relation", "from": "ana", "to": "Lisbon", "relationType": "live in"} in graph
    assert graph[0]["observations"] == ["I live in Lisbon."]


MEM0 = [
    {"id": "u-1", "memory": "Likes tea", "user_id": "ana", "created_at": "2024-05-01T10:00:00Z",
     "metadata": {"topic": "food"}},
    {"id": "u-2", "memory": "Has a dog", "user_id": "ana", "metadata": None},
]  # fmt: skip


@pytest.mark.parametrize("shape", ["list", "results"])
def test_a_mem0_export_keeps_user_date_and_metadata(
    memory: Memory, tmp_path: Path, shape: str
) -> None:
    file = _write(tmp_path / "mem0.json", MEM0 if shape == "list" else {"results": MEM0})
    assert sniff(file) == "mem0"
    import_file(memory, file)
    hit = memory.search("tea", k=1, where={"topic": "food"})[0]
    assert (hit.kind, hit.actor, hit.at) == ("row", "ana", "2024-05-01T10:00:00Z")
    assert hit.meta["mem0_id"] == "u-1"
    assert not import_file(memory, file).added


# ---------------------------------------------------------------- chats

CHATGPT = [
    {
        "title": "Dogs", "create_time": 1_700_000_000.5, "conversation_id": "c1",
        "current_node": "d",
        "mapping": {
            "a": {"message": None, "parent": None},
            "b": {"message": {"author": {"role": "user"}, "create_time": 1_700_000_001,
                              "content": {"parts": ["Which dog?"]}}, "parent": "a"},
            "x": {"message": {"author": {"role": "assistant"},
                              "content": {"parts": ["Rejected answer."]}}, "parent": "b"},
            "d": {"message": {"author": {"role": "assistant"}, "create_time": 1_700_000_002,
                              "content": {"parts": ["A poodle.", {"content_type":
                              "image_asset_pointer"}]}}, "parent": "b"},
        },
    }
]  # fmt: skip
CLAUDE = [
    {
        "uuid": "c1", "name": "Dogs", "created_at": "2023-11-14T22:13:20Z",
        "chat_messages": [
            {"uuid": "1", "sender": "human", "text": "Which dog?",
             "created_at": "2023-11-14T22:13:21Z", "content": [{"type": "text",
             "text": "Which dog?"}]},
            {"uuid": "2", "sender": "assistant", "text": "", "content": [{"type": "text",
             "text": "A poodle."}, {"type": "tool_use"}], "created_at": "2023-11-14T22:13:22Z"},
        ],
    }
]  # fmt: skip
TALK = [
    {
        "sample_id": "c1",
        "conversation": {
            "speaker_a": "Ana", "speaker_b": "Bo",
            "session_1_date_time": "1:56 pm on 8 May, 2023",
            "session_1": [
                {"speaker": "Ana", "dia_id": "D1:1", "text": "Which dog?"},
                {"speaker": "Bo", "dia_id": "D1:2", "text": "This.", "blip_caption": "a poodle"},
            ],
            "session_2_date_time": "2:01 pm on 9 May, 2023",
            "session_2": [{"speaker": "Ana", "dia_id": "D2:1", "text": "Woof."}],
        },
    }
]  # fmt: skip


def test_chatgpt_gives_the_branch_that_was_shown(memory: Memory, tmp_path: Path) -> None:
    import_file(memory, _write(tmp_path / "conversations.json", CHATGPT))
    assert _rows(memory) == [
        ("user", "Which dog?", "2023-11-14T22:13:21Z", "c1"),
        ("assistant", "A poodle.\n[image]", "2023-11-14T22:13:22Z", "c1"),
    ]
    assert memory.get("t1").meta["title"] == "Dogs"


def test_claude_gives_its_messages(memory: Memory, tmp_path: Path) -> None:
    import_file(memory, _write(tmp_path / "conversations.json", CLAUDE))
    assert _rows(memory) == [
        ("user", "Which dog?", "2023-11-14T22:13:21Z", "c1"),
        ("assistant", "A poodle.\n[tool_use]", "2023-11-14T22:13:22Z", "c1"),
    ]


def test_dated_sessions_with_speakers(memory: Memory, tmp_path: Path) -> None:
    import_file(memory, _write(tmp_path / "talk.json", TALK))
    assert _rows(memory) == [
        ("Ana", "Which dog?", "2023-05-08T13:56:00Z", "c1 session 1"),
        ("Bo", "This. [image: a poodle]", "2023-05-08T13:56:00Z", "c1 session 1"),
        ("Ana", "Woof.", "2023-05-09T14:01:00Z", "c1 session 2"),
    ]
    assert memory.search("poodle", k=1)[0].meta["ref"] == "D1:2"


PLAIN: list[tuple[Any, bool]] = [
    ([{"role": "user", "content": "Which dog?"}, {"role": "assistant", "content": "A poodle."}],
     False),
    ([{"role": "user", "content": "Which dog?"}, {"role": "assistant", "content": "A poodle."}],
     True),
    ({"messages": [{"role": "user", "content": "Which dog?"},
                   {"role": "assistant", "content": "A poodle."}]}, False),
    ([{"messages": [{"role": "user", "content": "Which dog?"}]},
      {"messages": [{"role": "assistant", "content": "A poodle."}]}], True),
    ([{"conversations": [{"from": "human", "value": "Which dog?"},
                         {"from": "gpt", "value": "A poodle."}]}], False),
]  # fmt: skip


@pytest.mark.parametrize(("content", "lines"), PLAIN)
def test_plain_messages_in_all_usual_wrappings(
    memory: Memory, tmp_path: Path, content: Any, lines: bool
) -> None:
    file = _write(tmp_path / "chat.json", content, lines=lines)
    assert sniff(file) == "chat"
    import_file(memory, file)
    assert [row[:2] for row in _rows(memory)] == [
        ("user", "Which dog?"), ("assistant", "A poodle."),
    ]  # fmt: skip
    assert all(row[2].startswith("2022-04-15T05:20:00") for row in _rows(memory))
    assert not import_file(memory, file).added
    memory.undo()
    assert memory.stats() == {}


def test_messages_without_text_are_left_out_and_counted(memory: Memory, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Call it."}, {"role": "assistant", "content": ""}]
    receipt = import_file(memory, _write(tmp_path / "chat.jsonl", talk, lines=True))
    assert receipt.notes == ("1 entries without text were left out",)
    assert len(receipt.ids) == 1


def test_an_import_of_many_batches_is_one_operation(memory: Memory, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": f"Number {i}."} for i in range(1300)]
    seen: list[tuple[int, int]] = []
    file = _write(tmp_path / "chat.jsonl", talk, lines=True)
    import_file(memory, file, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(500, 1300), (1000, 1300), (1300, 1300)]
    assert memory.stats() == {"turn": 1300}
    memory.undo()
    assert memory.stats() == {}


# ---------------------------------------------------------------- Markdown

NOTE = """---
title: "My dogs"
tags: [pets, home]
date: 2024-03-01
people:
  - Ana
  - Bo
---
Before any heading.

# Dogs

## Poodles

They curl.

```python
# no heading
```

## Terriers
They bark.
"""


def test_a_folder_of_markdown_gives_a_chunk_a_section(memory: Memory, tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    _write(folder / "dogs.md", NOTE)
    _write(folder / "deep" / "cats.md", "They purr.")
    _write(folder / "picture.txt", "not read")
    import_file(memory, folder)
    hits = [memory.get(item.id) for item in memory.view().scan("chunk")]
    assert [(h.session, h.meta.get("heading")) for h in hits] == [
        ("deep/cats.md", None), ("dogs.md", None), ("dogs.md", "Dogs > Poodles"),
        ("dogs.md", "Dogs > Terriers"),
    ]  # fmt: skip
    poodles = hits[2]
    assert "# no heading" in poodles.text
    assert (poodles.at, poodles.meta["tags"]) == ("2024-03-01T00:00:00Z", ["pets", "home"])
    assert (poodles.meta["title"], poodles.meta["people"]) == ("My dogs", ["Ana", "Bo"])
    assert hits[0].at.startswith("2022-04-15T05:20:00")
    assert not import_file(memory, folder).added


def test_a_bank_goes_out_as_markdown_and_nothing_is_overwritten(
    memory: Memory, tmp_path: Path
) -> None:
    memory.add("I live in Lisbon.\n# Not a heading", actor="ana", session="a/b: c")
    memory.add("No session.")
    assert export_markdown(memory, tmp_path / "out") == 3
    text = (tmp_path / "out" / "a-b-c.md").read_text()
    assert "session: a/b: c" in text
    assert "\n\\# Not a heading" in text
    assert (tmp_path / "out" / "facts.md").read_text() == "- ana lives in Lisbon.\n"
    with pytest.raises(InvalidKnob, match="not an empty folder"):
        export_markdown(memory, tmp_path / "out")


# ---------------------------------------------------------------- bad files

BAD: list[tuple[str, bytes, str, str]] = [
    ("x.json", b"", "auto", "not JSON"),
    ("x.json", b"[]", "auto", "holds nothing that memwise can import"),
    ("x.json", b"7", "auto", "holds nothing that memwise can import"),
    ("x.json", b'[{"colour": "red"}]', "auto", r"colour.*it reads memwise, mcp, mem0, chat"),
    ("x.json", b'[{"role": "user", "content"', "auto", "not JSON"),
    ("x.json", b"\xff\xfe\x00a", "auto", "binary"),
    ("x.json", b'[{"role": "user", "content": "caf\xe9"}]', "auto", "not UTF-8"),
    ("x.json", b"SQLite format 3\0", "auto", "memory file itself"),
    ("x.zip", b"PK\3\4rest", "auto", "ZIP archive; unpack it"),
    ("x.jsonl", b'{"role": "user", "content": "a"}\nnonsense\n', "auto", "line 2 is not JSON"),
    ("x.json", b'[{"role": "user", "content": "a"}, 7]', "auto", "item 1: a message"),
    ("x.json", b'[{"role": "wizard", "content": "a"}]', "auto", "item 0: role='wizard'"),
    ("x.json", b'[{"role": "user", "content": "a", "at": "soon"}]', "auto", "item 0: .*soon"),
    ("x.json", b'[{"role": "user", "content": ""}]', "auto", "holds nothing to remember"),
    ("x.json", b'[{"role": "user", "content": "a\\u0000"}]', "auto", "item 0: .*binary"),
    ("x.jsonl", b'{"type": "entity", "name": "A"}\n', "auto", "'entityType' must be a text"),
    ("x.json", b'[{"memory": 7, "id": "a"}]', "auto", "'memory' must be a text"),
    ("x.json", b'[{"role": "user", "content": "a"}]', "mem0", "'memory' must be a text"),
    ("x.json", b'[{"role": "user", "content": "a"}]', "memwise", "not the first line"),
    ("x.json", b"[]", "obsidian", "format='obsidian': use auto, memwise"),
]


@pytest.mark.parametrize(("name", "content", "form", "words"), BAD)
def test_bad_files_are_refused_whole(
    memory: Memory, tmp_path: Path, name: str, content: bytes, form: str, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MemwiseError, match=words):
        import_file(memory, tmp_path / name, form)
    assert memory.stats() == {}


def test_folders_and_missing_files(memory: Memory, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidKnob, match="no Markdown files"):
        import_file(memory, tmp_path / "empty")
    with pytest.raises(InvalidKnob, match="only be read as markdown"):
        import_file(memory, tmp_path / "empty", "chat")
    with pytest.raises(InvalidKnob, match="does not exist"):
        import_file(memory, tmp_path / "nowhere.json")


def test_what_does_not_fit_is_taken_back_whole(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": f"Number {i}."} for i in range(700)]
    talk[650]["content"] = "x"
    talk[650]["meta"] = {"blob": "x" * (3 << 20)}  # type: ignore[assignment]
    file = _write(tmp_path / "chat.jsonl", talk, lines=True)
    with Memory(tmp_path / "m.db", embedder="none", budget="2MiB") as memory:
        memory.add("Before.")
        with pytest.raises(MemwiseError, match="Raise the budget"):
            import_file(memory, file)
        assert memory.stats() == {"turn": 1}
