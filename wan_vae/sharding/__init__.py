"""One picture on several ranks: the context that callers pass, the plan, and guarded messages."""

from .context import SINGLE, ShardContext
from .plan import ShardPlan, plan_shards

__all__ = ["SINGLE", "ShardContext", "ShardPlan", "plan_shards"]
