r"""The information-theoretic limit: reverse waterfilling for independent Gaussian weights.

Weights of variance rho_i v_j under the Hessian H have the spectrum rho_i mu_k, mu_k the
eigenvalues of diag(v)^1/2 H diag(v)^1/2. At water level theta

    loss = sum_ik min(rho_i mu_k, theta),   R = mean_ik 1/2 log2(max(1, rho_i mu_k / theta)).
"""

import torch
from torch import Tensor


def spectrum(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """rho [m] (mean 1) and mu [n], both float64, of W [m, n] under H [n, n]."""
    square = weight.to(torch.float64).square()
    column = square.mean(dim=0)
    rho = square.mean(dim=1) / square.mean()
    root = column.sqrt()
    mu = torch.linalg.eigvalsh(root[:, None] * hessian.to(torch.float64) * root[None, :])
    return rho, mu.clamp_min(0)


def limit_bits(weight: Tensor, hessian: Tensor, loss: float) -> float:
    """Fewest bits per weight at which tr((W - Q) H (W - Q)^T) can be `loss`."""
    rho, mu = spectrum(weight, hessian)
    return _bits_at(rho, mu, loss)


def _bits_at(rho: Tensor, mu: Tensor, loss: float) -> float:
    power = (rho[:, None] * mu[None, :]).flatten().sort().values
    below = torch.cat([power.new_zeros(1), power.cumsum(0)])
    above = torch.arange(len(power), -1, -1, dtype=power.dtype, device=power.device)
    # Loss as a function of theta is piecewise linear with knots at the sorted powers.
    knots = below[:-1] + above[:-1] * power
    if loss >= float(below[-1]):
        return 0.0
    k = int(torch.searchsorted(knots, torch.tensor(loss, dtype=power.dtype)))
    theta = (loss - float(below[k])) / float(above[k])
    return float((power / theta).clamp_min(1).log2().mean() / 2)
