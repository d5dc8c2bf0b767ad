"""Llama 1 to 3.2, and the models of others that say `model_type: llama`."""

from sparsetrace.model.families.base import Family

LLAMA = Family(model_type="llama", architecture="LlamaForCausalLM")
