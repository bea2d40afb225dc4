// What torch lacks without a GPU for fake tensors on a CUDA device, lent and taken back: a device
// guard, which does nothing, and the answer that there is one CUDA device, which autograd asks for.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::impl::DeviceGuardImplInterface;

namespace {

const c10::Device kDevice(c10::DeviceType::CUDA, 0);
const c10::Stream kStream(c10::Stream::DEFAULT, kDevice);

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  c10::Stream getStream(c10::Device) const noexcept override { return kStream; }
  c10::Stream getDefaultStream(c10::Device) const override { return kStream; }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return kStream; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag)
      const override {}
  void block(void*, const c10::Stream&) const override {}
};

struct Hooks final : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  // A CUDA build asks for it when it chooses an attention; 0 is older than any that serves.
  long versionCuDNN() const override { return 0; }
  long versionRuntimeCuDNN() const override { return 0; }
};

// torch creates its hooks once and keeps them; their class is the only thing that can be exchanged.
void*& class_of(const at::CUDAHooksInterface& hooks) {
  return *reinterpret_cast<void**>(const_cast<at::CUDAHooksInterface*>(&hooks));
}

const Guard guard;
const Hooks hooks;
const DeviceGuardImplInterface* guard_before = nullptr;
void* hooks_before = nullptr;

auto& registered_guard() {
  return c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)];
}

} // namespace

extern "C" void lend_cuda() {
  guard_before = registered_guard().exchange(&guard);
  hooks_before = class_of(at::detail::getCUDAHooks());
  class_of(at::detail::getCUDAHooks()) = class_of(hooks);
}

extern "C" void take_cuda_back() {
  class_of(at::detail::getCUDAHooks()) = hooks_before;
  registered_guard().store(guard_before);
}
