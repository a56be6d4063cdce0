// The operators, over torch's stable ABI: tensors are checked and described here, the work is done by the kernels of the
// best instruction set that the CPU has, on torch's own threads. Schemas, fakes and what may be called with what are in
// kernels/native.py, kernels/<op>/native.py and fastprompt/int8/native.py.

#include "kernels.h"

#include <cstdlib>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#ifdef FASTPROMPT_X86
#include <cpuid.h>
#endif

#if defined(FASTPROMPT_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using namespace fastprompt;

constexpr int64_t LEVELS = 6;
constexpr int64_t GRAIN = 1 << 16;  // numbers that are worth a thread

#ifdef FASTPROMPT_X86
bool has_avx512_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (c >> 11 & 1);
}

bool has_avx512_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
#endif

// AMX needs the CPU's tiles and bfloat16, and the kernel's leave to use them.
bool has_amx() {
#if defined(FASTPROMPT_X86) && defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

int64_t best_level() {
#ifdef FASTPROMPT_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq"))
    return 1;
  return !has_avx512_vnni() ? 2 : !has_avx512_bf16() ? 3 : has_amx() ? 5 : 4;
#else
  return 0;
#endif
}

const Kernels* kernels_of(int64_t level) {
#ifdef FASTPROMPT_X86
  static const Kernels* const levels[LEVELS] = {&portable, &avx2, &avx512, &avx512_vnni, &avx512_bf16, &amx};
  return levels[level];
#else
  return &portable;
#endif
}

const int64_t best = best_level();
int64_t level = best;

// Memory that a thread keeps from call to call.
char* scratch_of(int64_t bytes) {
  struct Buffer {
    void* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.size = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(64, buffer.size);
    if (buffer.data == nullptr) std::abort();
  }
  return static_cast<char*>(buffer.data);
}

Type type_of(const Tensor& x, const char* name) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, name, " must be float32 or bfloat16");
  return type == ScalarType::Float ? FLOAT32 : BFLOAT16;
}

void check_sizes(const Tensor& x, const char* name, std::initializer_list<int64_t> sizes) {
  bool fits = x.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (const int64_t size : sizes) fits = fits && x.size(i++) == size;
  STD_TORCH_CHECK(fits, name, " has the wrong shape");
}

const float* floats(const Tensor& x, const char* name, std::initializer_list<int64_t> sizes) {
  check_sizes(x, name, sizes);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(), name, " must be contiguous float32");
  return static_cast<const float*>(x.const_data_ptr());
}

Heads heads_of(const Tensor& x, const char* name, ScalarType type, std::initializer_list<int64_t> sizes) {
  check_sizes(x, name, sizes);
  STD_TORCH_CHECK(x.scalar_type() == type, name, " must have the dtype of q");
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) == 1, name, " must have adjacent columns");
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

Tensor empty_like(const Tensor& x, std::initializer_list<int64_t> sizes) {
  return torch::stable::empty(sizes, x.scalar_type(), std::nullopt, x.device());
}

// Into how many parts to cut each of `tasks` tasks, so that every thread gets one.
int64_t parts_of(int64_t tasks, int64_t most) {
  const int64_t threads = torch::stable::get_num_threads();
  if (tasks <= 0 || tasks >= threads) return 1;
  const int64_t parts = (threads + tasks - 1) / tasks;
  return parts < most ? parts : most < 1 ? 1 : most;
}

// q (B, H, R, d), k, v (B, H, T, d), prefix_k, prefix_v (n, H, P, d) → (B, R, H, d)
Tensor prefix_attention(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<Tensor> prefix_k,
                        std::optional<Tensor> prefix_v, double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q and k must have 4 dimensions");
  const int64_t b = q.size(0), h = q.size(1), r = q.size(2), d = q.size(3), t = k.size(2);
  const int64_t p = prefix_k ? prefix_k->size(2) : 0, n = prefix_k ? prefix_k->size(0) : 1;
  STD_TORCH_CHECK(prefix_k.has_value() == prefix_v.has_value(), "prefix_k and prefix_v must be given together");
  STD_TORCH_CHECK((n > 0 ? b % n : b) == 0 && scale > 0, "the prefixes must divide the batch, the scale be positive");
  PrefixAttention a = {};
  a.type = type_of(q, "q");
  a.q = heads_of(q, "q", q.scalar_type(), {b, h, r, d});
  a.k = heads_of(k, "k", q.scalar_type(), {b, h, t, d});
  a.v = heads_of(v, "v", q.scalar_type(), {b, h, t, d});
  if (prefix_k) {
    a.prefix_k = heads_of(*prefix_k, "prefix_k", q.scalar_type(), {n, h, p, d});
    a.prefix_v = heads_of(*prefix_v, "prefix_v", q.scalar_type(), {n, h, p, d});
  }
  Tensor out = empty_like(q, {b, r, h, d});
  a.heads = h, a.queries = r, a.tokens = t, a.prompts = p, a.width = d, a.scale = scale;
  a.group = n > 0 && b > 0 ? b / n : 1;
  a.parts = parts_of(b * h, (r + 31) / 32);
  a.out = out.mutable_data_ptr();
  if (b * h * r * d == 0) return out;
  STD_TORCH_CHECK(p + t > 0, "attention needs a key");
  const Kernels* run = kernels_of(level);
  torch::stable::parallel_for(0, b * h * a.parts, 1, [&](int64_t begin, int64_t end) {
    run->prefix_attention(&a, begin, end, scratch_of(run->prefix_attention_scratch(&a)));
  });
  return out;
}

// grad (B, H, R, d) of the output, q, k, v, prefix_k, prefix_v as above → grad_q like q, grad_k, grad_v like k and v,
// grad_prefix_k, grad_prefix_v (B, H, P, d) of each image, contiguous, float32; the others have q's type, what is not given
// is not computed
void prefix_attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                               std::optional<Tensor> prefix_k, std::optional<Tensor> prefix_v, double scale,
                               std::optional<Tensor> grad_q, std::optional<Tensor> grad_k, std::optional<Tensor> grad_v,
                               std::optional<Tensor> grad_prefix_k, std::optional<Tensor> grad_prefix_v) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "q and k must have 4 dimensions");
  const int64_t b = q.size(0), h = q.size(1), r = q.size(2), d = q.size(3), t = k.size(2);
  const int64_t p = prefix_k ? prefix_k->size(2) : 0, n = prefix_k ? prefix_k->size(0) : 1;
  STD_TORCH_CHECK(prefix_k.has_value() == prefix_v.has_value(), "prefix_k and prefix_v must be given together");
  STD_TORCH_CHECK((n > 0 ? b % n : b) == 0 && p + t > 0, "the prefixes must divide the batch, there must be a key");
  const auto part_of = [&q](const Tensor& x, const char* name, std::initializer_list<int64_t> sizes) {
    return heads_of(x, name, q.scalar_type(), sizes);
  };
  PrefixAttentionBackward a = {};
  a.type = type_of(q, "q");
  a.q = part_of(q, "q", {b, h, r, d}), a.grad = part_of(grad, "grad", {b, h, r, d});
  a.k = part_of(k, "k", {b, h, t, d}), a.v = part_of(v, "v", {b, h, t, d});
  if (prefix_k) {
    a.prefix_k = part_of(*prefix_k, "prefix_k", {n, h, p, d});
    a.prefix_v = part_of(*prefix_v, "prefix_v", {n, h, p, d});
  }
  if (grad_q) a.grad_q = part_of(*grad_q, "grad_q", {b, h, r, d});
  STD_TORCH_CHECK(grad_k.has_value() == grad_v.has_value(), "grad_k and grad_v must be given together");
  if (grad_k) a.grad_k = part_of(*grad_k, "grad_k", {b, h, t, d}), a.grad_v = part_of(*grad_v, "grad_v", {b, h, t, d});
  STD_TORCH_CHECK(grad_prefix_k.has_value() == grad_prefix_v.has_value(), "grad_prefix_k needs grad_prefix_v");
  if (grad_prefix_k) {
    a.grad_prefix_k = const_cast<float*>(floats(*grad_prefix_k, "grad_prefix_k", {b, h, p, d}));
    a.grad_prefix_v = const_cast<float*>(floats(*grad_prefix_v, "grad_prefix_v", {b, h, p, d}));
  }
  a.heads = h, a.queries = r, a.tokens = t, a.prompts = p, a.width = d, a.scale = scale;
  a.group = n > 0 && b > 0 ? b / n : 1;
  if (b * h * d == 0) return;
  const Kernels* run = kernels_of(level);
  torch::stable::parallel_for(0, b * h, 1, [&](int64_t begin, int64_t end) {
    run->prefix_attention_backward(&a, begin, end, scratch_of(run->prefix_attention_backward_scratch(&a)));
  });
}

// x, branch (..., D) → their sum and its norm
std::tuple<Tensor, Tensor> add_norm(const Tensor& x, const Tensor& branch, double eps) {
  const int64_t width = x.size(x.dim() - 1), rows = width == 0 ? 0 : x.numel() / width;
  STD_TORCH_CHECK(x.is_contiguous() && branch.is_contiguous() && branch.numel() == x.numel() &&
                      branch.scalar_type() == x.scalar_type(), "x and branch must be contiguous and alike");
  AddNorm a = {};
  a.type = type_of(x, "x");
  Tensor sum = torch::stable::empty_like(x), normed = torch::stable::empty_like(x);
  a.x = x.const_data_ptr(), a.branch = branch.const_data_ptr();
  a.sum = sum.mutable_data_ptr(), a.normed = normed.mutable_data_ptr();
  a.width = width, a.eps = eps;
  const Kernels* run = kernels_of(level);
  if (rows > 0)
    torch::stable::parallel_for(0, rows, GRAIN / width + 1, [&](int64_t begin, int64_t end) {
      run->add_norm(&a, begin, end, scratch_of(4 * width));
    });
  return {sum, normed};
}

// tokens (B, N, D), norm_weight, norm_bias (D,), mix (P, N), bias (P,), w1 (r, D), w2 (D, r) transposed → (B, P, D)
Tensor adaptive_prompts(const Tensor& tokens, const Tensor& norm_weight, const Tensor& norm_bias, const Tensor& mix,
                        const Tensor& bias, std::optional<Tensor> w1, std::optional<Tensor> w2,
                        int64_t activation, double eps) {
  STD_TORCH_CHECK(tokens.dim() == 3 && mix.dim() == 2, "tokens must have 3 dimensions and mix 2");
  const int64_t b = tokens.size(0), n = tokens.size(1), d = tokens.size(2), p = mix.size(0);
  STD_TORCH_CHECK(tokens.stride(2) == 1 || d == 1, "tokens must have adjacent columns");
  AdaptivePrompts a = {};
  a.type = type_of(tokens, "tokens");
  a.tokens = tokens.const_data_ptr(), a.batch_stride = tokens.stride(0), a.row_stride = tokens.stride(1);
  a.norm_weight = floats(norm_weight, "norm_weight", {d}), a.norm_bias = floats(norm_bias, "norm_bias", {d});
  a.mix = floats(mix, "mix", {p, n}), a.bias = floats(bias, "bias", {p});
  STD_TORCH_CHECK(w1.has_value() == w2.has_value(), "w1 and w2 must be given together");
  if (w1) {
    a.hidden = w1->size(0);
    STD_TORCH_CHECK(a.hidden <= 64, "w1 must have at most 64 rows");
    a.w1 = floats(*w1, "w1", {a.hidden, d}), a.w2 = floats(*w2, "w2", {a.hidden, d});
  }
  Tensor out = empty_like(mix, {b, p, d});
  a.out = static_cast<float*>(out.mutable_data_ptr());
  a.tokens_per_image = n, a.prompts = p, a.width = d, a.activation = activation, a.eps = eps;
  a.parts = parts_of(b, (d + 63) / 64);
  if (b * p * d == 0) return out;
  const Kernels* run = kernels_of(level);
  torch::stable::parallel_for(0, b * a.parts, 1, [&](int64_t begin, int64_t end) {
    run->adaptive_prompts(&a, begin, end, scratch_of(run->adaptive_prompts_scratch(&a)));
  });
  if (a.hidden)
    torch::stable::parallel_for(0, b * p, GRAIN / (a.hidden * d) + 1, [&](int64_t begin, int64_t end) {
      run->bottleneck(&a, begin, end);
    });
  return out;
}

// x (..., K), weight (⌈N / 16⌉, ⌈K / 4⌉, 16, 4), scale, bias, sums (N,), factor (K,) → (..., N) in bfloat16 or float32
Tensor int8_linear(const Tensor& x, const Tensor& weight, const Tensor& scale, std::optional<Tensor> bias,
                   int64_t activation, int64_t bits, std::optional<Tensor> factor, std::optional<Tensor> sums,
                   bool in_bfloat16) {
  STD_TORCH_CHECK(x.dim() > 0 && scale.dim() == 1, "x must have a dimension and scale be a vector");
  const int64_t inner = x.size(x.dim() - 1), columns = scale.size(0), panels = (columns + 15) / 16;
  STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous");
  STD_TORCH_CHECK(inner <= 8192, "x must have at most 8192 columns: sums of more do not fit 32 bits");
  STD_TORCH_CHECK(bits == 12 || (bits == 8 && sums), "bits must be 12, or 8 with sums");
  check_sizes(weight, "weight", {panels, (inner + 3) / 4, 16, 4});
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Char && weight.is_contiguous(), "weight must be contiguous int8");
  Int8Linear a = {};
  a.type = type_of(x, "x"), a.x = x.const_data_ptr();
  a.weight = static_cast<const int8_t*>(weight.const_data_ptr());
  a.scale = floats(scale, "scale", {columns});
  a.bias = bias ? floats(*bias, "bias", {columns}) : nullptr;
  a.factor = factor ? floats(*factor, "factor", {inner}) : nullptr;
  if (sums) {
    check_sizes(*sums, "sums", {columns});
    STD_TORCH_CHECK(sums->scalar_type() == ScalarType::Int && sums->is_contiguous(), "sums must be contiguous int32");
    a.sums = static_cast<const int32_t*>(sums->const_data_ptr());
  }
  a.rows = inner == 0 ? 0 : x.numel() / inner, a.inner = inner, a.columns = columns, a.bits = bits;
  a.activation = static_cast<Activation>(activation);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = columns;
  a.out_type = in_bfloat16 ? BFLOAT16 : FLOAT32;
  const ScalarType out_type = in_bfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  Tensor out = torch::stable::empty(sizes, out_type, std::nullopt, x.device());
  a.out = out.mutable_data_ptr();
  if (a.rows * columns == 0) return out;
  constexpr int64_t strip = 12, cache = 1 << 18;  // bytes of a block's rounded rows, for the L2 cache
  const int64_t threads = torch::stable::get_num_threads(), fitting = cache / (inner * (bits == 8 ? 1 : 2));
  const int64_t most = fitting > strip ? fitting : strip;
  a.blocks = (a.rows + most - 1) / most;
  if (a.rows >= threads * strip) a.blocks = (a.blocks + threads - 1) / threads * threads;
  a.parts = parts_of(a.blocks, panels);
  const Kernels* run = kernels_of(level);
  torch::stable::parallel_for(0, a.blocks * a.parts, 1, [&](int64_t begin, int64_t end) {
    run->int8_linear(&a, begin, end, scratch_of(run->int8_linear_scratch(&a)));
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(fastprompt, CPU, m) {
  m.impl("prefix_attention_native", TORCH_BOX(&prefix_attention));
  m.impl("prefix_attention_backward_native", TORCH_BOX(&prefix_attention_backward));
  m.impl("add_norm_native", TORCH_BOX(&add_norm));
  m.impl("adaptive_prompts_native", TORCH_BOX(&adaptive_prompts));
  m.impl("int8_linear_native", TORCH_BOX(&int8_linear));
}

}  // namespace

// Called from Python by ctypes: take the kernels of a level, or the best below it that the CPU has; the level that runs.
extern "C" __attribute__((visibility("default"))) int64_t fastprompt_set_level(int64_t wanted) {
  level = wanted < 0 ? 0 : wanted > best ? best : wanted;
  return level;
}
