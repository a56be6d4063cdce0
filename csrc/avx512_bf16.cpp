// AVX-512 with its bfloat16 instructions, one of which makes 16 sums of two products each.

#define LANES 16
#include "kernels.inc"
#include "int8.inc"

#include <immintrin.h>

namespace {

struct Tiles {};

constexpr int64_t TILE_ROWS = 8;  // of A at a time: 16 accumulators hide the latency, and operands fit the registers

// See bfloat16.inc.
inline void product_of_tiles(const char* a, int64_t a_row, int64_t lower, int64_t a_step, const char* b, int64_t right,
                             int64_t b_step, int64_t steps, float* c, int64_t c_row) {
  for (int64_t row = 0; row < 32; row += TILE_ROWS) {
    const char* rows = a + row / 16 * lower + row % 16 * a_row;
    __m512 sums[TILE_ROWS][2];
#pragma GCC unroll 8
    for (int64_t i = 0; i < TILE_ROWS; ++i) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    for (int64_t step = 0; step < steps; ++step)
      for (int64_t pair = 0; pair < 16; ++pair) {
        const char* columns = b + step * b_step + 64 * pair;
        const __m512bh left = (__m512bh)_mm512_load_si512(columns);
        const __m512bh next = (__m512bh)_mm512_load_si512(columns + right);
        const char* numbers = rows + step * a_step + 4 * pair;
#pragma GCC unroll 8
        for (int64_t i = 0; i < TILE_ROWS; ++i) {
          int32_t two;
          __builtin_memcpy(&two, numbers + i * a_row, 4);
          const __m512bh of_row = (__m512bh)_mm512_set1_epi32(two);
          sums[i][0] = _mm512_dpbf16_ps(sums[i][0], of_row, left);
          sums[i][1] = _mm512_dpbf16_ps(sums[i][1], of_row, next);
        }
      }
#pragma GCC unroll 8
    for (int64_t i = 0; i < TILE_ROWS; ++i) {
      _mm512_store_ps(c + (row + i) * c_row, sums[i][0]);
      _mm512_store_ps(c + (row + i) * c_row + 16, sums[i][1]);
    }
  }
}

}  // namespace

#include "bfloat16.inc"

const Kernels fastprompt::avx512_bf16 = {
    tiled_scratch, tiled_prefix_attention,
    prefix_attention_backward_scratch, prefix_attention_backward,
    add_norm,
    adaptive_prompts_scratch, adaptive_prompts, bottleneck,
    int8_linear_scratch, int8_linear,
};
