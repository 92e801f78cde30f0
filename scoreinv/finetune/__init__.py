"""Learned posteriors: controls of a prior's chain, or of a process that knows nothing, and what their paths prove."""

from scoreinv.finetune.adapted import Adapted
from scoreinv.finetune.amortised import Amortised, Conditioned, finetune, load_amortised
from scoreinv.finetune.evidence import Evidence, evidence
from scoreinv.finetune.rewarded import Rewarded, finetune_by_reward
from scoreinv.finetune.sdes import SamplerControl, sampler_bounds
from scoreinv.finetune.steered import Steered
from scoreinv.finetune.training import Plan, Recipe

__all__ = [
    "Adapted",
    "Amortised",
    "Conditioned",
    "Evidence",
    "Plan",
    "Recipe",
    "Rewarded",
    "SamplerControl",
    "Steered",
    "evidence",
    "finetune",
    "finetune_by_reward",
    "load_amortised",
    "sampler_bounds",
]
