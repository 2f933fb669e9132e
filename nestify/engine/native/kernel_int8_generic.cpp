// The int8 kernel for any processor.
#include "kernel.h"
#define LANES 4
namespace nestify {
namespace generic_int8 {
#include "panels.inc"

typedef int32_t Sums __attribute__((vector_size(16), may_alias));

static INLINE Sums broadcast(int32_t x) { return Sums{x, x, x, x}; }

static INLINE Sums dot(Sums sum, const uint32_t* positions, Sums weight) {
  typedef uint32_t Words4 __attribute__((vector_size(16), may_alias));
  const Words4 words = *reinterpret_cast<const Words4*>(positions);
  UNROLL for (int i = 0; i < 4; i++) {
    const Sums bytes = Sums((words >> (8 * i)) & 255u), signs = Sums(Words4(weight) << (24 - 8 * i)) >> 24;
    sum += bytes * signs;
  }
  return sum;
}

// Makes words of four rows of bytes, of every step-th position.
static INLINE void interleave(const uint8_t* const* rows, int64_t count, int64_t step, uint32_t* to) {
  for (int64_t x = 0; x < count; x++)
    to[x] = uint32_t(rows[0][x * step]) | uint32_t(rows[1][x * step]) << 8 | uint32_t(rows[2][x * step]) << 16 |
            uint32_t(rows[3][x * step]) << 24;
}

template <int V>
static INLINE void write_row(const Int8Block& c, int64_t output, const Sums* sum) {
  const Int8Epilogue& e = c.epilogue;
  const float multiplier = c.multipliers[output];
  for (int i = 0; i < c.positions; i++) {
    float scaled = float(sum[i / kLanes][i % kLanes]);
    // One rounding, as with a multiply-add instruction, so that all variants return the same bytes.
    if (e.residual)
      scaled = __builtin_fmaf(scaled, multiplier,
                              float(int32_t(e.residual[output * c.stride + i]) - e.residual_zero) * e.residual_scale);
    else
      scaled *= multiplier;
    // The limits of multipliers and scales keep it in the range of int32.
    int32_t y = int32_t(__builtin_rintf(scaled)) + e.output_zero;
    y = y < e.low ? e.low : y;
    c.output[output * c.stride + i] = uint8_t(y > e.high ? e.high : y);
  }
}

#include "kernel_int8.inc"
}  // namespace generic_int8
}  // namespace nestify
