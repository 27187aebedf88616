"""What a symmetry forces on training: charges, ledgers, drift, noise equilibrium, entropic force, irreversibility.

A `Charge` comes from a symmetry (`charges`); everything else consumes it: `Ledger` keeps the exact books of a run, `predict` puts
predicted beside measured curves in one call, `noise_equilibrium` moves a model to where gradient noise is balanced,
`gradient_geometry` and `hessian_geometry` check the identities behind it all on a user's own loss.
"""

from parasym.laws.charges import Charge as Charge
from parasym.laws.charges import ChargeSet as ChargeSet
from parasym.laws.charges import charges as charges
from parasym.laws.charges import charges_of as charges_of
from parasym.laws.drift import charge_moments as charge_moments
from parasym.laws.drift import expected_change as expected_change
from parasym.laws.drift import imbalance as imbalance
from parasym.laws.entropy import effective_loss as effective_loss
from parasym.laws.entropy import entropic_force as entropic_force
from parasym.laws.entropy import entropy as entropy
from parasym.laws.entropy import equipartition as equipartition
from parasym.laws.equilibrium import Equilibrium as Equilibrium
from parasym.laws.equilibrium import noise_equilibrium as noise_equilibrium
from parasym.laws.flow import ModifiedFlow as ModifiedFlow
from parasym.laws.flow import NormFlow as NormFlow
from parasym.laws.flow import noether_flow as noether_flow
from parasym.laws.geometry import gradient_geometry as gradient_geometry
from parasym.laws.geometry import hessian_geometry as hessian_geometry
from parasym.laws.irreversibility import EntropyProduction as EntropyProduction
from parasym.laws.irreversibility import irreversibility as irreversibility
from parasym.laws.ledger import Account as Account
from parasym.laws.ledger import Ledger as Ledger
from parasym.laws.predict import Prediction as Prediction
from parasym.laws.predict import predict as predict
