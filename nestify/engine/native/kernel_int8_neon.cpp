// The int8 kernel for 64-bit ARM with the dot product of int8 (sdot).
#include "kernel.h"
#if defined(__aarch64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include <arm_neon.h>
#define LANES 4
namespace nestify {
namespace neon_dot {
#include "panels.inc"

typedef uint32_t Sums __attribute__((vector_size(16), may_alias));
constexpr uint32_t kFlip = 0x80808080u;

static INLINE Sums broadcast(int32_t x) { return Sums{} + uint32_t(x); }

static INLINE Sums dot(Sums sum, Sums words, Sums weight) {
  return Sums(vdotq_s32(int32x4_t(sum), int8x16_t(words), int8x16_t(weight)));
}

#include "kernel_int8_plain.inc"

#include "kernel_int8.inc"
}  // namespace neon_dot
}  // namespace nestify
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
