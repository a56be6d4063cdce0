// AVX-512 F, BW, DQ, VL and VNNI, whose products of bytes `int8.inc` takes.

#define LANES 16
#include "kernels.inc"
#include "int8.inc"

const Kernels fastprompt::avx512_vnni = {
    prefix_attention_scratch, prefix_attention,
    prefix_attention_backward_scratch, prefix_attention_backward,
    add_norm,
    adaptive_prompts_scratch, adaptive_prompts, bottleneck,
    int8_linear_scratch, int8_linear,
};
