// A second device for machines without a GPU: its memory is the CPU's, its operators are the CPU's, and it is as strict as
// CUDA about devices: tensors of both in one operation are refused, but numbers without dimensions and indices.

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/native/TensorShape.h>
#include <ATen/ops/as_strided_cpu_dispatch.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/library.h>

using namespace at;
using c10::SymIntArrayRef;
template <typename T>
using Maybe = std::optional<T>;

static constexpr auto SECOND = c10::DeviceType::PrivateUse1;
static const Stream STREAM(Stream::DEFAULT, Device(SECOND, 0));

struct Memory final : Allocator {
  DataPtr allocate(size_t n) override {
    void* p = c10::alloc_cpu(n);
    return {p, p, &c10::free_cpu, Device(SECOND, 0)};
  }
  DeleterFnPtr raw_deleter() const override { return &c10::free_cpu; }
  void copy_data(void* to, const void* from, std::size_t n) const override { memcpy(to, from, n); }
};
static Memory memory;
REGISTER_ALLOCATOR(SECOND, &memory);

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return SECOND; }
  Device exchangeDevice(Device) const override { return Device(SECOND, 0); }
  Device getDevice() const override { return Device(SECOND, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const noexcept override { return STREAM; }
  Stream getDefaultStream(Device) const override { return STREAM; }
  Stream getStreamFromGlobalPool(Device, bool = false) const override { return STREAM; }
  Stream getNewStream(Device, int = 0) const override { return STREAM; }
  Stream exchangeStream(Stream) const noexcept override { return STREAM; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks : public at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isAvailable() const override { return true; }
};
static Hooks hooks;
static const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

namespace second {

// ---- memory

static Tensor empty(IntArrayRef size, Maybe<ScalarType> dtype, Maybe<Layout>, Maybe<Device>, Maybe<bool>, Maybe<MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory, DispatchKeySet(DispatchKey::PrivateUse1), dtype_or_default(dtype), format);
}

static Tensor empty_strided(IntArrayRef size, IntArrayRef strides, Maybe<ScalarType> dtype, Maybe<Layout>, Maybe<Device>, Maybe<bool>) {
  return at::detail::empty_strided_generic(size, strides, &memory, DispatchKeySet(DispatchKey::PrivateUse1), dtype_or_default(dtype));
}

// The same memory, as a tensor of the CPU.
static Tensor on_cpu(const Tensor& x) {
  if (!x.defined() || x.device().is_cpu()) return x;
  auto* start = static_cast<char*>(x.storage().mutable_data());
  if (start != nullptr) start += x.storage_offset() * x.itemsize();
  return at::from_blob(start, x.sizes(), x.strides(), [keep = x](void*) {}, TensorOptions().dtype(x.dtype()));
}

static Tensor on_second(const Tensor& x) { return x.defined() ? x.to(Device(SECOND, 0)) : x; }

static Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

static Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

static Scalar number(const Tensor& x) { return on_cpu(x).item(); }

static Tensor strided(const Tensor& x, IntArrayRef size, IntArrayRef strides, Maybe<int64_t> offset) {
  return at::cpu::as_strided(x, size, strides, offset);
}

static Tensor reshape_alias(const Tensor& x, SymIntArrayRef size, SymIntArrayRef strides) {
  return at::cpu::as_strided(x, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(strides), x.storage_offset());
}

static Tensor viewed(const Tensor& x, SymIntArrayRef size) { return at::native::view(x, C10_AS_INTARRAYREF_SLOW(size)); }

static const Tensor& resized(const Tensor& x, SymIntArrayRef size, Maybe<MemoryFormat>) {
  at::native::resize_impl_cpu_(x.unsafeGetTensorImpl(), C10_AS_INTARRAYREF_SLOW(size), std::nullopt, true);
  return x;
}

static Tensor& set_storage(Tensor& x, Storage storage, int64_t offset, IntArrayRef size, IntArrayRef strides) {
  x.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  x.unsafeGetTensorImpl()->set_sizes_and_strides(size, strides, offset);
  return x;
}

// ---- operators

static void require(bool same, const std::string& name) {
  TORCH_CHECK(same, "Expected all tensors to be on the same device, but found at least two devices, second:0 and cpu! (", name, ")");
}

static void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& name = op.schema().name();
  const bool indexes = name.find("aten::index") == 0 || name.find("aten::_index_put") == 0;
  bool there = false, cpu = false;
  auto look = [&](const Tensor& t) {
    if (!t.defined()) return;
    if (t.device().type() == SECOND) there = true;
    else if (t.device().is_cpu() && t.dim() > 0) cpu = true;
  };
  size_t at = 0;
  for (const auto& a : torch::jit::last(*stack, op.schema().arguments().size())) {
    const bool is_index = indexes && at++ > 0;
    if (a.isTensor()) look(a.toTensor());
    else if (a.isTensorList() && !is_index) for (const auto& t : a.toTensorVector()) look(t);
  }
  require(!(there && cpu), name);
  at::native::cpu_fallback(op, stack);
}

static Tensor convolution(const Tensor& x, const Tensor& w, const Maybe<Tensor>& b, IntArrayRef stride, IntArrayRef padding,
                          IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups) {
  const bool biased = b.has_value() && b->defined();
  require(x.device() == w.device() && (!biased || b->device() == x.device()), "convolution");
  Maybe<Tensor> bias = biased ? Maybe<Tensor>(on_cpu(*b)) : std::nullopt;
  return on_second(at::convolution(on_cpu(x), on_cpu(w), bias, stride, padding, dilation, transposed, output_padding, groups));
}

static std::tuple<Tensor, Tensor, Tensor> convolution_backward(const Tensor& g, const Tensor& x, const Tensor& w, IntArrayRef stride,
                                                               IntArrayRef padding, IntArrayRef dilation, bool transposed,
                                                               IntArrayRef output_padding, int64_t groups, std::array<bool, 3> mask) {
  const std::vector<int64_t> bias{g.size(1)};
  auto [of_x, of_w, of_b] = at::convolution_backward(on_cpu(g), on_cpu(x), on_cpu(w), IntArrayRef(bias), stride, padding, dilation,
                                                     transposed, output_padding, groups, mask);
  return {on_second(of_x), on_second(of_w), on_second(of_b)};
}

// 0: attention by its own operations.
static int64_t attention(const Tensor&, const Tensor&, const Tensor&, const Maybe<Tensor>&, double, bool, Maybe<double>, bool) { return 0; }

}  // namespace second

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", second::empty);
  m.impl("empty_strided", second::empty_strided);
  m.impl("_copy_from", second::copy_from);
  m.impl("_copy_from_and_resize", second::copy_from_and_resize);
  m.impl("_local_scalar_dense", second::number);
  m.impl("as_strided", second::strided);
  m.impl("_reshape_alias", second::reshape_alias);
  m.impl("view", second::viewed);
  m.impl("resize_", second::resized);
  m.impl("set_.source_Storage_storage_offset", second::set_storage);
  m.impl("convolution_overrideable", second::convolution);
  m.impl("convolution_backward_overrideable", second::convolution_backward);
  m.impl("_fused_sdp_choice", second::attention);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&second::fallback>()); }
