"""What you can do about a symmetry: remove it, keep it, or use it. Every method returns a handle that undoes or bakes the change."""

from parasym.methods.compress import compress
from parasym.methods.dcs import Dcs, certify_mirror, dcs
from parasym.methods.edit import Edit, Handle, edited, output_change
from parasym.methods.entropic import EntropicRegularizer, cancel_entropy
from parasym.methods.lasso import Lasso, duality_gap, lasso
from parasym.methods.masks import Masking
from parasym.methods.objectives import Balance, Int8, MinimumNorm, NoiseEquilibrium, Sharpness
from parasym.methods.prune import critical_compression, max_compression, prune, rewound
from parasym.methods.rebasin import Agreement
from parasym.methods.reparametrize import Lift, Reparametrization
from parasym.methods.revive import revive
from parasym.methods.spred import Certificate, FeatureGate, Product, Spred, solve, spred
from parasym.methods.state import Moved, Transport, linear_transport, sliced_transport
from parasym.methods.syre import Pull, Shift, Syre, syre
from parasym.methods.teleport import teleport
from parasym.methods.upstream import upstream
from parasym.methods.width import thin

__all__ = [
    "Agreement",
    "Balance",
    "Certificate",
    "Dcs",
    "Edit",
    "EntropicRegularizer",
    "FeatureGate",
    "Handle",
    "Int8",
    "Lasso",
    "Lift",
    "Masking",
    "MinimumNorm",
    "Moved",
    "NoiseEquilibrium",
    "Product",
    "Pull",
    "Reparametrization",
    "Sharpness",
    "Shift",
    "Spred",
    "Syre",
    "Transport",
    "cancel_entropy",
    "certify_mirror",
    "compress",
    "critical_compression",
    "dcs",
    "duality_gap",
    "edited",
    "lasso",
    "linear_transport",
    "max_compression",
    "output_change",
    "prune",
    "revive",
    "rewound",
    "sliced_transport",
    "solve",
    "spred",
    "syre",
    "teleport",
    "thin",
    "upstream",
]
