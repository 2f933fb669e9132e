// What a kernel is given, and the variants of the kernels that this library holds.
#pragma once
#include <cstddef>
#include <cstdint>

#include "packed.h"

namespace nestify {

// Runs `task(state, i)` for i in [0, count), on several threads if `run` is not null.
struct Parallel {
  int64_t threads = 1;
  void* context = nullptr;
  void (*run)(void* context, size_t count, void (*task)(void*, size_t), void* state) = nullptr;
};

// What follows the product: an optional residual of the output's shape is added, then values are clamped.
struct Epilogue {
  const float* residual = nullptr;
  float low = -__builtin_inff(), high = __builtin_inff();
};

struct ConvGeometry {
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_top = 0, pad_left = 0, pad_bottom = 0, pad_right = 0;
  int64_t dilation_h = 1, dilation_w = 1;
};

// A convolution of (batch, groups * inputs, height, width) to (batch, groups * outputs, out_h, out_w).
struct ConvSizes {
  const PackedLayer* layer;
  ConvGeometry geometry;
  int64_t batch, height, width, out_h, out_w;
  Parallel parallel;
};

struct ConvCall : ConvSizes {
  const float* input;
  float* output;
  Epilogue epilogue;
};

// What follows an int8 product: scaling to the output's units, an optional residual of the output's shape, rounding,
// and clamping to [low, high], which holds bytes.
struct Int8Epilogue {
  int32_t input_zero = 0, output_zero = 0;  // zero points
  int32_t low = 0, high = 255;
  const uint8_t* residual = nullptr;
  int32_t residual_zero = 0;
  float residual_scale = 1;  // of the residual over that of the output
};

struct Int8Call : ConvSizes {
  const uint8_t* input;
  uint8_t* output;
  Int8Epilogue epilogue;
};

// One block of one group's rows against one panel of an int8 layer; see BlockCall in kernel.inc.
struct Int8Block {
  const PackedLayer* layer;
  int64_t row;
  const int32_t* bias;
  const float* multipliers;
  const uint32_t* panel;
  int32_t* sums;
  bool first, writes;
  uint8_t* output;
  int64_t stride;
  int positions;
  Int8Epilogue epilogue;  // its residual starts at the panel's position in the first output
};

// input (tokens, inputs) to output (tokens, outputs)
struct LinearCall {
  const PackedLayer* layer;
  const float* input;
  float* output;
  int64_t tokens;
  Epilogue epilogue;
  Parallel parallel;
};

// input (tokens, channels) to output (tokens, outputs); its epilogue has no residual
struct Int8LinearCall {
  const PackedLayer* layer;
  const uint8_t* input;
  uint8_t* output;
  int64_t tokens;
  Int8Epilogue epilogue;
  Parallel parallel;
};

// Returns an empty string, or why a geometry is refused.
std::string check_geometry(const ConvGeometry& geometry);

// Returns an empty string, or why an epilogue is refused.
std::string check_epilogue(const Int8Epilogue& epilogue);

// Computes the size of a convolution's output; returns an empty string, or why there is none.
std::string output_size(const Geometry& shape, const ConvGeometry& geometry, int64_t height, int64_t width,
                        int64_t& out_h, int64_t& out_w);

// Return false if there is no memory for their buffers. They use the variant that `variant` chooses.
bool run_conv(const ConvCall& call);
bool run_linear(const LinearCall& call);
bool run_conv_int8(const Int8Call& call);
bool run_linear_int8(const Int8LinearCall& call);

// A kernel for one instruction set.
struct Variant {
  const char* name;
  bool (*conv)(const ConvCall&);
  bool (*linear)(const LinearCall&);
  bool (*conv_int8)(const Int8Call&);
  bool (*linear_int8)(const Int8LinearCall&);
};

// Returns the fastest variant of this processor, or the one that NESTIFY_ENGINE_ISA names; null if that one
// does not exist here, with the reason in `problem`.
const Variant* variant(std::string& problem);

// Memory of this thread that is kept between calls, 64-byte aligned and zeroed when it is new; null if there
// is none. Each slot is one buffer.
enum Slot { kPanel, kSums, kStaged, kSlots };
float* scratch(Slot slot, int64_t floats);

namespace avx512 {
bool conv(const ConvCall& call);
bool linear(const LinearCall& call);
}  // namespace avx512
namespace avx2 {
bool conv(const ConvCall& call);
bool linear(const LinearCall& call);
}  // namespace avx2
namespace generic {
bool conv(const ConvCall& call);
bool linear(const LinearCall& call);
}  // namespace generic
namespace avx512_vnni {
bool conv_int8(const Int8Call& call);
bool linear_int8(const Int8LinearCall& call);
}  // namespace avx512_vnni
namespace avx2_int8 {
bool conv_int8(const Int8Call& call);
bool linear_int8(const Int8LinearCall& call);
}  // namespace avx2_int8
namespace neon_dot {
bool conv_int8(const Int8Call& call);
bool linear_int8(const Int8LinearCall& call);
}  // namespace neon_dot
namespace generic_int8 {
bool conv_int8(const Int8Call& call);
bool linear_int8(const Int8LinearCall& call);
}  // namespace generic_int8

}  // namespace nestify
