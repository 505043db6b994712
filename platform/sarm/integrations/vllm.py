"""vLLM: a SARM inside its engine, as a pooling model. `jobs/convert_sarm.py IN OUT --format vllm` writes the folder that it loads.

vLLM finds both functions by the entry points of this package, in every process that it starts. Nothing of vLLM is imported until a SARM is
loaded: `vllm_models` has the classes, `vllm_explanations` the IO processor, and `vllm_pooling` what they compute, without vLLM.
"""

from sarm.data.formats.vllm_layout import ARCHITECTURES


def register() -> None:
    """Teach vLLM the architectures of SARMs (`vllm.general_plugins`); may be called again."""
    from vllm import ModelRegistry

    for name in ARCHITECTURES.values():
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, f"sarm.integrations.vllm_models:{name}")


def io_processor() -> str:
    """Where the class is that explains rewards (`vllm.io_processor_plugins`)."""
    return "sarm.integrations.vllm_explanations.SarmExplanations"
