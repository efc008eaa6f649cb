// What is compiled once for each instruction set: loops over rows, without threads, memory or choices of their own.
#pragma once

#include <cstdint>

namespace fave_fast {

// How rows of a matrix that came from outside are stored.
enum class Format { fp32, bf16 };

// Gain and bias [d], both followed by zeros up to a multiple of kVector.
struct Norm {
  const float* gain;
  const float* bias;
  float eps;
  bool layer;  // LayerNorm; else RMSNorm, and the bias is zero
};

// One head of one history.
struct Attention {
  const float* qkv;  // [length, stride]: queries, keys and values side by side, each [heads, channels]
  std::int64_t stride;
  int d;
  int channels;
  int head;
  int length;
  int first_query;  // answered are the queries from here on
  bool causal;
  const float* cos;  // [longest, channels / 2] by age, or null
  const float* sin;
  const std::uint8_t* present;  // [length], 0 for a place that nothing looks at (but itself, if causal); null: all are
};

// One history's input E by eq. (9), row by row.
struct Input {
  Format format;
  const float* norm;  // [2, d]: gain and bias of the embeddings' LayerNorm
  float eps;
  int d;
};

enum class Epilogue { store, add, gelu };

constexpr int kVector = 16;  // rows of floats end at multiples of this, with zeros: the longest vector there is

// What a unit of a product's operands is: what takes the place of one float.
//
// int16_pairs stand for bfloat16 where no instruction multiplies that: a row of activations and a column of weights are
// scaled to the lengths below, rounded to whole numbers, multiplied and summed exactly, and scaled back. No sum leaves
// 32 bits, for by Cauchy and Schwarz |Q.R| <= |Q| |R| < 2^31, in every part of a row as well. The rounding of a row x
// of n elements is at most |x| / (2 * 32700) each, or 0.29 sqrt(n) / 32700 of x in the mean: 2e-4 at n = 512, a fifth
// of bfloat16's 1.1e-3 (2^-9 / sqrt(3)).
enum class Operand { fp32, bf16_pairs, int16_pairs };

constexpr float kRowLength = 32700.0f;     // so that no element is beyond 16 bits
constexpr float kColumnLength = 65000.0f;  // or less, so that none is: 32700 * 65000 < 2^31

// Units of a row lie at its beginning; of int16_pairs the last float of its stride is what it is scaled back by.
// A panel of packed weights holds units [units, panel]; of int16_pairs also a last row [panel] that its columns are
// scaled back by.
struct Kernels {
  const char* name;
  int lanes;   // of a vector: W
  int panel;   // columns of a panel of packed weights, a multiple of W
  int most_query_byte;  // of `byte_dots`
  Operand half;  // of products in a bfloat16 model, the fastest that is exact enough

  // Units [rows, out_stride] of the norm of h [rows, stride].
  void (*norm)(const Norm& norm, const float* h, int rows, std::int64_t stride, int d, float* out,
               std::int64_t out_stride, Operand operand);
  // Floats out [rows, panels * panel] = or += a w, or units of gelu(a w), for units a [rows, units] and packed w.
  void (*dense)(const float* a, std::int64_t a_stride, int rows, const float* w, int units, int panels,
                Epilogue epilogue, float* out, std::int64_t out_stride, Operand operand);
  // Units [length - first_query, out_stride], this head's channels of them; of int16_pairs still floats.
  void (*attend)(const Attention& attention, float* scratch, float* out, std::int64_t out_stride, Operand operand);
  // In place, int16_pairs of the d floats of each row: what `attend` leaves, as a row's scale depends on all heads.
  void (*to_words)(float* rows, int count, std::int64_t stride, int d);
  // h [d] = LayerNorm(item) + shift (+ scale * anchor)
  void (*input)(const Input& input, const void* item, const void* anchor, const float* shift, const float* scale,
                float* h);

  // A query [d] as inner products take it: query_stride(d) floats, zeros at its end.
  void (*query_units)(const void* query, int d, Format format, float* units);
  // Inner products of a query's units and `count` rows, whose addresses are given.
  void (*dots)(const float* query, const void* const* rows, int count, int d, Format format, float* scores);
  // scores [queries, score_stride]: inner products of neighbouring queries' units and neighbouring rows, whose stride
  // is in elements. The same bits as from `dots`.
  void (*block_dots)(const float* queries, int query_count, const void* rows, std::int64_t row_stride, int row_count,
                     int d, Format format, float* scores, std::int64_t score_stride);
  // Places of the scores above `threshold`; how many. NaN is not above.
  int (*above)(const float* scores, int count, float threshold, std::int32_t* places);
  // scores [queries, panel] of one panel of bytes: (products - offset of the query) * scale of the query * scale of the
  // item. `queries` are units [queries, units] of bytes up to +-most_query_byte, `w` units [units, panel] of unsigned
  // ones.
  void (*byte_dots)(const float* queries, int query_count, const float* w, int units, const std::int32_t* offsets,
                    const float* query_scales, const float* scales, float* scores);
  // Places of a panel where score + margin is not below `threshold`, NaN among them; how many. A margin belongs to the
  // W items of a vector: a * errors[vector] + b * norms[vector]. They are written to `margins`.
  int (*not_below)(const float* scores, float a, const float* errors, float b, const float* norms, float threshold,
                   float* margins, std::int32_t* places);
};

constexpr std::int64_t query_stride(std::int64_t d) { return (d + 2 * kVector - 1) / (2 * kVector) * (2 * kVector); }

// Floats of scratch that `attend` needs.
constexpr std::int64_t attention_scratch(std::int64_t length, std::int64_t channels) {
  const std::int64_t keys = (length + 15) / 16 * 16, wide = (channels + 15) / 16 * 16;
  return 3 * keys * wide + 16 * keys + 48 * wide;
}

// The kernels for an instruction set, each in its own copy of kernels.cpp.
extern const Kernels kKernelsScalar;
#if defined(FAVE_FAST_X86)
extern const Kernels kKernelsAvx2, kKernelsAvx512, kKernelsAvx512Vnni, kKernelsAvx512Bf16, kKernelsAmxBf16;
#endif

}  // namespace fave_fast
