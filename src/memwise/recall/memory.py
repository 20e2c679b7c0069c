"""`Memory`: long-term memory for an agent in one file, without a server and without an LLM."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import date, datetime
from functools import partial
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

import numpy as np

from memwise.budget import Budget, Ledger
from memwise.catalogue import load
from memwise.codec import np as codec
from memwise.errors import EmbedderMismatch, InvalidKnob, MemwiseError, StoreError, UnknownItem
from memwise.recall.engine.client import ChatClient, parse_llm
from memwise.recall.engine.dates import instant, iso
from memwise.recall.engine.embed import Embedder, embedder
from memwise.recall.engine.extract import Extractor, Rules
from memwise.recall.engine.index import Floats, Index
from memwise.recall.engine.intake import CHUNK_CHARACTERS, Content, drafts, is_text
from memwise.recall.engine.keep import Keeper, checked
from memwise.recall.engine.llm import LLM, stood_in
from memwise.recall.engine.pack import Candidate, as_hit
from memwise.recall.engine.plain import Plain
from memwise.recall.engine.policy import Policy, Step, overrides
from memwise.recall.engine.rank import Query
from memwise.recall.engine.records import (
    KINDS,
    NOTHING,
    SOURCES,
    Add,
    Context,
    Expire,
    Hit,
    Instant,
    Item,
    Link,
    Op,
    Receipt,
    Replace,
)
from memwise.recall.engine.store import WITH_NEW, Conflict, SQLite
from memwise.recall.engine.tables import Bank, Code
from memwise.recall.engine.text import n_tokens, phrased, spoken, term_bytes

At: TypeAlias = str | int | float | datetime | date
Tokenizer: TypeAlias = Callable[[str], Any]
VECTOR_CODEC = "int8/row:f16"
_TRIES = 4  # plans on a snapshot before the write lock is taken first
_POOL = 64  # candidates from which a context is packed


class Memory:
    """Remember what an agent is told, and find it again inside a token budget.

    One file holds many banks; a bank never sees another's items. Several processes and threads may
    use one file. Every call is one durable transaction.

    Args:
        path: the file, made when absent; ":memory:" keeps everything in RAM.
        bank: name of the bank (a user, an agent, a project).
        policy: how memories are derived, ranked, packed and forgotten: a name of
            `memwise methods --room recall`, a policy object, or None for what the bank recorded
            (at first the engine's own recipe).
        embedder: "auto", "minilm", "ngrams", "none", a sentence-transformers folder, an
            OpenAI-compatible URL, or an object with `encode`, `dim` and `fingerprint`. A file keeps
            the one with which it was made.
        tokenizer: counts tokens: a function from text to a number or a list, or an object with
            `encode`. Without it a token is four characters.
        llm: OpenAI-compatible URL (`http://host:port/v1#model`), client or extractor; rules stand
            in when it fails.
        budget: most bytes of file, WAL and RAM indexes together, for example "64MiB"; the least
            valuable items are forgotten to keep it.
        clock: returns the present; for replays and tests.
        durability: "process" survives `kill -9`, "power" also a power cut.

    Raises:
        InvalidKnob, UnknownMethod: an argument is wrong.
        EmbedderMismatch: the file was made with another embedder.
        StoreCorrupt, StoreLocked, StoreError: the file cannot be used; the message says what to do.
    """

    def __init__(
        self,
        path: str | Path,
        bank: str = "default",
        policy: str | Policy | None = None,
        embedder: str | Embedder = "auto",
        tokenizer: Tokenizer | Any | None = None,
        llm: str | ChatClient | Extractor | None = None,
        budget: str | int | None = None,
        clock: Callable[[], At] | None = None,
        durability: Literal["process", "power"] = "process",
    ):
        if not isinstance(bank, str) or not bank or len(bank) > 256 or not is_text(bank):
            raise InvalidKnob(f"bank={bank!r}: use a name of 1 to 256 characters")
        limit = checked(budget)
        chosen = named_policy(policy) if policy is not None else None
        self._count = _counter(tokenizer)
        self._clock = _microseconds(clock)
        self._extract = _extractor(llm)
        self._lock = threading.RLock()
        self._store = SQLite(path, durability)
        try:
            with self._store.guard():
                self._embedder = self._settle(embedder)
                self._store.fingerprint = self._embedder.fingerprint
                self._bank = self._store.bank(bank, chosen.name if chosen else None)
            self.policy = chosen or named_policy(self._bank.policy or "plain")
            self._policy_name = self.policy.name
            self._codec = codec.codec(VECTOR_CODEC)
            self._index = Index(
                self._store, self._bank, self.policy.name, self._embedder.dim, self._decode,
                exact_bytes=limit // 8 if limit else 12 << 20,
            )  # fmt: skip
            self._keeper = Keeper(self._store, limit)
        except BaseException:
            self._store.close()
            raise

    def __enter__(self) -> Memory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; further calls fail."""
        with self._lock:
            self._store.close()

    @property
    def bank(self) -> str:
        """Name of the bank."""
        return self._bank.name

    @property
    def path(self) -> str:
        """Path of the file."""
        return self._store.path

    # ------------------------------------------------------------ writing

    def add(
        self,
        content: Content,
        *,
        at: At | None = None,
        actor: str = "",
        session: str = "",
        meta: Mapping[str, Any] | None = None,
    ) -> Receipt:
        """Store what was said.

        Args:
            content: a text, a message `{"role", "content"}`, or a list of these; a message may
                carry `at`, `actor`, `session` and `meta` of its own.
            at: when it was said (ISO 8601, datetime, epoch seconds, "1:56 pm on 8 May, 2023");
                default is the clock.
            actor: who said it.
            session: the conversation it belongs to.
            meta: your own fields; they come back with every hit.

        Returns:
            What was stored. A turn that is already there keeps its id.

        Raises:
            InvalidKnob: empty or binary text, an unknown role, a wrong date; nothing is stored.
            BudgetExceeded: the budget is too small even after forgetting everything else.
        """
        now = self._now()
        when = None if at is None else instant(at)
        adds = drafts(content, at=when, now=now, actor=actor, session=session, meta=meta or {})
        return self.ingest(adds, now)

    def ingest(self, adds: Sequence[Add], now: Instant, call: int | None = None) -> Receipt:
        """Store sources that `drafts` made, as a part of operation `call` (for importers)."""
        receipt = NOTHING if call is None else Receipt(operation=call)
        with self._lock, self._store.guard():
            for _, group in groupby(adds, key=lambda a: a.session):
                for part in self._keeper.portions(list(group)):
                    begun = call is None and receipt.operation is not None
                    with self.whole(receipt.operation) if begun else nullcontext():
                        receipt += self._store_turns(part, now, receipt.operation)
        return receipt

    @contextmanager
    def whole(self, operation: int | None) -> Iterator[None]:
        """Take back what a call has stored so far, if it fails inside."""
        try:
            yield
        except MemwiseError as error:
            if operation is not None:
                try:
                    self.undo(operation)
                except MemwiseError as other:
                    error.add_note(f"its first part is stored as operation {operation}: {other}")
            raise

    def carry_out(
        self,
        ops: Sequence[Op],
        verb: str,
        now: Instant,
        *,
        policy: str | None = None,
        call: int | None = None,
    ) -> Receipt:
        """Apply operations that were not planned on a snapshot, as a part of operation `call`."""
        with self._lock, self._store.guard():
            codes = self._codes_of(ops, {})
            room = self._keeper.make_room(self, ops, codes, now, call)
            return room + self._store.apply(
                self._bank, ops, at=now, verb=verb, codes=codes, call=room.operation,
                policy=self._policy_name if policy is None else policy,
            )  # fmt: skip

    def restore(
        self,
        items: Sequence[Item],
        links: Sequence[Link],
        vectors: Collection[int],
        now: Instant,
        call: int | None = None,
    ) -> Receipt:
        """Write records of an export as they are, as a part of operation `call` (for importers).

        Args:
            items: in the order of their rows, which were set aside (`SQLite.reserve`).
            links: those that leave the items.
            vectors: rows of the items that similarity search is to find.
            now: the time of the call.
            call: number of the operation; None = a new one.
        """
        with self._lock, self._store.guard():
            adds = [
                Add(i.kind, i.text, actor=i.actor, data=i.data, vector=i.row in vectors)
                for i in items
            ]
            codes = self._codes(adds)
            room = self._keeper.make_room(self, adds, codes, now, call)
            ready = {i.row: codes[id(a)] for i, a in zip(items, adds, strict=True)}
            number = self._store.restore(
                self._bank, items, links, ready, at=now, call=room.operation
            )
            ids = tuple(i.id for i in items if i.is_source)
            return room + Receipt(ids, len(items), operation=number)

    def _store_turns(self, adds: list[Add], now: Instant, call: int | None) -> Receipt:
        codes = self._codes(adds)
        room = self._keeper.make_room(self, adds, codes, now, call)
        done = room + self._end_session(now, adds[0].session, room.operation)
        if overrides(self.policy, "on_turns"):
            return done + self._plan(
                "add", now, done.operation, lambda step: self._with_turns(step, adds), codes
            )
        return done + self._store.apply(
            self._bank, adds, at=now, verb="add", codes=codes, call=done.operation
        )

    def _with_turns(self, step: Step, adds: list[Add]) -> list[Op]:
        fresh = self._predicted(step, adds)
        if not fresh:
            return [*adds]
        return [*adds, *self.policy.on_turns(self._step(step.now, step.bank, fresh))]

    def _predicted(self, step: Step, adds: list[Add]) -> list[Item]:
        """The items that new turns will be: their rows follow from the bank's next number."""
        codes, held = self._store.recognize(step.bank, adds, step.now)
        known = set(held)
        fresh: list[Item] = []
        for add in adds:
            if (code := codes[add]) not in known:
                known.add(code)
                row = step.bank.first + step.bank.next + len(fresh)
                fresh.append(
                    Item(
                        row, add.kind, add.text, add.actor, add.session,
                        step.now if add.at is None else add.at, step.now, data=add.data,
                    )
                )  # fmt: skip
        return fresh

    def _end_session(self, now: Instant, session: str | None, call: int | None) -> Receipt:
        """Run `on_session_end` for the open session, unless `session` continues it."""
        if not overrides(self.policy, "on_session_end"):
            return NOTHING
        last = self._store.last_session(self._bank)
        if not last or last == session:
            return NOTHING

        def plan(step: Step) -> Sequence[Op]:
            ended = self._store.last_end(step.bank)
            turns = [t for t in step.scan(*SOURCES, session=last) if t.row > ended]
            # all of them may have been forgotten meanwhile
            return self.policy.on_session_end(replace(step, turns=turns)) if turns else ()

        return self._plan("session end", now, call, plan)

    def _plan(
        self,
        verb: str,
        now: Instant,
        call: int | None,
        plan: Callable[[Step], Sequence[Op]],
        codes: Mapping[int, Code] | None = None,
    ) -> Receipt:
        """Let the policy plan on a snapshot and apply the plan if the bank did not change.

        Embedding and extraction thus happen outside the write lock. After a few conflicts the lock
        is taken first.
        """
        room = NOTHING if call is None else Receipt(operation=call)
        for _ in range(_TRIES):
            step = self._step(now, self._store.seen(self._bank))
            ops = plan(step)
            ready = self._codes_of(ops, codes or {})
            more = self._keeper.make_room(self, ops, ready, now, room.operation)
            room += more
            if more.forgotten:
                continue  # the plan may rest on what went
            try:
                return room + self._apply(step, ops, ready, verb, room.operation)
            except Conflict:
                continue
        with self._store.write():
            step = self._step(now)
            ops = plan(step)
            ready = self._codes_of(ops, codes or {})
            return room + self._apply(step, ops, ready, verb, room.operation)

    def _apply(
        self, step: Step, ops: Sequence[Op], codes: Mapping[int, Code], verb: str, call: int | None
    ) -> Receipt:
        notes = stood_in(self._extract)
        if not ops:
            return Receipt(operation=call, notes=notes)
        done = self._store.apply(
            step.bank, ops, at=step.now, verb=verb, codes=codes, policy=self._policy_name,
            expect=step.bank.version, call=call,
        )  # fmt: skip
        return replace(done, notes=notes) if notes else done

    def _codes_of(self, ops: Sequence[Op], done: Mapping[int, Code]) -> dict[int, Code]:
        adds = [op if isinstance(op, Add) else op.new for op in ops if isinstance(op, WITH_NEW)]
        return dict(done) | self._codes([a for a in adds if id(a) not in done])

    def _codes(self, adds: Sequence[Add]) -> dict[int, Code]:
        """Terms and vectors of new items, by `id` of their `Add`."""
        blobs: list[bytes | None] = [None] * len(adds)
        wanted = [i for i, a in enumerate(adds) if a.vector] if self._embedder.dim else []
        if wanted:
            texts = [phrased(adds[i].kind, adds[i].actor, adds[i].text) for i in wanted]
            vectors = self._embedder.encode(texts, "passage")
            for i, blob in zip(
                wanted, self._codec.to_bytes(self._codec.encode(vectors)), strict=True
            ):
                blobs[i] = blob
        return {
            id(add): Code(term_bytes(add.actor, add.text), blob)
            for add, blob in zip(adds, blobs, strict=True)
        }

    def update(self, id: str, text: str) -> Receipt:
        """Replace an item's text: the old one is let go and stays in `history`.

        Raises:
            InvalidKnob: the id is unknown or was let go, or the text is empty.
        """
        now = self._now()
        with self._lock, self._store.guard():
            item = self._item(id)
            if item.expired is not None:
                raise InvalidKnob(f"{id} was let go already; update the item that superseded it")
            parts = drafts(
                text, at=item.at, now=now, actor=item.actor, session=item.session, meta=item.data
            )
            if item.is_source:
                return self._plan(
                    "update", now, None, lambda step: self._instead(step, item, parts)
                )
            if len(parts) > 1:
                raise InvalidKnob(
                    f"the text of a {item.kind} may have {CHUNK_CHARACTERS} characters"
                )
            new = replace(
                parts[0], kind=item.kind, data=item.data, extractor=item.extractor,
                valid_from=item.valid_from, valid_to=item.valid_to,
            )  # fmt: skip
            ops = [Replace(item, new, "updated")]
            return self.carry_out(ops, "update", now, policy=item.policy)

    def _instead(self, step: Step, old: Item, parts: Sequence[Add]) -> list[Op]:
        """New turns in the place of one, and what rested on it alone derived again."""
        fell = self._store.items(self._store.dependants(step.bank, old.row)).values()
        news = [replace(add, links=(("supersedes", old, 1.0),)) for add in parts]
        gone: list[Op] = [Expire(item, "updated") for item in fell if item.expired is None]
        return gone + self._with_turns(step, news)

    def delete(self, id: str) -> tuple[str, ...]:
        """Remove an item and what rests on it alone, for good: from file, log, attic and WAL.

        Returns:
            Ids that are gone.
        """
        with self._lock, self._store.guard():
            row = self._item(id, forgotten=True).row
            return tuple(self._store.delete(self._bank, row, at=self._now()))

    def undo(self, operation: int | None = None) -> str:
        """Take back the last call that changed this bank, or the one of that number.

        Returns:
            The verb that was taken back.

        Raises:
            StoreError: there is nothing to undo, or later calls build on it.
        """
        with self._lock, self._store.guard():
            now = self._now()
            while True:
                back, freed = self._store.returning(self._bank, operation)
                adds = [Add(i.kind, i.text, actor=i.actor, data=i.data) for i in back]
                codes = self._codes(adds)
                ready = {i.row: codes[id(a)] for i, a in zip(back, adds, strict=True)}
                rows = {id(a): i.row for i, a in zip(back, adds, strict=True)}
                try:
                    for part in self._keeper.parts(self, adds, codes, freed):
                        some = {rows[id(a)]: codes[id(a)] for a in part}
                        self._store.bring_back(self._bank, some, at=now)
                    return self._store.undo(self._bank, at=now, operation=operation, codes=ready)
                except Conflict:
                    continue

    def forget(self, *, budget: str | int | None = None, before: At | None = None) -> Receipt:
        """Forget the least valuable items until the file fits `budget`, or all from `before`.

        Forgotten items lie compressed in the attic while there is room, so `undo` brings them back.

        Returns:
            `forgotten` lists each id with the reason.
        """
        if (budget is None) == (before is None):
            raise InvalidKnob("forget() needs either budget= (bytes) or before= (a date)")
        with self._lock, self._store.guard():
            if before is not None:
                return self._keeper.forget_before(self, instant(before), self._now())
            return self._keeper.forget(self, Budget(budget or 0), self._now())

    def reflect(self) -> Receipt:
        """End the open session now: the policy derives what it derives at a session's end."""
        with self._lock, self._store.guard():
            return self._end_session(self._now(), None, None)

    def rebuild(self) -> Receipt:
        """Drop what this policy derived and derive it again from the sources, by session."""
        with self._lock, self._store.guard():
            now = self._now()
            self._store.drop(self._bank, [self._policy_name], at=now)
            turns = self._step(now).scan(*SOURCES)
            receipt = Receipt()
            for session, group in groupby(turns, key=lambda t: t.session):
                part = list(group)
                hooks = [("on_turns", self.policy.on_turns, part[0].row)]
                if session:
                    ended = part[-1].row + 1
                    hooks.append(("on_session_end", self.policy.on_session_end, ended))
                for name, hook, horizon in hooks:
                    if overrides(self.policy, name):
                        plan = partial(_on, hook, part, horizon)
                        receipt += self._plan("rebuild", now, receipt.operation, plan)
            return receipt

    def act(self, plan: Callable[[Step], Sequence[Op]], verb: str = "act") -> Receipt:
        """Carry out what a plan makes of the bank as it is: for agents that edit their own memory.

        The plan may be called again if another process changed the bank meanwhile; what it raises
        leaves everything as it was.
        """
        with self._lock, self._store.guard():
            return self._plan(verb, self._now(), None, plan)

    # ------------------------------------------------------------ reading

    def search(
        self,
        query: str,
        k: int = 10,
        *,
        kinds: Sequence[str] = (),
        actor: str | None = None,
        session: str | None = None,
        since: At | None = None,
        until: At | None = None,
        at: At | None = None,
        known_at: At | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> list[Hit]:
        """The k items that answer a query best; filters apply inside the search.

        Args:
            query: a question or some words.
            k: most hits.
            kinds: only these kinds ("turn", "fact", ...); default is what the policy ranks.
            actor: only what this actor said.
            session: only this session.
            since: only event times from here on.
            until: only event times before this.
            at: only what was true then.
            known_at: as the memory knew it then.
            where: only items whose `meta` has these values.

        Returns:
            Hits, best first; `hit.why` explains the score, `hit.sources` are the turns it rests on.
        """
        if k < 1:
            raise InvalidKnob(f"k={k}: ask for at least 1 hit")
        with self._lock, self._store.guard():
            asked = self._query(query, k, kinds, actor, session, since, until, at, known_at, where)
            hits, step = self._ranked(asked)
            self._recalled(step, hits)
            return hits

    def context(
        self,
        query: str,
        tokens: int = 1000,
        *,
        actor: str | None = None,
        session: str | None = None,
        since: At | None = None,
        until: At | None = None,
        at: At | None = None,
        known_at: At | None = None,
    ) -> Context:
        """What answers a query, packed for a prompt.

        Args:
            query: a question or some words.
            tokens: most tokens of the whole text, tags and dates included.
            actor: only what this actor said.
            session: only this session.
            since: only event times from here on.
            until: only event times before this.
            at: only what was true then.
            known_at: as the memory knew it then.

        Returns:
            `.text` for the prompt, `.parts` (hits) in the order of the text, `.tokens`.
        """
        if tokens < 1:
            raise InvalidKnob(f"tokens={tokens}: allow at least 1 token")
        with self._lock, self._store.guard():
            asked = self._query(query, _POOL, (), actor, session, since, until, at, known_at, None)
            step = replace(self._step(self._now()), query=asked, tokens=tokens)
            step = replace(step, found=step.candidates(self.policy.rank(step)))
            packed = self.policy.pack(step)
            rows = self._rows([part.id for part in packed.parts])
            parts = self._with_sources(packed.parts, rows)
            self._recalled(step, parts)
            return replace(packed, parts=tuple(parts))

    def facts(
        self,
        subject: str | None = None,
        relation: str | None = None,
        object: str | None = None,
        *,
        at: At | None = None,
        known_at: At | None = None,
    ) -> list[Hit]:
        """Facts by subject, relation and object (any may be left out), oldest first.

        A functional relation (lives in, works at, ...) has one value at a time: the one that began
        last. With `at` the value then; with `known_at` what the memory believed then.
        """
        given = {"subject": subject, "relation": relation, "object": object}
        wanted = {key: value for key, value in given.items() if value is not None}
        when = None if at is None else instant(at)
        known = None if known_at is None else instant(known_at)
        with self._lock, self._store.guard(), self._store.read():
            step = self._step(self._now())
            if not wanted:
                found = step.scan("fact", at=when, known_at=known)
            else:
                asked = step.get(sorted(self._store.matching(step.bank, wanted))).values()
                mine = (i for i in asked if i.kind == "fact" and i.policy == step.policy)
                found = [item for item in mine if item.holds(when, known)]
            return self._hits(_in_force(found), step)

    def timeline(self, entity: str, k: int = 50) -> list[Hit]:
        """What is known of someone or something, in the order of time: facts, or else turns."""
        with self._lock, self._store.guard(), self._store.read():
            step = self._step(self._now())
            name = entity.lower()
            items = [i for i in step.scan("fact") if name in i.text.lower()]
            if not items:
                items = [i for i in step.scan(*SOURCES) if name in spoken(i.actor, i.text).lower()]
            items.sort(key=lambda i: (i.at if i.valid_from is None else i.valid_from, i.row))
            return self._hits(items[:k], step)

    def get(self, id: str) -> Hit:
        """The item of that id, whether it still holds or not."""
        with self._lock, self._store.guard():
            return self._hits([self._item(id)], self._step(self._now()))[0]

    def history(self, id: str) -> list[dict[str, str]]:
        """What happened to an item: learnt when and from what, superseded by what, and so on."""
        with self._lock, self._store.guard():
            item = self._item(id)
            near = {i.row: i.id for i in self._store.items(self._near(item)).values()}
            events = [(item.created, "stored", item.text)]
            events += [
                (link.created, link.rel.replace("_", " "), near.get(link.dst, "?"))
                for link in self._store.links([item.row])
            ]
            events += [
                (link.created, "superseded by", near.get(link.src, "?"))
                for link in self._store.links([item.row], ["supersedes"], incoming=True)
            ]
            if item.uses:
                events.append((item.last_use, "recalled", f"{item.uses} times"))
            if item.expired is not None:
                events.append((item.expired, "let go", ""))
            return [{"at": iso(t), "event": e, "what": w} for t, e, w in sorted(events)]

    def report(self) -> Ledger:
        """Where every byte lies: text by kind, vectors, terms, links, log, attic, WAL, indexes."""
        with self._lock, self._store.guard():
            return self._keeper.ledger(self)

    def stats(self) -> dict[str, int]:
        """Number of live items by kind."""
        with self._lock, self._store.guard():
            step = self._step(self._now())
            return self._store.counts(step.bank, ("", step.policy))

    # ------------------------------------------------------------ inside

    def view(self) -> Step:
        """The bank as it is now, as a policy's hook would see it (for engines and checks)."""
        with self._lock, self._store.guard():
            return self._step(self._now())

    def index_bytes(self) -> int:
        """RAM that this bank's indexes hold, built if they were not yet."""
        with self._lock, self._store.guard():
            return self._step(0).index.nbytes

    def _now(self) -> Instant:
        return self._clock()

    def _settle(self, wanted: str | Embedder) -> Embedder:
        """The file's embedder; the first to open a file chooses it."""
        recorded = self._store.meta("embedder")
        if recorded is None:
            made = embedder(wanted)
            spec = wanted if isinstance(wanted, str) and wanted != "auto" else ""
            kept = self._store.settle_meta("embedder", made.fingerprint)
            self._store.settle_meta("embedder spec", spec or getattr(made, "spec", ""))
        elif wanted == "auto":
            made = embedder(self._store.meta("embedder spec") or "ngrams")
            kept = recorded
        else:
            made, kept = embedder(wanted), recorded
        if made.fingerprint != kept:
            known = self._store.meta("embedder spec")
            how = "embedder='auto'" if known else "that embedder object"
            raise EmbedderMismatch(
                f"{self._store.path} was made with embedder {kept!r}, not {made.fingerprint!r}; "
                f"open it with {how}, or re-embed it with "
                f"`memwise doctor {self._store.path} --reembed`"
            )
        return made

    def _decode(self, blobs: Sequence[bytes | None]) -> Floats:
        out = np.zeros((len(blobs), self._embedder.dim), np.float32)
        there = [i for i, blob in enumerate(blobs) if blob]
        if there:
            coded = self._codec.from_bytes([blobs[i] or b"" for i in there], self._embedder.dim)
            out[there] = self._codec.decode(coded)
        return out

    def _step(self, now: Instant, bank: Bank | None = None, turns: Sequence[Item] = ()) -> Step:
        self._bank = bank or self._store.refresh(self._bank)
        return Step(
            now, self._store, self._bank, self._policy_name, self._extract, self._encode,
            self._count, self._open_index, turns,
        )  # fmt: skip

    def _open_index(self, bank: Bank) -> Index:
        with self._store.read():
            self._index.refresh(bank)
        return self._index

    def _encode(self, texts: Sequence[str]) -> Floats:
        return np.asarray(self._embedder.encode(list(texts), "query"), np.float32)

    def _query(
        self,
        text: str,
        k: int,
        kinds: Sequence[str],
        actor: str | None,
        session: str | None,
        since: At | None,
        until: At | None,
        at: At | None,
        known_at: At | None,
        where: Mapping[str, Any] | None,
    ) -> Query:
        if not isinstance(text, str) or not text.strip():
            raise InvalidKnob("the query is empty; ask for something")
        if not is_text(text):
            raise InvalidKnob("the query holds lone surrogates or NUL: it looks like binary data")
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise InvalidKnob(f"kind {unknown[0]!r}: use some of {', '.join(KINDS)}")
        for value in (where or {}).values():
            wide = isinstance(value, int) and not -(1 << 63) <= value < 1 << 63
            if wide or not isinstance(value, str | int | float | None):
                raise InvalidKnob(
                    f"where={where!r}: compare fields with texts, numbers of at most 64 bits or "
                    "None"
                )
        start, end, true_at, known = (
            None if t is None else instant(t) for t in (since, until, at, known_at)
        )
        rows = self._store.matching(self._bank, where) if where else None
        return Query(text, k, tuple(kinds), actor, session, start, end, true_at, known, rows)

    def _ranked(self, query: Query) -> tuple[list[Hit], Step]:
        with self._store.read():
            step = replace(self._step(0), query=query)
            ranking = self.policy.rank(step)
            items = self._store.items(ranking.rows[: query.k])
            step = replace(
                step,
                found=[
                    Candidate(items[row], score)
                    for row, score in zip(ranking.rows, ranking.scores, strict=True)
                    if row in items
                ],
            )
            why = dict(zip(ranking.rows, ranking.why, strict=False))
            return self._hits(
                [c.item for c in step.found], step, [c.score for c in step.found], why
            ), step

    def _recalled(self, step: Step, hits: Sequence[Hit]) -> None:
        if not hits or not overrides(self.policy, "on_recall"):
            return
        now = self._now()
        ops = self.policy.on_recall(replace(step, now=now))
        if ops:
            self.carry_out(ops, "recall", now)

    def _hits(
        self,
        items: Sequence[Item],
        step: Step,
        scores: Sequence[float] = (),
        why: Mapping[int, Mapping[str, float]] | None = None,
    ) -> list[Hit]:
        hits = [
            as_hit(item, scores[n] if scores else 1.0, why=(why or {}).get(item.row))
            for n, item in enumerate(items)
        ]
        return self._with_sources(hits, [i.row for i in items])

    def _with_sources(self, hits: Sequence[Hit], rows: Sequence[int]) -> list[Hit]:
        derived = [row for hit, row in zip(hits, rows, strict=True) if hit.kind not in SOURCES]
        origins = self._open_index(self._bank).origins(derived) if derived else {}
        turns = self._store.items({r for found in origins.values() for r in found})
        as_hits = {row: as_hit(item) for row, item in turns.items()}
        out = []
        for hit, row in zip(hits, rows, strict=True):
            sources = (
                (hit,)
                if hit.kind in SOURCES
                else tuple(as_hits[r] for r in origins[row] if r in as_hits)
            )
            out.append(hit.resting_on(sources))
        return out

    def _rows(self, ids: Sequence[str]) -> list[int]:
        return [self._bank.first + int(id[1:]) for id in ids]

    def _item(self, id: str, *, forgotten: bool = False) -> Item:
        if not isinstance(id, str) or not id[1:].isdecimal() or len(id) > 12:
            raise UnknownItem(
                f"id={str(id)[:40]!r}: ids look like 't12'; take them from search or add"
            )
        row = self._rows([id])[0]
        item = self._store.items([row]).get(row)
        attic = {} if item else self._store.forgotten([row])
        if forgotten or not attic:
            item = item or attic.get(row)
        if item is None or item.id != id:
            known = attic and attic[row].id == id
            raise UnknownItem(
                f"bank {self.bank!r} forgot {id!r} to keep its budget; undo() brings it back"
                if known
                else f"bank {self.bank!r} has no item {id!r}: it never was, or is gone for good"
            )
        return item

    def _near(self, item: Item) -> list[int]:
        out = self._store.links([item.row])
        back = self._store.links([item.row], incoming=True)
        return [link.dst for link in out] + [link.src for link in back]


def _on(
    hook: Callable[[Step], Sequence[Op]], turns: list[Item], horizon: int, step: Step
) -> Sequence[Op]:
    return hook(replace(step, turns=turns, horizon=horizon))


def _in_force(facts: Sequence[Item]) -> list[Item]:
    """Of the values of a functional relation, the one that began last."""
    newest: dict[tuple[str, str], Item] = {}
    out = []
    for fact in facts:
        if not fact.data.get("functional"):
            out.append(fact)
            continue
        key = (str(fact.data.get("subject")).lower(), str(fact.data.get("relation")).lower())
        held = newest.get(key)
        if held is None or _began(fact) >= _began(held):
            newest[key] = fact
    return sorted([*out, *newest.values()], key=lambda f: (_began(f), f.row))


def _began(item: Item) -> Instant:
    return item.at if item.valid_from is None else item.valid_from


def named_policy(policy: str | Policy) -> Policy:
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str):
        raise InvalidKnob(f"policy={policy!r}: give the name of a policy or a policy object")
    if policy == "plain":
        return Plain()
    made = load(policy)()
    if not isinstance(made, Policy):
        raise InvalidKnob(
            f"policy={policy!r} is a method of another room; see `memwise methods --room recall`"
        )
    return made


def _extractor(llm: str | ChatClient | Extractor | None) -> Extractor:
    if llm is None:
        return Rules()
    client = ChatClient(*parse_llm(llm)) if isinstance(llm, str) else llm
    return LLM(client, Rules()) if isinstance(client, ChatClient) else client


def _microseconds(clock: Callable[[], At] | None) -> Callable[[], Instant]:
    if clock is None:
        return lambda: time.time_ns() // 1000
    return lambda: instant(clock())


def _counter(tokenizer: Tokenizer | Any | None) -> Callable[[str], int]:
    if tokenizer is None:
        return n_tokens
    encode = getattr(tokenizer, "encode", tokenizer)
    if not callable(encode):
        raise InvalidKnob(f"tokenizer={tokenizer!r}: give a function or an object with encode()")

    def count(text: str) -> int:
        found = encode(text)
        return found if isinstance(found, int) else len(getattr(found, "ids", found))

    return count


__all__ = ["At", "Memory", "StoreError"]
