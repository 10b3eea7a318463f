"""Where training starts: random weights, but for the circuit from which copying and recall grow.

A model of this size finds that circuit by itself only after a thousand steps or more, sometimes never; from here it masters the first
level within two hundred. Olsson et al., "In-context learning and induction heads" (arXiv 2209.11895), describe it.
"""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM


@torch.no_grad()
def seed_induction(model: LlamaForCausalLM) -> None:
    """Make the first two layers an induction circuit: heads that look back a token or two, and heads that find what followed.

    Without biases a query depends on position alone only through a direction that all embeddings share, so they get one. In
    layer 0 keys are a fixed vector along it and each query the same vector turned back by one or two tokens; what these heads
    read they write into subspaces of their own. In layer 1 a key is the token before (that subspace), a query the token itself,
    both in the pairs of dimensions that RoPE turns slowly, and the value is the token.
    """
    match, gain = 2.5, 0.15  # layer 1 then gives two fifths of its attention to what followed the same token
    config = model.config
    width, size, half = config.hidden_size, config.head_dim, config.head_dim // 2
    groups = config.num_attention_heads // config.num_key_value_heads
    embedding = model.model.embed_tokens.weight
    common = torch.randn(width, device=embedding.device)
    embedding.add_(common * embedding.std())
    direction = common / common.norm()
    token = torch.eye(width, device=embedding.device) - torch.outer(direction, direction)  # what tells tokens apart
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(half, device=embedding.device) / half)
    fast = (frequency > 0.03).float()  # pairs that tell neighbours apart
    slow = torch.cat([frequency < 0.005] * 2).nonzero().flatten()
    first, second = (model.model.layers[i].self_attn for i in (0, 1))
    basis = torch.linalg.qr(torch.randn(width, width, device=embedding.device))[0]
    for kv in range(config.num_key_value_heads):
        rows = slice(size * kv, size * (kv + 1))
        read, write = basis[:, rows].T @ token, basis[:, 2 * size + size * kv : 2 * size + size * (kv + 1)]
        first.k_proj.weight[rows] = 0.5 * torch.cat([fast, 0 * fast])[:, None] * direction
        first.v_proj.weight[rows] = read
        second.k_proj.weight[rows] = 0
        second.k_proj.weight[size * kv + slow] = match * write.T[: len(slow)]
        second.v_proj.weight[rows] = basis[:, rows].T @ token
        for head in range(groups * kv, groups * (kv + 1)):
            mine = slice(size * head, size * (head + 1))
            turn = frequency * (kv + 1)
            turned = torch.cat([fast * turn.cos(), -fast * turn.sin()])
            first.q_proj.weight[mine] = 0.5 * turned[:, None] * direction
            first.o_proj.weight[:, mine] = write / groups * gain
            second.q_proj.weight[mine] = 0
            second.q_proj.weight[size * head + slow] = match * read[: len(slow)]
            second.o_proj.weight[:, mine] = basis[:, rows] / groups * gain
