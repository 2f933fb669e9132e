// The int8 kernel for any processor.
#include "kernel.h"
#define LANES 4
namespace nestify {
namespace generic_int8 {
#include "panels.inc"

typedef uint32_t Sums __attribute__((vector_size(16), may_alias));
typedef int32_t Signed __attribute__((vector_size(16), may_alias));
constexpr uint32_t kFlip = 0;

static INLINE Sums broadcast(int32_t x) { return Sums{} + uint32_t(x); }

static INLINE Sums dot(Sums sum, Sums words, Sums weight) {
  UNROLL for (int i = 0; i < 4; i++)
    sum += ((words >> (8 * i)) & 255u) * Sums(Signed(weight << (24 - 8 * i)) >> 24);
  return sum;
}

#include "kernel_int8_plain.inc"

#include "kernel_int8.inc"
}  // namespace generic_int8
}  // namespace nestify
