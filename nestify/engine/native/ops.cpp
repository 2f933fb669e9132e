// The custom operators SparseConv, SparseLinear, SparseConvInt8 and SparseLinearInt8 of ONNX Runtime, domain nestify.
//
// Inputs: activations (float32), a packed layer (uint8 constant), optionally a residual of the output's shape.
// Attributes: low and high, between which the result is clamped; for SparseConv also strides, pads and dilations
// as for ONNX's Conv. The int8 operators have activations, residual and output in uint8, and the attributes of
// Int8Epilogue; SparseLinearInt8 has no residual. A layer is checked when a session is created, so that a damaged
// model is refused then.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "api.h"
#include "kernel.h"
#if defined(_WIN32) && !defined(_MSC_VER)
#define _Return_type_success_(X)  // an annotation of MSVC that the header uses; it defines the others itself
#endif
#include "onnxruntime/onnxruntime_c_api.h"

namespace nestify {
namespace {

constexpr const char* kDomain = "nestify";
constexpr const char* kThreadsEntry = "nestify.threads";
constexpr int64_t kMostThreads = 1024;

const OrtApi* g_api = nullptr;  // the same for all sessions of a process

// What an operator refuses; it becomes the message of an OrtStatus.
struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Calls a function and turns what it throws into a status.
template <class Function>
OrtStatusPtr guarded(Function function) {
  try {
    function();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return g_api->CreateStatus(ORT_FAIL, "nestify: out of memory");
  } catch (const std::exception& error) {
    return g_api->CreateStatus(ORT_INVALID_ARGUMENT, (std::string("nestify: ") + error.what()).c_str());
  } catch (...) {
    return g_api->CreateStatus(ORT_FAIL, "nestify: unexpected exception");
  }
}

void check(OrtStatusPtr status) {
  if (!status) return;
  const std::string message = g_api->GetErrorMessage(status);
  g_api->ReleaseStatus(status);
  throw Refusal(message);
}

void check(const std::string& problem) {
  if (!problem.empty()) throw Refusal(problem);
}

std::vector<int64_t> shape_of(const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check(g_api->GetTensorTypeAndShape(value, &info));
  size_t rank = 0;
  std::vector<int64_t> shape;
  OrtStatusPtr status = g_api->GetDimensionsCount(info, &rank);
  if (!status) {
    shape.resize(rank);
    status = g_api->GetDimensions(info, shape.data(), rank);
  }
  g_api->ReleaseTensorTypeAndShapeInfo(info);
  check(status);
  return shape;
}

template <class T>
T* data_of(const OrtValue* value) {
  void* data = nullptr;
  check(g_api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  return static_cast<T*>(data);
}

// An attribute that is a list of `count` numbers.
std::vector<int64_t> numbers(const OrtKernelInfo* info, const char* name, size_t count) {
  std::vector<int64_t> found(count);
  size_t size = count;
  check(g_api->KernelInfoGetAttributeArray_int64(info, name, found.data(), &size));
  if (size != count) throw Refusal(std::string(name) + " does not have " + std::to_string(count) + " numbers");
  return found;
}

float number(const OrtKernelInfo* info, const char* name) {
  float found = 0;
  check(g_api->KernelInfoGetAttribute_float(info, name, &found));
  return found;
}

// An attribute that is a whole number from 0 to 255.
int32_t byte(const OrtKernelInfo* info, const char* name) {
  int64_t found = 0;
  check(g_api->KernelInfoGetAttribute_int64(info, name, &found));
  if (found < 0 || found > 255) throw Refusal(std::string(name) + " is not from 0 to 255");
  return int32_t(found);
}

ConvGeometry geometry_of(const OrtKernelInfo* info) {
  const std::vector<int64_t> strides = numbers(info, "strides", 2), pads = numbers(info, "pads", 4),
                             dilations = numbers(info, "dilations", 2);
  const ConvGeometry geometry{strides[0], strides[1], pads[0], pads[1], pads[2], pads[3], dilations[0], dilations[1]};
  check(check_geometry(geometry));
  return geometry;
}

// A layer of a session.
struct Kernel {
  PackedLayer layer;
  std::unique_ptr<float[]> copy;  // of a layer whose bytes are not aligned in the session
  int64_t threads;

  Kernel(const OrtKernelInfo* info, int64_t n_threads, bool is_int8) : threads(n_threads) {
    int is_constant = 0;
    const OrtValue* tensor = nullptr;
    check(g_api->KernelInfoGetConstantInput_tensor(info, 1, &is_constant, &tensor));
    if (!is_constant || !tensor) throw Refusal("the packed layer is not a constant of the model");
    uint64_t size = 1;
    for (int64_t extent : shape_of(tensor))
      if (__builtin_mul_overflow(size, uint64_t(extent), &size)) throw Refusal("the packed layer is too large");
    const void* bytes = data_of<uint8_t>(tensor);
    if (reinterpret_cast<uintptr_t>(bytes) % alignof(float)) {
      copy.reset(new float[size / sizeof(float) + 1]);
      bytes = std::memcpy(copy.get(), bytes, size);
    }
    if (std::string problem = open_packed(bytes, size, layer); !problem.empty())
      throw Refusal("a packed layer is damaged: " + problem);
    if ((layer.channels != 0) != is_int8) throw Refusal("a packed layer is not of the type that its operator takes");
  }
  virtual ~Kernel() = default;
  virtual void compute(OrtKernelContext* context) const = 0;

 protected:
  static const OrtValue* input(OrtKernelContext* context, size_t index) {
    const OrtValue* value = nullptr;
    check(g_api->KernelContext_GetInput(context, index, &value));
    return value;
  }

  template <class T>
  static T* output(OrtKernelContext* context, const std::vector<int64_t>& shape) {
    OrtValue* value = nullptr;
    check(g_api->KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &value));
    return data_of<T>(value);
  }

  // The residual of an output of this shape; null if there is none.
  template <class T>
  static const T* residual(OrtKernelContext* context, const std::vector<int64_t>& shape) {
    size_t count = 0;
    check(g_api->KernelContext_GetInputCount(context, &count));
    const OrtValue* found = count > 2 ? input(context, 2) : nullptr;
    if (found && shape_of(found) != shape) throw Refusal("the residual does not have the shape of the output");
    return found ? data_of<T>(found) : nullptr;
  }

  // Fills the sizes of a convolution from its input, and returns the shape of its output.
  std::vector<int64_t> measure(ConvSizes& call, const ConvGeometry& geometry, const OrtValue* images,
                               int64_t channels) const {
    const std::vector<int64_t> shape = shape_of(images);
    if (shape.size() != 4 || shape[1] != layer.shape.groups * channels)
      throw Refusal("a sparse convolution got an input that does not have its channels");
    call.layer = &layer;
    call.geometry = geometry;
    call.batch = shape[0];
    call.height = shape[2];
    call.width = shape[3];
    check(output_size(layer.shape, geometry, call.height, call.width, call.out_h, call.out_w));
    return {shape[0], layer.shape.groups * layer.shape.outputs, call.out_h, call.out_w};
  }

  void check_linear() const {
    if (!layer.is_linear()) throw Refusal("the layer of a linear operator is not linear");
  }

  // Counts the tokens of a linear layer's input, and returns the shape of its output.
  std::vector<int64_t> measure_tokens(const OrtValue* value, int64_t features, int64_t& tokens) const {
    std::vector<int64_t> shape = shape_of(value);
    if (shape.empty() || shape.back() != features)
      throw Refusal("a sparse linear layer got an input that does not have its features");
    tokens = 1;
    for (size_t i = 0; i + 1 < shape.size(); i++) tokens *= shape[i];
    shape.back() = layer.shape.outputs;
    return shape;
  }

  Parallel parallel(OrtKernelContext* context) const {
    return Parallel{threads, context, [](void* to, size_t count, void (*task)(void*, size_t), void* state) {
                      const auto* running = static_cast<const OrtKernelContext*>(to);
                      check(g_api->KernelContext_ParallelFor(running, task, count, count, state));
                    }};
  }
};

// A layer that computes in float32.
struct FloatKernel : Kernel {
  static constexpr ONNXTensorElementDataType kType = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  float low, high;

  FloatKernel(const OrtKernelInfo* info, int64_t n_threads)
      : Kernel(info, n_threads, false), low(number(info, "low")), high(number(info, "high")) {}

 protected:
  Epilogue epilogue(OrtKernelContext* context, const std::vector<int64_t>& shape) const {
    return Epilogue{residual<float>(context, shape), low, high};
  }
};

struct ConvKernel final : FloatKernel {
  ConvGeometry geometry;

  ConvKernel(const OrtKernelInfo* info, int64_t n_threads)
      : FloatKernel(info, n_threads), geometry(geometry_of(info)) {}

  void compute(OrtKernelContext* context) const override {
    const OrtValue* images = input(context, 0);
    ConvCall call{};
    const std::vector<int64_t> result = measure(call, geometry, images, layer.shape.inputs);
    call.input = data_of<float>(images);
    call.epilogue = epilogue(context, result);
    call.output = output<float>(context, result);
    call.parallel = parallel(context);
    if (!run_conv(call)) throw std::bad_alloc();
  }
};

struct LinearKernel final : FloatKernel {
  LinearKernel(const OrtKernelInfo* info, int64_t n_threads) : FloatKernel(info, n_threads) { check_linear(); }

  void compute(OrtKernelContext* context) const override {
    const OrtValue* tokens = input(context, 0);
    LinearCall call{};
    call.layer = &layer;
    call.input = data_of<float>(tokens);
    const std::vector<int64_t> shape = measure_tokens(tokens, layer.shape.inputs, call.tokens);
    call.epilogue = epilogue(context, shape);
    call.output = output<float>(context, shape);
    call.parallel = parallel(context);
    if (!run_linear(call)) throw std::bad_alloc();
  }
};

// A layer that computes in int8.
struct Int8Kernel : Kernel {
  static constexpr ONNXTensorElementDataType kType = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
  Int8Epilogue epilogue;

  Int8Kernel(const OrtKernelInfo* info, int64_t n_threads) : Kernel(info, n_threads, true) {
    epilogue.input_zero = byte(info, "input_zero");
    epilogue.output_zero = byte(info, "output_zero");
    epilogue.low = byte(info, "low");
    epilogue.high = byte(info, "high");
    check(check_epilogue(epilogue));
  }
};

struct ConvInt8Kernel final : Int8Kernel {
  ConvGeometry geometry;

  ConvInt8Kernel(const OrtKernelInfo* info, int64_t n_threads)
      : Int8Kernel(info, n_threads), geometry(geometry_of(info)) {
    epilogue.residual_zero = byte(info, "residual_zero");
    epilogue.residual_scale = number(info, "residual_scale");
    check(check_epilogue(epilogue));
  }

  void compute(OrtKernelContext* context) const override {
    const OrtValue* images = input(context, 0);
    Int8Call call{};
    const std::vector<int64_t> result = measure(call, geometry, images, layer.channels);
    call.input = data_of<uint8_t>(images);
    call.epilogue = epilogue;
    call.epilogue.residual = residual<uint8_t>(context, result);
    call.output = output<uint8_t>(context, result);
    call.parallel = parallel(context);
    if (!run_conv_int8(call)) throw std::bad_alloc();
  }
};

struct LinearInt8Kernel final : Int8Kernel {
  LinearInt8Kernel(const OrtKernelInfo* info, int64_t n_threads) : Int8Kernel(info, n_threads) { check_linear(); }

  void compute(OrtKernelContext* context) const override {
    const OrtValue* tokens = input(context, 0);
    Int8LinearCall call{};
    call.layer = &layer;
    call.input = data_of<uint8_t>(tokens);
    const std::vector<int64_t> shape = measure_tokens(tokens, layer.channels, call.tokens);
    if (residual<uint8_t>(context, shape)) throw Refusal("SparseLinearInt8 adds no residual");
    call.epilogue = epilogue;
    call.output = output<uint8_t>(context, shape);
    call.parallel = parallel(context);
    if (!run_linear_int8(call)) throw std::bad_alloc();
  }
};

// An operator as ONNX Runtime sees it: a table of functions.
template <class K>
struct Operator : OrtCustomOp {
  int64_t threads;

  Operator(const char* (*name)(const OrtCustomOp*), int64_t n_threads) : OrtCustomOp{}, threads(n_threads) {
    version = ORT_API_VERSION;
    GetName = name;
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU's
    GetInputTypeCount = [](const OrtCustomOp*) -> size_t { return 3; };
    GetInputType = [](const OrtCustomOp*, size_t index) {
      return index == 1 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : K::kType;
    };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
      return index == 2 ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    GetOutputTypeCount = [](const OrtCustomOp*) -> size_t { return 1; };
    GetOutputType = [](const OrtCustomOp*, size_t) { return K::kType; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 0; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return INT32_MAX; };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
      return guarded([&] {
        *kernel = nullptr;
        *kernel = static_cast<Kernel*>(new K(info, static_cast<const Operator*>(op)->threads));
      });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return guarded([&] { static_cast<const Kernel*>(kernel)->compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }
};

// The operators for sessions of one number of threads.
struct Domain {
  Operator<ConvKernel> conv;
  Operator<LinearKernel> linear;
  Operator<ConvInt8Kernel> conv_int8;
  Operator<LinearInt8Kernel> linear_int8;
  OrtCustomOpDomain* handle = nullptr;

  explicit Domain(int64_t threads)
      : conv([](const OrtCustomOp*) { return "SparseConv"; }, threads),
        linear([](const OrtCustomOp*) { return "SparseLinear"; }, threads),
        conv_int8([](const OrtCustomOp*) { return "SparseConvInt8"; }, threads),
        linear_int8([](const OrtCustomOp*) { return "SparseLinearInt8"; }, threads) {
    check(g_api->CreateCustomOpDomain(kDomain, &handle));
    check(g_api->CustomOpDomain_Add(handle, &conv));
    check(g_api->CustomOpDomain_Add(handle, &linear));
    check(g_api->CustomOpDomain_Add(handle, &conv_int8));
    check(g_api->CustomOpDomain_Add(handle, &linear_int8));
  }
};

// Returns the number of threads that a session is configured for. ONNX Runtime does not tell operators how many
// threads it has, so programs repeat it as the configuration entry "nestify.threads".
int64_t configured_threads(const OrtSessionOptions* options) {
  int has_entry = 0;
  check(g_api->HasSessionConfigEntry(options, kThreadsEntry, &has_entry));
  if (!has_entry) return std::max<int64_t>(1, std::thread::hardware_concurrency());
  char text[16] = {};
  size_t size = sizeof text;
  check(g_api->GetSessionConfigEntry(options, kThreadsEntry, text, &size));
  char* end = nullptr;
  const long threads = std::strtol(text, &end, 10);
  if (*end || threads < 1 || threads > kMostThreads)
    throw Refusal(std::string(kThreadsEntry) + "=" + text + " is not a number from 1 to 1024");
  return threads;
}

}  // namespace
}  // namespace nestify

// Called by ONNX Runtime's RegisterCustomOpsLibrary.
NESTIFY_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  using namespace nestify;
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api) {
    const std::string message =
        std::string("nestify: needs ONNX Runtime 1.21 or newer, this is ") + base->GetVersionString();
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, message.c_str());
  }
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  g_api = api;
  return guarded([&] {
    std::string problem;
    if (!variant(problem)) throw Refusal(problem);
    // Never deleted, because sessions that outlive this library's static objects use them.
    static auto& domains = *new std::map<int64_t, std::unique_ptr<Domain>>;
    auto& domain = domains[configured_threads(options)];
    if (!domain) domain = std::make_unique<Domain>(configured_threads(options));
    check(g_api->AddCustomOpDomain(options, domain->handle));
  });
}
