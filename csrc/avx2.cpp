// AVX2 and FMA.

#define LANES 8
#include "kernels.inc"
#include "int8.inc"

const Kernels fastprompt::avx2 = {
    prefix_attention_scratch, prefix_attention,
    prefix_attention_backward_scratch, prefix_attention_backward,
    add_norm,
    adaptive_prompts_scratch, adaptive_prompts, bottleneck,
    int8_linear_scratch, int8_linear,
};
