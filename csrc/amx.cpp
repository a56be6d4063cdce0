// AVX-512 with its bfloat16 instructions, and AMX tiles for the products of bfloat16.
//
// A tile has 16 rows of 64 bytes. C (16 × 16 floats) += A (16 × 32 bfloat16) · B (32 × 16 bfloat16), where row i of B's
// tile holds rows 2i and 2i + 1 of B, their numbers side by side.

#define LANES 16
#include "kernels.inc"

#include <immintrin.h>

namespace {

constexpr int64_t TILE = 1024;  // bytes
constexpr int64_t BLOCK = 32;  // queries, keys or columns: two tiles

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// C (32 × 32 floats) = A · B over `steps` times 32 inner numbers, for `passes` A's one behind the other and the same B. Of A
// the upper and the lower 16 rows, and of B the left and the right 16 columns, are tiles of their own: `lower` and `right`
// bytes apart, the next of 32 inner numbers `a_step` and `b_step` bytes on.
inline void product_of_tiles(const char* a, int64_t a_row, int64_t lower, int64_t a_step, const char* b, int64_t right,
                             int64_t b_step, int64_t steps, float* c, int64_t c_row, int64_t passes = 1) {
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

// Up to 32 numbers of a row, zeros behind them.
inline __m512i load_pairs(const bfloat16* p, int64_t n) {
  return _mm512_maskz_loadu_epi16(n >= 32 ? ~0u : n <= 0 ? 0 : (1u << n) - 1, p);
}

// Rows become columns, of 16 × 16 numbers of 32 bits.
inline void transpose(__m512i x[16]) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // x[4 k + i]: columns i, i + 4, i + 8, i + 12 of rows 4 k to 4 k + 3
    y[i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
    y[4 + i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
    y[8 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
    y[12 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0x88);
    x[8 + i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0xdd);
    x[4 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0x88);
    x[12 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0xdd);
  }
}

// 2^x for x ≤ 0 that is rounded to bfloat16: 2^⌊x⌋ times a polynomial of the rest in [0, 1), exact at
// integers, relative error 1e-4 elsewhere.
inline __m512 exp2_short(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0.078267970f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.226307682f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.695424348f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1));
  return _mm512_scalef_ps(p, x);
}

// Bytes of the keys' and values' tiles, and of one block of queries, scores, weights and outputs.
struct TileScratch {
  int64_t keys, blocks, steps;  // S, and S and d in units of 32

  explicit TileScratch(const PrefixAttention* a)
      : keys(a->prompts + a->tokens), blocks((keys + BLOCK - 1) / BLOCK), steps((a->width + BLOCK - 1) / BLOCK) {}

  int64_t source() const { return 2 * TILE * blocks * steps; }  // keys or values
  int64_t queries() const { return 2 * TILE * steps; }
  int64_t row() const { return BLOCK * (blocks + 1); }  // from one row of scores or weights to the next
  int64_t out_row() const { return BLOCK * steps; }
  int64_t bytes() const { return 2 * source() + queries() + BLOCK * (6 * row() + 4 * out_row()); }
};

int64_t tiled_scratch(const PrefixAttention* a) {
  return a->type == BFLOAT16 ? TileScratch(a).bytes() : prefix_attention_scratch(a);
}

// Tiles of Kᵀ: [block of 32 keys][step of 32 columns][left, right 16 keys].
void pack_keys(const Source<bfloat16>& keys, const TileScratch& size, int64_t width, char* to) {
  for (int64_t half = 0; half < 2 * size.blocks; ++half)
    for (int64_t step = 0; step < size.steps; ++step) {
      __m512i rows[16];
      for (int64_t i = 0; i < 16; ++i) {
        const int64_t s = 16 * half + i;
        rows[i] = s < size.keys ? load_pairs(keys[s] + BLOCK * step, width - BLOCK * step) : _mm512_setzero_si512();
      }
      transpose(rows);
      char* tile = to + TILE * (2 * (half / 2 * size.steps + step) + half % 2);
      for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(tile + 64 * i, rows[i]);
    }
}

// Two rows of 32 columns as a row of the left and of the right tile.
inline void pack_pair(__m512i upper, __m512i lower, char* tile) {
  const __m512i left = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(upper));
  const __m512i right = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(upper, 1));
  const __m512i left2 = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(lower));
  const __m512i right2 = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(lower, 1));
  _mm512_store_si512(tile, _mm512_or_si512(left, _mm512_slli_epi32(left2, 16)));
  _mm512_store_si512(tile + TILE, _mm512_or_si512(right, _mm512_slli_epi32(right2, 16)));
}

// Tiles of V: [step of 32 columns][block of 32 keys][left, right 16 columns].
void pack_values(const Source<bfloat16>& values, const TileScratch& size, int64_t width, char* to) {
  for (int64_t pair = 0; pair < 16 * size.blocks; ++pair)
    for (int64_t step = 0; step < size.steps; ++step) {
      __m512i rows[2];
      for (int64_t i = 0; i < 2; ++i) {
        const int64_t s = 2 * pair + i;
        rows[i] = s < size.keys ? load_pairs(values[s] + BLOCK * step, width - BLOCK * step) : _mm512_setzero_si512();
      }
      pack_pair(rows[0], rows[1], to + 2 * TILE * (step * size.blocks + pair / 16) + 64 * (pair % 16));
    }
}

// Weights 2^(factor · (s − max s)) of a row's scores, rounded, and their sum before rounding.
inline float weights(float* scores, int64_t keys, int64_t padded, float factor, bfloat16* to) {
  for (int64_t j = keys; j < padded; ++j) scores[j] = -INFINITY;
  __m512 tops = _mm512_load_ps(scores), more = _mm512_load_ps(scores + 16);
  for (int64_t j = BLOCK; j < padded; j += BLOCK) {
    tops = _mm512_max_ps(tops, _mm512_load_ps(scores + j));
    more = _mm512_max_ps(more, _mm512_load_ps(scores + j + 16));
  }
  const __m512 times = _mm512_set1_ps(factor);
  const __m512 offset = _mm512_set1_ps(-factor * _mm512_reduce_max_ps(_mm512_max_ps(tops, more)));
  __m512 total = _mm512_setzero_ps(), rest = _mm512_setzero_ps();
  for (int64_t j = 0; j < padded; j += BLOCK) {
    const __m512 left = exp2_short(_mm512_fmadd_ps(_mm512_load_ps(scores + j), times, offset));
    const __m512 right = exp2_short(_mm512_fmadd_ps(_mm512_load_ps(scores + j + 16), times, offset));
    total = _mm512_add_ps(total, left);
    rest = _mm512_add_ps(rest, right);
    _mm512_store_si512(to + j, (__m512i)_mm512_cvtne2ps_pbh(right, left));
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(total, rest));
}

// Bring the keys and values that the next task packs closer, a share of them.
inline void prefetch(const Source<bfloat16>& rows, int64_t begin, int64_t end, int64_t width) {
  for (int64_t s = begin; s < end; ++s)
    for (int64_t i = 0; i < width; i += BLOCK) _mm_prefetch(rows[s] + i, _MM_HINT_T1);
}

void tiled_prefix_attention(const PrefixAttention* a, int64_t begin, int64_t end, char* scratch) {
  if (a->type != BFLOAT16) return prefix_attention(a, begin, end, scratch);
  const TileConfig config;
  _tile_loadconfig(&config);
  const TileScratch size(a);
  char* k = scratch;
  char* v = k + size.source();
  char* q = v + size.source();  // [step of 32 columns][upper, lower 16 queries]
  float* scores = reinterpret_cast<float*>(q + size.queries());  // (32, S)
  float* out = scores + BLOCK * size.row();  // (32, d)
  bfloat16* p = reinterpret_cast<bfloat16*>(out + BLOCK * size.out_row());  // (32, S)
  const int64_t blocks = (a->queries + BLOCK - 1) / BLOCK, d = a->width, row_bytes = 2 * size.row();
  for (int64_t task = begin; task < end; ++task) {
    const int64_t image = task / a->parts / a->heads, head = task / a->parts % a->heads, part = task % a->parts;
    const int64_t first = blocks * part / a->parts, last = blocks * (part + 1) / a->parts;
    if (first == last) continue;
    pack_keys({a->prefix_k, a->k, a->prompts, a->group, image, head}, size, d, k);
    pack_values({a->prefix_v, a->v, a->prompts, a->group, image, head}, size, d, v);
    const int64_t next = task + 1 < end ? task + 1 : task;
    const int64_t next_image = next / a->parts / a->heads, next_head = next / a->parts % a->heads;
    const Source<bfloat16> next_k(a->prefix_k, a->k, a->prompts, a->group, next_image, next_head);
    const Source<bfloat16> next_v(a->prefix_v, a->v, a->prompts, a->group, next_image, next_head);
    for (int64_t block = first; block < last; ++block) {
      const int64_t begun = size.keys * (block - first) / (last - first);
      const int64_t ended = size.keys * (block - first + 1) / (last - first);
      prefetch(next_k, begun, ended, d);
      prefetch(next_v, begun, ended, d);
      const int64_t row = block * BLOCK, rows = smaller(BLOCK, a->queries - row);
      const bfloat16* query =
          static_cast<const bfloat16*>(a->q.data) + image * a->q.batch + head * a->q.head + row * a->q.row;
      for (int64_t step = 0; step < size.steps; ++step)
        for (int64_t r = 0; r < BLOCK; ++r)
          _mm512_store_si512(q + 2 * TILE * step + 64 * r,
                             r < rows ? load_pairs(query + r * a->q.row + BLOCK * step, d - BLOCK * step)
                                      : _mm512_setzero_si512());
      for (int64_t i = 0; i < size.blocks; ++i)
        product_of_tiles(q, 64, TILE, 2 * TILE, k + 2 * TILE * size.steps * i, TILE, 2 * TILE, size.steps,
                         scores + BLOCK * i, size.row());
      float totals[BLOCK];
      for (int64_t r = 0; r < rows; ++r)
        totals[r] = weights(scores + r * size.row(), size.keys, BLOCK * size.blocks, a->scale * LOG2E,
                            p + r * size.row());
      for (int64_t step = 0; step < size.steps; ++step)
        product_of_tiles(reinterpret_cast<const char*>(p), row_bytes, 16 * row_bytes, 2 * BLOCK,
                         v + 2 * TILE * size.blocks * step, TILE, 2 * TILE, size.blocks, out + BLOCK * step,
                         size.out_row());
      bfloat16* to = static_cast<bfloat16*>(a->out) + ((image * a->queries + row) * a->heads + head) * d;
      for (int64_t r = 0; r < rows; ++r) write_row(out + r * size.out_row(), d, 1 / totals[r], to + r * a->heads * d);
    }
  }
  _tile_release();
}

// A float32 mix on bfloat16 tokens, mix · ((X − mean) / std) = (mix / std) · X − (mix / std) · mean: of three bfloat16 numbers that add up to a weight, each product with a token is exact.
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
  const TileConfig config;
  _tile_loadconfig(&config);
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
  _tile_release();
}

}  // namespace

const Kernels fastprompt::amx = {tiled_scratch, tiled_prefix_attention, add_norm,
                                 tiled_adaptive_prompts_scratch, tiled_adaptive_prompts, bottleneck};
