"""LoRA travels to PEFT and back without a changed bit."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from torch import nn  # noqa: E402

from memwise.errors import InvalidKnob  # noqa: E402
from memwise.train.engine.peft import from_peft, load_peft, save_peft  # noqa: E402
from memwise.train.policies.lora import LoRA  # noqa: E402
from memwise.train.policies.peqa import PEQA  # noqa: E402
from memwise.train.policies.qlora import QLoRA  # noqa: E402


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def x():
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


def shaken(policy):
    handle = policy(Net())
    for param in handle.parameters():
        param.data.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    return handle


def test_a_saved_lora_comes_back_bit_for_bit(tmp_path) -> None:
    handle = shaken(LoRA(4, 12.0))
    save_peft(handle, tmp_path / "new")
    again = load_peft(Net(), tmp_path / "new", LoRA)
    assert again.policy == LoRA(4, 12.0)
    assert torch.equal(again.model(x()), handle.model(x()))


def test_peft_reads_what_was_saved(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    handle = shaken(LoRA(4, 12.0))
    save_peft(handle, tmp_path)
    wrapped = peft.PeftModel.from_pretrained(Net(), tmp_path)
    torch.testing.assert_close(wrapped(x()), handle.model(x()))


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}])
def test_what_peft_saved_is_read(tmp_path, more) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=12, target_modules=["0", "1"], init_lora_weights=False, **more
    )
    wrapped = peft.get_peft_model(Net(), config)
    wrapped.save_pretrained(tmp_path)
    handle = load_peft(Net(), tmp_path, LoRA)
    torch.testing.assert_close(handle.model(x()), wrapped(x()))


def test_a_live_peft_model_is_taken_over() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    wrapped = peft.get_peft_model(Net(), config)
    wanted = wrapped(x())
    handle = from_peft(wrapped, LoRA)
    assert list(handle.sites) == ["layers.0"]
    torch.testing.assert_close(handle.model(x()), wanted)
    assert {name for name, p in handle.model.named_parameters() if p.requires_grad} == {
        "layers.0.deltas.default.A",
        "layers.0.deltas.default.B",
    }


def test_a_lora_of_a_packed_model_travels_without_the_codes(tmp_path) -> None:
    handle = shaken(QLoRA(4, 12.0))
    save_peft(handle, tmp_path)
    again = load_peft(Net(), tmp_path, QLoRA)
    assert torch.equal(again.model(x()), handle.model(x()))


def test_other_deltas_are_not_written_as_lora(tmp_path) -> None:
    with pytest.raises(InvalidKnob, match="PEFT's format holds plain LoRA, not the Scales of PEQA"):
        save_peft(shaken(PEQA()), tmp_path)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"use_dora": True}, "uses use_dora"),
        ({"peft_type": "IA3"}, "uses IA3"),
        ({"bias": "all"}, "uses bias"),
    ],
)
def test_what_is_more_than_lora_is_refused_before_the_model_is_touched(
    tmp_path, changed, told
) -> None:
    save_peft(shaken(LoRA()), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    model = Net()
    with pytest.raises(InvalidKnob, match=told):
        load_peft(model, tmp_path, LoRA)
    assert type(model.layers[0]) is nn.Linear


def test_a_folder_without_an_adapter_or_for_another_model_is_refused(tmp_path) -> None:
    with pytest.raises(InvalidKnob, match=r"does not hold adapter_config\.json"):
        load_peft(Net(), tmp_path, LoRA)
    save_peft(shaken(LoRA()), tmp_path)
    with pytest.raises(InvalidKnob, match=r"has no such module"):
        load_peft(nn.Sequential(nn.Linear(64, 64)), tmp_path, LoRA)
