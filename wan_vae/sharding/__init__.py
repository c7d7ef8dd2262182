"""One picture over several ranks: the context that callers pass, the plan, the guarded messages.

`decode_sharded` and `WorkerPool` decode over several devices from one ordinary program.
"""

from .context import SINGLE, ShardContext
from .plan import ShardPlan, plan_shards

__all__ = ["SINGLE", "ShardContext", "ShardPlan", "WorkerPool", "decode_sharded", "plan_shards"]


def __getattr__(name: str):
    # Late: `workers` needs the pipeline, which needs this package.
    if name in ("WorkerPool", "decode_sharded"):
        from . import workers

        return getattr(workers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
