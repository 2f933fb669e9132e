#include "api.h"

#include <new>

#include "kernel.h"
#include "packed.h"

namespace {

using nestify::Geometry;

constexpr int32_t kInterface = 2;

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
    if (size < 0 || batch < 0) return "a negative size";
    if (std::string problem = nestify::open_packed(bytes, uint64_t(size), layer); !problem.empty()) return problem;
    const int64_t* g = geometry;
    nestify::ConvCall call{};
    call.layer = &layer;
    call.geometry = nestify::ConvGeometry{g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7]};
    call.input = input;
    call.output = output;
    call.batch = batch;
    call.height = height;
    call.width = width;
    call.epilogue = nestify::Epilogue{residual, low, high};
    if (std::string problem = nestify::check_geometry(call.geometry); !problem.empty()) return problem;
    std::string problem = nestify::output_size(layer.shape, call.geometry, height, width, call.out_h, call.out_w);
    if (!problem.empty()) return problem;
    if (batch * layer.shape.groups * layer.shape.outputs * call.out_h * call.out_w != output_floats)
      return "the output does not have the convolution's size";
    return nestify::run_conv(call) ? "" : "out of memory";
  });
}

const char* nestify_linear(const void* bytes, int64_t size, const float* input, int64_t tokens, const float* residual,
                           float low, float high, float* output) {
  return guarded([&]() -> std::string {
    if (std::string problem = without_variant(); !problem.empty()) return problem;
    nestify::PackedLayer layer;
    if (size < 0 || tokens < 0) return "a negative size";
    if (std::string problem = nestify::open_packed(bytes, uint64_t(size), layer); !problem.empty()) return problem;
    if (layer.shape.groups != 1 || layer.shape.taps() != 1) return "the layer is not linear";
    const nestify::LinearCall call{&layer, input, output, tokens, nestify::Epilogue{residual, low, high}, {}};
    return nestify::run_linear(call) ? "" : "out of memory";
  });
}
