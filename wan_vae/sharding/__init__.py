"""One picture over several ranks: the context that blocks receive, and the guarded collectives."""

from .context import SINGLE, ShardContext

__all__ = ["SINGLE", "ShardContext"]
