// One vector type under one set of names for every instruction set; included only by kernels.cpp, which is compiled
// once for each. Everything is in an unnamed namespace: an inline function with external linkage, kept by the linker
// from the copy that was compiled for AVX-512, would be run on machines without it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#define FAVE_FAST_INLINE inline __attribute__((always_inline))
#else
#define FAVE_FAST_INLINE inline
#endif

namespace fave_fast {
namespace {

// A unit is what one lane holds of an operand: a float, two neighbouring bfloat16 or 16-bit integers, or four
// neighbouring 8-bit integers.
// Units are moved as floats (moving changes no bit) and copied in and out by memcpy.

FAVE_FAST_INLINE float widened(std::uint16_t bits) {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

#if defined(__AVX512F__)

constexpr int W = 16;
constexpr int kRows = 6;     // rows of a tile of a product: 24 sums, 4 columns and 1 row fill 29 of 32 registers
constexpr int kColumns = 4;  // vectors of columns of a tile
using F = __m512;
using I = __m512i;

FAVE_FAST_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
FAVE_FAST_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
FAVE_FAST_INLINE F load(const float* p, int n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
FAVE_FAST_INLINE F load(const std::uint16_t* p) {
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}
FAVE_FAST_INLINE F load(const std::uint16_t* p, int n) {
  const __m256i narrow = _mm256_maskz_loadu_epi16(first_lanes(n), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}
FAVE_FAST_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
FAVE_FAST_INLINE void store(float* p, F x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x); }
FAVE_FAST_INLINE F all(float x) { return _mm512_set1_ps(x); }
FAVE_FAST_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
FAVE_FAST_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
FAVE_FAST_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
FAVE_FAST_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
FAVE_FAST_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
FAVE_FAST_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is NaN
FAVE_FAST_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
// x * 2^n for whole n
FAVE_FAST_INLINE F scale(F x, F n) { return _mm512_scalef_ps(x, n); }
FAVE_FAST_INLINE F rounded(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// Bit i is set where a's lane i is greater; not for NaN.
FAVE_FAST_INLINE unsigned greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
// Bit i is set unless a's lane i is less: for NaN too.
FAVE_FAST_INLINE unsigned not_less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }

// Rows and columns of lanes change places.
FAVE_FAST_INLINE void transpose(F (&r)[W]) {
  F t[W];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) {
      const __m512d a = _mm512_castps_pd(t[4 * i + j]), b = _mm512_castps_pd(t[4 * i + 2 + j]);
      r[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const F a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
    const F c = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xdd), d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_f32x4(a, b, 0x88);
    t[8 + j] = _mm512_shuffle_f32x4(a, b, 0xdd);
    t[4 + j] = _mm512_shuffle_f32x4(c, d, 0x88);
    t[12 + j] = _mm512_shuffle_f32x4(c, d, 0xdd);
  }
  for (int i = 0; i < W; ++i) r[i] = t[i];
}

// Lane i is the sum over the lanes of r[i], added in an order that is the same for every i.
FAVE_FAST_INLINE F lane_sums(F (&r)[W]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    r[i] = add(_mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(r[2 * i]), b = _mm512_castps_pd(r[2 * i + 1]);
    r[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  const F low = add(_mm512_shuffle_f32x4(r[0], r[1], 0x88), _mm512_shuffle_f32x4(r[0], r[1], 0xdd));
  const F high = add(_mm512_shuffle_f32x4(r[2], r[3], 0x88), _mm512_shuffle_f32x4(r[2], r[3], 0xdd));
  return add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
}

FAVE_FAST_INLINE float sum(F x) { return _mm512_reduce_add_ps(x); }
FAVE_FAST_INLINE float largest(F x) { return _mm512_reduce_max_ps(x); }

FAVE_FAST_INLINE I zero_counts() { return _mm512_setzero_si512(); }
FAVE_FAST_INLINE F floats(I x) { return _mm512_cvtepi32_ps(x); }
FAVE_FAST_INLINE I sub(I a, std::int32_t b) { return _mm512_sub_epi32(a, _mm512_set1_epi32(b)); }
constexpr int kMostQueryByte = 127;
// sums + the products of four unsigned bytes of `items` and four signed ones of `query`, lane by lane; the latter from
// -kMostQueryByte to kMostQueryByte
FAVE_FAST_INLINE I add_byte_products(I sums, F items, F query) {
  const I b = _mm512_castps_si512(items), a = _mm512_castps_si512(query);
#if defined(__AVX512VNNI__)
  return _mm512_dpbusd_epi32(sums, b, a);
#else
  // By 16-bit products of even and of odd bytes: the 8-bit instruction saturates.
  const I even_b = _mm512_and_si512(b, _mm512_set1_epi16(0xff)), even_a = _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8);
  const I even = _mm512_madd_epi16(even_b, even_a);
  const I odd = _mm512_madd_epi16(_mm512_srli_epi16(b, 8), _mm512_srai_epi16(a, 8));
  return _mm512_add_epi32(sums, _mm512_add_epi32(even, odd));
#endif
}

#if defined(__AVX512BF16__)
// sums + the two products of each lane's pairs of bfloat16
FAVE_FAST_INLINE F add_pair_products(F sums, F a, F b) {
  return _mm512_dpbf16_ps(sums, (__m512bh)a, (__m512bh)b);
}
// Units of bfloat16 pairs from 2 W floats.
FAVE_FAST_INLINE F pairs(F first, F second) { return (F)_mm512_cvtne2ps_pbh(second, first); }
// Units whose lane i pairs low's lane i with high's.
FAVE_FAST_INLINE F interleaved_pairs(F low, F high) {
  const __m512i narrow = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_castsi512_ps(_mm512_permutexvar_epi16(order, narrow));
}
#endif

#elif defined(__AVX2__)

constexpr int W = 8;
constexpr int kRows = 6;  // 12 sums, 2 columns and 1 row fill 15 of 16 registers
constexpr int kColumns = 2;
using F = __m256;
using I = __m256i;

FAVE_FAST_INLINE __m256i first_lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
FAVE_FAST_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
FAVE_FAST_INLINE F load(const float* p, int n) { return _mm256_maskload_ps(p, first_lanes(n)); }
FAVE_FAST_INLINE F load(const std::uint16_t* p) {
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
}
FAVE_FAST_INLINE F load(const std::uint16_t* p, int n) {
  std::uint16_t part[W] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}
FAVE_FAST_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x); }
FAVE_FAST_INLINE void store(float* p, F x, int n) { _mm256_maskstore_ps(p, first_lanes(n), x); }
FAVE_FAST_INLINE F all(float x) { return _mm256_set1_ps(x); }
FAVE_FAST_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
FAVE_FAST_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
FAVE_FAST_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
FAVE_FAST_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
FAVE_FAST_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
FAVE_FAST_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
FAVE_FAST_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
FAVE_FAST_INLINE F scale(F x, F n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(x, _mm256_castsi256_ps(exponent));
}
FAVE_FAST_INLINE F rounded(F x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
FAVE_FAST_INLINE unsigned greater(F a, F b) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)));
}
FAVE_FAST_INLINE unsigned not_less(F a, F b) {
  return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)));
}

FAVE_FAST_INLINE void transpose(F (&r)[W]) {
  F t[W], u[W];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      const __m256d a = _mm256_castps_pd(t[4 * i + j]), b = _mm256_castps_pd(t[4 * i + 2 + j]);
      u[4 * i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b));
      u[4 * i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x20);
    r[4 + j] = _mm256_permute2f128_ps(u[j], u[4 + j], 0x31);
  }
}

FAVE_FAST_INLINE F lane_sums(F (&r)[W]) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = add(_mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m256d a = _mm256_castps_pd(r[2 * i]), b = _mm256_castps_pd(r[2 * i + 1]);
    r[i] = add(_mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), _mm256_castpd_ps(_mm256_unpackhi_pd(a, b)));
  }
  return add(_mm256_permute2f128_ps(r[0], r[1], 0x20), _mm256_permute2f128_ps(r[0], r[1], 0x31));
}

FAVE_FAST_INLINE float sum(F x) {
  __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
FAVE_FAST_INLINE float largest(F x) {
  __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

FAVE_FAST_INLINE I zero_counts() { return _mm256_setzero_si256(); }
FAVE_FAST_INLINE F floats(I x) { return _mm256_cvtepi32_ps(x); }
FAVE_FAST_INLINE I sub(I a, std::int32_t b) { return _mm256_sub_epi32(a, _mm256_set1_epi32(b)); }
#define FAVE_FAST_WORDS
// sums + the two products of each lane's pairs of 16-bit integers. In assembly because GCC 12 begins all products of a
// tile before their sums, for which there are no registers: a tile then took 1.6 times as long.
FAVE_FAST_INLINE I add_word_products(I sums, F a, F b) {
  I products;
  __asm__ volatile("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sums), "=&x"(products) : "x"(a), "x"(b));
  return sums;
}
// Units of 16-bit pairs from 2 W floats, rounded to the nearest.
FAVE_FAST_INLINE F words(F first, F second) {
  const I narrow = _mm256_packs_epi32(_mm256_cvtps_epi32(first), _mm256_cvtps_epi32(second));
  return _mm256_castsi256_ps(_mm256_permute4x64_epi64(narrow, 0xd8));
}
// The sum of two products is 16 bits wide, and saturates: 2 * 255 * 63 does not reach that, 2 * 255 * 127 would.
constexpr int kMostQueryByte = 63;
FAVE_FAST_INLINE I add_byte_products(I sums, F items, F query) {
  I twos;
  __asm__ volatile("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
                   : "+x"(sums), "=&x"(twos)
                   : "x"(items), "x"(query), "x"(_mm256_set1_epi16(1)));
  return sums;
}

#else

constexpr int W = 4;
constexpr int kRows = 4;
constexpr int kColumns = 2;

struct F {
  float lane[W];
};
struct I {
  std::int32_t lane[W];
};

template <typename Function>
FAVE_FAST_INLINE F each(Function value) {
  F result;
  for (int i = 0; i < W; ++i) result.lane[i] = value(i);
  return result;
}
template <typename Function>
FAVE_FAST_INLINE unsigned mask(Function holds) {
  unsigned bits = 0;
  for (int i = 0; i < W; ++i) bits |= static_cast<unsigned>(holds(i)) << i;
  return bits;
}

FAVE_FAST_INLINE F load(const float* p) {
  F result;
  std::memcpy(&result, p, sizeof result);
  return result;
}
FAVE_FAST_INLINE F load(const float* p, int n) { return each([=](int i) { return i < n ? p[i] : 0.0f; }); }
FAVE_FAST_INLINE F load(const std::uint16_t* p) { return each([=](int i) { return widened(p[i]); }); }
FAVE_FAST_INLINE F load(const std::uint16_t* p, int n) {
  return each([=](int i) { return i < n ? widened(p[i]) : 0.0f; });
}
FAVE_FAST_INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
FAVE_FAST_INLINE void store(float* p, F x, int n) {
  for (int i = 0; i < n; ++i) p[i] = x.lane[i];
}
FAVE_FAST_INLINE F all(float x) { return each([=](int) { return x; }); }
FAVE_FAST_INLINE F add(F a, F b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
FAVE_FAST_INLINE F sub(F a, F b) { return each([&](int i) { return a.lane[i] - b.lane[i]; }); }
FAVE_FAST_INLINE F mul(F a, F b) { return each([&](int i) { return a.lane[i] * b.lane[i]; }); }
FAVE_FAST_INLINE F div(F a, F b) { return each([&](int i) { return a.lane[i] / b.lane[i]; }); }
// Rounded once, or where that would be a call of the library's, in double and then to float: rounding the product too
// would make sums twice as wrong as PyTorch's.
FAVE_FAST_INLINE F fma(F a, F b, F c) {
#if defined(__FP_FAST_FMAF)
  return each([&](int i) { return __builtin_fmaf(a.lane[i], b.lane[i], c.lane[i]); });
#else
  return each([&](int i) {
    const double product = static_cast<double>(a.lane[i]) * static_cast<double>(b.lane[i]);
    return static_cast<float>(product + static_cast<double>(c.lane[i]));
  });
#endif
}
FAVE_FAST_INLINE F max(F a, F b) { return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; }); }
FAVE_FAST_INLINE F min(F a, F b) { return each([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; }); }
FAVE_FAST_INLINE F scale(F x, F n) {
  return each([&](int i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(static_cast<std::int32_t>(n.lane[i]) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return x.lane[i] * power;
  });
}
// Up to 2^22; adding and taking away 1.5 * 2^23 leaves no place for a fraction.
FAVE_FAST_INLINE F rounded(F x) {
  return each([&](int i) {
    volatile float whole = x.lane[i] + 12582912.0f;
    return whole - 12582912.0f;
  });
}
FAVE_FAST_INLINE unsigned greater(F a, F b) { return mask([&](int i) { return a.lane[i] > b.lane[i]; }); }
FAVE_FAST_INLINE unsigned not_less(F a, F b) { return mask([&](int i) { return !(a.lane[i] < b.lane[i]); }); }

FAVE_FAST_INLINE void transpose(F (&r)[W]) {
  for (int i = 0; i < W; ++i) {
    for (int j = 0; j < i; ++j) {
      const float kept = r[i].lane[j];
      r[i].lane[j] = r[j].lane[i];
      r[j].lane[i] = kept;
    }
  }
}
FAVE_FAST_INLINE F lane_sums(F (&r)[W]) {
  return each([&](int i) { return (r[i].lane[0] + r[i].lane[2]) + (r[i].lane[1] + r[i].lane[3]); });
}

FAVE_FAST_INLINE float sum(F x) { return (x.lane[0] + x.lane[2]) + (x.lane[1] + x.lane[3]); }
FAVE_FAST_INLINE float largest(F x) {
  const F y = max(x, each([&](int i) { return x.lane[i ^ 2]; }));
  return y.lane[0] > y.lane[1] ? y.lane[0] : y.lane[1];
}

FAVE_FAST_INLINE I zero_counts() { return I{}; }
FAVE_FAST_INLINE F floats(I x) { return each([&](int i) { return static_cast<float>(x.lane[i]); }); }
FAVE_FAST_INLINE I sub(I a, std::int32_t b) {
  for (int i = 0; i < W; ++i) a.lane[i] -= b;
  return a;
}
constexpr int kMostQueryByte = 127;
FAVE_FAST_INLINE I add_byte_products(I sums, F items, F query) {
  std::uint8_t b[4 * W];
  std::int8_t a[4 * W];
  std::memcpy(b, &items, sizeof b);
  std::memcpy(a, &query, sizeof a);
  for (int i = 0; i < W; ++i) {
    for (int j = 0; j < 4; ++j) sums.lane[i] += b[4 * i + j] * a[4 * i + j];
  }
  return sums;
}

#endif

// The first n lanes of x, zeros after them.
FAVE_FAST_INLINE F only(F x, int n) {
  float lanes[W];
  store(lanes, x);
  return load(lanes, n);
}

// 2^x for x up to 0; 0 where that is no normal number. Least-maximum fits: relative error 1.9e-9, or else 2.6e-6, both
// before rounding.
template <bool kExact>
FAVE_FAST_INLINE F exp2(F x) {
#if defined(__AVX512F__)
  const F limited = max(all(-160.0f), x);  // NaN stays
#else
  const F limited = max(all(-127.0f), x);
#endif
  const F whole = rounded(limited);
  const F part = sub(limited, whole);
  F y;
  if (kExact) {
    y = all(1.5345811380225396e-4f);
    y = fma(y, part, all(1.3399931214689966e-3f));
    y = fma(y, part, all(9.618488959441058e-3f));
    y = fma(y, part, all(5.550328776979514e-2f));
    y = fma(y, part, all(2.4022646890612467e-1f));
    y = fma(y, part, all(6.931472057372597e-1f));
  } else {
    y = all(9.570101433600377e-3f);
    y = fma(y, part, all(5.5917860281934774e-2f));
    y = fma(y, part, all(2.4024744839657183e-1f));
    y = fma(y, part, all(6.931218147436733e-1f));
  }
  return scale(fma(y, part, all(1.0f)), whole);
}

// x Phi(x). Exact: Phi - 1/2 as x P(x^2) / Q(x^2) up to 5.6, from where on it is 1/2 in float32 (fit: 9.3e-9); else as
// x p(x^2) up to 4.2 with p(4.2^2) = 1 / 8.4, so that what is larger is passed on or cut off whole; |error| < 5.7e-5,
// under bfloat16's rounding of the result.
template <bool kExact>
FAVE_FAST_INLINE F gelu(F x) {
  if (kExact) {
    const F y = max(all(-5.6f), min(all(5.6f), x));
    const F t = mul(y, y);
    F p = all(2.214523739192065e-8f);
    p = fma(p, t, all(6.3565062977767905e-6f));
    p = fma(p, t, all(1.7384997143310421e-4f));
    p = fma(p, t, all(4.707254726148564e-3f));
    p = fma(p, t, all(3.4376055840267684e-2f));
    p = fma(p, t, all(3.9894222156729264e-1f));
    F q = all(1.1802078122168725e-6f);
    q = fma(q, t, all(7.51015682397756e-5f));
    q = fma(q, t, all(1.9129740731721944e-3f));
    q = fma(q, t, all(2.894005441766061e-2f));
    q = fma(q, t, all(2.5283370670157995e-1f));
    q = fma(q, t, all(1.0f));
    return mul(x, add(all(0.5f), div(mul(y, p), q)));
  }
  const F y = max(all(-4.2f), min(all(4.2f), x));
  const F t = fma(mul(y, y), all(2.0f / (4.2f * 4.2f)), all(-1.0f));
  F p = all(3.1639408593845605e-3f);
  p = fma(p, t, all(-6.905145280678138e-3f));
  p = fma(p, t, all(7.000341652109627e-3f));
  p = fma(p, t, all(-1.2312142332158011e-2f));
  p = fma(p, t, all(2.5289992412150377e-2f));
  p = fma(p, t, all(-3.94128430800459e-2f));
  p = fma(p, t, all(5.581566563823691e-2f));
  p = fma(p, t, all(-8.144718227664512e-2f));
  p = fma(p, t, all(1.6785499145526475e-1f));
  return mul(x, fma(y, p, all(0.5f)));
}

}  // namespace
}  // namespace fave_fast
