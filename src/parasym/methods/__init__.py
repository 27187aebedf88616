"""What you can do about a symmetry: remove it, keep it, or use it. Every method returns a handle that undoes or bakes the change."""

from parasym.methods.edit import Edit, Handle, edited, output_change
from parasym.methods.state import Moved, Transport, linear_transport, sliced_transport

__all__ = ["Edit", "Handle", "Moved", "Transport", "edited", "linear_transport", "output_change", "sliced_transport"]
