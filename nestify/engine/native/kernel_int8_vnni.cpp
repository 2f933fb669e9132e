// The int8 kernel for AVX-512 with VNNI.
#include "kernel.h"
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx512vnni,avx2,fma,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx512vnni,avx2,fma,bmi2")
#endif
#define LANES 16
namespace nestify {
namespace avx512_vnni {
#include "panels.inc"

typedef uint32_t Sums __attribute__((vector_size(64), may_alias));
constexpr uint32_t kFlip = 0;

static INLINE Sums broadcast(int32_t x) { return Sums(_mm512_set1_epi32(x)); }

static INLINE Sums dot(Sums sum, Sums words, Sums weight) {
  return Sums(_mm512_dpbusd_epi32(__m512i(sum), __m512i(words), __m512i(weight)));
}

// Loads bytes 0, step, 2 * step, ... of a row; only the first `count` of 16 are read.
template <int kStep>
static INLINE __m128i load_bytes(const uint8_t* from, int count) {
  if (kStep == 1) return _mm_maskz_loadu_epi8(_cvtu32_mask16(_bzhi_u32(0xffff, count)), from);
  const uint32_t mask = _bzhi_u32(0xffffffff, 2 * count - 1);
  return _mm256_cvtepi16_epi8(_mm256_maskz_loadu_epi8(_cvtu32_mask32(mask), from));
}

template <int kStep>
static INLINE __m512i load_quad(const uint8_t* const* rows, int64_t x, int count) {
  // 4 rows of 4 words of 4 positions; then 4 lanes of 4 rows of 4 positions; then words of 4 rows.
  const __m512i to_lanes = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i to_words = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m512i quad = _mm512_castsi128_si512(load_bytes<kStep>(rows[0] + x * kStep, count));
  quad = _mm512_inserti32x4(quad, load_bytes<kStep>(rows[1] + x * kStep, count), 1);
  quad = _mm512_inserti32x4(quad, load_bytes<kStep>(rows[2] + x * kStep, count), 2);
  quad = _mm512_inserti32x4(quad, load_bytes<kStep>(rows[3] + x * kStep, count), 3);
  return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(to_lanes, quad), to_words);
}

template <int kStep>
static INLINE void interleave_steps(const uint8_t* const* rows, int64_t count, uint32_t* to) {
  int64_t x = 0;
  for (; x + 16 <= count; x += 16) _mm512_storeu_si512(to + x, load_quad<kStep>(rows, x, 16));
  if (x == count) return;
  const int left = int(count - x);
  _mm512_mask_storeu_epi32(to + x, _cvtu32_mask16(_bzhi_u32(0xffff, left)), load_quad<kStep>(rows, x, left));
}

// Makes words of four rows of bytes, of every step-th position.
static INLINE void interleave(const uint8_t* const* rows, int64_t count, int64_t step, uint32_t* to) {
  if (step == 1) return interleave_steps<1>(rows, count, to);
  if (step == 2) return interleave_steps<2>(rows, count, to);
  for (int64_t x = 0; x < count; x++)
    to[x] = uint32_t(rows[0][x * step]) | uint32_t(rows[1][x * step]) << 8 | uint32_t(rows[2][x * step]) << 16 |
            uint32_t(rows[3][x * step]) << 24;
}

// Scales 16 sums, adds the residual, and rounds; only the first `count` numbers of the residual are read.
static INLINE __m512i round_sums(const Int8Block& c, Sums sums, __m512 multiplier, const uint8_t* residual, int count) {
  __m512 scaled = _mm512_cvtepi32_ps(__m512i(sums));
  if (residual) {
    const __m128i bytes = _mm_maskz_loadu_epi8(_cvtu32_mask16(_bzhi_u32(0xffff, count)), residual);
    const __m512i added = _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(c.epilogue.residual_zero));
    const __m512 scale = _mm512_set1_ps(c.epilogue.residual_scale);
    scaled = _mm512_fmadd_ps(scaled, multiplier, _mm512_mul_ps(_mm512_cvtepi32_ps(added), scale));
  } else {
    scaled = _mm512_mul_ps(scaled, multiplier);
  }
  return _mm512_cvtps_epi32(scaled);  // the limits of multipliers and scales keep it in the range of int32
}

template <int V>
static INLINE void write_row(const Int8Block& c, int64_t output, const Sums* sum) {
  uint8_t* to = c.output + output * c.stride;
  const uint8_t* residual = c.epilogue.residual ? c.epilogue.residual + output * c.stride : nullptr;
  const __m512 multiplier = _mm512_set1_ps(c.multipliers[output]);
  const __m512i zero = _mm512_set1_epi16(short(c.epilogue.output_zero));
  const __m512i low = _mm512_set1_epi8(char(c.epilogue.low)), high = _mm512_set1_epi8(char(c.epilogue.high));
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  UNROLL for (int v = 0; v < V; v += 4) {
    __m512i part[4];
    UNROLL for (int i = 0; i < 4; i++) {
      if (v + i < V)
        part[i] = round_sums(c, sum[v + i], multiplier, residual ? residual + 16 * (v + i) : nullptr,
                             int(least(16, c.positions - 16 * (v + i))));
      else
        part[i] = _mm512_setzero_si512();
    }
    const __m512i first = _mm512_adds_epi16(_mm512_packs_epi32(part[0], part[1]), zero);
    const __m512i second = _mm512_adds_epi16(_mm512_packs_epi32(part[2], part[3]), zero);
    __m512i bytes = _mm512_permutexvar_epi32(in_order, _mm512_packus_epi16(first, second));
    bytes = _mm512_min_epu8(_mm512_max_epu8(bytes, low), high);
    if (v + 4 < V)
      _mm512_storeu_si512(to + 16 * v, bytes);
    else
      _mm512_mask_storeu_epi8(to + 16 * v, _cvtu64_mask64(_bzhi_u64(~0ull, c.positions - 16 * v)), bytes);
  }
}

#include "kernel_int8.inc"
}  // namespace avx512_vnni
}  // namespace nestify
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
