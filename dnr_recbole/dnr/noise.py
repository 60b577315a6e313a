"""Where synthetic retriever scores x' come from (DNR, Eq. 4): heuristic noise or a learned generator f_φ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dnr_recbole.data.slate import Slate


class HeuristicNoise:
    """x' = (1 − λ_c) z + λ_c ε with ε from a fixed distribution, kept in [0, 1].

    Args:
        kind: "gaussian" (DNR-G) or "beta" (DNR-B with a = b = 0.5, DNR-BL with a = 2, b = 5).
        lambda_c: share of noise λ_c in [0, 1].
        a, b: parameters of the Beta distribution.
        mean, std: parameters of the Gaussian; its draws are unbounded, so x' is clipped to [0, 1].
    """

    def __init__(
        self, kind: str, lambda_c: float, a: float = 0.5, b: float = 0.5, mean: float = 0.0, std: float = 1.0
    ) -> None:
        if kind not in ("gaussian", "beta"):
            raise ValueError(f"noise_type must be 'gaussian' or 'beta', got {kind!r}")
        if not 0 <= lambda_c <= 1:
            raise ValueError(f"lambda_c must lie in [0, 1], got {lambda_c}")
        self.kind, self.lambda_c = kind, lambda_c
        self.a, self.b, self.mean, self.std = a, b, mean, std

    @property
    def separable(self) -> bool:
        """Whether a threshold on x' reveals z: bounded noise with λ_c ≤ 0.5 leaves disjoint supports.

        Then x' ∈ [1 − λ_c, 1] for z = 1 and [0, λ_c] for z = 0: L_z falls to 0 and augments nothing.
        """
        return self.lambda_c == 0 or (self.kind == "beta" and self.lambda_c <= 0.5)

    def sample(self, like: Tensor) -> Tensor:
        """ε of the shape of ``like``."""
        if self.kind == "gaussian":
            return torch.randn_like(like) * self.std + self.mean
        # Ratio of Gammas, one fused kernel each; float32 also under autocast.
        gamma_a = torch._standard_gamma(torch.full_like(like, self.a))
        gamma_b = torch._standard_gamma(torch.full_like(like, self.b))
        return gamma_a / (gamma_a + gamma_b).clamp(min=torch.finfo(like.dtype).tiny)

    def __call__(self, labels: Tensor) -> Tensor:
        """labels z ``[B, n]`` of 0/1 → x' ``[B, n]`` in [0, 1], without gradient."""
        x = (1 - self.lambda_c) * labels + self.lambda_c * self.sample(labels)
        return x.clamp(0.0, 1.0)


class NoiseGenerator(nn.Module):
    """Model-based generator f_φ: a 2-layer MLP of user state, feedback and noise that outputs x' (Eq. 4 with λ_c = 1).

    The noise input makes it a distribution p_φ(x'|z, u) and not a function of z.

    Args:
        dim: width of user state and item vectors.
        hidden: hidden width.
        noise_dim: Gaussian noise inputs per candidate.
        use_item: whether the candidate's vector is an input too (the paper conditions on u and z only).
        n_scores: retriever scores per candidate (S).
        n_objectives: kinds of feedback (T).
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 64,
        noise_dim: int = 8,
        use_item: bool = False,
        n_scores: int = 1,
        n_objectives: int = 1,
    ) -> None:
        super().__init__()
        self.noise_dim = noise_dim
        self.from_user = nn.Linear(dim, hidden)
        self.from_item = nn.Linear(dim, hidden, bias=False) if use_item else None
        self.from_label = nn.Linear(n_objectives, hidden, bias=False)
        self.from_noise = nn.Linear(noise_dim, hidden, bias=False)
        self.out = nn.Linear(hidden, n_scores)

    def forward(self, user: Tensor, items: Tensor, labels: Tensor) -> Tensor:
        """user ``[B, d]``, items ``[B, n, d]``, labels ``[B, n]`` or ``[B, n, T]`` → x' in (0, 1): ``[B, n]``, or
        ``[B, n, S]``.

        Inputs are detached: gradients reach φ only, never the reranker that encoded them.
        """
        noise = torch.randn(*labels.shape[:2], self.noise_dim, device=labels.device)
        # One layer on the concatenation [u; e; z; ε], written as a sum so that u is projected once per request.
        hidden = self.from_user(user.detach()).unsqueeze(1) + self.from_noise(noise)
        hidden = hidden + self.from_label(signed(labels))
        if self.from_item is not None:
            hidden = hidden + self.from_item(items.detach())
        x = self.out(torch.relu(hidden))
        return torch.sigmoid((x.squeeze(-1) if x.shape[-1] == 1 else x).float())

    def draw(self, context: Any, slate: Slate) -> Tensor:
        """x' of the shape of the slate's scores."""
        return self(context.user, context.candidates, feedback(slate))


def feedback(slate: Slate) -> Tensor:
    """What a generator is told of z: the labels ``[B, n]``, or the objectives ``[B, n, T]`` where each is learned."""
    return slate.labels if slate.objectives is None else slate.objectives


def signed(labels: Tensor) -> Tensor:
    """``[B, n]`` or ``[B, n, T]`` in [0, 1] → ``[B, n, T]`` in [−1, 1]."""
    return (2 * labels - 1) if labels.dim() == 3 else (2 * labels - 1).unsqueeze(-1)
