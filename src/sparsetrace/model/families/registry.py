"""The families that `convert` takes, by the `model_type` of their config.json."""

from sparsetrace.model.families.llama import LLAMA
from sparsetrace.model.families.mistral import MISTRAL
from sparsetrace.model.families.qwen3 import QWEN3

FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN3)}
