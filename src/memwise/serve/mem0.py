"""The routes that clients of mem0 know, as a thin layer: its `user_id` is a bank.

`agent_id` becomes the actor and `run_id` the session. What was said is stored as it was said, so
`infer` has no effect here.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from memwise.recall.api import VERBS
from memwise.serve.pool import Pool


class NewMemory(BaseModel):
    """What mem0 takes to remember something."""

    model_config = ConfigDict(extra="ignore")
    messages: str | dict[str, Any] | list[str | dict[str, Any]]
    user_id: str = "default"
    agent_id: str = ""
    run_id: str = ""
    metadata: dict[str, Any] | None = None


class Wanted(BaseModel):
    """What mem0 takes to search."""

    model_config = ConfigDict(extra="ignore")
    query: str
    user_id: str | None = None
    agent_id: str | None = None
    run_id: str | None = None
    filters: dict[str, Any] | None = None
    top_k: int = 10


class NewText(BaseModel):
    """What mem0 takes to change a memory."""

    model_config = ConfigDict(extra="ignore")
    text: str


def mem0_routes(pool: Pool) -> APIRouter:
    """Routes `/memories` and `/search`."""
    routes = APIRouter(tags=["mem0"])

    def call(verb: str, bank: str, make: bool = False, **values: Any) -> Any:
        with pool.borrow(bank, make=make) as memory:
            return VERBS[verb].call(memory, **values)

    @routes.post("/memories")
    def add(given: NewMemory) -> dict[str, Any]:
        receipt = call(
            "add", given.user_id, make=True, content=given.messages, actor=given.agent_id,
            session=given.run_id, meta=given.metadata,
        )  # fmt: skip
        found = [call("get", given.user_id, id=id) for id in receipt["ids"]]
        return {"results": [{**_memory(hit), "event": "ADD"} for hit in found]}

    @routes.get("/memories/{id}")
    def get(id: str, user_id: str = "default") -> dict[str, Any]:
        return _memory(call("get", user_id, id=id))

    @routes.put("/memories/{id}")
    def update(id: str, given: NewText, user_id: str = "default") -> dict[str, Any]:
        receipt = call("update", user_id, id=id, text=given.text)
        return {"message": "Memory updated successfully!", "superseded": receipt["expired"]}

    @routes.delete("/memories/{id}")
    def delete(id: str, user_id: str = "default") -> dict[str, Any]:
        call("delete", user_id, id=id)
        return {"message": "Memory deleted successfully!"}

    @routes.get("/memories/{id}/history")
    def history(id: str, user_id: str = "default") -> list[dict[str, Any]]:
        return list(call("history", user_id, id=id))

    @routes.post("/search")
    def search(given: Wanted) -> dict[str, Any]:
        filters = dict(given.filters or {})
        bank = filters.pop("user_id", None) or given.user_id or "default"
        actor = filters.pop("agent_id", None) or given.agent_id
        session = filters.pop("run_id", None) or given.run_id
        hits = call(
            "search", str(bank), query=given.query, k=given.top_k, actor=actor, session=session,
            where=filters or None,
        )  # fmt: skip
        return {"results": [{**_memory(hit), "score": hit["score"]} for hit in hits]}

    return routes


def _memory(hit: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": hit["id"],
        "memory": hit["text"],
        "metadata": hit["meta"],
        "created_at": hit["at"],
        "agent_id": hit["actor"] or None,
        "run_id": hit["session"] or None,
    }
