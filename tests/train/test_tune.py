"""Fine-tuning inside a budget: what is refused, what fits, and the same bits after a kill."""

from __future__ import annotations

import gzip
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import memwise  # noqa: E402
from memwise.errors import BudgetExceeded, InvalidKnob, StoreLocked  # noqa: E402
from memwise.train import tune as tuning  # noqa: E402
from memwise.train.engine.heads import linear_cross_entropy  # noqa: E402
from memwise.train.tune import Settings, tune  # noqa: E402
from memwise.train.tune_data import LONGEST, Windows, start_of, tokenized  # noqa: E402
from memwise.train.tune_plan import CausalLoss  # noqa: E402

FIXTURES = Path(memwise.__file__).parent / "bench" / "fixtures"
WORDS = "the river ran under the old bridge and nobody in the village knew its name\n"


@pytest.fixture(scope="module")
def model(byte_llama: Path) -> Path:
    return byte_llama


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i}: {WORDS}" for i in range(60)))
    return path


SHORT = Settings(n_steps=6, context=32, batch=2, lr=5e-3)


def trained(folder: Path):
    return torch.load(folder / "checkpoint.pt", weights_only=True)["trained"]


def same(a, b) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


# --- the loss without logits


@pytest.mark.parametrize("frozen", [True, False])
def test_loss_and_gradients_are_those_of_cross_entropy(frozen, monkeypatch) -> None:
    monkeypatch.setattr("memwise.train.engine.heads.LOGITS", 60)
    draws = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 5, generator=draws, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(20, 5, generator=draws, dtype=torch.float64, requires_grad=not frozen)
    targets = torch.randint(20, (7,), generator=draws)
    wanted = [hidden] if frozen else [hidden, weight]
    plain = torch.nn.functional.cross_entropy(hidden @ weight.T, targets)
    mine = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(mine, plain)
    for a, b in zip(
        torch.autograd.grad(mine * 3, wanted), torch.autograd.grad(plain * 3, wanted), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("draw", range(4))
def test_dropout_does_not_hide_that_the_loss_needs_no_logits(model, draw) -> None:
    loss = CausalLoss(transformers.AutoModelForCausalLM.from_pretrained(model)).train()
    with torch.random.fork_rng():
        torch.manual_seed(draw)
        assert loss.look(torch.arange(33)[None])
    assert loss.training


# --- data


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n", "holds no text"),
        ("latin.txt", b"caf\xe9\n", "line 1: byte 3 is not UTF-8"),
        ("binary.txt", b"ok\nab\0cd\n", "line 2: a NUL byte"),
        ("long.txt", b"x" * (LONGEST + 1), r"line 1: over 1,048,576 bytes"),
        ("bad.jsonl", b'{"text": "a"}\n{"text"\n', "line 2: not JSON"),
        ("field.jsonl", b'{"body": "a"}\n', r"no text in field 'text'; there is \['body'\]"),
        ("list.jsonl", b"[1]\n", "no text in field 'text'; there is list"),
        ("short.txt", b"abc\n", "less than two windows"),
    ],
)
def test_bad_data_is_refused_before_training(model, tmp_path, name, content, told) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidKnob, match=told):
        tune(model, path, out=tmp_path / "out", settings=SHORT)
    assert not (tmp_path / "out" / "checkpoint.pt").exists()


def test_a_missing_file_or_model_is_refused(model, tmp_path) -> None:
    with pytest.raises(InvalidKnob, match="is not a file"):
        tune(model, tmp_path / "none.txt", out=tmp_path / "out")
    with pytest.raises(InvalidKnob, match="is not a folder"):
        tune(tmp_path / "none", tmp_path / "none.txt", out=tmp_path / "out")


def test_text_comes_back_from_its_tokens_and_json_texts_end(model, tmp_path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    plain, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text(WORDS * 3 + "café")
    lines.write_text("".join(json.dumps({"body": t}) + "\n" for t in ("one", "two\nlines")))
    ids = Windows.of(tokenized(plain, tokenizer, tmp_path), 8, 0).tokens
    assert tokenizer.decode(ids) == WORDS * 3 + "café"
    path = tokenized(lines, tokenizer, tmp_path, "body")
    assert tokenizer.decode(Windows.of(path, 4, 0).tokens) == "one</s>two\nlines</s>"


def test_held_out_windows_are_never_trained_on_and_all_others_once_an_epoch(
    model, text, tmp_path
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    windows = Windows.of(tokenized(text, tokenizer, tmp_path), 32, 3)
    n = windows.n_windows - len(windows.held_out)
    seen = [tuple(row.tolist()) for nth in range(n) for row in windows.batch(nth, 1)]
    wanted = [
        tuple(windows.window(i).tolist())
        for i in range(windows.n_windows)
        if i not in windows.held_out
    ]
    assert sorted(seen) == sorted(wanted)
    again = [tuple(row.tolist()) for nth in range(n, 2 * n) for row in windows.batch(nth, 1)]
    assert sorted(again) == sorted(wanted)
    assert again != seen


def test_each_window_begins_as_the_tokenizer_begins_a_text(model, text, tmp_path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    assert start_of(tokenizer) is None
    path = tokenized(text, tokenizer, tmp_path)
    plain, started = Windows.of(path, 32, 3), Windows.of(path, 32, 3, start=7)
    assert plain.window(1)[0] == plain.window(0)[-1]
    assert started.window(0)[0] == started.window(1)[0] == 7
    assert torch.equal(started.window(1)[1:], torch.from_numpy(plain.tokens[32:64].astype("int64")))
    tokenizer.bos_token = "a"
    assert start_of(tokenizer) == tokenizer.convert_tokens_to_ids("a")


# --- plans


def test_without_a_budget_every_weight_is_trained(model, text, tmp_path) -> None:
    heard = []
    report = tune(
        model, text, out=tmp_path / "out", settings=SHORT, told=lambda what, _: heard.append(what)
    )
    assert report["way"] == "full with adamw"
    assert report["held-out loss after"] < report["held-out loss before"] - 0.3
    assert heard == ["plan", *["step"] * 6, "checkpoint"]
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()
    found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert same([p.detach() for p in found.parameters()], trained(tmp_path / "out"))


def test_a_smaller_budget_finds_a_smaller_way_and_holds(model, text, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("memwise.train.tune_plan._LOGITS_BYTES", 1 << 18)
    heard, seen = set(), []
    for i, budget in enumerate(("8MiB", "2500KiB", "2MiB", "1200KiB")):
        report = tune(model, text, budget, out=tmp_path / str(i), settings=SHORT)
        heard.add(report["way"])
        seen.append(report["bytes"]["all"])
        assert report["bytes"]["all"] <= report["settings"]["budget"]
    assert seen == sorted(seen, reverse=True)
    assert len(heard) >= 3


def test_what_cannot_fit_is_refused_with_all_numbers(model, text, tmp_path) -> None:
    with pytest.raises(BudgetExceeded, match="loading"):
        tune(model, text, "100KiB", out=tmp_path / "out", settings=SHORT)
    with pytest.raises(BudgetExceeded, match=r"full with adamw needs more than .*qlora with adamw"):
        tune(model, text, "600KiB", out=tmp_path / "out", settings=SHORT)


@pytest.mark.parametrize("adapter", ["peqa", "randlora", "full"])
def test_an_adapter_may_be_asked_for(model, text, tmp_path, adapter) -> None:
    settings = Settings(n_steps=2, context=32, adapter=adapter, optimizer="adamw4bit")
    report = tune(model, text, out=tmp_path / "out", settings=settings)
    assert report["way"] == f"{adapter} with adamw4bit"


@pytest.mark.parametrize(("slot", "name"), [("adapter", "apiq"), ("optimizer", "lora")])
def test_what_cannot_be_used_is_refused(model, text, tmp_path, slot, name) -> None:
    with pytest.raises(InvalidKnob, match="cannot be used here"):
        tune(model, text, out=tmp_path / "out", settings=Settings(**{slot: name}))


# --- going on


class Killed(Exception):
    pass


@pytest.mark.parametrize("way", [("full", "adamw"), ("full", "adamw4bit"), ("qlora", "adamw")])
def test_a_killed_run_goes_on_to_the_same_bits(model, text, tmp_path, way, monkeypatch) -> None:
    settings = Settings(n_steps=6, context=32, lr=5e-3, adapter=way[0], optimizer=way[1])
    whole = tune(model, text, out=tmp_path / "whole", settings=settings, save_every=1)

    def killer(at):
        def hear(what, numbers):
            if what == "step" and numbers["step"] == at:
                raise Killed

        return hear

    for at in (2, 3, 5):
        with pytest.raises(Killed):
            tune(
                model, text, out=tmp_path / "cut", settings=settings, save_every=1, told=killer(at)
            )
    report = tune(model, text, out=tmp_path / "cut", settings=settings, save_every=1)
    assert same(trained(tmp_path / "cut"), trained(tmp_path / "whole"))
    assert report["training losses"] == whole["training losses"]
    assert report["held-out loss after"] == whole["held-out loss after"]


def test_a_run_that_has_ended_tells_its_report_again(model, text, tmp_path) -> None:
    report = tune(model, text, out=tmp_path / "out", settings=SHORT)
    assert tune(model, text, out=tmp_path / "out", settings=SHORT) == report


def test_another_run_is_not_gone_on_from(model, text, tmp_path) -> None:
    tune(model, text, out=tmp_path / "out", settings=SHORT)
    other = Settings(n_steps=6, context=32, batch=2, lr=1e-3)
    with pytest.raises(InvalidKnob, match=r"holds a run with lr=0\.005"):
        tune(model, text, out=tmp_path / "out", settings=other)


def test_two_runs_do_not_share_a_folder(model, text, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    with tuning._alone(tmp_path / "out"), pytest.raises(StoreLocked, match="another process"):
        tune(model, text, out=tmp_path / "out", settings=SHORT)


def test_a_process_killed_in_its_middle_leaves_a_checkpoint_that_loads(
    model, text, tmp_path
) -> None:
    out = tmp_path / "out"
    code = (
        "from memwise.train.tune import Settings, tune; "
        f"tune({str(model)!r}, {str(text)!r}, out={str(out)!r}, save_every=1, "
        "settings=Settings(n_steps=100000, context=32))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (out / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] >= 1


# --- killed at any moment, from outside


KILLED = """
import sys
from memwise.train.tune import Settings, tune
tune(
    sys.argv[1], sys.argv[2], sys.argv[3] or None, out=sys.argv[4], save_every=1,
    settings=Settings(n_steps=int(sys.argv[5]), context=int(sys.argv[6])),
    told=lambda what, numbers: print(what, numbers.get("step"), flush=True),
)
"""


def _killed_often(model, text, budget, tmp_path, n_steps, context, n_kills) -> None:
    """Run once whole, once with kills at moments that are drawn, and compare all bits."""

    def begun(out):
        given = [str(model), str(text), budget, str(out), str(n_steps), str(context)]
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, *given], stdout=subprocess.PIPE, text=True
        )

    def told(process):
        line = process.stdout.readline()
        assert line, "the run ended before it was killed"
        return line.split()

    begun(tmp_path / "whole").communicate()
    draws, reached = random.Random(0), 0
    for nth in range(n_kills):
        process = begun(tmp_path / "cut")
        goal = min(n_steps - 1, (nth + 1) * n_steps // (n_kills + 1))
        while (line := told(process))[0] != "step" or int(line[1]) < goal:
            if line[0] == "plan":
                assert int(line[1]) >= reached - 1  # at most the step that was not written is lost
        reached = int(line[1])
        time.sleep(draws.random() * 0.05)  # somewhere in a step, or in writing
        process.kill()
        process.communicate()
    last = begun(tmp_path / "cut")
    last.communicate()
    assert last.returncode == 0
    assert same(trained(tmp_path / "cut"), trained(tmp_path / "whole"))
    whole, cut = (json.loads((tmp_path / w / "report.json").read_text()) for w in ("whole", "cut"))
    assert cut == whole


@pytest.mark.slow
def test_twenty_kills_leave_the_same_weights(model, text, tmp_path) -> None:
    _killed_often(model, text, "", tmp_path, n_steps=63, context=32, n_kills=20)


@pytest.mark.slow
@pytest.mark.model
def test_two_kills_of_gemma_leave_the_same_weights(tmp_path) -> None:
    with gzip.open(FIXTURES / "alice_in_wonderland.txt.gz", "rt", encoding="utf-8") as book:
        (tmp_path / "book.txt").write_text(book.read()[:20_000])
    _killed_often(
        "gemma", tmp_path / "book.txt", "1.5GiB", tmp_path, n_steps=6, context=64, n_kills=2
    )
