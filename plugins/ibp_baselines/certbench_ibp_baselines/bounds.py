"""IBP and CROWN-IBP training, with the symbols of arXiv 1810.12715 and 1906.06316."""

from __future__ import annotations

from torch import Tensor

from certbench.bounds import Bounds, Box, crown_ibp_margins
from certbench.training import Batch, IntervalObjective
from certbench_ibp_baselines.settings import IBPSettings

NEGLIGIBLE = 1e-5
"""The share of linear bounds below which the reference implementation leaves them out."""


class IBP(IntervalObjective):
    """``(1 - kappa) L_IBP(x, eps) + kappa CE(f(x), y)``, and the regularisers where the settings ask for them."""

    settings: IBPSettings

    def robust_loss(self, batch: Batch, box: Box, bounds: Bounds) -> Tensor:
        kappa = self.settings.kappa
        return (1 - kappa) * super().robust_loss(batch, box, bounds) + kappa * batch.clean_loss


class CrownIBP(IntervalObjective):
    """The robust loss of ``f m_CROWN-IBP + (1 - f) m_IBP``, f falling from 1 to 0 while eps ramps up to eps_max."""

    def margins(self, batch: Batch, box: Box, bounds: Bounds) -> Tensor:
        f = (self.eps_max - batch.eps) / self.eps_max
        m_ibp = bounds.margins(batch.labels)
        if f < NEGLIGIBLE:
            return m_ibp
        m_crown = crown_ibp_margins(self.graph, box, batch.labels, batch.clean.statistics)
        return f * m_crown + (1 - f) * m_ibp
