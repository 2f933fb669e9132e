#include "api.h"

#include <new>

#include "kernel.h"
#include "packed.h"

namespace {

using nestify::Geometry;

constexpr int32_t kInterface = 5;

const char* answer(std::string problem) {
  static thread_local std::string kept;
  kept = std::move(problem);
  return kept.empty() ? nullptr : kept.c_str();
}

Geometry geometry_of(const int64_t shape[5]) { return Geometry{shape[0], shape[1], shape[2], shape[3], shape[4]}; }

nestify::Format format_of(int32_t value_bits) { return value_bits == 16 ? nestify::kFloat16 : nestify::kFloat32; }

// Runs a function that returns an empty string or a problem; no exception leaves this library.
template <class Function>
const char* guarded(Function function) {
  try {
    return answer(function());
  } catch (const std::bad_alloc&) {
    return "out of memory";
  } catch (...) {
    return "unexpected exception";
  }
}

// An int8 layer, whose shape has channels in place of quads.
Geometry quads_of(const int64_t shape[5]) {
  Geometry geometry = geometry_of(shape);
  geometry.inputs = shape[1] / 4 + (shape[1] % 4 != 0);
  return geometry;
}

std::string check_channels(int64_t channels) {
  return channels < 1 || channels > INT32_MAX ? "the number of channels is out of range" : "";
}

std::string open_layer(const void* bytes, int64_t size, bool is_int8, nestify::PackedLayer& layer) {
  if (size < 0) return "a negative size";
  std::string problem = nestify::open_packed(bytes, uint64_t(size), layer);
  if (problem.empty() && (layer.channels != 0) != is_int8) return "the layer is not of this type";
  return problem;
}

// Fills the sizes of a call for images of one size; returns an empty string or a problem.
std::string measure(nestify::ConvSizes& call, const nestify::PackedLayer& layer, const int64_t g[8], int64_t batch,
                    int64_t height, int64_t width, int64_t output_numbers) {
  if (batch < 0) return "a negative size";
  call.layer = &layer;
  call.geometry = nestify::ConvGeometry{g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7]};
  call.batch = batch;
  call.height = height;
  call.width = width;
  if (std::string problem = nestify::check_geometry(call.geometry); !problem.empty()) return problem;
  std::string problem = nestify::output_size(layer.shape, call.geometry, height, width, call.out_h, call.out_w);
  if (!problem.empty()) return problem;
  if (batch * layer.shape.groups * layer.shape.outputs * call.out_h * call.out_w != output_numbers)
    return "the output does not have the convolution's size";
  return "";
}

std::string without_variant() {
  std::string problem;
  nestify::variant(problem);
  return problem;
}

}  // namespace

int32_t nestify_engine_interface() { return kInterface; }

const char* nestify_engine_isa(const char** name) {
  return guarded([&] {
    std::string problem;
    const nestify::Variant* chosen = nestify::variant(problem);
    *name = chosen ? chosen->name : "";
    return problem;
  });
}

const char* nestify_packed_size(const int64_t shape[5], const int64_t* starts, const int32_t* columns,
                                int32_t value_bits, int64_t* block_rows, int64_t* size) {
  return guarded([&] {
    uint64_t bytes = 0;
    const nestify::SparseRows rows{starts, columns, nullptr, nullptr, format_of(value_bits)};
    std::string problem = nestify::packed_size(geometry_of(shape), rows, *block_rows, bytes);
    *size = int64_t(bytes);
    return problem;
  });
}

const char* nestify_pack(const int64_t shape[5], const int64_t* starts, const int32_t* columns, const void* values,
                         int32_t value_bits, const float* bias, int64_t block_rows, void* bytes, int64_t size) {
  return guarded([&] {
    const nestify::SparseRows rows{starts, columns, values, bias, format_of(value_bits)};
    return nestify::pack(geometry_of(shape), rows, block_rows, bytes, uint64_t(size));
  });
}

const char* nestify_packed_int8_size(const int64_t shape[5], const int64_t* starts, const int32_t* columns,
                                     int64_t* block_rows, int64_t* size) {
  return guarded([&] {
    if (std::string problem = check_channels(shape[1]); !problem.empty()) return problem;
    uint64_t bytes = 0;
    const nestify::SparseRows rows{starts, columns, nullptr, nullptr, nestify::kInt8, nullptr, shape[1]};
    std::string problem = nestify::packed_size(quads_of(shape), rows, *block_rows, bytes);
    *size = int64_t(bytes);
    return problem;
  });
}

const char* nestify_pack_int8(const int64_t shape[5], const int64_t* starts, const int32_t* columns,
                              const int8_t* quads, const int32_t* bias, const float* multipliers, int64_t block_rows,
                              void* bytes, int64_t size) {
  return guarded([&] {
    if (std::string problem = check_channels(shape[1]); !problem.empty()) return problem;
    const nestify::SparseRows rows{starts, columns, quads, bias, nestify::kInt8, multipliers, shape[1]};
    return nestify::pack(quads_of(shape), rows, block_rows, bytes, uint64_t(size));
  });
}

const char* nestify_packed_depthwise_size(const int64_t shape[5], int64_t* size) {
  return guarded([&] {
    uint64_t bytes = 0;
    std::string problem = nestify::packed_depthwise_size(geometry_of(shape), bytes);
    *size = int64_t(bytes);
    return problem;
  });
}

const char* nestify_pack_depthwise(const int64_t shape[5], const int8_t* weights, const int32_t* bias,
                                   const float* multipliers, void* bytes, int64_t size) {
  return guarded([&] {
    return nestify::pack_depthwise(geometry_of(shape), weights, bias, multipliers, bytes, uint64_t(size));
  });
}

const char* nestify_check_packed(const void* bytes, int64_t size) {
  return guarded([&] {
    nestify::PackedLayer layer;
    return size < 0 ? std::string("a negative size") : nestify::open_packed(bytes, uint64_t(size), layer);
  });
}

const char* nestify_conv(const void* bytes, int64_t size, const float* input, int64_t batch, int64_t height,
                         int64_t width, const int64_t geometry[8], const float* residual, float low, float high,
                         float* output, int64_t output_floats) {
  return guarded([&]() -> std::string {
    if (std::string problem = without_variant(); !problem.empty()) return problem;
    nestify::PackedLayer layer;
    if (std::string problem = open_layer(bytes, size, false, layer); !problem.empty()) return problem;
    nestify::ConvCall call{};
    std::string problem = measure(call, layer, geometry, batch, height, width, output_floats);
    if (!problem.empty()) return problem;
    call.input = input;
    call.output = output;
    call.epilogue = nestify::Epilogue{residual, low, high};
    return nestify::run_conv(call) ? "" : "out of memory";
  });
}

const char* nestify_linear(const void* bytes, int64_t size, const float* input, int64_t tokens, const float* residual,
                           float low, float high, float* output) {
  return guarded([&]() -> std::string {
    if (std::string problem = without_variant(); !problem.empty()) return problem;
    nestify::PackedLayer layer;
    if (tokens < 0) return "a negative size";
    if (std::string problem = open_layer(bytes, size, false, layer); !problem.empty()) return problem;
    if (!layer.is_linear()) return "the layer is not linear";
    const nestify::LinearCall call{&layer, input, output, tokens, nestify::Epilogue{residual, low, high}, {}};
    return nestify::run_linear(call) ? "" : "out of memory";
  });
}

const char* nestify_conv_int8(const void* bytes, int64_t size, const uint8_t* input, int64_t batch, int64_t height,
                              int64_t width, const int64_t geometry[8], const int32_t limits[5],
                              const uint8_t* residual, float residual_scale, uint8_t* output, int64_t output_bytes) {
  return guarded([&]() -> std::string {
    if (std::string problem = without_variant(); !problem.empty()) return problem;
    nestify::PackedLayer layer;
    if (std::string problem = open_layer(bytes, size, true, layer); !problem.empty()) return problem;
    nestify::Int8Call call{};
    std::string problem = measure(call, layer, geometry, batch, height, width, output_bytes);
    if (!problem.empty()) return problem;
    call.input = input;
    call.output = output;
    call.epilogue = {limits[0], limits[1], limits[2], limits[3], residual, limits[4], residual_scale};
    if (problem = nestify::check_epilogue(call.epilogue); !problem.empty()) return problem;
    return nestify::run_conv_int8(call) ? "" : "out of memory";
  });
}

const char* nestify_linear_int8(const void* bytes, int64_t size, const uint8_t* input, int64_t tokens,
                                const int32_t limits[4], uint8_t* output) {
  return guarded([&]() -> std::string {
    if (std::string problem = without_variant(); !problem.empty()) return problem;
    nestify::PackedLayer layer;
    if (tokens < 0) return "a negative size";
    if (std::string problem = open_layer(bytes, size, true, layer); !problem.empty()) return problem;
    if (!layer.is_linear()) return "the layer is not linear";
    nestify::Int8LinearCall call{&layer, input, output, tokens, {}, {}};
    call.epilogue = {limits[0], limits[1], limits[2], limits[3]};
    if (std::string problem = nestify::check_epilogue(call.epilogue); !problem.empty()) return problem;
    return nestify::run_linear_int8(call) ? "" : "out of memory";
  });
}
