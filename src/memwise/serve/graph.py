"""The nine tools of the official MCP memory server, on a memwise bank.

Entities, observations and relations are turns whose `meta` says what they are, so every other verb
finds them too, with dates; `search_nodes` ranks instead of comparing substrings. An imported
`memory.jsonl` has the same `meta`, so its graph can be read and changed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from memwise.recall.api import Hints
from memwise.recall.engine.records import SOURCES, Item
from memwise.recall.memory import Memory

_TAG = "mcp"
Skip: TypeAlias = Annotated[
    int, Field(description="So many entities are left out first: what earlier pages showed.", ge=0)
]
_NEAREST = 50  # turns whose entities `search_nodes` shows


class Entity(BaseModel):
    """A node: its name is its identity."""

    name: str = Field(min_length=1)
    entityType: str
    observations: list[str] = Field(default_factory=list)


class Relation(BaseModel):
    """A directed edge, in active voice."""

    model_config = ConfigDict(populate_by_name=True)
    from_: str = Field(alias="from")
    to: str
    relationType: str


class Observations(BaseModel):
    """What to add to an entity."""

    entityName: str
    contents: list[str]


class Deletion(BaseModel):
    """What to remove from an entity."""

    entityName: str
    observations: list[str]


def create_entities(memory: Memory, entities: list[Entity]) -> list[dict[str, Any]]:
    """Create entities with their observations; names that exist are left alone."""
    known = set(_graph(memory).entities)
    fresh = []
    for entity in entities:
        if entity.name not in known:
            known.add(entity.name)
            fresh.append(entity)
    turns = [_entity(e) for e in fresh]
    turns += [_observation(e.name, text) for e in fresh for text in dict.fromkeys(e.observations)]
    _store(memory, turns)
    return [entity.model_dump() for entity in fresh]


def create_relations(memory: Memory, relations: list[Relation]) -> list[dict[str, Any]]:
    """Create relations between entities; those that exist are left alone."""
    known = {_edge(item.data) for item in _graph(memory).relations}
    fresh = []
    for relation in relations:
        fields = relation.model_dump(by_alias=True)
        if _edge(fields) not in known:
            known.add(_edge(fields))
            fresh.append(fields)
    _store(
        memory,
        [
            _turn(
                f"{r['from']} {r['relationType'].replace('_', ' ')} {r['to']}",
                r["from"],
                "relation",
                r,
            )
            for r in fresh
        ],
    )
    return fresh


def add_observations(memory: Memory, observations: list[Observations]) -> list[dict[str, Any]]:
    """Add observations to entities, which are made if they do not exist."""
    graph = _graph(memory)
    turns, told = [], []
    for given in observations:
        known = {item.text for item in graph.observations.get(given.entityName, ())}
        fresh = [text for text in dict.fromkeys(given.contents) if text not in known]
        if given.entityName not in graph.entities:
            turns.append(_entity(Entity(name=given.entityName, entityType="entity")))
        turns += [_observation(given.entityName, text) for text in fresh]
        told.append({"entityName": given.entityName, "addedObservations": fresh})
    _store(memory, turns)
    return told


def delete_entities(memory: Memory, entityNames: list[str]) -> dict[str, Any]:
    """Delete entities with their observations and relations, for good."""
    graph, names = _graph(memory), set(entityNames)
    gone = [graph.entities[name] for name in names & set(graph.entities)]
    gone += [item for name in names for item in graph.observations.get(name, ())]
    gone += [r for r in graph.relations if {r.data["from"], r.data["to"]} & names]
    return _delete(memory, gone)


def delete_observations(memory: Memory, deletions: list[Deletion]) -> dict[str, Any]:
    """Delete single observations, for good."""
    graph = _graph(memory)
    return _delete(
        memory,
        [
            item
            for given in deletions
            for item in graph.observations.get(given.entityName, ())
            if item.text in given.observations
        ],
    )


def delete_relations(memory: Memory, relations: list[Relation]) -> dict[str, Any]:
    """Delete relations, for good."""
    wanted = {_edge(relation.model_dump(by_alias=True)) for relation in relations}
    return _delete(memory, [r for r in _graph(memory).relations if _edge(r.data) in wanted])


def read_graph(memory: Memory, skip: Skip = 0) -> dict[str, Any]:
    """Read all entities and relations, page by page where there are many."""
    graph = _graph(memory)
    return graph.shown(list(graph.entities)[skip:])


def search_nodes(memory: Memory, query: str) -> dict[str, Any]:
    """Find the entities that a question is about, best first, and their relations."""
    graph = _graph(memory)
    named = [name for name in graph.entities if name.lower() in query.lower()]
    for hit in memory.search(query, _NEAREST, kinds=SOURCES):
        if hit.meta.get(_TAG) is not None:
            named += [hit.meta[key] for key in ("name", "from", "to") if key in hit.meta]
    return graph.shown(name for name in dict.fromkeys(named) if name in graph.entities)


def open_nodes(memory: Memory, names: list[str]) -> dict[str, Any]:
    """Read entities by name, and their relations."""
    graph = _graph(memory)
    return graph.shown(name for name in dict.fromkeys(names) if name in graph.entities)


class _Graph:
    """The bank's entities, observations and relations, by name, oldest first."""

    def __init__(self, items: Iterable[Item]) -> None:
        self.entities: dict[str, Item] = {}
        self.observations: dict[str, list[Item]] = {}
        self.relations: list[Item] = []
        for item in items:
            kind = item.data.get(_TAG)
            if kind == "entity":
                self.entities[item.data["name"]] = item
            elif kind == "observation":
                self.observations.setdefault(item.data["name"], []).append(item)
            elif kind == "relation":
                self.relations.append(item)

    def shown(self, names: Iterable[str]) -> dict[str, Any]:
        """The subgraph of some entities; a relation is in it if one of its ends is."""
        kept = list(names)
        return {
            "entities": [
                {
                    "name": name,
                    "entityType": self.entities[name].data["entityType"],
                    "observations": [item.text for item in self.observations.get(name, ())],
                }
                for name in kept
            ],
            "relations": [
                {key: r.data[key] for key in ("from", "to", "relationType")}
                for r in self.relations
                if {r.data["from"], r.data["to"]} & set(kept)
            ],
        }


def _graph(memory: Memory) -> _Graph:
    return _Graph(memory.view().scan(*SOURCES))


def _turn(text: str, actor: str, kind: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"content": text, "actor": actor, "meta": {_TAG: kind, **fields}}


def _entity(entity: Entity) -> dict[str, Any]:
    fields = {"name": entity.name, "entityType": entity.entityType}
    return _turn(f"{entity.name} ({entity.entityType})", entity.name, "entity", fields)


def _observation(name: str, text: str) -> dict[str, Any]:
    return _turn(text, name, "observation", {"name": name})


def _edge(fields: Mapping[str, Any]) -> tuple[str, str, str]:
    return fields["from"], fields["relationType"], fields["to"]


def _store(memory: Memory, turns: list[dict[str, Any]]) -> None:
    if turns:
        memory.add(turns)


def _delete(memory: Memory, items: Iterable[Item]) -> dict[str, Any]:
    gone: set[str] = set()
    for item in items:
        if item.id not in gone:
            gone.update(memory.delete(item.id))
    return {"deleted": sorted(gone)}


_WRITES, _DELETES = Hints(idempotent=True), Hints(destructive=True, idempotent=True)
_READS = Hints(read_only=True, idempotent=True)
GRAPH_TOOLS: tuple[tuple[Callable[..., Any], Hints], ...] = (
    (create_entities, _WRITES),
    (create_relations, _WRITES),
    (add_observations, _WRITES),
    (delete_entities, _DELETES),
    (delete_observations, _DELETES),
    (delete_relations, _DELETES),
    (read_graph, _READS),
    (search_nodes, _READS),
    (open_nodes, _READS),
)
