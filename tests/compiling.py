"""How tests compile: they compile more than they compute."""

from importlib.metadata import version

# Without LLVM's optimisation.
QUICK = "--xla_backend_optimization_level=0"
# XLA ends a process at a flag that it does not know; these belong to the version that constraints/ pins. Its newer
# emitters of fusions take three times as long, its threads a third more.
if version("jaxlib").startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
