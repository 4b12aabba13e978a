"""Parametrised hypercomplex multiplication (PHM), and the kernel features of SNNK adapters.

Everything is in the row convention of the papers, `y = x W + b` with `W [in, out]`, and `n` divides `in` and `out`:

    W = sum_i  A_i (x) B_i,    A_i [n, n] shared by the whole model ("slow"),    B_i = s_i t_i^T of rank r ("fast")

Row `a * in/n + p` and column `c * out/n + q` of `W` hold `sum_i A_i[a, c] B_i[p, q]`.
Source: Compacter, arXiv 2106.04647; Scalable Neural Network Kernels, arXiv 2310.13225.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def round_bottleneck(width: int, reduction_factor: float, division: int) -> int:
    """Bottleneck of an adapter: `width / reduction_factor`, rounded to a multiple of `division`, and at least that.

    Args:
        width: features of the hidden state.
        reduction_factor: how many times narrower the bottleneck shall be.
        division: number of Kronecker products, which has to divide the bottleneck.

    Returns:
        The bottleneck; a tie goes to the even multiple.

    >>> round_bottleneck(768, 32, 4), round_bottleneck(576, 32, 4), round_bottleneck(32, 32, 4)
    (24, 16, 4)
    """
    return max(1, round(width / reduction_factor / division)) * division


def phm_weight(slow: Tensor, s: Tensor, t: Tensor | None = None) -> Tensor:
    """The whole matrix `sum_i A_i (x) B_i`.

    Args:
        slow: `A`, `[n, n, n]`.
        s: left factors `[n, in/n, r]`, or the whole `B`, `[n, in/n, out/n]`, where `t` is None.
        t: right factors `[n, out/n, r]`.

    Returns:
        `W [in, out]`.

    >>> phm_weight(torch.eye(2)[None], torch.tensor([[[1.0]]]), torch.tensor([[[3.0]]])).tolist()
    [[3.0, 0.0], [0.0, 3.0]]
    """
    fast = s if t is None else s @ t.mT  # [n, in/n, out/n]
    count, rows, columns = fast.shape
    division = slow.shape[1]
    product = slow.reshape(count, -1).T @ fast.reshape(count, -1)  # [n n, in/n out/n]
    return product.view(division, division, rows, columns).transpose(1, 2).reshape(division * rows, division * columns)


def phm_linear(x: Tensor, slow: Tensor, s: Tensor, t: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """`x W + b` by whichever way takes fewer multiplications; equal up to rounding.

    The factor form folds the slow matrices into the factor of the narrow side and never builds `W`. Per row of `x` it
    takes `n r wide + n^2 r narrow` multiplications against `in out`, and for rank one it is the faster way at every
    shape and number of rows that was tried.

    Args:
        x: `[..., in]`.
        slow: `A`, `[n, n, n]`.
        s: left factors `[n, in/n, r]`, or the whole `B`, `[n, in/n, out/n]`, where `t` is None.
        t: right factors `[n, out/n, r]`.
        bias: `[out]`.

    Returns:
        `[..., out]`.

    >>> x = torch.ones(1, 2)
    >>> phm_linear(x, torch.ones(1, 2, 2), torch.ones(1, 1, 1), torch.ones(1, 1, 1)).tolist()
    [[2.0, 2.0]]
    """
    if t is None:
        return F.linear(x, phm_weight(slow, s).T, bias)
    division, rank = slow.shape[1], s.shape[2]
    wide, narrow = max(s.shape[1], t.shape[1]) * division, min(s.shape[1], t.shape[1]) * division
    rows = x.numel() // x.shape[-1]
    if rows * division * rank * (wide + division * narrow) > (rows + division) * wide * narrow:
        return F.linear(x, phm_weight(slow, s, t).T, bias)
    return phm_linear_factored(x, slow, s, t, bias)


def phm_linear_factored(x: Tensor, slow: Tensor, s: Tensor, t: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W + b` without `W`; arguments as of `phm_linear`.

    >>> x, slow, s, t = torch.ones(1, 4), torch.ones(2, 2, 2), torch.ones(2, 2, 1), torch.ones(2, 3, 1)
    >>> torch.equal(phm_linear_factored(x, slow, s, t), x @ phm_weight(slow, s, t))
    True
    """
    count, rows, rank = s.shape
    columns, division = t.shape[1], slow.shape[1]
    left = s.transpose(0, 1)  # [in/n, n, r]
    right = t.transpose(1, 2)  # [n, r, out/n]
    if rows >= columns:
        inner = x.reshape(-1, rows) @ left.reshape(rows, -1)  # [T n, n r]: (a, i, r)
        outer = slow.transpose(0, 1)[:, :, None, :, None] * right[:, :, None]  # [a, i, r, c, q]
        y = inner.view(-1, division * count * rank) @ outer.reshape(division * count * rank, -1)
    else:
        outer = slow.permute(1, 2, 0)[:, None, :, :, None] * left[None, :, None]  # [a, p, c, i, r]
        inner = x.reshape(-1, division * rows) @ outer.reshape(division * rows, -1)  # [T, (c, i, r)]
        y = inner.view(-1, count * rank) @ right.reshape(count * rank, columns)  # [T n, out/n]
    y = y.reshape(*x.shape[:-1], division * columns)
    return y if bias is None else y + bias


def low_rank_linear(x: Tensor, s: Tensor, t: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x s t^T + b` with `s [in, r]` and `t [out, r]`, and `x [..., in]`.

    >>> low_rank_linear(torch.ones(1, 2), torch.ones(2, 1), torch.ones(3, 1)).tolist()
    [[2.0, 2.0, 2.0]]
    """
    return F.linear(x @ s, t, bias)


def init_glorot_(tensor: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Fill every `[rows, columns]` slice of `tensor [..., rows, columns]` from the uniform Glorot distribution, in place.

    The bound is `sqrt(2) sqrt(6 / (rows + columns))`, the gain that the authors use.

    >>> init_glorot_(torch.empty(4, 10, 2)).abs().max() <= 2 ** 0.5 * (6 / 12) ** 0.5
    tensor(True)
    """
    bound = math.sqrt(2) * math.sqrt(6 / (tensor.shape[-2] + tensor.shape[-1]))
    with torch.no_grad():
        return tensor.uniform_(-bound, bound, generator=generator)


# SNNK: f(<w, x> + b) as an inner product of features of x, which are random and fixed, and of (w, b), which are trained.


def draw_frequencies(num_features: int, width: int, seed: int) -> Tensor:
    """Random directions of a kernel's features, the same for a seed on every machine: orthogonal in blocks.

    Blocks of at most `width` rows are orthogonal, which lowers the variance of the kernel, and have the lengths of
    Gaussian rows.

    Args:
        num_features: rows.
        width: columns, the features of the hidden state.
        seed: of the generator.

    Returns:
        `G [num_features, width]`, float32, rows of mean squared length `width`.

    >>> draw_frequencies(3, 4, seed=0).shape
    torch.Size([3, 4])
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    blocks = []
    for start in range(0, num_features, width):
        rows = min(width, num_features - start)
        orthogonal, _ = torch.linalg.qr(torch.randn(width, rows, generator=generator, dtype=torch.float64))
        lengths = torch.randn(rows, width, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
        blocks.append(lengths * orthogonal.T)
    return torch.cat(blocks).float()


def kernel_features(x: Tensor, frequencies: Tensor, feature: str) -> Tensor:
    """Random features of `x`, whose inner products approximate a kernel of the two inputs.

    `relu` is the arc-cosine kernel of degree one, which grows with the lengths of the inputs; `sincos` is the Gaussian
    kernel of width one between their directions, `x` being scaled to length one first.

    Args:
        x: `[..., width]`.
        frequencies: `G [m, width]`.
        feature: `relu` for m features, `sincos` for 2 m.

    Returns:
        `[..., m]` or `[..., 2 m]`, scaled so that inner products do not depend on m.

    Raises:
        ValueError: another feature.

    >>> kernel_features(torch.ones(4), torch.zeros(2, 4), "sincos").tolist()
    [0.0, 0.0, 0.7071067690849304, 0.7071067690849304]
    """
    scale = 1 / math.sqrt(frequencies.shape[0])
    if feature == "relu":
        return math.sqrt(2) * scale * F.linear(x, frequencies).relu()
    if feature == "sincos":
        projected = F.linear(F.normalize(x, dim=-1), frequencies)
        return scale * torch.cat([projected.sin(), projected.cos()], dim=-1)
    raise ValueError(f"feature must be one of relu, sincos, got {feature!r}")


def bundle(features: Tensor, target: Tensor, ridge: float) -> Tensor:
    """The closed form that takes the place of training a last SNNK layer on squared error.

    Args:
        features: `Phi [T, m]`, one row per token.
        target: `Y [T, out]`.
        ridge: added to the diagonal, as a fraction of the mean diagonal of `Phi^T Phi`; at least 0.

    Returns:
        `V [out, m]` in the dtype of `features`, the minimiser of `||Phi V^T - Y||^2 + lambda ||V||^2`; solved in float64.

    Raises:
        ValueError: shapes that do not fit, or a negative ridge.

    >>> bundle(torch.eye(2), torch.tensor([[1.0], [2.0]]), ridge=0).tolist()
    [[1.0, 2.0]]
    """
    if features.dim() != 2 or target.dim() != 2 or features.shape[0] != target.shape[0]:
        raise ValueError(f"features [T, m] and target [T, out] must share T, got {[*features.shape]} and {[*target.shape]}")
    if ridge < 0:
        raise ValueError(f"ridge must be at least 0, got {ridge}")
    phi, y = features.double(), target.double()
    gram = phi.T @ phi
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram, phi.T @ y).T.to(features.dtype)
