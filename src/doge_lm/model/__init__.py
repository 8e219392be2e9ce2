"""The Doge model, registered with transformers' Auto classes under `doge_ifa`.

The name `doge` belongs to a different, incompatible model inside transformers.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_doge import DogeConfig
from .modeling_doge import DogeForCausalLM, DogeModel, DogePreTrainedModel

AutoConfig.register(DogeConfig.model_type, DogeConfig)
# transformers' own DogeConfig has the same class name, and register() compares names.
AutoModel.register(DogeConfig, DogeModel, exist_ok=True)
AutoModelForCausalLM.register(DogeConfig, DogeForCausalLM, exist_ok=True)

# A saved checkpoint then carries these files, and loads with `trust_remote_code=True` without this package.
DogeConfig.register_for_auto_class()
DogeModel.register_for_auto_class("AutoModel")
DogeForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["DogeConfig", "DogeForCausalLM", "DogeModel", "DogePreTrainedModel"]
