"""(config, world_size) -> Plan. Imports neither torch nor megatron, except `plan.megatron`."""

from ring_train.plan.batch import BatchPlan, context_tokens
from ring_train.plan.cost import Cost
from ring_train.plan.layers import LayerPlan
from ring_train.plan.lora import LoraPlan
from ring_train.plan.memory import RankMemory, make_memory
from ring_train.plan.mesh import Mesh, smallest_world
from ring_train.plan.phases import Phase, StepPlan
from ring_train.plan.pipeline import PipelinePlan
from ring_train.plan.plan import Plan, make_plan, model_at, plan_record
from ring_train.plan.problems import PlanError
from ring_train.plan.search import Found, Layout, search
from ring_train.plan.timing import Timing, make_timing

__all__ = [
    "BatchPlan",
    "Cost",
    "Found",
    "LayerPlan",
    "Layout",
    "LoraPlan",
    "Mesh",
    "Phase",
    "PipelinePlan",
    "Plan",
    "PlanError",
    "RankMemory",
    "StepPlan",
    "Timing",
    "context_tokens",
    "make_memory",
    "make_plan",
    "make_timing",
    "model_at",
    "plan_record",
    "search",
    "smallest_world",
]
