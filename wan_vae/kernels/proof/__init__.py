"""The proof of a kernel on this device, and the verdicts that are kept."""

from .cache import ProofCache, environment
from .prove import Verdict, prove

__all__ = ["ProofCache", "Verdict", "environment", "prove"]
