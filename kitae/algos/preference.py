"""Losses of preferences: DPO, IPO, SimPO and ORPO over pairs, KTO over labelled completions.

Rows come in units: rows 2p and 2p + 1 of a batch are the chosen and the rejected completion of pair p. Every loss is a
sum over pairs (KTO: rows), each counting 1 whatever its length; token weights play no part. Metrics are such sums too.
Papers: arXiv:2305.18290 (DPO), 2310.12036 (IPO), 2403.00409 (robust DPO), 2405.14734 (SimPO), 2403.07691 (ORPO),
2402.01306 (KTO).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kitae.algos.losses import LossOutput
from kitae.types import TokenOutputs

LN_2 = math.log(2.0)
TIE = 1e-3
"""Log ratios to the reference that differ by less, in nats, are equal: at step 1 they differ by rounding only."""
LARGEST_LOGPROB = -1e-7
"""A mean log-prob nearer to 0 than this has no odds in float32."""


def dpo(
    out: TokenOutputs,
    _weights_N: Tensor,
    *,
    ref_logprob: Tensor,
    beta: float,
    loss_type: Literal["sigmoid", "robust", "ipo"] = "sigmoid",
    label_smoothing: float = 0.0,
    nll_coef: float = 0.0,
) -> LossOutput:
    """Direct preference optimization, eq. 7; ref_logprob [B] is the reference's log-prob of each completion.

    label_smoothing e takes e of all pairs to be labelled the wrong way round: "sigmoid" then is the conservative form,
    (1 - e) L(chosen, rejected) + e L(rejected, chosen), and "robust" its unbiased one, eq. 8 of arXiv:2403.00409. "ipo" is
    eq. 17 of arXiv:2310.12036 on mean log-probs per token. nll_coef adds the chosen completion's mean negative
    log-prob per token (arXiv:2404.19733, eq. 1).
    """
    logprob_B, length_B = _sums(out)
    score_B = logprob_B - ref_logprob
    if loss_type == "ipo":
        score_B = score_B / length_B
    margin_P = score_B[0::2] - score_B[1::2]
    if loss_type == "ipo":
        loss_P = (margin_P - 1 / (2 * beta)).square()
    else:
        loss_P = _smoothed(beta * margin_P, label_smoothing, is_robust=loss_type == "robust")
    mean_B = logprob_B / length_B
    if nll_coef:
        loss_P = loss_P - nll_coef * mean_B[0::2]
    return loss_P.sum(), _pair_metrics(beta * score_B, mean_B, tie=beta * TIE)


def simpo(
    out: TokenOutputs,
    _weights_N: Tensor,
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
    nll_coef: float = 0.0,
) -> LossOutput:
    """Simple preference optimization, eq. 6: mean log-probs per token, a target margin gamma, and no reference."""
    logprob_B, length_B = _sums(out)
    mean_B = logprob_B / length_B
    reward_B = beta * mean_B
    loss_P = _smoothed(reward_B[0::2] - reward_B[1::2] - gamma, label_smoothing)
    if nll_coef:
        loss_P = loss_P - nll_coef * mean_B[0::2]
    return loss_P.sum(), _pair_metrics(reward_B, mean_B)


def orpo(out: TokenOutputs, _weights_N: Tensor, *, odds_coef: float) -> LossOutput:
    """Odds ratio preference optimization, eq. 6 and 7: the chosen completion's negative log-prob, and the log odds ratio.

    Both are of mean log-probs per token. The reward in the metrics is a completion's log odds, log p / (1 - p).
    """
    logprob_B, length_B = _sums(out)
    mean_B = logprob_B / length_B
    log_odds_B = mean_B - _log1mexp(mean_B.clamp(max=LARGEST_LOGPROB))
    loss_P = -mean_B[0::2] - odds_coef * F.logsigmoid(log_odds_B[0::2] - log_odds_B[1::2])
    return loss_P.sum(), _pair_metrics(log_odds_B, mean_B)


def kto(
    out: TokenOutputs,
    _weights_N: Tensor,
    *,
    label: Tensor,
    ref_logprob: Tensor,
    reference_point: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOutput:
    """Kahneman-Tversky optimization, eq. 8; all three numbers are [B], and reference_point is the same in every row.

    It is z0, an estimate of the KL divergence to the reference, and has no gradient. chosen_* and rejected_* among the
    metrics are sums over the desirable and undesirable rows only, whose share is `desirable`: see per_side.
    """
    logprob_B, length_B = _sums(out)
    log_ratio_B = logprob_B - ref_logprob
    is_good_B = label > 0.5
    sign_B = torch.where(is_good_B, 1.0, -1.0)
    weight_B = torch.where(is_good_B, desirable_weight, undesirable_weight)
    gain_B = sign_B * (log_ratio_B - reference_point)
    loss_B = weight_B * torch.sigmoid(-beta * gain_B)  # lambda - lambda sigmoid(beta gain)
    with torch.no_grad():
        mean_B, good_B = logprob_B / length_B, is_good_B.float()
        metrics = {
            "accuracy": (gain_B > TIE).float().sum(),
            "desirable": good_B.sum(),
            "chosen_reward": (beta * log_ratio_B * good_B).sum(),
            "rejected_reward": (beta * log_ratio_B * (1 - good_B)).sum(),
            "chosen_logprob": (mean_B * good_B).sum(),
            "rejected_logprob": (mean_B * (1 - good_B)).sum(),
            "kl": reference_point.sum(),
        }
    return loss_B.sum(), metrics


def per_side(metrics: dict[str, float]) -> dict[str, float]:
    """KTO's metrics over all rows, with chosen_* and rejected_* as means over their own rows, and their margin.

    What had no row is left out.
    """
    if "desirable" not in metrics:
        return metrics
    shares = {"chosen_": metrics["desirable"], "rejected_": 1 - metrics["desirable"]}
    found = {}
    for name, value in metrics.items():
        share = next((share for side, share in shares.items() if name.startswith(side)), 1.0)
        if share > 1e-9:
            found[name] = value / share
    if {"chosen_reward", "rejected_reward"} <= set(found):
        found["margin"] = found["chosen_reward"] - found["rejected_reward"]
    return found


def _sums(out: TokenOutputs) -> tuple[Tensor, Tensor]:
    """Log-prob and number of tokens of each row's completion; long sums are added up in float64."""
    logprob_B = out.per_row(out.logprobs_N.double()).float()
    return logprob_B, out.per_row(torch.ones_like(out.logprobs_N))


def _smoothed(logit_P: Tensor, label_smoothing: float, *, is_robust: bool = False) -> Tensor:
    """-log sigmoid(logit), where a share of the labels may be wrong."""
    right_P, wrong_P = -F.logsigmoid(logit_P), -F.logsigmoid(-logit_P)
    e = label_smoothing
    if is_robust:
        return ((1 - e) * right_P - e * wrong_P) / (1 - 2 * e)
    return (1 - e) * right_P + e * wrong_P if e else right_P


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0 without cancellation: near 0 by expm1, elsewhere by log1p."""
    is_near = x > -LN_2
    near = torch.log(-torch.expm1(torch.where(is_near, x, -LN_2)))
    far = torch.log1p(-torch.exp(torch.where(is_near, -LN_2, x)))
    return torch.where(is_near, near, far)


@torch.no_grad()
def _pair_metrics(reward_B: Tensor, mean_logprob_B: Tensor, *, tie: float = 0.0) -> dict[str, Tensor]:
    """Sums over pairs: what the loss compares (rewards, their margin, and who wins), and log-probs per token."""
    margin_P = reward_B[0::2] - reward_B[1::2]
    return {
        "margin": margin_P.sum(),
        "accuracy": (margin_P > tie).float().sum(),
        "chosen_reward": reward_B[0::2].sum(),
        "rejected_reward": reward_B[1::2].sum(),
        "chosen_logprob": mean_logprob_B[0::2].sum(),
        "rejected_logprob": mean_logprob_B[1::2].sum(),
    }
