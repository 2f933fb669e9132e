// The C interface: packing, checking, and calling a layer without ONNX Runtime.
//
// Functions that return `const char*` return null, or one sentence that says what is wrong; the text is valid
// until the thread's next call.
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define NESTIFY_EXPORT extern "C" __declspec(dllexport)
#else
#define NESTIFY_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Number that changes with the interface or the packed format.
NESTIFY_EXPORT int32_t nestify_engine_interface();

// Name of the instruction set that is used.
NESTIFY_EXPORT const char* nestify_engine_isa(const char** name);

// Bytes of a layer when it is packed.
//   shape: outputs and inputs per group, groups, kernel height and width
//   starts, columns, values: rows of weights, one per output of all groups; columns ascend in a row
//   block_rows: columns of one block; 0 to choose it by density
//   value_bits: 32 for float32 values, 16 for float16
NESTIFY_EXPORT const char* nestify_packed_size(const int64_t shape[5], const int64_t* starts, const int32_t* columns,
                                               int32_t value_bits, int64_t* block_rows, int64_t* size);

// Packs a layer into `size` bytes. bias: one number per output of all groups, or null.
NESTIFY_EXPORT const char* nestify_pack(const int64_t shape[5], const int64_t* starts, const int32_t* columns,
                                        const void* values, int32_t value_bits, const float* bias,
                                        int64_t block_rows, void* bytes, int64_t size);

// The same for an int8 layer: columns are quads of inputs in the flattened (quads, kernel height, kernel width), and
// values four int8 each. A sum times its output's multiplier is in units of the output; bias: in units of the sums.
NESTIFY_EXPORT const char* nestify_packed_int8_size(const int64_t shape[5], const int64_t* starts,
                                                    const int32_t* columns, int64_t* block_rows, int64_t* size);
NESTIFY_EXPORT const char* nestify_pack_int8(const int64_t shape[5], const int64_t* starts, const int32_t* columns,
                                             const int8_t* quads, const int32_t* bias, const float* multipliers,
                                             int64_t block_rows, void* bytes, int64_t size);

// The same for a depthwise int8 layer: shape has one output and one input, and weights are [groups][height][width].
NESTIFY_EXPORT const char* nestify_packed_depthwise_size(const int64_t shape[5], int64_t* size);
NESTIFY_EXPORT const char* nestify_pack_depthwise(const int64_t shape[5], const int8_t* weights, const int32_t* bias,
                                                  const float* multipliers, void* bytes, int64_t size);

// Checks a packed layer, which may come from anywhere.
NESTIFY_EXPORT const char* nestify_check_packed(const void* bytes, int64_t size);

// Runs a packed layer as a convolution, on one thread.
//   input: float32 (batch, groups * inputs, height, width)
//   output: float32 (batch, groups * outputs, out_height, out_width), of `output_floats` numbers
//   geometry: stride_h, stride_w, pad_top, pad_left, pad_bottom, pad_right, dilation_h, dilation_w
//   residual: of the output's shape, or null; added before the result is clamped to [low, high]
NESTIFY_EXPORT const char* nestify_conv(const void* bytes, int64_t size, const float* input, int64_t batch,
                                        int64_t height, int64_t width, const int64_t geometry[8],
                                        const float* residual, float low, float high, float* output,
                                        int64_t output_floats);

// Runs a packed layer as a linear layer, on one thread: (tokens, inputs) to (tokens, outputs).
NESTIFY_EXPORT const char* nestify_linear(const void* bytes, int64_t size, const float* input, int64_t tokens,
                                          const float* residual, float low, float high, float* output);

// Runs a packed int8 layer as a convolution, on one thread.
//   input, output, residual: uint8, as for nestify_conv
//   limits: zero points of input and output, lowest and highest output, zero point of the residual
//   residual_scale: scale of the residual over that of the output
NESTIFY_EXPORT const char* nestify_conv_int8(const void* bytes, int64_t size, const uint8_t* input, int64_t batch,
                                             int64_t height, int64_t width, const int64_t geometry[8],
                                             const int32_t limits[5], const uint8_t* residual, float residual_scale,
                                             uint8_t* output, int64_t output_bytes);

// Runs a packed int8 layer as a linear layer, on one thread: uint8 (tokens, inputs) to (tokens, outputs).
//   limits: zero points of input and output, lowest and highest output
NESTIFY_EXPORT const char* nestify_linear_int8(const void* bytes, int64_t size, const uint8_t* input, int64_t tokens,
                                               const int32_t limits[4], uint8_t* output);
