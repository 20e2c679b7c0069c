"""Parts of training put together: every optimizer on every adapter, every activation policy under
every adapter, and the ways in which others drive an optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from memwise.catalogue import cards, load  # noqa: E402
from memwise.train.engine.activations import ActivationPolicy, compress_activations  # noqa: E402
from memwise.train.engine.adapters import AdapterPolicy  # noqa: E402
from memwise.train.engine.optimizer import OptimizerPolicy  # noqa: E402
from memwise.train.policies.adamw4bit import AdamW4bit  # noqa: E402


def named(kind: type) -> list[str]:
    """Policies of a kind that are called as the kind is."""
    found = []
    for entry in cards():
        made = load(entry.key)
        if entry.room == "train" and isinstance(made, type) and issubclass(made, kind):
            plain = getattr(made, "__call__", None) is getattr(kind, "__call__", None)  # noqa: B004
            if plain or kind is ActivationPolicy:
                found.append(entry.name)
    return found


OPTIMIZERS, ADAPTERS = named(OptimizerPolicy), named(AdapterPolicy)
ACTIVATIONS = named(ActivationPolicy)
EXACT = {"keep", "offload", "recompute", "selective_differentiation"}


@pytest.fixture
def model() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).train()


IDS = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(1))


def loss_of(model: Any) -> Any:
    return model(IDS, labels=IDS, use_cache=False).loss


def trained(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_trains_every_adapter(model: Any, optimizer: str, adapter: str) -> None:
    load(f"train/{adapter}")()(model)
    own = trained(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if n not in own}
    assert own
    assert frozen
    made = load(f"train/{optimizer}")()(own.values(), lr=1e-3)
    before = {name: p.detach().clone() for name, p in own.items()}
    for _ in range(2):
        made.zero_grad()
        loss_of(model).backward()
        made.step()
    assert all(p.isfinite().all() for p in own.values())
    assert any(not torch.equal(p, before[name]) for name, p in own.items())
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize("adapter", ["none", *ADAPTERS])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_every_activation_policy_works_under_every_adapter(
    model: Any, activations: str, adapter: str
) -> None:
    if adapter != "none":
        load(f"train/{adapter}")()(model)
        with torch.no_grad():  # deltas begin at zero, which leaves half of them without a gradient
            draws = torch.Generator().manual_seed(2)
            for p in trained(model).values():
                p += 0.02 * torch.randn(p.shape, generator=draws)
    plain = torch.autograd.grad(loss_of(model), list(trained(model).values()), allow_unused=True)
    with compress_activations(model, load(f"train/{activations}")()):
        mine = torch.autograd.grad(loss_of(model), list(trained(model).values()), allow_unused=True)
    assert [g is None for g in mine] == [g is None for g in plain]
    for a, b in zip(mine, plain, strict=True):
        if a is None or activations == "randomized_linear_backward":
            continue  # which is right in the mean only
        if activations in EXACT:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
        else:
            assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.9


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_schedulers_and_clipping_are_followed(model: Any, optimizer: str) -> None:
    made = load(f"train/{optimizer}")()(trained(model).values(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.0 if step else 1.0)
    for step in range(2):
        before = {name: p.detach().clone() for name, p in trained(model).items()}
        made.zero_grad()
        loss_of(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        made.step()
        schedule.step()
        moved = any(not torch.equal(p, before[name]) for name, p in trained(model).items())
        assert moved == (step == 0)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw4bit", "galore", "lion"])
def test_a_scaler_of_mixed_precision_skips_what_overflowed(model: Any, optimizer: str) -> None:
    made = load(f"train/{optimizer}")()(trained(model).values(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for overflows in (False, True, False):
        before = {name: p.detach().clone() for name, p in trained(model).items()}
        made.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model)
        scaler.scale(loss).backward()
        if overflows:
            model.lm_head.weight.grad.view(-1)[0] = torch.inf
        scaler.step(made)
        scaler.update()
        moved = any(not torch.equal(p, before[name]) for name, p in trained(model).items())
        assert moved != overflows


def test_a_trainer_of_transformers_drives_it_and_goes_on(model: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(8, 1)]

    def run(n_steps: int, resume: bool) -> dict[str, Any]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            fresh = transformers.LlamaForCausalLM(model.config)
        made = AdamW4bit()(fresh.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(made, 1.0, 0.5, total_iters=6)
        settings = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=n_steps, per_device_train_batch_size=2,
            save_steps=3, report_to=[], max_grad_norm=1.0, use_cpu=True, disable_tqdm=True,
            dataloader_pin_memory=False, logging_strategy="no",
        )  # fmt: skip
        trainer = transformers.Trainer(
            model=fresh, args=settings, train_dataset=rows, optimizers=(made, schedule)
        )
        trainer.train(resume_from_checkpoint=resume)
        return {name: p.detach().clone() for name, p in fresh.named_parameters()}

    straight = run(6, resume=False)
    for folder in tmp_path.glob("checkpoint-6"):
        folder.rename(tmp_path / "done")
    resumed = run(6, resume=True)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
