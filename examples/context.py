"""A long text through a small cache: what is held, and what became of a token."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memwise.context import StreamingLLM, bounded, bytes_for

config = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
model = LlamaForCausalLM(config).eval()
draws = torch.Generator().manual_seed(0)
text = torch.randint(2, 97, (1, 400), generator=draws)

policy = StreamingLLM(sinks=4)
budget = bytes_for(model, policy, n_slots=64, chunk=16)
print("budget for 64 tokens a layer:", budget)

with bounded(model, policy, budget, chunk=16) as cache:
    given = {"past_key_values": cache, "attention_mask": torch.ones_like(text)}
    out = model.generate(text, max_new_tokens=8, do_sample=False, **given)
    print(f"{out.shape[1] - text.shape[1]} tokens more")
    print(cache.report())
    for token in (0, 100, 399):
        print(cache.report().explain(token))
