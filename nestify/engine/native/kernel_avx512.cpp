#include "kernel.h"
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")
#endif
#define LANES 16
namespace nestify {
namespace avx512 {
#include "kernel.inc"
}
}  // namespace nestify
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
