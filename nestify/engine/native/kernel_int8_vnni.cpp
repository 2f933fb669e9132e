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

static INLINE void copy_bytes(const uint8_t* from, int64_t count, uint8_t* to) {
  for (; count >= 64; count -= 64, from += 64, to += 64) _mm512_storeu_si512(to, _mm512_loadu_si512(from));
  const __mmask64 left = _cvtu64_mask64(_bzhi_u64(~0ull, uint32_t(count)));
  _mm512_mask_storeu_epi8(to, left, _mm512_maskz_loadu_epi8(left, from));
}

template <int kStep>
static INLINE Sums neighbours(const uint8_t* from) {
  // Each lane of 16 bytes gets the four-byte words that its four positions begin in, and then their bytes.
  const __m512i to_lanes = kStep == 1 ? _mm512_setr_epi32(0, 1, 0, 0, 1, 2, 0, 0, 2, 3, 0, 0, 3, 4, 0, 0)
                                      : _mm512_setr_epi32(0, 1, 2, 0, 2, 3, 4, 0, 4, 5, 6, 0, 6, 7, 8, 0);
  const __m512i to_words = _mm512_broadcast_i32x4(
      kStep == 1 ? _mm_setr_epi8(0, 1, 2, 3, 1, 2, 3, 4, 2, 3, 4, 5, 3, 4, 5, 6)
                 : _mm_setr_epi8(0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 8, 9));
  return Sums(_mm512_shuffle_epi8(_mm512_permutexvar_epi32(to_lanes, _mm512_loadu_si512(from)), to_words));
}

// Eight words of four bytes each at positions from `first`, and from `second`.
template <int kStep>
static INLINE Sums neighbours_of_two(const uint8_t* first, const uint8_t* second) {
  // As in `neighbours`, with two lanes of each; their bytes are 16 or 32 apart when they are loaded.
  const __m512i to_words = _mm512_broadcast_i32x4(
      kStep == 1 ? _mm_setr_epi8(0, 1, 2, 3, 1, 2, 3, 4, 2, 3, 4, 5, 3, 4, 5, 6)
                 : _mm_setr_epi8(0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7, 8, 9));
  __m512i bytes;
  if (kStep == 1) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first));
    bytes = _mm512_castsi256_si512(
        _mm256_inserti128_si256(_mm256_castsi128_si256(a), *reinterpret_cast<const __m128i_u*>(second), 1));
    const __m512i to_lanes = _mm512_setr_epi32(0, 1, 0, 0, 1, 2, 0, 0, 4, 5, 0, 0, 5, 6, 0, 0);
    bytes = _mm512_permutexvar_epi32(to_lanes, bytes);
  } else {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first));
    bytes = _mm512_inserti64x4(_mm512_castsi256_si512(a), *reinterpret_cast<const __m256i_u*>(second), 1);
    const __m512i to_lanes = _mm512_setr_epi32(0, 1, 2, 0, 2, 3, 4, 0, 8, 9, 10, 0, 10, 11, 12, 0);
    bytes = _mm512_permutexvar_epi32(to_lanes, bytes);
  }
  return Sums(_mm512_shuffle_epi8(bytes, to_words));
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

// Makes bytes of four vectors of rounded sums: adds the zero point, and clamps.
static INLINE __m512i clamp_bytes(const Int8Block& c, const __m512i* part) {
  const __m512i zero = _mm512_set1_epi16(short(c.epilogue.output_zero));
  const __m512i low = _mm512_set1_epi8(char(c.epilogue.low)), high = _mm512_set1_epi8(char(c.epilogue.high));
  const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i first = _mm512_adds_epi16(_mm512_packs_epi32(part[0], part[1]), zero);
  const __m512i second = _mm512_adds_epi16(_mm512_packs_epi32(part[2], part[3]), zero);
  const __m512i bytes = _mm512_permutexvar_epi32(in_order, _mm512_packus_epi16(first, second));
  return _mm512_min_epu8(_mm512_max_epu8(bytes, low), high);
}

template <int V>
static INLINE void write_row(const Int8Block& c, int64_t output, const Sums* sum) {
  uint8_t* to = c.output + output * c.stride;
  const uint8_t* residual = c.epilogue.residual ? c.epilogue.residual + output * c.stride : nullptr;
  const __m512 multiplier = _mm512_set1_ps(c.multipliers[output]);
  UNROLL for (int v = 0; v < V; v += 4) {
    __m512i part[4];
    UNROLL for (int i = 0; i < 4; i++) {
      if (v + i < V)
        part[i] = round_sums(c, sum[v + i], multiplier, residual ? residual + 16 * (v + i) : nullptr,
                             int(least(16, c.positions - 16 * (v + i))));
      else
        part[i] = _mm512_setzero_si512();
    }
    const __m512i bytes = clamp_bytes(c, part);
    if (v + 4 < V)
      _mm512_storeu_si512(to + 16 * v, bytes);
    else
      _mm512_mask_storeu_epi8(to + 16 * v, _cvtu64_mask64(_bzhi_u64(~0ull, c.positions - 16 * v)), bytes);
  }
}

// Writes vectors that begin in consecutive rows of the output; only the first `rows` of them.
template <int V>
static INLINE void write_rows(const Int8Block& c, int rows, const Sums* sum) {
  static_assert(V == 4, "one lane each");
  const __m512 multiplier = _mm512_set1_ps(c.multipliers[0]);
  __m512i part[V];
  UNROLL for (int v = 0; v < V; v++) {
    const bool has_residual = c.epilogue.residual && v < rows;
    part[v] = round_sums(c, sum[v], multiplier, has_residual ? c.epilogue.residual + v * c.stride : nullptr, c.positions);
  }
  const __m512i bytes = clamp_bytes(c, part);
  const __mmask16 used = _cvtu32_mask16(_bzhi_u32(0xffff, c.positions));
  _mm_mask_storeu_epi8(c.output, used, _mm512_castsi512_si128(bytes));
  if (rows > 1) _mm_mask_storeu_epi8(c.output + c.stride, used, _mm512_extracti32x4_epi32(bytes, 1));
  if (rows > 2) _mm_mask_storeu_epi8(c.output + 2 * c.stride, used, _mm512_extracti32x4_epi32(bytes, 2));
  if (rows > 3) _mm_mask_storeu_epi8(c.output + 3 * c.stride, used, _mm512_extracti32x4_epi32(bytes, 3));
}

// Writes the lower halves of four vectors to rows 0 to 3 of the output, and the upper halves to rows 4 to 7.
static INLINE void write_halves(const Int8Block& c, int rows, const Sums* sum) {
  const __m512 multiplier = _mm512_set1_ps(c.multipliers[0]);
  const uint8_t* residual = c.epilogue.residual;
  __m512i part[4];
  UNROLL for (int v = 0; v < 4; v++) {
    uint8_t added[16] = {};
    if (residual && v < rows) __builtin_memcpy(added, residual + v * c.stride, size_t(c.positions));
    if (residual && v + 4 < rows) __builtin_memcpy(added + 8, residual + (v + 4) * c.stride, size_t(c.positions));
    part[v] = round_sums(c, sum[v], multiplier, residual ? added : nullptr, 16);
  }
  alignas(64) uint8_t bytes[64];
  _mm512_store_si512(bytes, clamp_bytes(c, part));
  const __mmask16 used = _cvtu32_mask16(_bzhi_u32(0xff, c.positions));
  for (int row = 0; row < rows; row++) {
    const uint8_t* from = bytes + row % 4 * 16 + row / 4 * 8;
    _mm_mask_storeu_epi8(c.output + row * c.stride, used, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  }
}

#include "kernel_int8.inc"
}  // namespace avx512_vnni
}  // namespace nestify
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
