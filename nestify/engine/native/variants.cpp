// Choice of the instruction set, checks of a call's sizes, and the memory that kernels work in.
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

#include "kernel.h"

namespace nestify {
namespace {

#if defined(__x86_64__)
// What the processor has, and the system saves the registers of. __builtin_cpu_supports is not used: in a library that
// zig 0.17 has compiled, its answer is always no.
struct Features {
  bool avx2 = false, avx512 = false, vnni = false;

  Features() {
    unsigned a = 0, b = 0, c = 0, d = 0, saved = 0, high = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return;
    const bool has_fma = c & bit_FMA;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    constexpr unsigned kVectors = 0x06, kWideVectors = 0xe6;  // of `saved`: SSE and AVX, and AVX-512 as well
    constexpr unsigned kParts = bit_AVX512F | bit_AVX512VL | bit_AVX512DQ | bit_AVX512BW;
    avx2 = (saved & kVectors) == kVectors && has_fma && (b & bit_AVX2);
    avx512 = (saved & kWideVectors) == kWideVectors && avx2 && (b & kParts) == kParts;
    vnni = avx512 && (c & bit_AVX512VNNI) && (b & bit_BMI2);
  }
};

const Features& features() {
  static const Features found;
  return found;
}

bool has_avx512_vnni() { return features().vnni; }
bool has_avx512_alone() { return features().avx512 && !features().vnni; }
bool has_avx2() { return features().avx2; }
bool has_only_plain_int8() { return true; }
#elif defined(__aarch64__)
bool has_dot_products() {
#if defined(__APPLE__)
  return true;  // every processor of Apple that runs macOS
#elif defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return false;
#endif
}
bool has_only_plain_int8() { return !has_dot_products(); }
#else
bool has_only_plain_int8() { return true; }
#endif

// Variants from the fastest to the one that every processor runs. Two of one name exclude each other.
struct Entry {
  Variant variant;
  bool (*is_supported)();
};
const Entry kVariants[] = {
#if defined(__x86_64__)
    {{"avx512", avx512::conv, avx512::linear, avx512_vnni::conv_int8, avx512_vnni::linear_int8}, has_avx512_vnni},
    {{"avx512", avx512::conv, avx512::linear, avx2_int8::conv_int8, avx2_int8::linear_int8}, has_avx512_alone},
    {{"avx2", avx2::conv, avx2::linear, avx2_int8::conv_int8, avx2_int8::linear_int8}, has_avx2},
#elif defined(__aarch64__)
    {{"generic", generic::conv, generic::linear, neon_dot::conv_int8, neon_dot::linear_int8}, has_dot_products},
#endif
    {{"generic", generic::conv, generic::linear, generic_int8::conv_int8, generic_int8::linear_int8}, has_only_plain_int8},
};

const Variant* choose(const char* name, std::string& problem) {
  for (const Entry& entry : kVariants)
    if ((!name || !*name || !std::strcmp(name, entry.variant.name)) && entry.is_supported()) return &entry.variant;
  problem = std::string("NESTIFY_ENGINE_ISA=") + name + " is not an instruction set of this processor; use ";
  for (const Entry& entry : kVariants)
    if (entry.is_supported()) problem += std::string(entry.variant.name) + ", ";
  problem += "or unset it";
  return nullptr;
}

struct Buffer {
  float* data = nullptr;
  int64_t size = 0;
  ~Buffer() { release(); }
  void release() {
    if (data) ::operator delete(data, std::align_val_t(64));
    data = nullptr;
    size = 0;
  }
};

}  // namespace

const Variant* variant(std::string& problem) {
  static std::string reason;
  static const Variant* const chosen = choose(std::getenv("NESTIFY_ENGINE_ISA"), reason);
  problem = reason;
  return chosen;
}

bool run_conv(const ConvCall& call) {
  std::string problem;
  return variant(problem)->conv(call);
}

bool run_linear(const LinearCall& call) {
  std::string problem;
  return variant(problem)->linear(call);
}

bool run_conv_int8(const Int8Call& call) {
  std::string problem;
  return variant(problem)->conv_int8(call);
}

bool run_linear_int8(const Int8LinearCall& call) {
  std::string problem;
  return variant(problem)->linear_int8(call);
}

std::string check_geometry(const ConvGeometry& g) {
  for (int64_t pad : {g.pad_top, g.pad_left, g.pad_bottom, g.pad_right})
    if (pad < 0 || pad > kMostSide) return "a padding is out of range";
  for (int64_t step : {g.stride_h, g.stride_w, g.dilation_h, g.dilation_w})
    if (step < 1 || step > kMostSide) return "a stride or dilation is out of range";
  return "";
}

std::string check_epilogue(const Int8Epilogue& e) {
  for (int32_t number : {e.input_zero, e.output_zero, e.low, e.high, e.residual_zero})
    if (number < 0 || number > 255) return "a zero point or a limit is not from 0 to 255";
  if (e.low > e.high) return "the lower limit is above the upper one";
  return e.residual_scale >= 0 && e.residual_scale <= kLargestScale ? "" : "the residual's scale is out of range";
}

std::string output_size(const Geometry& shape, const ConvGeometry& g, int64_t height, int64_t width, int64_t& out_h,
                        int64_t& out_w) {
  if (height < 0 || width < 0 || height > INT32_MAX || width > INT32_MAX) return "the image's size is out of range";
  const int64_t h = height + g.pad_top + g.pad_bottom - g.dilation_h * (shape.kernel_h - 1) - 1;
  const int64_t w = width + g.pad_left + g.pad_right - g.dilation_w * (shape.kernel_w - 1) - 1;
  if (h < 0 || w < 0) return "the image is smaller than the kernel";
  out_h = h / g.stride_h + 1;
  out_w = w / g.stride_w + 1;
  return "";
}

float* scratch(Slot slot, int64_t floats) {
  static thread_local Buffer buffers[kSlots];
  Buffer& buffer = buffers[slot];
  if (buffer.size >= floats) return buffer.data;
  buffer.release();
  const int64_t size = floats + floats / 4;  // a later layer may need a little more
  if (floats < 0 || size > INT64_MAX / 8) return nullptr;
  buffer.data = static_cast<float*>(::operator new(size_t(size) * sizeof(float), std::align_val_t(64), std::nothrow));
  if (!buffer.data) return nullptr;
  std::memset(buffer.data, 0, size_t(size) * sizeof(float));
  buffer.size = size;
  return buffer.data;
}

}  // namespace nestify
