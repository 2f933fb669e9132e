#include "kernel.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define LANES 8
namespace nestify {
namespace avx2 {
#include "kernel.inc"
}
}  // namespace nestify
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
