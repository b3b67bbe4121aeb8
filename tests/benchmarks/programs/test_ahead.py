"""Kernels of a compiled program and their bytes, against a text whose numbers are worked out by hand."""

from benchmarks.programs.ahead import Kernel, kernels

TEXT = """HloModule jit_f, is_scheduled=true

%fused_computation (param_0: bf16[4,8], param_1: f32[8]) -> bf16[4,8] {
  %param_0 = bf16[4,8]{1,0} parameter(0)
  ROOT %multiply.3 = bf16[4,8]{1,0} multiply(%param_0, %param_0)
}

%gemm (param_0: bf16[4,8], param_1: bf16[8,5]) -> bf16[4,5] {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  ROOT %dot.1 = bf16[4,5]{1,0} dot(%p.1, %p.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main.9 (x.1: bf16[4,8], w.1: bf16[8,5]) -> (f32[4], s32[]) {
  %x.1 = bf16[4,8]{1,0} parameter(0), metadata={op_name="x"}
  %w.1 = bf16[8,5]{1,0} parameter(1)
  %c.1 = f32[8]{0} constant({...})
  %fusion.1 = bf16[4,8]{1,0} fusion(%x.1, %c.1), kind=kLoop, calls=%fused_computation, metadata={op_name="f(a), %w.1"}
  %bitcast.1 = bf16[32]{0} bitcast(%fusion.1)
  %gemm_fusion = bf16[4,5]{1,0} fusion(%fusion.1, /*index=1*/%w.1), kind=kCustom, calls=%gemm
  %custom-call.1 = (bf16[4,5]{1,0}, s8[100]{0}) custom-call(%gemm_fusion), custom_call_target="__gpu$xla.gpu.triton"
  %get-tuple-element.1 = bf16[4,5]{1,0} get-tuple-element(%custom-call.1), index=0
  %copy-start.1 = (bf16[4,5]{1,0}, bf16[4,5]{1,0}, u32[]) copy-start(%get-tuple-element.1)
  %copy-done.1 = bf16[4,5]{1,0} copy-done(%copy-start.1)
  ROOT %tuple.1 = (f32[4]{0}, s32[]) tuple(%copy-done.1, %c.1)
}
"""


def test_kernels_of_the_entry_and_what_they_read_and_write():
    assert kernels(TEXT) == [
        Kernel("fusion.1", "elementwise and sums", 64 + 64 + 32),
        Kernel("gemm_fusion", "matrix products", 40 + 64 + 80),
        Kernel("custom-call.1", "triton", (40 + 100) + 40),
        Kernel("copy-start.1", "copies and layout", (40 + 40 + 4) + 40),
    ]
