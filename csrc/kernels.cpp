// Compiled once for each instruction set, under the name FAVE_FAST_KERNELS. No function here has external linkage and
// nothing of the standard library's is instantiated (vec.hpp says why).
//
// Sums run in an order that depends on the sizes of the model alone: a row's result has the same bits in any tile, and
// a history's in any batch. No library promises that, nor is one faster here: oneDNN's products alone, without norms,
// attention and GELU, reach 13, 56, 153 and 190 GMAC/s for 9, 50, 512 and 3,200 rows in bf16, the whole encoder 73, 138,
// 160 and 151 (two cores, Zen 4).
#include "kernels.hpp"

#include "vec.hpp"

#include "tiles.hpp"

namespace fave_fast {
namespace {

constexpr int kPanel = W * kColumns;

#if defined(__AVX512BF16__)
constexpr Operand kHalf = Operand::bf16_pairs;
#elif defined(FAVE_FAST_WORDS)
constexpr Operand kHalf = Operand::int16_pairs;
#else
constexpr Operand kHalf = Operand::fp32;
#endif

// n or W elements, whichever is less.
template <typename Element>
FAVE_FAST_INLINE F up_to(const Element* p, int n) {
  return n < W ? load(p, n) : load(p);
}

struct Floats {
  // Units summed one after another. Over 24 models of 32 channels the mean error of encode was 1.3 x PyTorch's with one
  // chain, 0.93 with chains of 16, which are then added up.
  static constexpr int kChain = 16;
  static FAVE_FAST_INLINE F multiply_add(F sums, F row, F columns) { return fma(row, columns, sums); }
};
#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int kChain = 1 << 30;
  static FAVE_FAST_INLINE F multiply_add(F sums, F row, F columns) { return add_pair_products(sums, row, columns); }
};
#endif

// Where the rest of the model has 16 bits.
struct LooseFloats : Floats {
  static constexpr int kChain = 1 << 30;
};

template <Operand kOperand>
struct Unit {
  using type = Floats;
};
template <>
struct Unit<Operand::int16_pairs> {
  using type = LooseFloats;
};
#if defined(__AVX512BF16__)
template <>
struct Unit<Operand::bf16_pairs> {
  using type = Pairs;
};
#endif

// sums [R, C vectors] of a [R, units] and w [units, w_stride].
template <typename Unit, int R, int C>
FAVE_FAST_INLINE void product(const float* a, std::int64_t a_stride, const float* w, std::int64_t w_stride, int units,
                              F (&sums)[R][C]) {
  F chain[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[r][c] = all(0.0f);
  }
  for (int first = 0; first < units; first += Unit::kChain) {
    const int last = units - first < Unit::kChain ? units : first + Unit::kChain;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) chain[r][c] = all(0.0f);
    }
    for (int k = first; k < last; ++k) {
      F columns[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) columns[c] = load(w + k * w_stride + c * W);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const F row = all(a[r * a_stride + k]);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) chain[r][c] = Unit::multiply_add(chain[r][c], row, columns[c]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[r][c] = add(sums[r][c], chain[r][c]);
    }
  }
}

#if defined(FAVE_FAST_WORDS)
// As floats, sums [R, C vectors] of units of 16-bit pairs, scaled back by the rows' factors and the columns' after w.
template <int R, int C>
FAVE_FAST_INLINE void word_product(const float* a, std::int64_t a_stride, const float* w, int units,
                                   F (&result)[R][C]) {
  I sums[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[r][c] = zero_counts();
  }
  for (int k = 0; k < units; ++k, w += C * W) {
    F columns[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) columns[c] = load(w + c * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F row = all(a[r * a_stride + k]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[r][c] = add_word_products(sums[r][c], row, columns[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const F factor = all(a[(r + 1) * a_stride - 1]);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) result[r][c] = mul(floats(sums[r][c]), mul(factor, load(w + c * W)));
  }
}

// Of a row of n floats or of its GELU, in place; what lies behind them is not looked at.
template <bool kGelu>
FAVE_FAST_INLINE void words_of_row(float* row, int n, std::int64_t stride) {
  F even = all(0.0f), odd = all(0.0f);
  for (int i = 0; i < n; i += 2 * W) {
    F first = up_to(row + i, n - i), second = i + W < n ? up_to(row + i + W, n - i - W) : all(0.0f);
    if (kGelu) {  // of zero, zero
      first = gelu<false>(first);
      second = gelu<false>(second);
      store(row + i, first);
      if (i + W < n) store(row + i + W, second);
    }
    even = fma(first, first, even);
    odd = fma(second, second, odd);
  }
  const float length = __builtin_sqrtf(sum(add(even, odd)));
  const F factor = all(length > 0.0f ? kRowLength / length : 0.0f);
  for (int i = 0; i < n; i += 2 * W) {
    const F first = up_to(row + i, n - i), second = i + W < n ? up_to(row + i + W, n - i - W) : all(0.0f);
    store(row + i / 2, words(mul(first, factor), mul(second, factor)));
  }
  row[stride - 1] = length * (1.0f / kRowLength);  // NaN where an element is
}
#endif

// The tiles of a call: as few as hold `rows`, of about equal height.
struct Tiles {
  int rows, count;
  explicit Tiles(int n) : rows(n), count((n + kRows - 1) / kRows) {}
  int begin(int tile) const { return static_cast<int>(static_cast<std::int64_t>(rows) * tile / count); }
};

// One row of a panel's sums becomes what `dense` gives.
template <Operand kOperand, Epilogue kEpilogue>
FAVE_FAST_INLINE void finish(const F (&sums)[kColumns], float* row) {
#if defined(__AVX512BF16__)
  if (kOperand == Operand::bf16_pairs && kEpilogue == Epilogue::gelu) {
    for (int c = 0; c < kColumns; c += 2) {
      store(row + c / 2 * W, pairs(gelu<false>(sums[c]), gelu<false>(sums[c + 1])));
    }
    return;
  }
#endif
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) {
    F x = sums[c];
    if (kEpilogue == Epilogue::add) x = add(x, load(row + c * W));
    if (kEpilogue == Epilogue::gelu && kOperand == Operand::fp32) x = gelu<true>(x);
    store(row + c * W, x);
  }
}

template <Operand kOperand, int R, Epilogue kEpilogue>
FAVE_FAST_INLINE void dense_tile(const float* a, std::int64_t a_stride, const float* w, int units, float* out,
                                 std::int64_t out_stride) {
  F sums[R][kColumns];
#if defined(FAVE_FAST_WORDS)
  if (kOperand == Operand::int16_pairs) {
    word_product(a, a_stride, w, units, sums);
  } else
#endif
  {
    product<typename Unit<kOperand>::type, R, kColumns>(a, a_stride, w, kPanel, units, sums);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) finish<kOperand, kEpilogue>(sums[r], out + r * out_stride);
}

template <Operand kOperand, Epilogue kEpilogue>
void dense_rows(const float* a, std::int64_t a_stride, int rows, const float* w, int units, int panels, float* out,
                std::int64_t out_stride) {
  const Tiles tiles(rows);
  const std::int64_t advance = kOperand == Operand::bf16_pairs && kEpilogue == Epilogue::gelu ? kPanel / 2 : kPanel;
  const std::int64_t panel_size = (units + (kOperand == Operand::int16_pairs ? 1 : 0)) * std::int64_t{kPanel};
  float* columns = out;
  for (int p = 0; p < panels; ++p, w += panel_size, columns += advance) {
    for (int t = 0; t < tiles.count; ++t) {
      const int first = tiles.begin(t);
      const float* from = a + first * a_stride;
      float* to = columns + first * out_stride;
      switch (tiles.begin(t + 1) - first) {
        case 1: dense_tile<kOperand, 1, kEpilogue>(from, a_stride, w, units, to, out_stride); break;
        case 2: dense_tile<kOperand, 2, kEpilogue>(from, a_stride, w, units, to, out_stride); break;
        case 3: dense_tile<kOperand, 3, kEpilogue>(from, a_stride, w, units, to, out_stride); break;
        case 4: dense_tile<kOperand, 4, kEpilogue>(from, a_stride, w, units, to, out_stride); break;
        case 5:
          dense_tile<kOperand, 5 <= kRows ? 5 : kRows, kEpilogue>(from, a_stride, w, units, to, out_stride);
          break;
        default: dense_tile<kOperand, kRows, kEpilogue>(from, a_stride, w, units, to, out_stride); break;
      }
    }
  }
#if defined(FAVE_FAST_WORDS)
  if (kOperand == Operand::int16_pairs && kEpilogue == Epilogue::gelu) {
    for (int r = 0; r < rows; ++r) words_of_row<true>(out + r * out_stride, panels * kPanel, out_stride);
  }
#endif
}

#if defined(__AMX_BF16__)
// As `dense_rows`, of bf16_pairs. First whole tiles, then the rows that are left: new shapes cost more than the weights'
// second way through the cache.
template <Epilogue kEpilogue>
void dense_by_tiles(const float* a, std::int64_t a_stride, int rows, const float* w, int units, int panels, float* out,
                    std::int64_t out_stride) {
  alignas(64) float sums[kTile * kPanel];
  const std::int64_t advance = kEpilogue == Epilogue::gelu ? kPanel / 2 : kPanel;
  for (int begin = 0, end; begin < rows; begin = end) {
    end = rows - begin < kTile ? rows : rows - rows % kTile;
    const int height = end - begin < kTile ? end - begin : kTile;
    const TileShapes shapes(height, kTile, units % kTile);
    shapes.use();
    for (int p = 0; p < panels; ++p) {
      for (int first = begin; first < end; first += height) {
        tile_product(a + first * a_stride, a_stride, w + std::int64_t{p} * units * kPanel, units, sums);
        for (int r = 0; r < height; ++r) {
          F row[kColumns];
          for (int c = 0; c < kColumns; ++c) row[c] = load(sums + r * kPanel + c * W);
          finish<Operand::bf16_pairs, kEpilogue>(row, out + (first + r) * out_stride + p * advance);
        }
      }
    }
  }
  _tile_release();
}
#endif

template <Operand kOperand, Epilogue kEpilogue>
FAVE_FAST_INLINE void dense_with(const float* a, std::int64_t a_stride, int rows, const float* w, int units, int panels,
                                 float* out, std::int64_t out_stride) {
#if defined(__AMX_BF16__)
  if (kOperand == Operand::bf16_pairs) {
    return dense_by_tiles<kEpilogue>(a, a_stride, rows, w, units, panels, out, out_stride);
  }
#endif
  dense_rows<kOperand, kEpilogue>(a, a_stride, rows, w, units, panels, out, out_stride);
}

template <Operand kOperand>
void dense_of(const float* a, std::int64_t a_stride, int rows, const float* w, int units, int panels, Epilogue epilogue,
              float* out, std::int64_t out_stride) {
  switch (epilogue) {
    case Epilogue::store:
      return dense_with<kOperand, Epilogue::store>(a, a_stride, rows, w, units, panels, out, out_stride);
    case Epilogue::add:
      return dense_with<kOperand, Epilogue::add>(a, a_stride, rows, w, units, panels, out, out_stride);
    case Epilogue::gelu:
      return dense_with<kOperand, Epilogue::gelu>(a, a_stride, rows, w, units, panels, out, out_stride);
  }
}

void dense(const float* a, std::int64_t a_stride, int rows, const float* w, int units, int panels, Epilogue epilogue,
           float* out, std::int64_t out_stride, Operand operand) {
  if (operand == Operand::fp32) {
    dense_of<Operand::fp32>(a, a_stride, rows, w, units, panels, epilogue, out, out_stride);
  } else if (kHalf != Operand::fp32) {
    dense_of<kHalf>(a, a_stride, rows, w, units, panels, epilogue, out, out_stride);
  }
}

// n floats as n units, or as pairs n / 2 units; n is even there, and whole units are written.
FAVE_FAST_INLINE void put(const float* from, int n, float* out, bool as_pairs) {
#if defined(__AVX512BF16__)
  if (as_pairs) {
    int i = 0;
    for (; i + 2 * W <= n; i += 2 * W) store(out + i / 2, pairs(load(from + i), load(from + i + W)));
    if (i < n) {
      const int first = n - i < W ? n - i : W, second = n - i - first;
      store(out + i / 2, pairs(load(from + i, first), load(from + i + W, second)), (n - i) / 2);
    }
    return;
  }
#endif
  static_cast<void>(as_pairs);
  int i = 0;
  for (; i + W <= n; i += W) store(out + i, load(from + i));
  if (i < n) store(out + i, load(from + i, n - i), n - i);
}

void to_words(float* rows, int count, std::int64_t stride, int d) {
#if defined(FAVE_FAST_WORDS)
  for (int r = 0; r < count; ++r) words_of_row<false>(rows + r * stride, d, stride);
#else
  static_cast<void>(rows), static_cast<void>(count), static_cast<void>(stride), static_cast<void>(d);
#endif
}

FAVE_FAST_INLINE float inverse_root(float x) { return 1.0f / __builtin_sqrtf(x); }

// The rows' places from d on hold zeros, and so do gain and bias.
void norm(const Norm& norm, const float* h, int rows, std::int64_t stride, int d, float* out, std::int64_t out_stride,
          Operand operand) {
  const int whole = (d + W - 1) / W * W, last = whole - W;
  float* to = out;
  for (int r = 0; r < rows; ++r, h += stride, to += out_stride) {
    float centre = 0.0f;
    if (norm.layer) {
      F total = all(0.0f);
      for (int i = 0; i < whole; i += W) total = add(total, load(h + i));
      centre = sum(total) / static_cast<float>(d);
    }
    F squares = all(0.0f);
    for (int i = 0; i < whole; i += W) {
      F x = load(h + i);
      if (norm.layer) {
        x = sub(x, all(centre));
        if (i == last && d < whole) x = only(x, d - last);
      }
      squares = fma(x, x, squares);
    }
    const F factor = all(inverse_root(sum(squares) / static_cast<float>(d) + norm.eps));
    const auto normed = [&](int i) {
      const F x = norm.layer ? sub(load(h + i), all(centre)) : load(h + i);
      return norm.layer ? fma(mul(x, factor), load(norm.gain + i), load(norm.bias + i))
                        : mul(mul(x, factor), load(norm.gain + i));
    };
#if defined(__AVX512BF16__)
    if (operand == Operand::bf16_pairs) {
      for (int i = 0; i < whole; i += 2 * W) {
        store(to + i / 2, pairs(normed(i), i + W < whole ? normed(i + W) : all(0.0f)));
      }
      continue;
    }
#endif
    for (int i = 0; i < whole; i += W) store(to + i, normed(i));
  }
  if (operand == Operand::int16_pairs) to_words(out, rows, out_stride, d);
}

// Rotates the pairs (i, i + half) of x [2 * half] by the angles of one age.
FAVE_FAST_INLINE void rotate(const float* x, int half, const float* cos, const float* sin, float* out) {
  const auto part = [&](int i, int n) {
    const F first = load(x + i, n), second = load(x + half + i, n), c = load(cos + i, n), s = load(sin + i, n);
    store(out + i, sub(mul(first, c), mul(second, s)), n);
    store(out + half + i, fma(first, s, mul(second, c)), n);
  };
  int i = 0;
  for (; i + W <= half; i += W) {
    const F first = load(x + i), second = load(x + half + i), c = load(cos + i), s = load(sin + i);
    store(out + i, sub(mul(first, c), mul(second, s)));
    store(out + half + i, fma(first, s, mul(second, c)));
  }
  if (i < half) part(i, half - i);
}

template <Operand kOperand, int R, int C>
void tile_of(const float* a, std::int64_t a_stride, const float* w, std::int64_t w_stride, int units, float* out,
             std::int64_t out_stride) {
  F sums[R][C];
  product<typename Unit<kOperand>::type, R, C>(a, a_stride, w, w_stride, units, sums);
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) store(out + r * out_stride + c * W, sums[r][c]);
  }
}

template <Operand kOperand, int R>
void tile_columns(const float* a, std::int64_t a_stride, const float* w, std::int64_t w_stride, int units, int vectors,
                  float* out, std::int64_t out_stride) {
  for (; vectors >= kColumns; vectors -= kColumns, w += kPanel, out += kPanel) {
    tile_of<kOperand, R, kColumns>(a, a_stride, w, w_stride, units, out, out_stride);
  }
  switch (vectors) {
    case 1: return tile_of<kOperand, R, 1>(a, a_stride, w, w_stride, units, out, out_stride);
    case 2: return tile_of<kOperand, R, 2 < kColumns ? 2 : 1>(a, a_stride, w, w_stride, units, out, out_stride);
    case 3: return tile_of<kOperand, R, 3 < kColumns ? 3 : 1>(a, a_stride, w, w_stride, units, out, out_stride);
    default: return;
  }
}

// out [rows, vectors * W], for up to kRows rows.
template <Operand kOperand>
void small_product(const float* a, std::int64_t a_stride, int rows, const float* w, std::int64_t w_stride, int units,
                   int vectors, float* out, std::int64_t out_stride) {
  switch (rows) {
    case 1: return tile_columns<kOperand, 1>(a, a_stride, w, w_stride, units, vectors, out, out_stride);
    case 2: return tile_columns<kOperand, 2>(a, a_stride, w, w_stride, units, vectors, out, out_stride);
    case 3: return tile_columns<kOperand, 3>(a, a_stride, w, w_stride, units, vectors, out, out_stride);
    case 4: return tile_columns<kOperand, 4>(a, a_stride, w, w_stride, units, vectors, out, out_stride);
    case 5:
      return tile_columns<kOperand, 5 <= kRows ? 5 : kRows>(a, a_stride, w, w_stride, units, vectors, out, out_stride);
    default: return tile_columns<kOperand, kRows>(a, a_stride, w, w_stride, units, vectors, out, out_stride);
  }
}

// Columns [units, keys] of units of W rows, or fewer: the rest are zeros.
FAVE_FAST_INLINE void put_columns(const float* rows, std::int64_t stride, int count, int units, float* out,
                                  std::int64_t keys) {
  int u = 0;
  for (; u + W <= units; u += W) {
    F block[W];
    for (int i = 0; i < W; ++i) block[i] = i < count ? load(rows + i * stride + u) : all(0.0f);
    transpose(block);
    for (int i = 0; i < W; ++i) store(out + (u + i) * keys, block[i]);
  }
  for (; u < units; ++u) {
    for (int i = 0; i < W; ++i) {
      if (i < count) {
        std::memcpy(out + u * keys + i, rows + i * stride + u, sizeof(float));
      } else {
        out[u * keys + i] = 0.0f;
      }
    }
  }
}

// In place the softmax of a row of scores, up to the factor that is returned.
template <bool kExact>
FAVE_FAST_INLINE float weigh(float* scores, int vectors, double scale_log2) {
  F top = load(scores);
  for (int v = 1; v < vectors; ++v) top = max(top, load(scores + v * W));
  const F most = all(largest(top)), factor = all(static_cast<float>(scale_log2));
  // The factor's rounding error would bend all weights together.
  const F rest = all(static_cast<float>(scale_log2 - static_cast<float>(scale_log2)));
  F total = all(0.0f);
  for (int v = 0; v < vectors; ++v) {
    F below = sub(load(scores + v * W), most);
    if (kExact) below = max(all(-1e30f), below);  // finite: its parts are added
    const F p = exp2<kExact>(kExact ? fma(below, factor, mul(below, rest)) : mul(below, factor));
    total = add(total, p);
    store(scores + v * W, p);
  }
  return 1.0f / sum(total);
}

// Units of a history's i-th query or key, rotated; `row` is room for floats.
FAVE_FAST_INLINE void turn(const Attention& at, const float* first, int i, bool as_pairs, float* row, float* out) {
  const float* from = first + i * at.stride;
  if (at.cos != nullptr) {
    const std::int64_t half = at.channels / 2, age = at.length - 1 - i;
    float* to = as_pairs ? row : out;
    rotate(from, static_cast<int>(half), at.cos + age * half, at.sin + age * half, to);
    if (!as_pairs) return;
    from = row;
  }
  put(from, at.channels, out, as_pairs);
}

template <Operand kOperand>
void attend_of(const Attention& at, float* scratch, float* out, std::int64_t out_stride) {
  constexpr bool kPairs = kOperand == Operand::bf16_pairs;
  const int n = at.length, channels = at.channels, per_unit = kPairs ? 2 : 1;
  const int units = channels / per_unit, key_vectors = (n + W - 1) / W, keys = key_vectors * W;
  const int wide_vectors = (channels + W - 1) / W, wide = wide_vectors * W;
  const int key_units = (n + per_unit - 1) / per_unit;
  float* columns = scratch;                        // keys: [units, keys]
  float* values = columns + units * keys;          // [key_units, wide]
  float* queries = values + key_units * wide;      // [n, units]
  float* weights = queries + (n + W) * units;      // [kRows, keys], as scores and as units
  float* weight_units = weights + kRows * keys;
  float* summed = weight_units + kRows * keys;     // [kRows, wide]
  float* bias = summed + (kRows + 2) * wide;       // [keys], 0 or minus infinity
  float* past = bias + keys;                       // [2 * keys]: zeros, then minus infinities
  float* turned = past + 2 * keys;                 // [W, units], one row of floats after it
  const float minus_infinity = -__builtin_inff();

  const float* q = at.qkv + at.head * channels;
  const float* k = q + at.d;
  const float* v = k + at.d;
  float* row = turned + W * channels;
  for (int first = 0; first < n; first += W) {
    const int count = n - first < W ? n - first : W;
    for (int i = 0; i < count; ++i) {
      turn(at, k, first + i, kPairs, row, turned + i * units);
    }
    put_columns(turned, units, count, units, columns + first, keys);
  }
  for (int i = at.first_query; i < n; ++i) {
    turn(at, q, i, kPairs, row, queries + i * units);
  }
  const bool in_place = !kPairs && channels % W == 0;
  for (int u = 0; u < key_units && !in_place; ++u) {
    for (int c = 0; c < channels; c += W) {
      const int width = channels - c < W ? channels - c : W;
      const F first = load(v + u * per_unit * at.stride + c, width);
#if defined(__AVX512BF16__)
      if (kPairs) {
        const F second = 2 * u + 1 < n ? load(v + (2 * u + 1) * at.stride + c, width) : all(0.0f);
        store(values + u * wide + c, interleaved_pairs(first, second));
        continue;
      }
#endif
      store(values + u * wide + c, first);
    }
  }
  const bool masked = at.causal || at.present != nullptr;
  for (int j = masked ? 0 : keys - W; j < keys; ++j) {
    bias[j] = j < n && (at.present == nullptr || at.present[j] != 0) ? 0.0f : minus_infinity;
    past[j] = 0.0f;
    past[keys + j] = minus_infinity;
  }

  const double scale_log2 = 1.4426950408889634 / __builtin_sqrt(static_cast<double>(channels));
  const Tiles tiles(n - at.first_query);
  for (int t = 0; t < tiles.count; ++t) {
    const int first = at.first_query + tiles.begin(t), rows = tiles.begin(t + 1) - tiles.begin(t);
    // Summed in doubles, scores would make the error of encode 13 % smaller (96 float32 models of 20 and 32 channels with
    // peaked attention, mean of the norms), and a worst element beyond 2 x PyTorch's as rare as 1 in 96, not 6.
    small_product<kOperand>(queries + first * units, units, rows, columns, keys, units, key_vectors, weights, keys);
    float inverse[kRows];
    for (int r = 0; r < rows; ++r) {
      float* scores = weights + r * keys;
      const float itself = scores[first + r];
      const float* later = past + keys - 1 - (first + r);  // 0 up to the query's own place
      for (int j = masked ? 0 : keys - W; j < keys; j += W) {
        F s = add(load(scores + j), load(bias + j));
        if (at.causal) s = add(s, load(later + j));
        store(scores + j, s);
      }
      if (at.causal && at.first_query == 0 && bias[first + r] != 0.0f) scores[first + r] = itself;
      inverse[r] = weigh<kOperand == Operand::fp32>(scores, key_vectors, scale_log2);
      if (kPairs) put(scores, keys, weight_units + r * keys, true);
    }
    small_product<kOperand>(kPairs ? weight_units : weights, keys, rows, in_place ? v : values,
                            in_place ? at.stride : wide, key_units, wide_vectors, summed, wide);
    for (int r = 0; r < rows; ++r) {
      float* result = summed + r * wide;
      const F factor = all(inverse[r]);
      float* to = out + (first + r - at.first_query) * out_stride + at.head * units;
      for (int c = 0; c < wide; c += W) store((in_place ? to : result) + c, mul(load(result + c), factor));
      if (!in_place) put(result, channels, to, kPairs);
    }
  }
}

void attend(const Attention& attention, float* scratch, float* out, std::int64_t out_stride, Operand operand) {
  if (operand == Operand::fp32) {
    attend_of<Operand::fp32>(attention, scratch, out, out_stride);
  } else if (kHalf != Operand::fp32) {
    attend_of<kHalf>(attention, scratch, out, out_stride);
  }
}

template <typename Element>
FAVE_FAST_INLINE void input_row(const Input& in, const Element* item, const Element* anchor, const float* shift,
                                const float* scale, float* h) {
  const int d = in.d;
  F total = all(0.0f);
  for (int i = 0; i < d; i += W) total = add(total, up_to(item + i, d - i));
  const F centre = all(sum(total) / static_cast<float>(d));
  F squares = all(0.0f);
  for (int i = 0; i < d; i += W) {
    F x = sub(up_to(item + i, d - i), centre);
    if (d - i < W) x = only(x, d - i);
    squares = fma(x, x, squares);
  }
  const F factor = all(inverse_root(sum(squares) / static_cast<float>(d) + in.eps));
  for (int i = 0; i < d; i += W) {
    const int n = d - i;
    const F x = mul(sub(up_to(item + i, n), centre), factor);
    F e = add(fma(x, up_to(in.norm + i, n), up_to(in.norm + d + i, n)), up_to(shift + i, n));
    if (anchor != nullptr) e = fma(up_to(scale + i, n), up_to(anchor + i, n), e);
    if (n < W) {
      store(h + i, e, n);
    } else {
      store(h + i, e);
    }
  }
}

void input(const Input& in, const void* item, const void* anchor, const float* shift, const float* scale, float* h) {
  if (in.format == Format::fp32) {
    input_row(in, static_cast<const float*>(item), static_cast<const float*>(anchor), shift, scale, h);
  } else {
    input_row(in, static_cast<const std::uint16_t*>(item), static_cast<const std::uint16_t*>(anchor), shift, scale, h);
  }
}

// Inner products lie along the lanes: lane l sums the channels (or pairs of them) that are l modulo W, and lane_sums
// adds the lanes. So a score's bits depend on its two vectors alone.
//
// kParts vectors hold kStep elements of a row, and of a query as `query_units` leaves it.

struct FloatRows {
  using Element = float;
  static constexpr int kStep = W, kParts = 1;
  static FAVE_FAST_INLINE void get(const float* p, F (&parts)[kParts]) { parts[0] = load(p); }
  static FAVE_FAST_INLINE void get(const float* p, int n, F (&parts)[kParts]) { parts[0] = load(p, n); }
  static FAVE_FAST_INLINE F multiply_add(F sums, F a, F b) { return fma(a, b, sums); }
};

#if defined(__AVX512BF16__)
struct HalfRows {
  using Element = std::uint16_t;
  static constexpr int kStep = 2 * W, kParts = 1;
  static FAVE_FAST_INLINE void get(const std::uint16_t* p, F (&parts)[kParts]) {
    parts[0] = _mm512_castsi512_ps(_mm512_loadu_si512(reinterpret_cast<const void*>(p)));
  }
  static FAVE_FAST_INLINE void get(const std::uint16_t* p, int n, F (&parts)[kParts]) {
    const auto some = static_cast<__mmask32>((1ull << n) - 1);
    parts[0] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(some, reinterpret_cast<const void*>(p)));
  }
  static FAVE_FAST_INLINE F multiply_add(F sums, F a, F b) { return add_pair_products(sums, a, b); }
};
#elif defined(FAVE_FAST_WORDS)
struct HalfRows {  // even elements and odd ones: a shift and a mask widen them where they are
  using Element = std::uint16_t;
  static constexpr int kStep = 2 * W, kParts = 2;
  static FAVE_FAST_INLINE void get(const std::uint16_t* p, F (&parts)[kParts]) {
    const I both = _mm256_loadu_si256(reinterpret_cast<const I*>(p));
    parts[0] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    parts[1] = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static FAVE_FAST_INLINE void get(const std::uint16_t* p, int n, F (&parts)[kParts]) {
    std::uint16_t some[kStep] = {};
    std::memcpy(some, p, static_cast<std::size_t>(n) * sizeof *p);
    get(some, parts);
  }
  static FAVE_FAST_INLINE F multiply_add(F sums, F a, F b) { return fma(a, b, sums); }
};
#else
struct HalfRows {
  using Element = std::uint16_t;
  static constexpr int kStep = W, kParts = 1;
  static FAVE_FAST_INLINE void get(const std::uint16_t* p, F (&parts)[kParts]) { parts[0] = load(p); }
  static FAVE_FAST_INLINE void get(const std::uint16_t* p, int n, F (&parts)[kParts]) { parts[0] = load(p, n); }
  static FAVE_FAST_INLINE F multiply_add(F sums, F a, F b) { return fma(a, b, sums); }
};
#endif

template <typename Rows>
void units_of_query(const typename Rows::Element* query, int d, float* units) {
  F parts[Rows::kParts];
  for (int k = 0; k < d; k += Rows::kStep, units += Rows::kParts * W) {
    if (d - k < Rows::kStep) {
      Rows::get(query + k, d - k, parts);
    } else {
      Rows::get(query + k, parts);
    }
    for (int p = 0; p < Rows::kParts; ++p) store(units + p * W, parts[p]);
  }
}

void query_units(const void* query, int d, Format format, float* units) {
  if (format == Format::fp32) {
    units_of_query<FloatRows>(static_cast<const float*>(query), d, units);
  } else {
    units_of_query<HalfRows>(static_cast<const std::uint16_t*>(query), d, units);
  }
}

// sums [Q, J] += the inner products of n elements, kStep or fewer, of Q queries and of J rows.
template <typename Rows, int Q, int J>
FAVE_FAST_INLINE void add_step(const float* const (&queries)[Q], int at, const typename Rows::Element* const (&rows)[J],
                               int k, int n, F (&sums)[Q * J]) {
  F units[Q][Rows::kParts];
#pragma GCC unroll 16
  for (int i = 0; i < Q; ++i) {
#pragma GCC unroll 2
    for (int p = 0; p < Rows::kParts; ++p) units[i][p] = load(queries[i] + at + p * W);
  }
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j) {
    F parts[Rows::kParts];
    if (n < Rows::kStep) {
      Rows::get(rows[j] + k, n, parts);
    } else {
      Rows::get(rows[j] + k, parts);
    }
#pragma GCC unroll 2
    for (int p = 0; p < Rows::kParts; ++p) {
#pragma GCC unroll 16
      for (int i = 0; i < Q; ++i) sums[i * J + j] = Rows::multiply_add(sums[i * J + j], units[i][p], parts[p]);
    }
  }
}

// [Q, J] inner products, unfinished: their sums' lanes.
template <typename Rows, int Q, int J>
FAVE_FAST_INLINE void lanes_of(const float* const (&queries)[Q], const typename Rows::Element* const (&rows)[J], int d,
                               F (&sums)[Q * J]) {
#pragma GCC unroll 16
  for (int i = 0; i < Q * J; ++i) sums[i] = all(0.0f);
  int k = 0, at = 0;
  for (; k + Rows::kStep <= d; k += Rows::kStep, at += Rows::kParts * W) {
    add_step<Rows, Q, J>(queries, at, rows, k, Rows::kStep, sums);
  }
  if (k < d) add_step<Rows, Q, J>(queries, at, rows, k, d - k, sums);
}

// Rows that one query meets at a time: memory is fastest read in its own order, but one chain of sums waits for itself.
constexpr int kTogether = W == 8 ? 4 : 1;

// One lane for each of [Q, W / Q] inner products.
template <typename Rows, int Q>
FAVE_FAST_INLINE F dots_of(const float* const (&queries)[Q], const typename Rows::Element* const (&rows)[W / Q],
                           int d) {
  F sums[W];
  if (Q == 1) {
#pragma GCC unroll 16
    for (int j = 0; j < W; j += kTogether) {
      const float* const query[1] = {queries[0]};
      const typename Rows::Element* some[kTogether];
      F found[kTogether];
#pragma GCC unroll 16
      for (int i = 0; i < kTogether; ++i) some[i] = rows[(j + i) % (W / Q)];
      lanes_of<Rows, 1, kTogether>(query, some, d, found);
#pragma GCC unroll 16
      for (int i = 0; i < kTogether; ++i) sums[j + i] = found[i];
    }
  } else {
    lanes_of<Rows, Q, W / Q>(queries, rows, d, sums);
  }
  return lane_sums(sums);
}

template <typename Rows>
void dots_rows(const float* query, const void* const* rows, int count, int d, float* scores) {
  const float* const queries[1] = {query};
  for (int first = 0; first < count; first += W) {
    const typename Rows::Element* some[W];
    for (int i = 0; i < W; ++i) {
      some[i] = static_cast<const typename Rows::Element*>(rows[first + i < count ? first + i : count - 1]);
    }
    const F s = dots_of<Rows, 1>(queries, some, d);
    if (count - first < W) {
      store(scores + first, s, count - first);
    } else {
      store(scores + first, s);
    }
  }
}

constexpr int kQueries = W == 16 ? 4 : 2;  // of a tile of inner products

template <typename Rows, int Q>
void block_dots_of(const float* queries, const typename Rows::Element* rows, std::int64_t row_stride, int count, int d,
                   float* scores, std::int64_t score_stride) {
  constexpr int kItems = W / Q;
  const float* some_queries[Q];
  for (int i = 0; i < Q; ++i) some_queries[i] = queries + i * query_stride(d);
  for (int first = 0; first < count; first += kItems) {
    const typename Rows::Element* some[kItems];
    for (int j = 0; j < kItems; ++j) some[j] = rows + (first + j < count ? first + j : count - 1) * row_stride;
    const F s = dots_of<Rows, Q>(some_queries, some, d);
    if (Q == 1 && count - first >= W) {
      store(scores + first, s);
      continue;
    }
    float lanes[W];
    store(lanes, s);
    for (int i = 0; i < Q; ++i) {
      float* const row = scores + i * score_stride + first;
      if (count - first >= kItems) {  // apart: a copy of unknown length took 34 instructions for these few bytes
        std::memcpy(row, lanes + i * kItems, kItems * sizeof *row);
      } else {
        for (int j = 0; j < count - first; ++j) row[j] = lanes[i * kItems + j];
      }
    }
  }
}

template <typename Rows>
void block_dots_rows(const float* queries, int query_count, const void* rows_at, std::int64_t row_stride, int row_count,
                     int d, float* scores, std::int64_t score_stride) {
  const auto* rows = static_cast<const typename Rows::Element*>(rows_at);
  int q = 0;
  for (; q + kQueries <= query_count; q += kQueries) {
    block_dots_of<Rows, kQueries>(queries + q * query_stride(d), rows, row_stride, row_count, d,
                                  scores + q * score_stride, score_stride);
  }
  for (; q < query_count; ++q) {
    block_dots_of<Rows, 1>(queries + q * query_stride(d), rows, row_stride, row_count, d, scores + q * score_stride,
                           score_stride);
  }
}

#if defined(__AMX_BF16__)
constexpr int kMostTileElements = 512;  // longer rows are left to the vectors

// Rows of d elements, `count` of them and up to 64, as tiles of whole steps. Those that do not fill a tile, of either
// side, are copied and have zeros behind them.
class TiledRows {
 public:
  // `row(i)` is where the i-th row is; of rows side by side the distance is `stride`, else 0.
  template <typename Row>
  RowTiles of(Row row, int count, std::int64_t stride, int d) {
    RowTiles tiles;
    for (int t = 0; t < 4; ++t) {
      const int first = t * kTile, n = count - first < kTile ? count - first : kTile;
      const bool whole = stride != 0 && n == kTile && d % (2 * kTile) == 0;
      tiles.first[t] = whole ? row(first) : n > 0 ? copied(row, first, n, d, copies_[t]) : tiles.first[0];
      tiles.bytes[t] = whole ? 2 * stride : n > 0 ? 2 * kMostTileElements : tiles.bytes[0];
    }
    return tiles;
  }

 private:
  template <typename Row>
  static const std::uint16_t* copied(Row row, int first, int n, int d, std::uint16_t* to) {
    const int wide = (d + 2 * kTile - 1) / (2 * kTile) * (2 * kTile);
    for (int i = 0; i < kTile; ++i) {
      std::uint16_t* own = to + i * kMostTileElements;
      const int kept = i < n ? d : 0;
      if (kept > 0) std::memcpy(own, row(first + i), static_cast<std::size_t>(kept) * sizeof *own);
      std::memset(own + kept, 0, static_cast<std::size_t>(wide - kept) * sizeof *own);
    }
    return to;
  }

  alignas(64) std::uint16_t copies_[4][kTile * kMostTileElements];
};

void dots_by_tiles(const float* query, const void* const* rows, int count, int d, float* scores) {
  alignas(64) float sums[kTileRows];
  TiledRows tiled;
  const TileShapes shapes(kTile, 1, 0);
  shapes.use();
  for (int first = 0; first < count; first += kTileRows) {
    const int n = count - first < kTileRows ? count - first : kTileRows;
    const auto row = [&](int i) { return static_cast<const std::uint16_t*>(rows[first + i]); };
    tile_dots(tiled.of(row, n, 0, d), query, 1, (d + 2 * kTile - 1) / (2 * kTile), sums);
    std::memcpy(scores + first, sums, static_cast<std::size_t>(n) * sizeof(float));
  }
  _tile_release();
}

// The pairs of up to 16 queries side by side, [16 * steps, 16]; behind the last query zeros.
void columns_of(const float* queries, int count, int d, int steps, float* columns) {
  for (int step = 0; step < steps; ++step) {
    F block[W];
    for (int q = 0; q < W; ++q) block[q] = q < count ? load(queries + q * query_stride(d) + step * W) : all(0.0f);
    transpose(block);
    for (int u = 0; u < W; ++u) store(columns + (step * W + u) * W, block[u]);
  }
}

void block_dots_by_tiles(const float* queries, int query_count, const std::uint16_t* rows, std::int64_t row_stride,
                         int row_count, int d, float* scores, std::int64_t score_stride) {
  alignas(64) float columns[kMostTileElements / 2 * kTile], sums[kTileRows * kTile];
  TiledRows tiled;
  const int steps = (d + 2 * kTile - 1) / (2 * kTile);
  const int width = query_count == 1 ? 1 : kTile;
  const TileShapes shapes(kTile, width, 0);
  shapes.use();
  for (int first = 0; first < row_count; first += kTileRows) {
    const int n = row_count - first < kTileRows ? row_count - first : kTileRows;
    const auto row = [&](int i) { return rows + (first + i) * row_stride; };
    const RowTiles tiles = tiled.of(row, n, row_stride, d);
    if (width == 1) {
      tile_dots(tiles, queries, 1, steps, sums);
      std::memcpy(scores + first, sums, static_cast<std::size_t>(n) * sizeof(float));
      continue;
    }
    for (int q = 0; q < query_count; q += kTile) {
      const int some = query_count - q < kTile ? query_count - q : kTile;
      columns_of(queries + q * query_stride(d), some, d, steps, columns);
      tile_dots(tiles, columns, kTile, steps, sums);
      for (int t = 0; t * kTile < n; ++t) {
        F block[W];
        for (int i = 0; i < W; ++i) block[i] = load(sums + (t * kTile + i) * kTile);
        transpose(block);
        const int wide = n - t * kTile < kTile ? n - t * kTile : kTile;
        for (int i = 0; i < some; ++i) store(scores + (q + i) * score_stride + first + t * kTile, block[i], wide);
      }
    }
  }
  _tile_release();
}
#endif

void dots(const float* query, const void* const* rows, int count, int d, Format format, float* scores) {
#if defined(__AMX_BF16__)
  if (format == Format::bf16 && d <= kMostTileElements) return dots_by_tiles(query, rows, count, d, scores);
#endif
  if (format == Format::fp32) {
    dots_rows<FloatRows>(query, rows, count, d, scores);
  } else {
    dots_rows<HalfRows>(query, rows, count, d, scores);
  }
}

void block_dots(const float* queries, int query_count, const void* rows, std::int64_t row_stride, int row_count, int d,
                Format format, float* scores, std::int64_t score_stride) {
#if defined(__AMX_BF16__)
  if (format == Format::bf16 && d <= kMostTileElements) {
    return block_dots_by_tiles(queries, query_count, static_cast<const std::uint16_t*>(rows), row_stride, row_count, d,
                               scores, score_stride);
  }
#endif
  if (format == Format::fp32) {
    block_dots_rows<FloatRows>(queries, query_count, rows, row_stride, row_count, d, scores, score_stride);
  } else {
    block_dots_rows<HalfRows>(queries, query_count, rows, row_stride, row_count, d, scores, score_stride);
  }
}

FAVE_FAST_INLINE int lowest(std::uint64_t bits) {
#if defined(__GNUC__)
  return __builtin_ctzll(bits);
#else
  int lane = 0;
  for (; (bits & 1u) == 0; bits >>= 1) ++lane;
  return lane;
#endif
}

FAVE_FAST_INLINE int put_places(std::uint64_t bits, int first, std::int32_t* places) {
  int found = 0;
  for (; bits != 0; bits &= bits - 1) places[found++] = first + lowest(bits);
  return found;
}

int above(const float* scores, int count, float threshold, std::int32_t* places) {
  constexpr int kBits = 64;  // for which one branch asks whether there is any
  const F level = all(threshold);
  int found = 0, i = 0;
  for (; i + kBits <= count; i += kBits) {
    std::uint64_t bits = 0;
#pragma GCC unroll 16
    for (int lane = 0; lane < kBits; lane += W) {
      bits |= static_cast<std::uint64_t>(greater(load(scores + i + lane), level)) << lane;
    }
    found += put_places(bits, i, places + found);
  }
  for (; i + W <= count; i += W) found += put_places(greater(load(scores + i), level), i, places + found);
  if (i < count) {
    const unsigned lanes = (1u << (count - i)) - 1;
    found += put_places(greater(load(scores + i, count - i), level) & lanes, i, places + found);
  }
  return found;
}

template <int Q>
FAVE_FAST_INLINE void byte_dots_of(const float* queries, const float* w, int units, const std::int32_t* offsets,
                                   const float* query_scales, const float* scales, float* scores) {
  I sums[Q][kColumns];
#pragma GCC unroll 8
  for (int q = 0; q < Q; ++q) {
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) sums[q][c] = zero_counts();
  }
  for (int k = 0; k < units; ++k) {
    F columns[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) columns[c] = load(w + k * kPanel + c * W);
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) {
      const F query = all(queries[q * units + k]);
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) sums[q][c] = add_byte_products(sums[q][c], columns[c], query);
    }
  }
  for (int q = 0; q < Q; ++q) {
    for (int c = 0; c < kColumns; ++c) {
      const F product = floats(sub(sums[q][c], offsets[q]));
      store(scores + q * kPanel + c * W, mul(mul(product, all(query_scales[q])), load(scales + c * W)));
    }
  }
}

void byte_dots(const float* queries, int query_count, const float* w, int units, const std::int32_t* offsets,
               const float* query_scales, const float* scales, float* scores) {
  int q = 0;
  for (; q + 4 <= query_count; q += 4) {
    byte_dots_of<4>(queries + q * units, w, units, offsets + q, query_scales + q, scales, scores + q * kPanel);
  }
  for (; q < query_count; ++q) {
    byte_dots_of<1>(queries + q * units, w, units, offsets + q, query_scales + q, scales, scores + q * kPanel);
  }
}

int not_below(const float* scores, float a, const float* errors, float b, const float* norms, float threshold,
              float* margins, std::int32_t* places) {
  const F level = all(threshold);
  int found = 0;
  for (int c = 0; c < kColumns; ++c) {
    margins[c] = a * errors[c] + b * norms[c];
    const F upper = add(load(scores + c * W), all(margins[c]));
    found += put_places(not_less(upper, level), c * W, places + found);
  }
  return found;
}

}  // namespace

extern const Kernels FAVE_FAST_KERNELS;
const Kernels FAVE_FAST_KERNELS = {FAVE_FAST_NAME, W,      kPanel,   kMostQueryByte, kHalf, norm,
                                   dense,          attend, to_words, input,          query_units,
                                   dots,           block_dots, above, byte_dots,     not_below};

}  // namespace fave_fast
