// The int8 kernel for AVX2, which has no instruction that adds up four products of bytes.
#include "kernel.h"
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define LANES 8
namespace nestify {
namespace avx2_int8 {
#include "panels.inc"

typedef uint32_t Sums __attribute__((vector_size(32), may_alias));
constexpr uint32_t kFlip = 0;

static INLINE Sums broadcast(int32_t x) { return Sums(_mm256_set1_epi32(x)); }

// Multiplies the bytes at even and at odd places apart, as numbers of 16 bits.
static INLINE Sums dot(Sums sum, Sums words, Sums weight) {
  const __m256i w = __m256i(weight), x = __m256i(words);
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0xff)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(w, 8));
  return sum + Sums(_mm256_add_epi32(even, odd));
}

template <int kStep>
static INLINE Sums neighbours(const uint8_t* from) {
  // Each lane of 16 bytes gets those that its four positions need.
  const auto* second = reinterpret_cast<const __m128i_u*>(from + 4 * kStep);
  const __m256i bytes =
      _mm256_inserti128_si256(_mm256_castsi128_si256(*reinterpret_cast<const __m128i_u*>(from)), *second, 1);
  const __m256i to_words = _mm256_broadcastsi128_si256(
      kStep == 1 ? _mm_setr_epi8(0, 1, 2, 3, 1, 2, 3, 4, 2, 3, 4, 5, 3, 4, 5, 6)
                 : _mm_setr_epi8(0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 8, 9));
  return Sums(_mm256_shuffle_epi8(bytes, to_words));
}

#include "kernel_int8_copy.inc"

// Scales the sums of a vector, adds the residual, rounds, and makes bytes of them.
static INLINE __m128i make_bytes(const Int8Block& c, Sums sums, const uint8_t* residual) {
  const Int8Epilogue& e = c.epilogue;
  const __m256 multiplier = _mm256_set1_ps(c.multipliers[0]);
  __m256 scaled = _mm256_cvtepi32_ps(__m256i(sums));
  if (residual) {
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(residual)));
    const __m256 added = _mm256_cvtepi32_ps(_mm256_sub_epi32(bytes, _mm256_set1_epi32(e.residual_zero)));
    scaled = _mm256_fmadd_ps(scaled, multiplier, _mm256_mul_ps(added, _mm256_set1_ps(e.residual_scale)));
  } else {
    scaled = _mm256_mul_ps(scaled, multiplier);
  }
  const __m256i rounded = _mm256_cvtps_epi32(scaled);  // the limits of multipliers and scales keep it in range
  __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  words = _mm_adds_epi16(words, _mm_set1_epi16(short(e.output_zero)));
  const __m128i bytes = _mm_packus_epi16(words, words);
  return _mm_min_epu8(_mm_max_epu8(bytes, _mm_set1_epi8(char(e.low))), _mm_set1_epi8(char(e.high)));
}

// Writes the first `count` bytes of a vector, and reads as many of the residual.
static INLINE void write_vector(const Int8Block& c, Sums sums, int count, const uint8_t* residual, uint8_t* to) {
  if (count >= kLanes) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), make_bytes(c, sums, residual));
    return;
  }
  uint8_t bytes[8] = {};
  for (int i = 0; residual && i < count; i++) bytes[i] = residual[i];
  const __m128i made = make_bytes(c, sums, residual ? bytes : nullptr);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(bytes), made);
  for (int i = 0; i < count; i++) to[i] = bytes[i];
}

template <int V>
static INLINE void write_row(const Int8Block& c, int64_t output, const Sums* sum) {
  Int8Block row = c;
  row.multipliers += output;
  uint8_t* to = c.output + output * c.stride;
  const uint8_t* residual = c.epilogue.residual ? c.epilogue.residual + output * c.stride : nullptr;
  UNROLL for (int v = 0; v < V; v++)
    write_vector(row, sum[v], c.positions - v * kLanes, residual ? residual + v * kLanes : nullptr, to + v * kLanes);
}

// Writes vectors that begin in consecutive rows of the output; only the first `rows` of them.
template <int V>
static INLINE void write_rows(const Int8Block& c, int rows, const Sums* sum) {
  for (int v = 0; v < rows; v++) {
    const uint8_t* residual = c.epilogue.residual ? c.epilogue.residual + v * c.stride : nullptr;
    write_vector(c, sum[v], c.positions, residual, c.output + v * c.stride);
  }
}

#include "kernel_int8.inc"
}  // namespace avx2_int8
}  // namespace nestify
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
