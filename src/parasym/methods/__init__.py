"""What you can do about a symmetry: remove it, keep it, or use it. Every method returns a handle that undoes or bakes the change."""

from parasym.methods.compress import compress
from parasym.methods.edit import Edit, Handle, edited, output_change
from parasym.methods.masks import Masking
from parasym.methods.prune import critical_compression, max_compression, prune, rewound
from parasym.methods.revive import revive
from parasym.methods.state import Moved, Transport, linear_transport, sliced_transport

__all__ = [
    "Edit",
    "Handle",
    "Masking",
    "Moved",
    "Transport",
    "compress",
    "critical_compression",
    "edited",
    "linear_transport",
    "max_compression",
    "output_change",
    "prune",
    "revive",
    "rewound",
    "sliced_transport",
]
