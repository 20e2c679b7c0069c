"""An agent's notes in one file: write, find, ask about the past, undo."""

import tempfile
from pathlib import Path

from memwise import Memory

with (
    tempfile.TemporaryDirectory() as folder,
    Memory(Path(folder) / "notes.db", bank="ana", embedder="ngrams") as memory,
):
    memory.add("I live in Porto.", at="2025-03-01", actor="Ana", session="spring")
    memory.add("I moved to Lisbon last week.", at="2026-05-09", actor="Ana", session="move")
    memory.add("My sister Rita bakes bread.", at="2026-05-10", actor="Ana", session="move")

    print("search")
    for hit in memory.search("Where does Ana live?", k=2):
        print(f"  {hit.id} {hit.at[:10]} {hit.text}  {dict(hit.why)}")

    print("facts now, and a year earlier")
    for when in ("2026-06-01", "2025-06-01"):
        for fact in memory.facts("Ana", "live in", at=when):
            print(f"  {when}: {fact.text}")

    print("a prompt's worth")
    print(memory.context("Tell me about Ana's family", tokens=60).text)

    print("undo:", memory.undo())
    print("left:", memory.stats())
