#include "packed.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

namespace nestify {
namespace {

constexpr uint64_t kMostWeights = INT32_MAX;

// Offsets of the arrays of a packed layer.
struct Layout {
  uint64_t starts, values, bias, multipliers, columns, order, end;  // the values are before or after the bias
};

std::string check_shape(const Geometry& g) {
  if (g.outputs < 1 || g.outputs > kMostOutputs) return "the number of outputs is out of range";
  if (g.groups < 1 || g.groups > kMostOutputs) return "the number of groups is out of range";
  if (g.kernel_h < 1 || g.kernel_h > kMostSide || g.kernel_w < 1 || g.kernel_w > kMostSide)
    return "the kernel's size is out of range";
  if (g.taps() > kMostBlockRows) return "the kernel is too large";
  if (g.inputs < 1 || g.inputs > INT32_MAX / g.taps()) return "the number of inputs is out of range";
  return "";
}

// Number of blocks of one group.
int64_t block_count(const Geometry& g, int64_t block_rows) { return (g.reduction() + block_rows - 1) / block_rows; }

// Adds count * size to an offset; returns false if the result does not fit.
bool advance(uint64_t& offset, uint64_t count, uint64_t size) {
  uint64_t bytes;
  return !__builtin_mul_overflow(count, size, &bytes) && !__builtin_add_overflow(offset, bytes, &offset);
}

bool make_layout(const Geometry& g, int64_t block_rows, uint64_t weights, uint32_t format, Layout& layout) {
  const uint64_t outputs = static_cast<uint64_t>(g.groups * g.outputs);
  uint64_t rows;
  if (__builtin_mul_overflow(outputs, static_cast<uint64_t>(block_count(g, block_rows)), &rows)) return false;
  uint64_t offset = layout.starts = sizeof(PackedHeader);
  if (!advance(offset, rows + 1, sizeof(int32_t))) return false;
  layout.values = offset;
  if (format != kFloat16 && !advance(offset, weights, sizeof(float))) return false;
  layout.bias = offset;
  if (!advance(offset, outputs, sizeof(float))) return false;
  if (format == kFloat16) {
    layout.values = offset;
    if (!advance(offset, weights, sizeof(uint16_t))) return false;
  }
  layout.multipliers = offset;
  if (format == kInt8 && !advance(offset, outputs, sizeof(float))) return false;
  layout.columns = offset;
  if (!advance(offset, weights, sizeof(uint16_t))) return false;
  layout.order = offset;
  if (!advance(offset, rows, sizeof(uint16_t))) return false;
  layout.end = offset;
  return true;
}

// Offsets of the arrays of a depthwise layer; false if they are too large.
bool make_depthwise_layout(const Geometry& g, Layout& layout) {
  const uint64_t channels = uint64_t(g.groups), quads = uint64_t(g.groups * g.kernel_h * g.row_quads());
  uint64_t offset = layout.values = sizeof(PackedHeader);
  if (quads > kMostWeights || !advance(offset, quads, sizeof(int32_t))) return false;
  layout.bias = offset;
  if (!advance(offset, channels, sizeof(int32_t))) return false;
  layout.multipliers = offset;
  if (!advance(offset, channels, sizeof(float))) return false;
  layout.end = offset;
  return true;
}

template <class T>
const T* at(const void* bytes, uint64_t offset) {
  return reinterpret_cast<const T*>(static_cast<const char*>(bytes) + offset);
}

// Converts float16 numbers; returns false if one is not finite. Integers are used, because a thread may be set to
// take subnormal numbers for 0.
bool from_halves(const uint16_t* from, uint64_t count, float* to) {
  bool is_finite = true;
  for (uint64_t i = 0; i < count; i++) {
    const int32_t magnitude = from[i] & 0x7fff;
    const int32_t normal = (magnitude << 13) + ((127 - 15) << 23);
    const float subnormal = float(magnitude) * 0x1p-24f;
    int32_t bits;
    std::memcpy(&bits, &subnormal, sizeof bits);
    if (magnitude >= 0x400) bits = normal;
    bits = int32_t(uint32_t(bits) | uint32_t(from[i] & 0x8000) << 16);
    std::memcpy(to + i, &bits, sizeof bits);
    is_finite &= magnitude < 0x7c00;
  }
  return is_finite;
}

// Blocks of the sizes below were the fastest of those that were tried at these densities.
int64_t choose_block_rows(const Geometry& g, int64_t weights) {
  const double density = double(weights) / (double(g.groups * g.outputs) * double(g.reduction()));
  const int64_t wanted = density > 0.15 ? 96 : density > 0.07 ? 128 : density > 0.03 ? 192 : 288;
  const int64_t channels = std::max<int64_t>(1, wanted / g.taps());
  const int64_t blocks = (g.inputs + channels - 1) / channels;
  return (g.inputs + blocks - 1) / blocks * g.taps();  // blocks of about equal size
}

std::string check_multipliers(const float* multipliers, int64_t count) {
  for (int64_t o = 0; o < count; o++)
    if (!(multipliers[o] >= 0 && multipliers[o] <= kLargestMultiplier)) return "a multiplier is out of range";
  return "";
}

std::string open_depthwise(const void* bytes, uint64_t size, const PackedHeader& header, const Geometry& g,
                           PackedLayer& layer) {
  if (g.outputs != 1 || g.inputs != 1 || header.channels != 1)
    return "a depthwise layer does not have one of its channels in each group";
  Layout layout;
  if (header.block_rows || header.weights != uint64_t(g.groups * g.kernel_h * g.row_quads()))
    return "its number of weights is not that of its kernels";
  if (!make_depthwise_layout(g, layout) || layout.end != size) return "its size is not what its header says";
  layer.shape = g;
  layer.is_depthwise = true;
  layer.channels = 1;
  layer.quads = at<int32_t>(bytes, layout.values);
  layer.sums = at<int32_t>(bytes, layout.bias);
  layer.multipliers = at<float>(bytes, layout.multipliers);
  return check_multipliers(layer.multipliers, g.groups);
}

std::string check_rows(const Geometry& g, const SparseRows& rows) {
  const int64_t outputs = g.groups * g.outputs;
  if (rows.starts[0] != 0) return "the first row does not start at 0";
  for (int64_t o = 0; o < outputs; o++)
    if (rows.starts[o + 1] < rows.starts[o]) return "the rows' starts descend";
  if (uint64_t(rows.starts[outputs]) > kMostWeights) return "the layer has too many weights";
  for (int64_t o = 0; o < outputs; o++) {
    int64_t previous = -1;
    for (int64_t i = rows.starts[o]; i < rows.starts[o + 1]; i++) {
      if (rows.columns[i] <= previous || rows.columns[i] >= g.reduction())
        return "the columns of a row do not ascend, or exceed its length";
      previous = rows.columns[i];
    }
  }
  return "";
}

}  // namespace

std::string open_packed(const void* bytes, uint64_t size, PackedLayer& layer) {
  PackedHeader header;
  if (size < sizeof header) return "it is shorter than its header";
  if (reinterpret_cast<uintptr_t>(bytes) % alignof(float)) return "it is not aligned";
  std::memcpy(&header, bytes, sizeof header);
  if (header.magic != kMagic) return "it is not a packed layer of this byte order";
  if (header.format < kFloat32 || header.format > kDepthwiseInt8)
    return "it has format " + std::to_string(header.format) + ", not 1, 2, 3 or 4";
  const bool is_int8 = header.format == kInt8;
  for (uint32_t word : header.reserved)
    if (word) return "a reserved word of its header is not 0";
  Geometry g{header.outputs, header.inputs, header.groups, header.kernel_h, header.kernel_w};
  if (std::string problem = check_shape(g); !problem.empty()) return problem;
  if (header.format == kDepthwiseInt8) {
    PackedLayer found;
    std::string problem = open_depthwise(bytes, size, header, g, found);
    if (problem.empty()) layer = std::move(found);
    return problem;
  }
  if (is_int8 ? (header.channels + uint64_t(3)) / 4 != header.inputs : header.channels != 0)
    return "its number of channels is not that of its quads";
  const int64_t block_rows = header.block_rows;
  if (block_rows < 1 || block_rows > kMostBlockRows || block_rows % g.taps()) return "its blocks have no valid size";
  if (header.weights > kMostWeights) return "it has too many weights";
  Layout layout;
  if (!make_layout(g, block_rows, header.weights, header.format, layout) || layout.end != size)
    return "its size is not what its header says";
  PackedLayer found;
  found.shape = g;
  found.block_rows = block_rows;
  found.blocks = block_count(g, block_rows);
  found.starts = at<int32_t>(bytes, layout.starts);
  if (is_int8) {
    found.channels = header.channels;
    found.quads = at<int32_t>(bytes, layout.values);
    found.sums = at<int32_t>(bytes, layout.bias);
    found.multipliers = at<float>(bytes, layout.multipliers);
    if (std::string problem = check_multipliers(found.multipliers, g.groups * g.outputs); !problem.empty())
      return problem;
  } else if (header.format == kFloat16) {
    found.converted.reset(new float[header.weights]);
    if (!from_halves(at<uint16_t>(bytes, layout.values), header.weights, found.converted.get()))
      return "a float16 weight is not finite";
    found.values = found.converted.get();
    found.bias = at<float>(bytes, layout.bias);
  } else {
    found.values = at<float>(bytes, layout.values);
    found.bias = at<float>(bytes, layout.bias);
  }
  found.columns = at<uint16_t>(bytes, layout.columns);
  found.order = at<uint16_t>(bytes, layout.order);

  // Each block must compute each output once, from columns that it has.
  const int32_t* start = found.starts;
  if (*start != 0) return "its first row does not start at 0";
  std::vector<int64_t> computed_in(g.outputs, -1);
  for (int64_t block = 0; block < g.groups * found.blocks; block++) {
    const int64_t first = block % found.blocks * block_rows;
    const int64_t length = std::min(block_rows, g.reduction() - first);
    for (int64_t r = 0; r < g.outputs; r++, start++) {
      const uint16_t output = found.order[block * g.outputs + r];
      if (output >= g.outputs || computed_in[output] == block) return "a block does not compute each output once";
      computed_in[output] = block;
      if (start[1] < start[0] || uint64_t(start[1]) > header.weights) return "its rows' starts are not in order";
      for (int64_t i = start[0]; i < start[1]; i++)
        if (found.columns[i] >= length) return "a column exceeds its block";
    }
  }
  if (uint64_t(*start) != header.weights) return "its rows do not hold all of its weights";
  layer = std::move(found);
  return "";
}

std::string packed_size(const Geometry& g, const SparseRows& rows, int64_t& block_rows, uint64_t& size) {
  if (std::string problem = check_shape(g); !problem.empty()) return problem;
  if (std::string problem = check_rows(g, rows); !problem.empty()) return problem;
  const int64_t weights = rows.starts[g.groups * g.outputs];
  if (block_rows == 0) block_rows = choose_block_rows(g, weights);
  if (block_rows < 1 || block_rows > kMostBlockRows || block_rows % g.taps())
    return "the rows of a block are not a multiple of the kernel's size";
  Layout layout;
  if (!make_layout(g, block_rows, weights, rows.format, layout)) return "the layer is too large";
  size = layout.end;
  return "";
}

std::string pack(const Geometry& g, const SparseRows& rows, int64_t block_rows, void* bytes, uint64_t size) {
  uint64_t due = 0;
  if (std::string problem = packed_size(g, rows, block_rows, due); !problem.empty()) return problem;
  if (due != size) return "the buffer does not have the layer's size";
  const int64_t outputs = g.groups * g.outputs, weights = rows.starts[outputs];
  Layout layout;
  make_layout(g, block_rows, weights, rows.format, layout);
  PackedHeader header{};
  header.magic = kMagic;
  header.format = rows.format;
  header.channels = uint32_t(rows.channels);
  header.outputs = uint32_t(g.outputs);
  header.inputs = uint32_t(g.inputs);
  header.groups = uint32_t(g.groups);
  header.kernel_h = uint32_t(g.kernel_h);
  header.kernel_w = uint32_t(g.kernel_w);
  header.block_rows = uint32_t(block_rows);
  header.weights = uint64_t(weights);
  std::memcpy(bytes, &header, sizeof header);
  auto* starts = const_cast<int32_t*>(at<int32_t>(bytes, layout.starts));
  const size_t value_size = rows.format == kFloat16 ? sizeof(uint16_t) : sizeof(uint32_t);
  auto* values = const_cast<char*>(at<char>(bytes, layout.values));
  auto* bias = const_cast<char*>(at<char>(bytes, layout.bias));
  auto* columns = const_cast<uint16_t*>(at<uint16_t>(bytes, layout.columns));
  auto* order = const_cast<uint16_t*>(at<uint16_t>(bytes, layout.order));
  if (rows.bias)
    std::memcpy(bias, rows.bias, size_t(outputs) * 4);
  else
    std::memset(bias, 0, size_t(outputs) * 4);
  if (rows.channels)
    std::memcpy(static_cast<char*>(bytes) + layout.multipliers, rows.multipliers, size_t(outputs) * sizeof(float));

  std::vector<int64_t> next(rows.starts, rows.starts + outputs);  // first weight that is not packed yet
  std::vector<int64_t> count(g.outputs);
  std::vector<uint16_t> sorted(g.outputs);
  int64_t packed = 0;
  for (int64_t group = 0; group < g.groups; group++) {
    for (int64_t block = 0; block < block_count(g, block_rows); block++) {
      const int64_t first = block * block_rows, end = first + block_rows;
      for (int64_t o = 0; o < g.outputs; o++) {
        const int64_t row = group * g.outputs + o;
        int64_t i = next[row];
        while (i < rows.starts[row + 1] && rows.columns[i] < end) i++;
        count[o] = i - next[row];
      }
      // Rows of equal length follow each other, so that the processor predicts where their loops end.
      std::iota(sorted.begin(), sorted.end(), uint16_t(0));
      std::stable_sort(sorted.begin(), sorted.end(), [&](uint16_t a, uint16_t b) { return count[a] < count[b]; });
      for (uint16_t o : sorted) {
        *order++ = o;
        *starts++ = int32_t(packed);
        int64_t& i = next[group * g.outputs + o];
        for (int64_t end_of_row = i + count[o]; i < end_of_row; i++, packed++) {
          std::memcpy(values + packed * value_size, static_cast<const char*>(rows.values) + i * value_size, value_size);
          columns[packed] = uint16_t(rows.columns[i] - first);
        }
      }
    }
  }
  *starts = int32_t(packed);
  return "";
}

std::string packed_depthwise_size(const Geometry& g, uint64_t& size) {
  if (std::string problem = check_shape(g); !problem.empty()) return problem;
  if (g.outputs != 1 || g.inputs != 1) return "the layer is not depthwise";
  Layout layout;
  if (!make_depthwise_layout(g, layout)) return "the layer is too large";
  size = layout.end;
  return "";
}

std::string pack_depthwise(const Geometry& g, const int8_t* weights, const int32_t* bias, const float* multipliers,
                           void* bytes, uint64_t size) {
  uint64_t due = 0;
  if (std::string problem = packed_depthwise_size(g, due); !problem.empty()) return problem;
  if (due != size) return "the buffer does not have the layer's size";
  Layout layout{};
  make_depthwise_layout(g, layout);
  PackedHeader header{};
  header.magic = kMagic;
  header.format = kDepthwiseInt8;
  header.outputs = header.inputs = header.channels = 1;
  header.groups = uint32_t(g.groups);
  header.kernel_h = uint32_t(g.kernel_h);
  header.kernel_w = uint32_t(g.kernel_w);
  header.weights = uint64_t(g.groups * g.kernel_h * g.row_quads());
  std::memset(bytes, 0, size);
  std::memcpy(bytes, &header, sizeof header);
  auto* quads = const_cast<int8_t*>(at<int8_t>(bytes, layout.values));
  for (int64_t row = 0; row < g.groups * g.kernel_h; row++)
    std::memcpy(quads + row * g.row_quads() * 4, weights + row * g.kernel_w, size_t(g.kernel_w));
  if (bias) std::memcpy(static_cast<char*>(bytes) + layout.bias, bias, size_t(g.groups) * sizeof(int32_t));
  std::memcpy(static_cast<char*>(bytes) + layout.multipliers, multipliers, size_t(g.groups) * sizeof(float));
  return "";
}

}  // namespace nestify
