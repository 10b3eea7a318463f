"""Read drift: what two runs read with a query, and where the difference of their outputs comes from.

Card kv-drift §3. Axes: G query heads that read one KV head, n entries the reference holds, m the lane holds, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workbench.cache.segments import Query, entry_mask
from workbench.inspection.storage import common_entries

if TYPE_CHECKING:
    from workbench.cache.layer import WorkbenchLayer

SINK = -1  # the position of a learnt sink: a logit without a value, which every run holds


@dataclass(frozen=True)
class Reading:
    """What one query finds: logits [G, n] (-inf where it may not look), values [n, D], and positions int [n]."""

    logits: Tensor
    values: Tensor
    at: Tensor


def take_reading(layer: WorkbenchLayer, query: Query, row: int) -> Reading:
    """The last of the queries, over all entries that a row of a layer holds now."""
    k, v, at = layer.store.entries(row)
    group = query.q.shape[1] // layer.store.heads
    heads = slice(row * group, (row + 1) * group)
    logits = query.q[0, heads, -1].float() @ k.float().T * query.scale
    if query.softcap is not None:
        logits = query.softcap * torch.tanh(logits / query.softcap)
    mask = entry_mask(query, at[None, None])
    extra = None if mask is None else mask(query.q.shape[2] - 1, query.q.shape[2], 0, len(at))
    if extra is not None:
        logits = logits + extra[0, :, 0]
    if query.sinks is not None:
        logits = torch.cat([logits, query.sinks[heads].float()[:, None]], 1)
        v, at = torch.cat([v, v.new_zeros(1, v.shape[1])]), torch.cat([at, at.new_full((1,), SINK)])
    return Reading(logits, v.float(), at)


def read_drift(reference: Reading, lane: Reading) -> dict[str, Tensor]:
    """Everything the card asks of one query, each [G]; distances are of softmax weights over token positions.

    Returns:
        ``retained``: share of the reference's weights on tokens the lane holds. ``beyond``: share of the lane's on tokens
        the reference does not hold. ``logit_rms``: difference of the logits of common tokens, less the mean that the
        reference's weights give it. ``total_variation``; ``js`` (nats); ``kl``: KL(lane || reference) over common tokens,
        always finite (NaN where the lane reads none of them). ``output_relative_l2``, ``output_cosine``. The error o_S - o_R is ``lost`` (the dropped
        contribution) + ``gain`` (what the others gain as weights sum to 1 again) + ``changed`` (other logits or values):
        their lengths over |o_R|, and as ``signed_…`` their parts along the error, which add up to
        ``output_relative_l2``. ``values_only`` and ``keys_only``: the error if only the values, or only the logits, of
        common tokens were the lane's.
    """
    z_r, z_s = reference.logits.double(), lane.logits.double()
    v_r, v_s = reference.values.double(), lane.values.double()
    theirs, ours = common_entries(reference.at, lane.at)
    log_r, log_s = (z.log_softmax(-1).nan_to_num(nan=-torch.inf, neginf=-torch.inf) for z in (z_r, z_s))
    p_r, p_s = log_r.exp(), log_s.exp()
    c_r, c_s = p_r[:, theirs], p_s[:, ours]  # of common tokens
    retained, inside = c_r.sum(-1), c_s.sum(-1)
    o_r, o_s, o_mf = p_r @ v_r, p_s @ v_s, c_r @ v_r[theirs]
    size = o_r.norm(dim=-1).clamp_min(torch.finfo(o_r.dtype).tiny)

    lost, gain = o_mf - o_r, (1 / retained - 1)[:, None] * o_mf
    gain = torch.where(retained[:, None] > 0, gain, 0.0)
    error = o_s - o_r
    changed = error - lost - gain
    along = error / error.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(o_r.dtype).tiny)

    mixed = z_r.clone()
    mixed[:, theirs] = z_s[:, ours]
    out = {
        "retained": retained.clamp(0, 1),
        "beyond": (p_s.sum(-1) - inside).clamp(0, 1),
        "logit_rms": _centred_rms(z_s[:, ours] - z_r[:, theirs], c_r),
        "total_variation": 0.5 * ((c_r - c_s).abs().sum(-1) + (1 - retained).clamp_min(0) + (1 - inside).clamp_min(0)),
        "js": _js(c_r, c_s, retained, inside),
        "kl": _kl(log_s[:, ours] - inside.log()[:, None], log_r[:, theirs]).masked_fill(inside == 0, torch.nan),
        "output_relative_l2": error.norm(dim=-1) / size,
        "output_cosine": torch.cosine_similarity(o_r, o_s, dim=-1, eps=torch.finfo(o_r.dtype).tiny),
        "values_only": (c_r @ (v_s[ours] - v_r[theirs])).norm(dim=-1) / size,
        "keys_only": (mixed.softmax(-1) @ v_r - o_r).norm(dim=-1) / size,
    }
    for name, part in (("lost", lost), ("gain", gain), ("changed", changed)):
        out[name] = part.norm(dim=-1) / size
        out[f"signed_{name}"] = (part * along).sum(-1) / size
    return {name: x.float() for name, x in out.items()}


def layer_error(reference: Tensor, lane: Tensor, weight: Tensor) -> float:
    """CompressKV's layer error of head outputs [Hq, D] after the output projection [Hq, D, hidden]."""
    projected = [torch.einsum("hd,hdm->m", x.float(), weight.float()) for x in (reference, lane)]
    return float((projected[1] - projected[0]).norm() / (projected[0].norm() + 1e-5))


def _centred_rms(difference: Tensor, weights: Tensor) -> Tensor:
    """Root mean square of logit differences [G, c] less their mean by ``weights`` [G, c]; hidden ones are left out."""
    seen = difference.isfinite()
    difference = torch.where(seen, difference, 0.0)
    mean = (difference * weights).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    squares = torch.where(seen, (difference - mean) ** 2, 0.0).sum(-1)
    return (squares / seen.sum(-1).clamp_min(1)).sqrt()


def _kl(log_s: Tensor, log_r: Tensor) -> Tensor:
    """KL(S || R) over common tokens, nats: where the lane has weight, so does the reference, so it is finite."""
    p = log_s.exp()
    return torch.where(p > 0, p * (log_s - log_r), 0.0).sum(-1).clamp_min(0.0)


def _js(p_r: Tensor, p_s: Tensor, retained: Tensor, inside: Tensor) -> Tensor:
    """Jensen-Shannon divergence, nats: what only one of the two reads adds ln 2 times half its mass."""
    middle = (p_r + p_s) / 2
    parts = [torch.xlogy(p, p) - torch.xlogy(p, middle.clamp_min(1e-300)) for p in (p_r, p_s)]
    alone = (1 - retained).clamp_min(0) + (1 - inside).clamp_min(0)
    return (0.5 * (sum(parts).sum(-1) + alone * torch.log(torch.tensor(2.0)))).clamp_min(0.0)  # type: ignore[union-attr]
