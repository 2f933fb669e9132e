// A simulated accelerator: its memory is the host's and its kernels are the CPU's, but its tensors are not CPU tensors.
// Results equal the CPU's bit by bit. Tensors of several devices in one operator, and generators of another device, are
// refused. Launches and waits are counted as a GPU would have them.

#include <ATen/Context.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DispatchKey;
using c10::IValue;

namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;
constexpr DeviceIndex kDevices = 2;

thread_local DeviceIndex current = 0;
std::mutex mutex;
std::map<std::string, int64_t> counts;  // by "launch NAME", "wait NAME" and "copy"
std::set<const void*> pinned;

void count(const std::string& what, int64_t n = 1) {
  std::lock_guard<std::mutex> guard(mutex);
  counts[what] += n;
}

void check_ordinal(DeviceIndex index) {
  TORCH_CHECK(index < kDevices, "simulated: invalid device ordinal ", static_cast<int>(index));
}

// ---- memory ----

struct DeviceAllocator final : at::Allocator {
  at::DataPtr allocate(size_t bytes) override {
    void* memory = bytes ? c10::alloc_cpu(bytes) : nullptr;
    return {memory, memory, &c10::free_cpu, Device(kType, current)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};

struct PinnedAllocator final : at::Allocator {
  static void release(void* memory) {
    {
      std::lock_guard<std::mutex> guard(mutex);
      pinned.erase(memory);
    }
    c10::free_cpu(memory);
  }
  at::DataPtr allocate(size_t bytes) override {
    void* memory = c10::alloc_cpu(bytes ? bytes : 1);
    std::lock_guard<std::mutex> guard(mutex);
    pinned.insert(memory);
    return {memory, memory, &release, Device(at::kCPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }
};

DeviceAllocator device_allocator;
PinnedAllocator pinned_allocator;
REGISTER_ALLOCATOR(kType, &device_allocator);

// ---- devices, streams and generators ----

c10::Stream default_stream(Device device) { return c10::Stream(c10::Stream::DEFAULT, device); }

struct DeviceGuard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kType; }
  Device exchangeDevice(Device device) const override {
    Device old(kType, current);
    setDevice(device);
    return old;
  }
  Device getDevice() const override { return {kType, current}; }
  void setDevice(Device device) const override {
    check_ordinal(device.index());
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  c10::Stream getStream(Device device) const override { return default_stream(device); }
  c10::Stream getDefaultStream(Device device) const override { return default_stream(device); }
  c10::Stream getNewStream(Device device, int) const override { return default_stream(device); }
  c10::Stream getStreamFromGlobalPool(Device device, bool) const override { return default_stream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { count("wait stream"); }
  void synchronizeDevice(DeviceIndex) const override { count("wait device"); }
  void record(void**, const c10::Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { count("wait event"); }
  void destroyEvent(void*, DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, DeviceGuard);

struct DeviceGenerator final : at::CPUGeneratorImpl {
  explicit DeviceGenerator(DeviceIndex index) : at::CPUGeneratorImpl(at::default_rng_seed_val) {
    device_ = Device(kType, index);
    key_set_ = c10::DispatchKeySet(DispatchKey::PrivateUse1);
  }
};

at::Generator& default_generator(DeviceIndex index) {
  static std::vector<at::Generator> generators = [] {
    std::vector<at::Generator> made;
    for (DeviceIndex i = 0; i < kDevices; i++) made.push_back(at::make_generator<DeviceGenerator>(i));
    return made;
  }();
  return generators.at(index < 0 ? current : index);
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    return at::make_generator<DeviceGenerator>(index < 0 ? current : index);
  }
  DeviceIndex deviceCount() const override { return kDevices; }
  void setCurrentDevice(DeviceIndex index) const override {
    check_ordinal(index);
    current = index;
  }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    const DeviceIndex old = current;
    if (index >= 0) current = index;
    return old;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchangeDevice(index); }
  bool isPinnedPtr(const void* memory) const override {
    std::lock_guard<std::mutex> guard(mutex);
    return pinned.count(memory) > 0;
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  Device getDeviceFromPtr(void*) const override { return {kType, current}; }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::DataPtr memory = device_allocator.allocate(bytes);
    if (storage.nbytes() && bytes) memcpy(memory.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(memory));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};
const bool hooked = [] {
  static Hooks hooks;
  at::RegisterPrivateUse1HooksInterface(&hooks);
  return true;
}();

// ---- the same memory as a tensor of another device ----

Tensor alias(const Tensor& tensor, Device device, DispatchKey key) {
  auto* owner = new c10::Storage(tensor.storage());
  auto release = [](void* storage) { delete static_cast<c10::Storage*>(storage); };
  c10::Storage storage(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(),
                       at::DataPtr(const_cast<void*>(tensor.storage().data()), owner, release, device),
                       c10::GetAllocator(device.type()), true);
  Tensor made(c10::make_intrusive<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), tensor.dtype()));
  auto* impl = made.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  if (tensor.is_conj()) made._set_conj(true);
  if (tensor.is_neg()) made._set_neg(true);
  return made;
}
Tensor on_cpu(const Tensor& tensor) {
  const bool ours = tensor.defined() && tensor.device().type() == kType;
  return ours ? alias(tensor, at::kCPU, DispatchKey::CPU) : tensor;
}
Tensor on_device(const Tensor& tensor, Device device) {
  const bool cpu = tensor.defined() && tensor.device().is_cpu();
  return cpu ? alias(tensor, device, DispatchKey::PrivateUse1) : tensor;
}

// ---- every operator that has no kernel of its own below: checked, counted, and run by the CPU ----

// The size or the answer is data, so that a GPU's host code waits.
const std::set<std::string> kWaiting = {
    "aten::_unique",       "aten::_unique2",          "aten::bincount", "aten::equal",      "aten::histc",
    "aten::masked_select", "aten::nonzero",           "aten::unique_consecutive",
    "aten::unique_dim",    "aten::repeat_interleave",
};
const std::set<std::string> kIndexing = {"aten::index", "aten::index_put_", "aten::_index_put_impl_",
                                         "aten::_unsafe_index"};

// What the arguments of one call say.
struct Call {
  const std::string& name;
  bool indexing;
  std::optional<Device> device = std::nullopt;
  std::string cpu_argument = "";  // an argument that is not on the device, and not a scalar

  void see(const Tensor& tensor, const std::string& argument, bool may_be_on_cpu) {
    if (!tensor.defined()) return;
    if (tensor.device().type() == kType) {
      TORCH_CHECK(!device || *device == tensor.device(), "simulated: ", name, " expects all tensors on one device, found ",
                  *device, " and ", tensor.device(), " (argument ", argument, ")");
      device = tensor.device();
    } else if (!(tensor.device().is_cpu() && (tensor.dim() == 0 || may_be_on_cpu))) {
      cpu_argument = argument;
    }
  }
  void see_index(const Tensor& tensor) {
    if (!tensor.defined()) return;
    if (tensor.scalar_type() == at::kBool || tensor.scalar_type() == at::kByte) count("wait " + name + " by mask");
    if (tensor.is_cpu()) count("wait " + name + " by index on the CPU");
  }
};

// A GPU handles lists of tensors in one launch only if their types and layouts agree, position by position.
int64_t launches(const std::string& name, const torch::jit::Stack& arguments) {
  if (name.rfind("aten::_foreach_", 0) != 0) return 1;
  std::vector<std::vector<Tensor>> lists;
  for (const auto& value : arguments)
    if (value.isTensorList()) lists.push_back(value.toTensorVector());
  if (lists.empty()) return 1;
  const auto& first = lists[0];
  for (const auto& list : lists)
    for (size_t i = 0; i < first.size() && i < list.size(); i++)
      if (list[i].scalar_type() != first[0].scalar_type() || list[i].sizes() != first[i].sizes() ||
          list[i].strides() != first[i].strides() || !first[i].is_non_overlapping_and_dense())
        return static_cast<int64_t>(first.size());
  return 1;
}

void run_on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto n = schema.arguments().size();
  Call call{schema.name(), kIndexing.count(schema.name()) > 0};
  torch::jit::Stack arguments(stack->end() - n, stack->end());
  bool seeded = false;
  for (auto tag : op.getTags()) seeded |= tag == at::Tag::nondeterministic_seeded;
  std::optional<at::Generator> generator;
  for (size_t i = 0; i < n; i++) {
    const auto& value = arguments[i];
    const auto& argument = schema.arguments()[i].name();
    if (value.isTensor()) {
      call.see(value.toTensor(), argument, false);
    } else if (value.isTensorList()) {
      for (const auto& tensor : value.toTensorVector()) call.see(tensor, argument, false);
    } else if (value.isList()) {
      for (const IValue& item : value.toListRef())
        if (item.isTensor()) {
          call.see(item.toTensor(), argument, call.indexing);
          if (call.indexing) call.see_index(item.toTensor());
        }
    } else if (value.isDevice() && value.toDevice().type() == kType && !call.device) {
      const auto device = value.toDevice();
      call.device = Device(kType, device.has_index() ? device.index() : current);
    } else if (value.isGenerator() && value.toGenerator().defined()) {
      generator = value.toGenerator();
      TORCH_CHECK(generator->device().type() == kType, "simulated: ", call.name,
                  " expects a generator of the device, found one of ", generator->device());
    }
  }
  const Device device = call.device.value_or(Device(kType, current));
  TORCH_CHECK(!call.device || call.cpu_argument.empty(), "simulated: ", call.name, " expects all tensors on ", device,
              ", but argument ", call.cpu_argument, " is not");
  count("launch " + call.name, launches(call.name, arguments));
  if (kWaiting.count(call.name)) count("wait " + call.name);

  std::vector<std::pair<at::TensorImpl*, Tensor>> originals;  // alias on the CPU -> tensor of the device
  auto convert = [&](const Tensor& tensor) {
    Tensor made = on_cpu(tensor);
    if (!made.is_same(tensor)) originals.emplace_back(made.unsafeGetTensorImpl(), tensor);
    return made;
  };
  for (auto& value : arguments) {
    if (value.isTensor()) {
      value = convert(value.toTensor());
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const auto& tensor : value.toTensorVector()) list.push_back(convert(tensor));
      value = IValue(list);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector())
        list.push_back(tensor && tensor->defined() ? std::optional<Tensor>(convert(*tensor)) : std::nullopt);
      value = IValue(list);
    } else if (value.isDevice() && value.toDevice().type() == kType) {
      value = IValue(Device(at::kCPU));
    } else if (value.isGenerator()) {
      value = IValue();  // the CPU's default generator, which has the device's state below
    }
  }

  at::Generator host = at::detail::getDefaultCPUGenerator();
  at::Generator own = generator.value_or(default_generator(device.index()));
  const bool random = seeded || generator;
  Tensor host_state;
  if (random) {
    host_state = host.get_state();
    host.set_state(own.get_state());
  }
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), &arguments);
  }
  if (random) {
    own.set_state(host.get_state());
    host.set_state(host_state);
  }

  auto restore = [&](const Tensor& tensor) -> Tensor {
    if (!tensor.defined()) return tensor;
    for (const auto& [made, original] : originals) {
      if (made != tensor.unsafeGetTensorImpl()) continue;
      auto* impl = original.unsafeGetTensorImpl();  // an out= argument may have been resized
      if (original.storage().data() != tensor.storage().data())
        impl->set_storage_keep_dtype(on_device(tensor, device).storage());
      if (original.sizes() != tensor.sizes() || original.strides() != tensor.strides())
        impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
      return original;
    }
    return on_device(tensor, device);
  };
  stack->erase(stack->end() - n, stack->end());
  for (size_t i = 0; i < arguments.size(); i++) {
    const auto& value = arguments[i];
    const auto* aliased = schema.returns()[i].alias_info();
    TORCH_CHECK(!(aliased && !aliased->isWrite() && value.isTensor()), "simulated: ", call.name,
                " returns a view and needs a kernel of its own");
    if (value.isTensor()) {
      stack->push_back(restore(value.toTensor()));
    } else if (value.isTensorList()) {
      std::vector<Tensor> list;
      for (const auto& tensor : value.toTensorVector()) list.push_back(restore(tensor));
      stack->push_back(IValue(list));
    } else {
      stack->push_back(value);
    }
  }
}

// ---- operators that the CPU cannot run for the device ----

Device device_or_current(std::optional<Device> device) {
  return device && device->has_index() ? *device : Device(kType, current);
}
Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device_or_current(device));
  return at::detail::empty_generic(size, &device_allocator, c10::DispatchKeySet(DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}
Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device_or_current(device));
  return at::detail::empty_strided_generic(size, stride, &device_allocator,
                                           c10::DispatchKeySet(DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}
Tensor copy_from(const Tensor& from, const Tensor& to, bool non_blocking) {
  const bool waits = !non_blocking || (from.is_cpu() && !from.is_pinned());
  if (from.is_cpu() || to.is_cpu()) {
    count(!waits ? "copy" : from.is_cpu() ? "wait copy to the device" : "wait copy to the host");
  } else {
    count("launch aten::copy_");
  }
  on_cpu(to).copy_(on_cpu(from));
  return to;
}
at::Scalar local_scalar(const Tensor& tensor) {
  count("wait item");
  return at::native::_local_scalar_dense_cpu(on_cpu(tensor));
}
Tensor as_strided(const Tensor& tensor, c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(tensor, size, stride, offset);
}
const Tensor& resize(const Tensor& tensor, c10::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  const size_t bytes = (impl->storage_offset() + tensor.numel()) * tensor.itemsize();
  if (tensor.storage().nbytes() < bytes) Hooks().resizePrivateUse1Bytes(tensor.storage(), bytes);
  if (format && *format != at::MemoryFormat::Preserve) impl->empty_tensor_restride(*format);
  return tensor;
}
Tensor& set_storage(Tensor& tensor, at::Storage storage, int64_t offset, c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(storage));
  if (stride.size() == size.size() && stride.data() != nullptr) {
    impl->set_sizes_and_strides(size, stride, offset);
  } else {
    impl->set_sizes_contiguous(size);
    impl->set_storage_offset(offset);
  }
  return tensor;
}
Tensor& set_whole_storage(Tensor& tensor, at::Storage storage) {
  const auto n = static_cast<int64_t>(storage.nbytes() / tensor.itemsize());
  return set_storage(tensor, std::move(storage), 0, {n}, {1});
}
Tensor& set_tensor(Tensor& tensor, const Tensor& other) {
  return set_storage(tensor, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}
Tensor convolution(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                   c10::SymIntArrayRef stride, c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation,
                   bool transposed, c10::SymIntArrayRef output_padding, c10::SymInt groups) {
  const bool biased = bias && bias->defined();
  TORCH_CHECK(input.device() == weight.device() && (!biased || bias->device() == input.device()),
              "simulated: convolution expects all tensors on one device");
  count("launch aten::convolution");
  const auto b = biased ? std::optional<Tensor>(on_cpu(*bias)) : std::nullopt;
  return on_device(at::convolution_symint(on_cpu(input), on_cpu(weight), b, stride, padding, dilation, transposed,
                                          output_padding, groups),
                   input.device());
}
std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& input, const Tensor& weight, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> wanted) {
  const auto device = input.device();
  TORCH_CHECK(device == weight.device() && gradient.device() == device,
              "simulated: convolution_backward expects all tensors on one device");
  count("launch aten::convolution_backward");
  std::vector<c10::SymInt> bias{transposed ? weight.sym_size(1) * groups : weight.sym_size(0)};
  auto [x, w, b] = at::convolution_backward_symint(
      on_cpu(gradient), on_cpu(input), on_cpu(weight),
      wanted[2] ? at::OptionalSymIntArrayRef(bias) : at::OptionalSymIntArrayRef(), stride, padding, dilation, transposed,
      output_padding, groups, wanted);
  return {on_device(x, device), on_device(w, device), on_device(b, device)};
}

// Attention: the CPU's fused kernel where the CPU would choose it.
int64_t attention_choice(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask,
                         double dropout, bool causal, std::optional<double> scale, bool grouped) {
  const auto m = mask ? std::optional<Tensor>(on_cpu(*mask)) : std::nullopt;
  const auto chosen = at::_fused_sdp_choice(on_cpu(query), on_cpu(key), on_cpu(value), m, dropout, causal, scale, grouped);
  const bool fused = chosen == static_cast<int64_t>(sdp::SDPBackend::flash_attention);
  return static_cast<int64_t>(fused ? sdp::SDPBackend::overrideable : sdp::SDPBackend::math);
}
std::tuple<Tensor, Tensor, Tensor, Tensor, c10::SymInt, c10::SymInt, Tensor, Tensor, Tensor> attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias, double dropout,
    bool causal, bool, std::optional<double> scale) {
  count("launch attention");
  const auto b = bias ? std::optional<Tensor>(on_cpu(*bias)) : std::nullopt;
  auto [out, logsumexp] = at::_scaled_dot_product_flash_attention_for_cpu(on_cpu(query), on_cpu(key), on_cpu(value),
                                                                         dropout, causal, b, scale);
  const auto device = query.device();
  return {on_device(out, device), on_device(logsumexp, device), {}, {}, query.sym_size(2), key.sym_size(2), {}, {}, {}};
}
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& gradient, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& bias,
    std::array<bool, 4>, const Tensor& out, const Tensor& logsumexp, const Tensor&, const Tensor&, c10::SymInt,
    c10::SymInt, double dropout, bool causal, const Tensor&, const Tensor&, std::optional<double> scale) {
  count("launch attention_backward");
  const auto b = bias.defined() ? std::optional<Tensor>(on_cpu(bias)) : std::nullopt;
  auto [q, k, v] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      on_cpu(gradient), on_cpu(query), on_cpu(key), on_cpu(value), on_cpu(out), on_cpu(logsumexp), dropout, causal, b,
      scale);
  const auto device = query.device();
  return {on_device(q, device), on_device(k, device), on_device(v, device), {}};
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_local_scalar_dense", &local_scalar);
  m.impl("as_strided", &as_strided);
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("resize_", &resize);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_whole_storage);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("_scaled_dot_product_fused_attention_overrideable", &attention);
  m.impl("_scaled_dot_product_fused_attention_overrideable_backward", &attention_backward);
  // torch would compose these of other operators, which a GPU does in one launch, and the CPU in other steps.
  for (const auto& op : c10::Dispatcher::singleton().getAllOpNames())
    if (op.name.rfind("aten::_foreach_", 0) == 0 || op.name == "aten::native_layer_norm")
      m.impl((op.overload_name.empty() ? op.name : op.name + "." + op.overload_name).c_str(),
             torch::CppFunction::makeFromBoxedFunction<&run_on_cpu>());
}

// ---- what Python calls: torch.ops.simulated ----

TORCH_LIBRARY(simulated, m) {
  m.def("device_count", []() -> int64_t { return kDevices; });
  m.def("current_device", []() -> int64_t { return current; });
  m.def("set_device", [](int64_t index) {
    check_ordinal(static_cast<DeviceIndex>(index));
    current = static_cast<DeviceIndex>(index);
  });
  m.def("synchronize", [] { count("wait device"); });
  m.def("get_rng_state", [](int64_t index) { return default_generator(static_cast<DeviceIndex>(index)).get_state(); });
  m.def("set_rng_state", [](int64_t index, const Tensor& state) {
    default_generator(static_cast<DeviceIndex>(index)).set_state(state);
  });
  m.def("seed", [](int64_t index, int64_t seed) {
    default_generator(static_cast<DeviceIndex>(index)).set_current_seed(static_cast<uint64_t>(seed));
  });
  m.def("counts", [] {
    std::lock_guard<std::mutex> guard(mutex);
    c10::Dict<std::string, int64_t> copy;
    for (const auto& [what, n] : counts) copy.insert(what, n);
    return copy;
  });
  m.def("reset_counts", [] {
    std::lock_guard<std::mutex> guard(mutex);
    counts.clear();
  });
  m.def("cpu_alias", [](const Tensor& tensor) { return on_cpu(tensor); });
}

}  // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &attention_choice);
}

// ---- autocast: the operators of CUDA's lists ----

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
namespace at::autocast {
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FULL(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FULL)
#undef LOWER
#undef FULL
}
}  // namespace at::autocast
