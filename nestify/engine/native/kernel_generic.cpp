// Four lanes: NEON on 64-bit ARM, SSE2 on x86-64, and what the compiler makes of it elsewhere.
#include "kernel.h"
#define LANES 4
namespace nestify {
namespace generic {
#include "kernel.inc"
}
}  // namespace nestify
