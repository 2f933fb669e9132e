// The packed form of a sparse layer: one block of bytes that an ONNX initializer can hold.
//
// The weight of a layer is a matrix per group: `outputs` rows by `inputs * kernel_h * kernel_w` columns, which
// this code calls the reduction. The reduction is cut into blocks so that the activations of one block stay in
// the first-level cache. Inside a block, rows are sorted by their number of weights.
//
// Bytes, little-endian, without gaps:
//   header   64 bytes, struct PackedHeader
//   starts   int32   [groups * blocks * outputs + 1]   first weight of each row of each block
//   values   float32 [weights]                          in format 1
//   bias     float32 [groups * outputs]
//   halves   float16 [weights]                          in format 2, in place of the values; all are finite
//   columns  uint16  [weights]                          column inside the block
//   order    uint16  [groups * blocks * outputs]        output that a row computes
//
// An int8 layer (format 3) multiplies quads: four input channels of one tap. Its header counts quads as inputs and
// weights, and has the number of channels of a group as `channels`. Its values are quads of int8, its bias is int32,
// and multipliers, float32 [groups * outputs], follow the bias: a sum times its multiplier is in units of the output.
//
// A depthwise int8 layer (format 4) has one input and one output in each group, and keeps all weights. A quad holds four
// neighbours of a row of a kernel, so that a row has (kernel_w + 3) / 4 of them; the header counts these as weights, and
// its blocks have no rows. After it come the quads [groups][kernel_h][quads of a row], the bias and the multipliers.
#pragma once
#include <cstdint>
#include <memory>
#include <string>

namespace nestify {

constexpr uint32_t kMagic = 0x4b50534e;  // "NSPK"
enum Format : uint32_t { kFloat32 = 1, kFloat16 = 2, kInt8 = 3, kDepthwiseInt8 = 4 };  // by the type of the weights
constexpr int64_t kMostOutputs = 65536;    // of one group: an output is stored as uint16
constexpr int64_t kMostBlockRows = 65536;  // likewise a column inside its block
constexpr float kLargestMultiplier = 0.5f, kLargestScale = 1e6f;  // int8 results stay in the range of int32
constexpr int64_t kMostSide = 32767;       // of kernels, strides, paddings and dilations

struct PackedHeader {
  uint32_t magic, format;
  uint32_t outputs, inputs, groups;  // channels per group
  uint32_t kernel_h, kernel_w;
  uint32_t block_rows;  // columns of one block; a multiple of kernel_h * kernel_w
  uint64_t weights;
  uint32_t channels;  // of an int8 layer; 0 of others
  uint32_t reserved[5];
};
static_assert(sizeof(PackedHeader) == 64, "the header has a fixed size");

// Shape of a layer's weight; outputs and inputs are channels per group.
struct Geometry {
  int64_t outputs = 0, inputs = 0, groups = 1, kernel_h = 1, kernel_w = 1;
  int64_t taps() const { return kernel_h * kernel_w; }
  int64_t row_quads() const { return (kernel_w + 3) / 4; }  // of a depthwise int8 layer
  int64_t reduction() const { return inputs * taps(); }
};

// A checked layer. It points into bytes that it does not own, except for float16 weights: converting them once
// costs memory, and converting them in the kernels took 3 to 5 % of their time.
struct PackedLayer {
  Geometry shape;
  int64_t block_rows = 0, blocks = 0;
  const int32_t* starts = nullptr;
  const float* values = nullptr;
  const float* bias = nullptr;
  bool is_depthwise = false;  // a depthwise int8 layer has neither starts nor columns nor order
  int64_t channels = 0;  // of a group of an int8 layer, which has what follows in place of values and bias
  const int32_t* quads = nullptr;
  const int32_t* sums = nullptr;
  const float* multipliers = nullptr;
  const uint16_t* columns = nullptr;
  const uint16_t* order = nullptr;
  std::unique_ptr<float[]> converted;

  bool is_linear() const { return shape.groups == 1 && shape.taps() == 1 && !is_depthwise; }
};

// Weights as rows of (column, value) pairs: one row per output of all groups.
struct SparseRows {
  const int64_t* starts;   // [groups * outputs + 1]
  const int32_t* columns;  // ascending in a row, below the reduction
  const void* values;      // float32, float16, or quads of int8, as the format says
  const void* bias;        // [groups * outputs] float32, or int32 for an int8 layer; null for zeros
  Format format;
  const float* multipliers = nullptr;  // [groups * outputs] of an int8 layer; null for others
  int64_t channels = 0;                // of a group of an int8 layer; 0 for others
};

// Each of these returns an empty string, or what is wrong.

// Checks every number of a packed layer that a kernel reads with, and describes the layer.
std::string open_packed(const void* bytes, uint64_t size, PackedLayer& layer);

// Computes how many bytes a layer has when it is packed, and the rows of its blocks (0: chosen by density).
std::string packed_size(const Geometry& shape, const SparseRows& rows, int64_t& block_rows, uint64_t& size);

// Packs a layer into `size` bytes, as returned by packed_size for the same arguments.
std::string pack(const Geometry& shape, const SparseRows& rows, int64_t block_rows, void* bytes, uint64_t size);

// Computes how many bytes a depthwise int8 layer has when it is packed.
std::string packed_depthwise_size(const Geometry& shape, uint64_t& size);

// Packs weights [groups][kernel_h][kernel_w] into `size` bytes.
std::string pack_depthwise(const Geometry& shape, const int8_t* weights, const int32_t* bias, const float* multipliers,
                           void* bytes, uint64_t size);

}  // namespace nestify
