// AVX-512 with its bfloat16 instructions, and AMX tiles for the products of bfloat16:
// C (16 × 16 floats) += A (16 × 32 bfloat16) · B (32 × 16 bfloat16).

#define LANES 16
#include "kernels.inc"
#include "int8.inc"

#include <immintrin.h>

namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig CONFIG;

// The tiles of this thread, as long as it lives.
struct Tiles {
  Tiles() { _tile_loadconfig(&CONFIG); }
  ~Tiles() { _tile_release(); }
};

// See bfloat16.inc; with `passes`, A's one behind the other share a B, and their products are added.
inline void product_of_tiles(const char* a, int64_t a_row, int64_t lower, int64_t a_step, const char* b, int64_t right,
                             int64_t b_step, int64_t steps, float* c, int64_t c_row, int64_t passes = 1) {
  __asm__ volatile("" ::: "memory");  // the compiler does not know that tiles are loaded from what was stored before
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (; passes > 0; --passes) {
    const char* to_the_right = b;
    for (int64_t i = 0; i < steps; ++i, a += a_step, to_the_right += b_step) {
      _tile_loadd(4, a, a_row);
      _tile_loadd(6, to_the_right, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, to_the_right + right, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + lower, a_row);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, 4 * c_row);
  _tile_stored(1, c + 16, 4 * c_row);
  _tile_stored(2, c + 16 * c_row, 4 * c_row);
  _tile_stored(3, c + 16 * c_row + 16, 4 * c_row);
}

}  // namespace

#include "bfloat16.inc"

namespace {

// A float32 mix on bfloat16 tokens, mix · ((X − mean) / std) = (mix / std) · X − (mix / std) · mean: of three bfloat16 numbers
// that add up to a weight, each product with a token is exact.
constexpr int64_t TERMS = 3;

// Bytes from a prompt's terms to the next prompt's: an odd number of cache lines.
int64_t terms_row(int64_t blocks) { return TERMS * blocks * 64 | 64; }

int64_t tiled_adaptive_prompts_scratch(const AdaptivePrompts* a) {
  if (a->type != BFLOAT16) return adaptive_prompts_scratch(a);
  const int64_t blocks = (a->tokens_per_image + BLOCK - 1) / BLOCK, rows = round_up(a->prompts, BLOCK);
  return round_up(4 * Mix::size(a), 64) + rows * terms_row(blocks) + 2 * TILE * blocks + 4 * BLOCK * BLOCK;
}

// The terms of n weights: [term][32 tokens of each block], zeros behind them.
void split_weights(const float* weights, int64_t n, int64_t blocks, bfloat16* to) {
  for (int64_t t = 0; t < BLOCK * blocks; t += 16) {
    const __mmask16 mask = n - t >= 16 ? 0xFFFF : n <= t ? 0 : (1u << (n - t)) - 1;
    __m512 rest = _mm512_maskz_loadu_ps(mask, weights + t);
    for (int64_t term = 0; term < TERMS; ++term) {
      bfloat16* place = to + term * BLOCK * blocks + t;
      store(place, (Vec)rest);
      rest = _mm512_sub_ps(rest, (__m512)load(place));
    }
  }
}

void tiled_adaptive_prompts(const AdaptivePrompts* a, int64_t begin, int64_t end, char* scratch) {
  if (a->type != BFLOAT16) return adaptive_prompts(a, begin, end, scratch);
  const Tiles tiles;
  const int64_t n = a->tokens_per_image, p = a->prompts, d = a->width, blocks = (n + BLOCK - 1) / BLOCK;
  const int64_t row_bytes = terms_row(blocks), panels = (d + BLOCK - 1) / BLOCK, padded = round_up(p, BLOCK);
  Mix mix(a, reinterpret_cast<float*>(scratch));
  char* terms = scratch + round_up(4 * Mix::size(a), 64);  // (P padded, terms · N)
  char* panel = terms + padded * row_bytes;  // [block of 32 tokens][left, right 16 columns]
  float* mixed = reinterpret_cast<float*>(panel + 2 * TILE * blocks);  // (32, 32)
  __builtin_memset(terms + p * row_bytes, 0, (padded - p) * row_bytes);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / a->parts, part = task % a->parts;
    const int64_t first = panels * part / a->parts, last = panels * (part + 1) / a->parts;
    if (first == last) continue;
    const bfloat16* tokens = static_cast<const bfloat16*>(a->tokens) + image * a->batch_stride;
    mix.fill(a, tokens, false);
    for (int64_t i = 0; i < p; ++i)
      split_weights(mix.weights + i * mix.tokens, n, blocks, reinterpret_cast<bfloat16*>(terms + i * row_bytes));
    for (int64_t column = BLOCK * first; column < smaller(d, BLOCK * last); column += BLOCK) {
      const int64_t columns = smaller(BLOCK, d - column);
      for (int64_t pair = 0; pair < 16 * blocks; ++pair) {
        const bfloat16* upper = tokens + 2 * pair * a->row_stride + column;
        pack_pair(load_pairs(upper, 2 * pair < n ? columns : 0),
                  load_pairs(upper + a->row_stride, 2 * pair + 1 < n ? columns : 0),
                  panel + 2 * TILE * (pair / 16) + 64 * (pair % 16));
      }
      for (int64_t i = 0; i < p; i += BLOCK) {
        product_of_tiles(terms + i * row_bytes, row_bytes, 16 * row_bytes, 64, panel, TILE, 2 * TILE, blocks, mixed,
                         BLOCK, TERMS);
        for (int64_t j = 0; j < smaller(BLOCK, p - i); ++j)
          mix.finish(a, image, i + j, column, columns, mixed + BLOCK * j);
      }
    }
  }
}

}  // namespace

const Kernels fastprompt::amx = {
    tiled_scratch, tiled_prefix_attention,
    prefix_attention_backward_scratch, prefix_attention_backward,
    add_norm,
    tiled_adaptive_prompts_scratch, tiled_adaptive_prompts, bottleneck,
    int8_linear_scratch, int8_linear,
};
