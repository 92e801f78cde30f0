"""Published samplers, to compare with: none is exact for a prior that is not Gaussian, TDS apart."""

from scoreinv.samplers.baselines.convolved import ConvolvedLikelihood
from scoreinv.samplers.baselines.daps import DAPS
from scoreinv.samplers.baselines.diffpir import DiffPIR
from scoreinv.samplers.baselines.dps import DPS
from scoreinv.samplers.baselines.mmps import MMPS
from scoreinv.samplers.baselines.pigdm import PiGDM
from scoreinv.samplers.baselines.pnpdm import PnPDM
from scoreinv.samplers.baselines.tds import TDS

__all__ = ["DAPS", "DPS", "MMPS", "TDS", "ConvolvedLikelihood", "DiffPIR", "PiGDM", "PnPDM"]
