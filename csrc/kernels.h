// What the translation units of the instruction sets share with ops.cpp: arguments as plain structs, and a table of
// functions for each set. Neither torch nor the C++ library is included here: an inline function that was compiled for
// AVX-512 in one unit could be the copy that the linker keeps for all of them.

#pragma once

#include <stdint.h>

namespace fastprompt {

enum Type : int64_t { FLOAT32, BFLOAT16 };

// A (B, H, rows, columns) tensor whose columns are adjacent; strides in elements.
struct Heads {
  const void* data;
  int64_t batch, head, row;
};

// softmax(scale · q [prefix_k, k]ᵀ) [prefix_v, v] → out (B, R, H, d), contiguous.
struct PrefixAttention {
  Heads q, k, v, prefix_k, prefix_v;
  void* out;
  Type type;
  int64_t heads, queries, tokens, prompts, width;  // H, R, T, P, d
  int64_t group;  // images that share a prefix
  int64_t parts;  // tasks that share the queries of one head; task i is part i % parts of head i / parts
  float scale;
};

// The gradients of out = softmax(scale · q [prefix_k, k]ᵀ) [prefix_v, v]. Of what is null nothing is written.
struct PrefixAttentionBackward {
  Heads q, k, v, prefix_k, prefix_v, grad;  // grad: of out, (B, H, R, d)
  Heads grad_q, grad_k, grad_v;
  float *grad_prefix_k, *grad_prefix_v;  // of each image, (B, H, P, d), float32 whatever the type
  Type type;
  int64_t heads, queries, tokens, prompts, width;  // H, R, T, P, d
  int64_t group;  // images that share a prefix
  float scale;
};

// sum = x + branch in their type, and normed = (sum − mean) / √(variance + eps), each row by itself; all contiguous.
struct AddNorm {
  const void *x, *branch;
  void *sum, *normed;
  Type type;
  int64_t width;
  float eps;
};

// W₂ σ(W₁ p) + p with p = mix · LayerNorm(tokens) + bias → out (B, P, D), float32, contiguous.
struct AdaptivePrompts {
  const void* tokens;
  Type type;
  int64_t batch_stride, row_stride;
  const float *norm_weight, *norm_bias, *mix, *bias, *w1, *w2;  // mix (P, N); w1 (r, D); w2 transposed, (r, D)
  float* out;
  int64_t tokens_per_image, prompts, width, hidden;  // N, P, D, r
  int64_t parts;  // tasks that share the columns of one image
  int64_t activation;
  float eps;
};

enum Activation : int64_t { IDENTITY, GELU, GELU_TANH, SILU };

// act(x Wᵀ + b) → out (rows, columns), contiguous, with x (rows, inner) rounded to integers of 12 or 8 bits, each row with a
// scale of its own, and W int8 with a scale for each column of the result; see int8.inc.
struct Int8Linear {
  const void* x;
  const int8_t* weight;  // (⌈columns / 16⌉, ⌈inner / 4⌉, 16, 4), zeros behind the last column and the last inner number
  const float *scale, *bias, *factor;  // (columns,), (columns,) or null, (inner,) of x or null
  const int32_t* sums;  // (columns,) of W over the inner numbers; for 8 bits
  void* out;
  int64_t rows, inner, columns, bits;
  int64_t blocks;  // of rows
  int64_t parts;  // tasks that share the columns of one block; task i is part i % parts of block i / parts
  Type type, out_type;  // of x and out
  Activation activation;
};

// The kernels of one instruction set. Tasks [begin, end) run on one thread, which has `scratch` bytes for itself,
// aligned to 64.
struct Kernels {
  int64_t (*prefix_attention_scratch)(const PrefixAttention*);
  void (*prefix_attention)(const PrefixAttention*, int64_t begin, int64_t end, char* scratch);
  int64_t (*prefix_attention_backward_scratch)(const PrefixAttentionBackward*);
  void (*prefix_attention_backward)(const PrefixAttentionBackward*, int64_t begin, int64_t end, char* scratch);
  void (*add_norm)(const AddNorm*, int64_t begin, int64_t end, char* scratch);  // task: a row
  int64_t (*adaptive_prompts_scratch)(const AdaptivePrompts*);
  void (*adaptive_prompts)(const AdaptivePrompts*, int64_t begin, int64_t end, char* scratch);  // task: part of an image
  void (*bottleneck)(const AdaptivePrompts*, int64_t begin, int64_t end);  // task: a prompt of an image
  int64_t (*int8_linear_scratch)(const Int8Linear*);
  void (*int8_linear)(const Int8Linear*, int64_t begin, int64_t end, char* scratch);  // task: part of a block of rows
};

extern const Kernels portable;
#ifdef FASTPROMPT_X86
extern const Kernels avx2, avx512, avx512_vnni, avx512_bf16, amx;
#endif

}  // namespace fastprompt
