import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from memwise import Memory, errors
from memwise.errors import BudgetExceeded, InvalidKnob, MemwiseError, StoreLocked

pytest.importorskip("fastapi")

from starlette.testclient import TestClient

from memwise.serve import Options, Pool, UnknownBank
from memwise.serve.guard import Limit, check_exposure
from memwise.serve.http import listen
from memwise.serve.rest import STATUS, create_app

HERE = "http://127.0.0.1:8765"


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[Pool]:
    made = Pool(tmp_path / "m.db", Options(embedder="none"))
    yield made
    made.close()


@pytest.fixture
def client(pool: Pool) -> Iterator[TestClient]:
    with TestClient(create_app(pool), base_url=HERE) as made:
        yield made


# ---------------------------------------------------------------- verbs


def test_what_is_posted_is_found(client: TestClient) -> None:
    told = {"content": "Ana moved to Lisbon.", "at": "2026-05-02", "meta": {"ref": 7}}
    assert client.post("/v1/banks/ana/add", json=told).json()["ids"] == ["t1"]
    hits = client.get("/v1/banks/ana/search", params={"query": "Lisbon?"}).json()
    assert (hits[0]["text"], hits[0]["at"]) == ("Ana moved to Lisbon.", "2026-05-02T00:00:00Z")
    assert client.post("/v1/banks/ana/search", json={"query": "Lisbon?"}).json() == hits


def test_a_query_may_carry_lists_and_mappings(client: TestClient) -> None:
    for ref in (1, 2):
        told = {"content": f"tea {ref}", "meta": {"ref": ref}}
        client.post("/v1/banks/ana/add", json=told)
    asked = {"query": "tea", "where": '{"ref": 2}', "kinds": ["turn", "fact"]}
    hits = client.get("/v1/banks/ana/search", params=asked).json()
    assert [hit["text"] for hit in hits] == ["tea 2"]


def test_a_verb_without_parameters_needs_no_body(client: TestClient) -> None:
    client.post("/v1/banks/ana/add", json={"content": "tea"})
    assert client.post("/v1/banks/ana/undo").json() == {"undone": "add"}


def test_a_date_may_be_seconds_since_the_epoch(client: TestClient) -> None:
    client.post("/v1/banks/ana/add", json={"content": "tea", "at": "1970-01-02"})
    assert client.get("/v1/banks/ana/get", params={"id": "t1"}).json()["at"].startswith("1970")


def test_a_bank_may_have_any_name(client: TestClient) -> None:
    client.post("/v1/banks/team%2Fana%20b/add", json={"content": "tea"})
    assert client.get("/v1/banks").json()[0]["bank"] == "team/ana b"
    assert len(client.get("/v1/banks/team%2Fana%20b/search", params={"query": "tea"}).json()) == 1


def test_one_bank_never_sees_another(client: TestClient) -> None:
    client.post("/v1/banks/ana/add", json={"content": "My password is swordfish."})
    client.post("/v1/banks/ben/add", json={"content": "Hello."})
    for verb, asked in (
        ("search", {"query": "password swordfish"}),
        ("context", {"query": "password swordfish"}),
        ("timeline", {"entity": "password"}),
        ("facts", {}),
        ("export", {}),
        ("get", {"id": "t1"}),
    ):
        answer = client.get(f"/v1/banks/ben/{verb}", params=asked)
        assert answer.status_code == 200
        assert "swordfish" not in answer.text


def test_reading_makes_no_bank(client: TestClient, pool: Pool) -> None:
    answer = client.get("/v1/banks/nobody/search", params={"query": "tea"})
    assert answer.status_code == 404
    assert pool.names() == []
    assert not Path(pool.path).exists()


def test_mem0_clients_find_their_routes(client: TestClient) -> None:
    told = {"messages": [{"role": "user", "content": "I like tea."}], "user_id": "ana"}
    (added,) = client.post("/memories", json=told).json()["results"]
    assert (added["memory"], added["event"]) == ("I like tea.", "ADD")
    found = client.post("/search", json={"query": "tea", "filters": {"user_id": "ana"}}).json()
    assert found["results"][0]["id"] == added["id"]
    path, who = f"/memories/{added['id']}", {"user_id": "ana"}
    assert client.get(path, params=who).json()["memory"] == "I like tea."
    assert client.put(path, params=who, json={"text": "I like coffee."}).status_code == 200
    assert "superseded by" in client.get(f"{path}/history", params=who).text
    assert client.delete(path, params=who).status_code == 200
    assert client.get(path, params=who).status_code == 404


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("verb", "body", "status", "kind", "message"),
    [
        ("search", {"query": " "}, 400, "InvalidKnob", "the query is empty"),
        ("search", {"query": "tea", "at": "someday"}, 400, "InvalidKnob", "not a time"),
        ("search", {"query": "tea", "nearest": 3}, 422, "InvalidRequest", "nearest: Extra"),
        ("search", {"query": "tea", "k": "many"}, 422, "InvalidRequest", "k: Input should be"),
        ("search", {}, 422, "InvalidRequest", "query: Field required"),
        ("add", {"content": {"role": "king", "content": "a"}}, 400, "InvalidKnob", "role='king'"),
        ("add", {"content": ""}, 400, "InvalidKnob", "empty"),
        ("add", {"content": "\0"}, 400, "InvalidKnob", "binary"),
        ("get", {"id": "t99"}, 404, "UnknownItem", "no item 't99'"),
        ("delete", {"id": "t99"}, 404, "UnknownItem", "no item 't99'"),
        ("update", {"id": "nonsense", "text": "a"}, 404, "UnknownItem", "ids look like"),
        ("facts", {"subject": "\ud800"}, 400, "InvalidKnob", "binary"),
        ("import", {"content": "\ud800"}, 400, "InvalidKnob", "binary"),
        ("search", {"query": "tea", "where": {"a": "\0"}}, 400, "InvalidKnob", "binary"),
        ("search", {"query": "tea", "where": {"a": 10**30}}, 400, "InvalidKnob", "64 bits"),
        ("facts", {"k": 0}, 400, "InvalidKnob", "k=0"),
        ("facts", {"skip": -1}, 400, "InvalidKnob", "skip=-1"),
        ("timeline", {"entity": " "}, 400, "InvalidKnob", "the entity is empty"),
        ("forget", {"budget": "1KiB"}, 507, "BudgetExceeded", "at least"),
        ("undo", {"operation": 99}, 409, "StoreError", ""),
    ],
)
def test_an_error_is_json_with_a_status(
    client: TestClient, verb: str, body: dict[str, Any], status: int, kind: str, message: str
) -> None:
    client.post("/v1/banks/ana/add", json={"content": "Hello."})
    headers = {"content-type": "application/json"}
    answer = client.post(f"/v1/banks/ana/{verb}", content=json.dumps(body), headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"] == kind
    assert message in answer.json()["message"]


def test_a_forgotten_item_is_not_found_and_its_answer_names_undo(client: TestClient) -> None:
    client.post("/v1/banks/ana/add", json={"content": "Hello.", "at": "2020-01-01"})
    client.post("/v1/banks/ana/forget", json={"before": "2021-01-01"})
    answer = client.get("/v1/banks/ana/get", params={"id": "t1"})
    assert answer.status_code == 404
    assert "undo" in answer.json()["message"]


def test_long_lists_are_read_page_by_page(client: TestClient) -> None:
    for i in range(7):
        client.post(f"/v1/banks/b{i}/add", json={"content": "tea"})
        client.post("/v1/banks/ana/add", json={"content": f"P{i} moved to Rome.", "actor": "ana"})
    for path, asked in (
        ("/v1/banks", {}),
        ("/v1/banks/ana/facts", {}),
        ("/v1/banks/ana/timeline", {"entity": "rome"}),
    ):
        whole = client.get(path, params=asked).json()
        assert len(whole) >= 7
        pages = [
            client.get(path, params={**asked, "k": 3, "skip": skip}).json()
            for skip in range(0, len(whole) + 3, 3)
        ]
        assert [one for page in pages for one in page] == whole


@pytest.mark.parametrize(
    ("where", "method", "path", "body", "status", "kind"),
    [
        ("path", "GET", "/v1/nothing", b"", 404, "NotFound"),
        ("method", "GET", "/v1/banks/ana/add", b"", 405, "MethodNotAllowed"),
        ("half", "POST", "/v1/banks/ana/add", b'{"content": ', 422, "InvalidRequest"),
        ("bytes", "POST", "/v1/banks/ana/add", b'{"content": "\xff"}', 400, "BadRequest"),
        ("depth", "POST", "/v1/banks/ana/add", b"[" * 10**5 + b"]" * 10**5, 400, "BadRequest"),
    ],
)
def test_what_the_router_refuses_is_json_too(
    client: TestClient, where: str, method: str, path: str, body: bytes, status: int, kind: str
) -> None:
    headers = {"content-type": "application/json"}
    answer = client.request(method, path, content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]) == (status, kind)
    told = {"half": "the body is not JSON (", "path": "GET /v1/nothing: Not Found"}
    assert answer.json()["message"].startswith(told.get(where, ""))


# ---------------------------------------------------------------- how much may be sent


@pytest.mark.parametrize("told", [True, False])
def test_a_body_over_the_limit_is_refused_and_stores_nothing(pool: Pool, told: bool) -> None:
    def parts() -> Iterator[bytes]:
        yield b'{"content": "'
        yield b"x" * 2000
        yield b'"}'

    body = b"".join(parts()) if told else parts()
    with TestClient(create_app(pool, body_bytes=1024), base_url=HERE) as client:
        answer = client.post("/v1/banks/ana/add", content=body)
        assert answer.status_code == 413
        assert answer.json()["error"] == "ContentTooLarge"
        assert "longer than 1 KiB" in answer.json()["message"]
        assert client.get("/v1/banks").json() == []


def test_a_length_that_is_told_too_short_does_not_help(pool: Pool) -> None:
    with TestClient(create_app(pool, body_bytes=1024), base_url=HERE) as client:
        headers = {"content-length": "10"}
        answer = client.post("/v1/banks/ana/add", content=b"x" * 2000, headers=headers)
        assert answer.status_code == 413


def test_a_client_that_waits_to_be_told_is_told_before_it_sends() -> None:
    sent: list[Any] = []

    async def ask() -> None:
        async def never(*_: Any) -> Any:
            raise AssertionError("nothing is read, and nobody is asked")

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-length", b"2000"), (b"expect", b"100-continue")]
        await Limit(never, 1024)({"type": "http", "headers": headers}, never, send)

    anyio.run(ask)
    assert sent[0]["status"] == 413


def test_a_body_inside_the_limit_arrives_whole(pool: Pool) -> None:
    content = "é" * 5000
    with TestClient(create_app(pool, body_bytes=1 << 14), base_url=HERE) as client:
        receipt = client.post("/v1/banks/ana/add", json={"content": content}).json()
        texts = (
            client.get("/v1/banks/ana/get", params={"id": id}).json()["text"]
            for id in receipt["ids"]
        )
        assert "".join(texts) == content


def test_a_body_of_ten_megabytes_is_inside_the_default_limit(client: TestClient) -> None:
    told = {"messages": [], "filters": {"x": "y" * 10_000_000}}
    assert client.post("/search", json={"query": "x", **told}).status_code == 404


def test_every_class_of_error_has_a_status() -> None:
    known = {kind for kind in vars(errors).values() if isinstance(kind, type)}
    assert {kind for kind in known if issubclass(kind, MemwiseError)} <= set(STATUS)
    assert STATUS[BudgetExceeded] == 507


def test_a_locked_file_is_to_be_tried_again(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.post("/v1/banks/ana/add", json={"content": "Hello."})

    def locked(memory: Memory) -> None:
        raise StoreLocked("the file was locked")

    monkeypatch.setattr(Memory, "stats", locked)
    answer = client.get("/v1/banks/ana/stats")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")


# ---------------------------------------------------------------- who may ask


def test_a_token_is_asked_for(pool: Pool) -> None:
    with TestClient(create_app(pool, token="sesame"), base_url="http://notes.example") as client:
        assert client.get("/v1/banks").status_code == 401
        wrong = client.get("/v1/banks", headers={"authorization": "Bearer sesam"})
        assert (wrong.status_code, wrong.headers["www-authenticate"]) == (401, "Bearer")
        right = {"authorization": "Bearer sesame"}
        assert client.get("/v1/banks", headers=right).json() == []
        assert client.get("/").status_code == 200  # the page holds no data and asks for the token


def test_without_a_token_only_this_machine_is_answered(pool: Pool) -> None:
    with TestClient(create_app(pool), base_url="http://rebound.example") as client:
        assert client.get("/v1/banks").status_code == 403


def test_pages_of_other_sites_are_not_answered(client: TestClient) -> None:
    client.post("/v1/banks/ana/add", json={"content": "Hello."})
    foreign = client.post("/v1/banks/ana/undo", headers={"origin": "http://evil.example"})
    assert foreign.status_code == 403
    assert client.post("/v1/banks/ana/undo", headers={"origin": HERE}).status_code == 200


def test_no_network_is_served_without_a_token() -> None:
    with pytest.raises(InvalidKnob, match="also give a token"):
        check_exposure("0.0.0.0", None)
    check_exposure("0.0.0.0", "sesame")
    check_exposure("127.0.0.1", None)


def test_an_address_that_is_taken_is_said() -> None:
    with listen("127.0.0.1", 0, None) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidKnob, match=f"cannot listen on 127.0.0.1, port {port}"):
            listen("127.0.0.1", port, None)


# ---------------------------------------------------------------- the page


def test_the_page_loads_nothing_from_elsewhere_and_runs_nothing_but_itself(
    client: TestClient,
) -> None:
    answer = client.get("/")
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", answer.text)
    assert "http://" not in answer.text
    assert "https://" not in answer.text
    (script,) = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = answer.headers["content-security-policy"]
    assert f"script-src 'sha256-{digest}';" in policy
    assert "default-src 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_the_page_never_reads_text_as_html(client: TestClient) -> None:
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|srcdoc"
    assert not re.findall(sinks, client.get("/").text)


def test_recalled_markup_is_json_and_not_html(client: TestClient) -> None:
    told = "<script>alert('tea')</script>"
    client.post("/v1/banks/ana/add", json={"content": told})
    answer = client.get("/v1/banks/ana/search", params={"query": "alert tea"})
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()[0]["text"] == told
    refused = client.get("/v1/banks/<script>alert(1)</script>x/stats")
    assert refused.headers["content-type"] == "application/json"


# ---------------------------------------------------------------- the pool


def test_the_pool_closes_what_was_used_least_recently(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "m.db", Options(embedder="none"), most=2)
    for bank in ("a", "b", "a", "c"):
        with pool.borrow(bank, make=True) as memory:
            memory.add(f"tea of {bank}")
    assert list(pool._open) == ["a", "c"]
    with pool.borrow("b") as memory:
        assert memory.search("tea")[0].text == "tea of b"
    pool.close()


def test_a_borrowed_bank_stays_open(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "m.db", Options(embedder="none"), most=1)
    with pool.borrow("a", make=True) as first, pool.borrow("b", make=True) as second:
        first.add("tea")
        second.add("tea")
    assert len(pool._open) == 1
    pool.close()


def test_many_threads_may_use_one_bank(tmp_path: Path) -> None:
    pool = Pool(tmp_path / "m.db", Options(embedder="none"), most=1)

    def work(number: int) -> None:
        for i in range(10):
            with pool.borrow("ana" if i % 2 else f"bank {number}", make=True) as memory:
                memory.add(f"tea {number} {i}")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pool.borrow("ana") as memory:
        assert memory.stats()["turn"] == 20
    pool.close()


def test_all_banks_share_one_embedder(tmp_path: Path) -> None:
    Memory(tmp_path / "m.db", "a", embedder="ngrams").close()
    pool = Pool(tmp_path / "m.db")
    with pool.borrow("a") as first, pool.borrow("b", make=True) as second:
        assert first._embedder is second._embedder
    pool.close()


def test_a_pool_needs_a_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidKnob, match="needs a file"):
        Pool(":memory:")
    pool = Pool(tmp_path / "m.db")
    with pytest.raises(UnknownBank, match="no bank 'a'"), pool.borrow("a"):
        pass
