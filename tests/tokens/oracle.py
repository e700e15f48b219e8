"""Token reduction by loops in float64."""

import math

import torch


def probabilities(q, k, *, causal=False, alignment="bottom-right", key_mask=None, temperature=1.0):
    """[B, H, N, M] by loops over pairs; a row without any key is 0."""
    b, h, n, d = q.shape
    m, groups = k.shape[2], h // k.shape[1]
    offset = m - n if alignment == "bottom-right" else 0
    out = torch.zeros(b, h, n, m, dtype=torch.float64)
    for row in range(b):
        for head in range(h):
            for i in range(n):
                seen = [j for j in range(m) if (not causal or j <= i + offset) and (key_mask is None or key_mask[row, j])]
                if seen:
                    logits = torch.stack([q[row, head, i].double() @ k[row, head // groups, j].double() for j in seen])
                    out[row, head, i, seen] = (logits / math.sqrt(d) / temperature).softmax(0)
    return out


def walk(p, key_mask, iterations, damping=0.0):
    """x [B, H, N] after so many steps from equal shares."""
    valid = key_mask.double() / key_mask.sum(1, keepdim=True).clamp(min=1)
    start = valid[:, None].expand(-1, p.shape[1], -1)
    x = start
    for _ in range(iterations):
        x = (1 - damping) * torch.einsum("bhi,bhij->bhj", x, p) + damping * start
    return x


def tome(x, metric, sizes, r, protect=1, weighting="size"):
    """One row x [N, C]: (merged, sizes, sources as sets of indices), by loops."""
    unit = metric.double() / metric.double().norm(dim=-1, keepdim=True)
    left, right = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    best = {}
    for a in left:
        found = [(float(unit[a] @ unit[b]), -b) for b in right if a >= protect and b >= protect]
        if found:
            best[a] = max(found)
    chosen = sorted(best, key=lambda a: (-best[a][0], a))[:r]
    into = {b: [a for a in chosen if -best[a][1] == b] for b in right}
    kept = [a for a in left if a not in chosen]
    out, count, sets = [x[a].double() for a in kept], [float(sizes[a]) for a in kept], [{a} for a in kept]
    for b in right:
        members = [b, *into[b]]
        weights = [float(sizes[i]) if weighting == "size" else 1.0 for i in members]
        out.append(sum(w * x[i].double() for w, i in zip(weights, members)) / sum(weights))
        count.append(sum(float(sizes[i]) for i in members))
        sets.append(set(members))
    return torch.stack(out), torch.tensor(count, dtype=torch.float64), sets
